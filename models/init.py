"""Random weights in the size of a configuration, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.models.config import DecoderConfig
from jaxzip.models.families import family_of


def random_params(config: DecoderConfig, seed: int = 0, *, dtype: str | None = None) -> dict[str, Any]:
    """Random weights in the size of ``config``, for tests and benchmarks: NumPy arrays, norms near one.

    Matrices are normal with standard deviation ``1 / sqrt(fan_in)``, so that activations keep their scale; exponents
    are distributed as in trained models, up to the spread between tensors.
    """
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype or config.dtype)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise, name = rng.standard_normal(leaf.shape, dtype=np.float32), path[-1].key
        if name == "bias":
            return (0.1 * noise).astype(dtype)
        if name == "scale":
            return (1 - config.norm_offset + 0.1 * noise).astype(dtype)
        fan_in = leaf.shape[-1] if name == "embedding" else leaf.shape[-2]
        return (noise / np.sqrt(fan_in)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, family_of(config)(config).to_params())
