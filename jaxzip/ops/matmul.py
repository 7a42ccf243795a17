"""``matmul``: activations times a compressed weight."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip.ops import registry
from jaxzip.ops.decompress import decompress
from jaxzip.tensor import CompressedTensor

ACTIVATION_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def matmul(
    x: jax.Array,
    w: CompressedTensor | jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """``x[..., K] @ w[K, M]`` with fp32 accumulation and one rounding to ``out_dtype``.

    Fused implementations decode ``w`` in registers and never hold it whole. Their order of accumulation is fixed: the
    same bits from run to run, and the same bits for a ``raw`` tensor as for any other format. Differentiable in ``x``
    (``w`` is frozen: its cotangent is zero). Jittable; a stack of weights goes through ``jax.vmap`` or
    ``jax.lax.scan``.

    Args:
      x: bf16, fp16 or fp32 ``[..., K]``.
      w: compressed ``[K, M]``, or a dense array of that shape, which XLA multiplies.
      out_dtype: dtype of the result; default: the one that ``x`` and ``w`` promote to.
      implementation: ``"ffi"`` or ``"pallas"`` (fused), ``"decompress"`` (the best decode, then XLA's dot), ``"xla"``
        (plain XLA throughout), or ``None`` for the best one here.

    Returns:
      ``[..., M]``.

    Raises:
      TypeError: ``x`` is not a floating-point array, or ``w`` is neither compressed nor an array.
      ValueError: shapes do not match, or no such implementation.
      NotImplementedError: the implementation asked for cannot take these arguments; the message says why.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        x = jnp.asarray(x)
    if not isinstance(w, CompressedTensor) and not isinstance(w, jax.Array | np.ndarray):
        raise TypeError(f"matmul: w must be a CompressedTensor or an array, got {type(w).__name__}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"matmul: x has dtype {x.dtype}, expected bfloat16, float16 or float32; cast it first")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"matmul: w has dtype {w.dtype}, expected a floating-point weight")
    if w.ndim != 2:
        raise ValueError(f"matmul: w has shape {w.shape}, expected a matrix [K, M]; map a stack with jax.vmap")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x has shape {x.shape}, its last dimension must be K={w.shape[0]} of w {w.shape}")
    out_dtype = jnp.dtype(jnp.promote_types(x.dtype, w.dtype) if out_dtype is None else out_dtype)
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise TypeError(f"matmul: out_dtype is {out_dtype}, expected a floating-point dtype")
    return _matmul(x, w, out_dtype, implementation)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _matmul(x, w, out_dtype, implementation):
    with jax.named_scope("jaxzip.matmul"):
        if not isinstance(w, CompressedTensor):
            if implementation not in (None, registry.XLA):
                raise NotImplementedError(
                    f"matmul: {implementation} multiplies compressed weights; this one is dense: compress it with "
                    'format="raw" to send it through the same kernel'
                )
            return _dot(x, w, out_dtype)
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = _matmul_2d(out_dtype, implementation, flat, w)
        return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_2d(out_dtype, implementation, x, w):
    return registry.run("matmul", implementation, x, w, out_dtype=out_dtype)


def _matmul_2d_fwd(out_dtype, implementation, x, w):
    # x itself is not needed, only its dtype: an empty array carries it through the trace.
    return _matmul_2d(out_dtype, implementation, x, w), (jnp.zeros((0,), x.dtype), w)


def _matmul_2d_bwd(out_dtype, implementation, residuals, g):
    like_x, w = residuals
    dense = decompress(w, implementation=registry.XLA if implementation == registry.XLA else None)
    return _dot(g, dense.T, like_x.dtype), None


_matmul_2d.defvjp(_matmul_2d_fwd, _matmul_2d_bwd)


def _dot(x, w, out_dtype):
    common = jnp.promote_types(x.dtype, w.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x.astype(common), w.astype(common), dims, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)


def matmul_xla(x: jax.Array, w: CompressedTensor, *, out_dtype) -> jax.Array:
    """The reference: XLA's decode to a dense array, then XLA's dot.

    The weight's bits are exact; the order of accumulation is XLA's, which may choose it by what surrounds the dot.
    """
    return _dot(x, decompress(w, implementation=registry.XLA), out_dtype)


def matmul_decompressed(x: jax.Array, w: CompressedTensor, *, out_dtype) -> jax.Array:
    """The best decode that is there, then XLA's dot: where there is no fused kernel."""
    return _dot(x, decompress(w), out_dtype)


registry.register("matmul", registry.XLA, matmul_xla)
registry.register("matmul", "decompress", matmul_decompressed, priority=1)
