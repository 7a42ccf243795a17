"""The layers that hold weights: ``Linear``, ``Embedding`` and ``RMSNorm``; weights may be dense or compressed.

New layers hold ``jax.ShapeDtypeStruct`` in place of weights: building a model allocates nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxzip
from jaxzip import ops
from jaxzip.ops import registry
from jaxzip.tensor import CompressedTensor


def _abstract(*shape: int, dtype: str) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def _operands(x: jax.Array, weight: Any, op: str, implementation: str | None) -> tuple[jax.Array, Any, str | None]:
    """The activations, the weight and the implementation to call ``op`` with.

    Dense weights are XLA's, and so is a compressed weight that is to run by ``"xla"``: behind a barrier XLA cannot tell
    the decoded array from a stored one. Otherwise it folds the decoder's transpose into the dot, which may then sum in
    another order; so ``"xla"`` gives the logits of the dense model bit for bit. A backend that lacks ``op`` leaves it
    to the best one.
    """
    # Activations and weight go through one barrier, dense or not: what XLA fuses into the activations is then the same
    # for both, and nothing that is done to a weight (decoding, widening) is moved out of the decode loop.
    x, weight = jax.lax.optimization_barrier((x, weight))
    if not isinstance(weight, CompressedTensor):
        return x, weight, None
    if implementation == registry.XLA and op == "matmul":
        return x, jax.lax.optimization_barrier(jaxzip.decompress(weight, implementation=registry.XLA)), None
    known = implementation in ops.implementations(op) or implementation not in ops.implementations("matmul")
    return x, weight, implementation if known else None


class Linear(nnx.Module):
    """``x @ kernel`` without bias; ``kernel[K, M]`` is an array or a CompressedTensor."""

    def __init__(self, in_features: int, out_features: int, *, dtype: str):
        self.dtype = dtype
        self.kernel = _abstract(in_features, out_features, dtype=dtype)

    def __call__(self, x: jax.Array, *, out_dtype: str | None = None, implementation: str | None = None) -> jax.Array:
        """``x[..., K]`` to ``[..., M]`` in ``out_dtype`` (default: the layer's dtype), rounded once from fp32."""
        x, kernel, implementation = _operands(x, self.kernel.get_value(), "matmul", implementation)
        return jaxzip.matmul(x, kernel, out_dtype=out_dtype or self.dtype, implementation=implementation)


class Embedding(nnx.Module):
    """A table ``embedding[V, D]``; compressed tables have ``output_axis=-2``, so that a row is decoded for itself."""

    def __init__(self, vocab_size: int, features: int, *, dtype: str):
        self.dtype = dtype
        self.embedding = _abstract(vocab_size, features, dtype=dtype)

    def __call__(self, ids: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """Rows of the table: int32 ``ids[...]`` to ``[..., D]`` in the layer's dtype."""
        ids, table, implementation = _operands(ids, self.embedding.get_value(), "take", implementation)
        return jaxzip.take(table, ids, implementation=implementation).astype(self.dtype)

    def attend(self, x: jax.Array, *, implementation: str | None = None) -> jax.Array:
        """Logits of a tied head: ``x[..., D]`` to fp32 ``[..., V]``, through the same fused matmul as any kernel."""
        x, table, implementation = _operands(x, self.embedding.get_value(), "matmul", implementation)
        return jaxzip.matmul(x, table.T, out_dtype=jnp.float32, implementation=implementation)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` (Zhang and Sennrich, 2019), in fp32, rounded once to the input's dtype."""

    def __init__(self, features: int, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = _abstract(features, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)
