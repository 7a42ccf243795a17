"""64-bit arrays and JAX, which cuts them to 32 bits on the way to a device unless ``jax_enable_x64`` is set."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_cut(dtype: Any) -> bool:
    """Whether JAX, as it is set, would hold an array of ``dtype`` in fewer bits."""
    return jax.dtypes.canonicalize_dtype(dtype) != dtype


def check_uncut(dtype: Any, what: str, otherwise: str) -> None:
    """Raises TypeError if JAX would cut ``dtype``; ``otherwise`` says what to do but to set ``jax_enable_x64``."""
    if is_cut(dtype):
        raise TypeError(
            f"{what} has dtype {dtype}, which JAX would cut to {jax.dtypes.canonicalize_dtype(dtype)}; set "
            f"jax_enable_x64, or {otherwise}"
        )


def to_device(array: Any) -> jax.Array | np.ndarray:
    """``array`` on JAX's default device; a NumPy array that JAX would cut stays one."""
    return array if is_cut(array.dtype) else jnp.asarray(array)
