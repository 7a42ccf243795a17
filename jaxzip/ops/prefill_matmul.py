"""``prefill_matmul``: products of a few hundred rows on a GPU by the fused kernel, which takes 256 rows at a time.

A weight is decoded once for every slice of rows, but never written out: for up to two slices that was predicted to be
faster than decoding it to memory before one dot, for large weights up to four. Above, :func:`jaxzip.matmul` does that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzip.ops import registry
from jaxzip.ops.matmul import matmul_decompressed
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

OP = "prefill_matmul"
#: Most rows, and most rows of a weight of at least LARGE elements. By prediction only.
ROWS, LARGE, ROWS_OF_LARGE = 512, 50_000_000, 1024
FORMATS = ("lane-planar", "raw")


def most_rows(w: CompressedTensor) -> int:
    """Rows of x up to which the fused kernel in slices is taken to be faster than decoding ``w``."""
    return ROWS_OF_LARGE if w.core_shape[0] * w.core_shape[1] >= LARGE else ROWS


def prefill_matmul(
    x: jax.Array, w: CompressedTensor, residual: jax.Array | None, *, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """``x @ w + residual``: fp32 sums, rounded once.

    Args:
      x: bfloat16 ``[N, K]``.
      w: kernel ``[K, M]`` in one of ``FORMATS``; raw ones go through the same kernel, the control of exactness.
      residual: bfloat16 ``[N, M]`` or ``None``.
      out_dtype: bfloat16 or float32.

    Returns:
      ``[N, M]``. On other platforms than CUDA it is computed by :func:`jaxzip.matmul`'s reference.
    """
    with jax.named_scope("jaxzip.prefill_matmul"):
        return registry.run(OP, None, x, w, residual, out_dtype=jnp.dtype(out_dtype))


def available(x: jax.Array | jax.ShapeDtypeStruct, w: CompressedTensor, out_dtype: jax.typing.DTypeLike) -> bool:
    """Whether a GPU would run the fused kernel, given ``x[N, K]``."""
    return registry.candidates(OP, "cuda", x, w, None, out_dtype=jnp.dtype(out_dtype))[0] != registry.XLA


def check(x, w: CompressedTensor, residual, *, out_dtype) -> None:
    """What a backend's fused kernel has to take.

    Raises:
      NotImplementedError: anything else.
    """
    if w.format not in FORMATS or w.output_axis != KERNEL_AXIS:
        raise NotImplementedError(f"takes kernels in {' or '.join(FORMATS)}, not {w.format} with axis {w.output_axis}")
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16 or out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bfloat16 and returns it or float32, not {x.dtype}, {w.dtype}, {out_dtype}")
    if x.shape[0] > most_rows(w):
        raise NotImplementedError(f"x has {x.shape[0]} rows: above {most_rows(w)}, decoding the weight once is faster")


def _reference(x, w, residual, *, out_dtype):
    return matmul_decompressed(x, w, None, residual, out_dtype=out_dtype, batch_invariant=False)


registry.register(OP, registry.XLA, _reference)
