"""Random weights in the size of a configuration, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.models.config import LlamaConfig
from jaxzip.models.llama import Llama


def random_params(config: LlamaConfig, seed: int = 0, *, dtype: str | None = None) -> dict[str, Any]:
    """Random weights in the size of ``config``, for tests and benchmarks: NumPy arrays, norms near one.

    Matrices are normal with standard deviation ``1 / sqrt(fan_in)``, so that activations keep their scale; exponents
    are distributed as in trained models, up to the spread between tensors.
    """
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype or config.dtype)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, dtype=np.float32)
        if len(leaf.shape) == 1:
            return (1 + 0.1 * noise).astype(dtype)
        fan_in = leaf.shape[-1] if leaf.shape == (config.vocab_size, config.hidden_size) else leaf.shape[0]
        return (noise / np.sqrt(fan_in)).astype(dtype)

    return jax.tree.map(draw, Llama(config).to_params())
