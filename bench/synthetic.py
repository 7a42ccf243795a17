"""Weights for benchmarks, made on JAX's device: Gaussian ones, and ones with the exponents of real models."""

from __future__ import annotations

import functools
import json

import harness
import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("real", "gaussian")
SIGMA, ZEROS = 0.02, 0.0005
ABOUT = {
    "real": "each 64x64 block draws one of 32 classes of blocks of the linear layers of SmolLM2 and MiniLM, each "
    "weight its exponent from that class; rows differ in scale by up to 8; uniform sign and mantissa",
    "gaussian": f"Gaussian, sigma {SIGMA}, {ZEROS:.2%} zeros",
}
_BLOCK = 64


@functools.cache
def _exponents() -> tuple[int, np.ndarray]:
    """First exponent of the table, and uint32 ``[classes, values]``: cumulated shares of zero and of each exponent."""
    data = json.loads((harness.ROOT / "bench" / "cuda" / "exponents.json").read_text())
    counts = np.array(data["classes"], np.float64)
    cumulated = np.cumsum(counts, 1) / counts.sum(1, keepdims=True) * 2.0**32
    return data["first"], np.minimum(cumulated, 2.0**32 - 1).astype(np.uint32)


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> jax.Array:
    """bf16 ``[K, M]`` of one of ``KINDS``, on the default device."""
    k, m = shape
    key = jax.random.key(seed)
    if kind == "gaussian":
        return _gaussian(key, shape)
    first, table = _exponents()
    return _real(key, shape, first, jnp.asarray(table))


@functools.partial(jax.jit, static_argnums=1)
def _gaussian(key, shape):
    normal, zero = jax.random.split(key)
    w = SIGMA * jax.random.normal(normal, shape, jnp.bfloat16)
    return jnp.where(jax.random.uniform(zero, shape) < ZEROS, 0, w).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _real(key, shape, first, table):
    k, m = shape
    of_block, of_row, draw, rest = jax.random.split(key, 4)
    classes = jax.random.randint(of_block, (-(-k // _BLOCK), -(-m // _BLOCK)), 0, table.shape[0])
    row_scale = jax.random.randint(of_row, (m,), 0, 4)
    u = jax.random.bits(draw, shape, jnp.uint32)
    index = jnp.zeros(shape, jnp.int32)
    for value in range(table.shape[1] - 1):
        limit = jnp.repeat(jnp.repeat(table[classes, value], _BLOCK, 0)[:k], _BLOCK, 1)[:, :m]
        index += u >= limit
    bits = jax.random.bits(rest, shape, jnp.uint16)
    exponent = (first + index - 1 - row_scale).astype(jnp.uint16)
    value = (bits & 0x8000) | exponent << 7 | (bits & 127)
    return jax.lax.bitcast_convert_type(jnp.where(index == 0, bits & 0x8000, value), jnp.bfloat16)
