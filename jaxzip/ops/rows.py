"""What layers compute on rows beside products, by XLA: the reference of kernels that do it on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_normed(x: jax.Array, scale: jax.Array, eps: float, offset: float) -> jax.Array:
    """``x / rms(x) * (scale + offset)`` along the last axis, in fp32, rounded once to ``x.dtype``."""
    wide, factor = x.astype(jnp.float32), scale.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse_rms * (factor + offset if offset else factor)).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads by their token's angles, pairing element ``i`` with ``i + D // 2`` (Hugging Face's order).

    Computed in fp32 and rounded once to ``x.dtype``.

    Args:
      x: ``[..., heads, D]``.
      cos, sin: fp32 ``[..., D // 2]``.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
