"""The layers that hold weights: ``Linear``, ``Stack``, ``Embedding``, ``RMSNorm``; weights may be dense or compressed.

New layers hold ``jax.ShapeDtypeStruct`` in place of weights: building a model allocates nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxzip.models import rms_norm
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import DEFAULT, Execution, gpu_is_here, with_gradient_of

import jaxzip
from jaxzip import ops
from jaxzip.ops import registry
from jaxzip.ops.rows import rms_normed
from jaxzip.tensor import CompressedTensor

#: Rows of activations beyond which a GPU decodes a compressed weight once and multiplies by XLA's dot.
PREFILL_ROWS = 16384
#: Rows for each expert that the grouped kernel takes at a time.
FUSED_ROWS = 64
#: Rows up to which a norm is a kernel of its own on a GPU; XLA's is as fast for more, and may join with what follows.
_FEW_ROWS = 256


def _abstract(*shape: int, dtype: str) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def _operands(x: jax.Array, weight: Any, op: str, execution: Execution) -> tuple[jax.Array, Any, str | None]:
    """The activations, the weight and the implementation to call ``op`` with.

    Dense weights are XLA's, and so is a compressed weight that is to run by ``"xla"``: behind a barrier XLA cannot tell
    the decoded array from a stored one, which it lies in memory like. Otherwise XLA folds the decoder's transpose
    into the dot, or has the decoder write it, and the dot may sum in another order; so ``"xla"`` gives the logits of
    the dense model bit for bit. A backend that lacks ``op`` leaves it to the best one.
    """
    # Activations and weight go through one barrier, dense or not: what XLA fuses into the activations is then the same
    # for both, and nothing that is done to a weight (decoding, widening) is moved out of the decode loop.
    x, weight = jax.lax.optimization_barrier((x, weight))
    implementation = execution.implementation
    if not isinstance(weight, CompressedTensor):
        return x, weight, None
    if implementation == registry.XLA and op in ("matmul", "ragged_matmul"):
        dense = jaxzip.decompress(weight, implementation=registry.XLA)
        dense = with_layout_constraint(dense, Layout(major_to_minor=tuple(range(dense.ndim))))
        return x, jax.lax.optimization_barrier(dense), None
    known = op == "matmul" or implementation in ops.implementations(op)  # matmul knows them all, and refuses others
    return x, weight, implementation if known else None


def _matmul(
    x: jax.Array,
    weight: Any,
    out_dtype: str,
    execution: Execution,
    *,
    residual: jax.Array | None = None,
    transposed: bool = False,
) -> jax.Array:
    """``x @ weight + residual`` in ``out_dtype``; ``transposed``: ``weight`` is a table ``[M, K]``."""

    def general(x, weight, residual):
        x, weight, implementation = _operands(x, weight, "matmul", execution)
        options = {"batch_invariant": execution.batch_invariant, "implementation": implementation}
        weight = weight.T if transposed else weight
        return jaxzip.matmul(x, weight, residual=residual, out_dtype=out_dtype, **options)

    def on_gpu(x, weight, residual):
        # As cuBLAS has it: fp32 sums inside, a result in the output's dtype. An fp32 result would be written whole.
        if isinstance(weight, CompressedTensor):
            x, weight = jax.lax.optimization_barrier((x, weight))
            weight = jaxzip.decompress(weight)
        y = jnp.dot(x, weight.T if transposed else weight, preferred_element_type=jnp.dtype(out_dtype))
        return y if residual is None else y + residual

    if _is_xlas(x, weight, execution):
        return jax.lax.platform_dependent(x, weight, residual, cuda=on_gpu, default=general)
    return general(x, weight, residual)


def _is_xlas(x: jax.Array, weight: Any, execution: Execution) -> bool:
    """Whether XLA multiplies on a GPU: by dense weights, and by compressed ones where they are decoded first."""
    if execution.batch_invariant or x.dtype != weight.dtype:
        return False
    if not isinstance(weight, CompressedTensor):
        return True
    rows = math.prod(x.shape[:-1])
    return execution.implementation is None and (weight.format == "raw" or rows > PREFILL_ROWS)


class Linear(nnx.Module):
    """``x @ kernel``, and ``+ bias`` where there is one; ``kernel[K, M]`` is an array or a CompressedTensor."""

    def __init__(self, in_features: int, out_features: int, *, dtype: str, use_bias: bool = False):
        self.dtype = dtype
        self.kernel = _abstract(in_features, out_features, dtype=dtype)
        if use_bias:
            self.bias = _abstract(out_features, dtype=dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        residual: jax.Array | None = None,
        out_dtype: str | None = None,
        execution: Execution = DEFAULT,
    ) -> jax.Array:
        """``x[..., K]`` (plus ``residual[..., M]``) to ``[..., M]`` in ``out_dtype``, by default the layer's."""
        y = _matmul(x, self.kernel.get_value(), out_dtype or self.dtype, execution, residual=residual)
        return y + self.bias.get_value().astype(y.dtype) if hasattr(self, "bias") else y


