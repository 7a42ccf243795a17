"""The layers that hold weights: ``Linear``, ``Embedding`` and ``RMSNorm``; weights may be dense or compressed.

New layers hold ``jax.ShapeDtypeStruct`` in place of weights: building a model allocates nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import jaxzip
from jaxzip import ops
from jaxzip.tensor import CompressedTensor


def _abstract(*shape: int, dtype: str) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def _for(weight, op: str, implementation: str | None) -> str | None:
    """``implementation`` where it applies: dense weights are XLA's, and a backend may lack an operation."""
    if not isinstance(weight, CompressedTensor) or implementation not in ops.implementations(op):
        return None
    return implementation


class Linear(nnx.Module):
    """``x @ kernel`` without bias; ``kernel[K, M]`` is an array or a CompressedTensor."""

    def __init__(self, in_features: int, out_features: int, *, dtype: str):
        self.dtype = dtype
        self.kernel = _abstract(in_features, out_features, dtype=dtype)

    def __call__(self, x: jax.Array, *, out_dtype: str | None = None, implementation: str | None = None) -> jax.Array:
        """``x[..., K]`` to ``[..., M]`` in ``out_dtype`` (default: the layer's dtype), rounded once from fp32."""
        kernel = self.kernel.get_value()
        compressed = isinstance(kernel, CompressedTensor)
        return jaxzip.matmul(
            x, kernel, out_dtype=out_dtype or self.dtype, implementation=implementation if compressed else None
        )


class Embedding(nnx.Module):
    """A table ``embedding[V, D]``; compressed tables have ``output_axis=-2``, so that a row is decoded for itself."""

    def __init__(self, vocab_size: int, features: int, *, dtype: str):
        self.dtype = dtype
        self.embedding = _abstract(vocab_size, features, dtype=dtype)

    def __call__(self, ids: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """Rows of the table: int32 ``ids[...]`` to ``[..., D]``; a backend that has no ``take`` leaves it to the best."""
        table = self.embedding.get_value()
        return jaxzip.take(table, ids, implementation=_for(table, "take", implementation)).astype(self.dtype)

    def attend(self, x: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """Logits of a tied head: ``x[..., D]`` to fp32 ``[..., V]``, through the same fused matmul as any kernel."""
        table = self.embedding.get_value()
        compressed = isinstance(table, CompressedTensor)
        return jaxzip.matmul(
            x, table.T, out_dtype=jnp.float32, implementation=implementation if compressed else None
        )


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` (Zhang and Sennrich, 2019), in fp32, rounded once to the input's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = _abstract(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)