class Stack(nnx.Module):
    """As many linear layers as there are experts: ``kernel[E, K, M]`` is an array or a CompressedTensor."""

    def __init__(self, count: int, in_features: int, out_features: int, *, dtype: str):
        self.count, self.dtype = count, dtype
        self.kernel = _abstract(count, in_features, out_features, dtype=dtype)

    def __call__(self, rows: jax.Array, sizes: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """``rows[R, K]`` to ``[R, M]``; the first ``sizes[0]`` rows are for expert 0, and so on, int32 ``[E]``.

        With ``batch_invariant`` only the fused kernels will do, in which a row's sums depend on nothing else: they get
        as many rows at a time as they take.
        """
        rows, weight, implementation = _operands(rows, self.kernel.get_value(), "ragged_matmul", execution)

        def multiply(rows, sizes, implementation):
            return jaxzip.ragged_matmul(rows, weight, sizes, out_dtype=self.dtype, implementation=implementation)

        if not execution.batch_invariant:
            return multiply(rows, sizes, implementation)
        most = FUSED_ROWS * self.count
        chunks = -(-rows.shape[0] // most)
        ends = jnp.cumsum(sizes)
        edges = most * jnp.arange(chunks, dtype=sizes.dtype)[:, None]
        of_chunks = jnp.clip(ends - edges, 0, most) - jnp.clip(ends - sizes - edges, 0, most)
        padded = jnp.pad(rows, ((0, chunks * most - rows.shape[0]), (0, 0))).reshape(chunks, most, -1)
        each = (padded, of_chunks) if chunks > 1 else (rows[None], of_chunks)
        out = jax.lax.map(lambda chunk: multiply(*chunk, implementation or "ffi"), each)
        return out.reshape(-1, out.shape[-1])[: rows.shape[0]]


class Embedding(nnx.Module):
    """A table ``embedding[V, D]``; compressed tables have ``output_axis=-2``, so that a row is decoded for itself."""

    def __init__(self, vocab_size: int, features: int, *, dtype: str):
        self.dtype = dtype
        self.embedding = _abstract(vocab_size, features, dtype=dtype)

    def __call__(self, ids: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """Rows of the table: int32 ``ids[...]`` to ``[..., D]`` in the layer's dtype."""
        ids, table, implementation = _operands(ids, self.embedding.get_value(), "take", execution)
        return jaxzip.take(table, ids, implementation=implementation).astype(self.dtype)

    def attend(self, x: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """Logits of a tied head: ``x[..., D]`` to fp32 ``[..., V]``, through the same fused matmul as any kernel."""
        return _matmul(x, self.embedding.get_value(), "float32", execution, transposed=True)


class RMSNorm(nnx.Module):
    """``x / rms(x) * (offset + scale)`` (Zhang and Sennrich, 2019), in fp32, rounded once to the input's dtype.

    Gemma's norms have ``offset`` 1, all others none.
    """

    def __init__(self, features: int, *, eps: float, dtype: str, offset: float = 0.0):
        self.eps, self.offset = eps, offset
        self.scale = _abstract(features, dtype=dtype)

    def __call__(self, x: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        scale = self.scale.get_value()
        rows = x.reshape(-1, x.shape[-1])

        def kernel(rows, scale):
            return rms_norm.rms_norm(rows, scale, self.eps, offset=self.offset)

        def xla(rows, scale):
            return rms_normed(rows, scale, self.eps, self.offset)

        few = rows.shape[0] <= _FEW_ROWS or execution.batch_invariant
        if few and rms_norm.supported(x.shape[-1]) and gpu_is_here():
            kernel = with_gradient_of(xla, kernel)
            return jax.lax.platform_dependent(rows, scale, cuda=kernel, default=xla).reshape(x.shape)
        return xla(rows, scale).reshape(x.shape)


def norm(config: DecoderConfig, features: int | None = None) -> RMSNorm:
    """The norm of a family, of the model's width unless ``features`` says another."""
    options = {"eps": config.rms_norm_eps, "dtype": config.dtype, "offset": config.norm_offset}
    return RMSNorm(config.hidden_size if features is None else features, **options)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """``cap * tanh(x / cap)``: ``x`` kept inside ``(-cap, cap)`` (Gemma Team, 2024); ``None``: ``x``."""
    return x if cap is None else cap * jnp.tanh(x / cap)
