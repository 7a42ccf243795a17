"""Which operations on lane-planar the CPU kernels take, and their registration as implementation ``"ffi"`` on CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxzip.ffi import lane_planar_ops

from jaxzip.ops import registry
from jaxzip.ops.matmul import finish
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor

LANE_PLANAR = "lane-planar"
_KERNEL_DTYPES = (jnp.bfloat16, jnp.float32)
#: Ahead of the XLA reference.
PRIORITY = 10


def register_lane_planar_cpu() -> None:
    """Adds decompress, matmul and take."""
    add = functools.partial(registry.register, name="ffi", platforms=("cpu",), priority=PRIORITY)
    add("decompress", fn=_decompress, check=_check_format)
    add("matmul", fn=_matmul, check=_check_matmul)
    add("take", fn=_take, check=_check_take)


def _check_format(z: CompressedTensor) -> None:
    if z.format != LANE_PLANAR:
        raise NotImplementedError(f"this kernel is for lane-planar, not for {z.format}")


def _decompress(z: CompressedTensor) -> jax.Array:
    m, k = z.matrix_shape
    one = functools.partial(lane_planar_ops.decompress, m=m, k=k, transposed=z.output_axis == KERNEL_AXIS)
    for _ in z.batch_shape:
        one = jax.vmap(one)
    return one(dict(z.payload))


def _check_matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant) -> None:
    _check_format(w)
    for what, dtype in (("x", x.dtype), ("the result", out_dtype)):
        if dtype not in _KERNEL_DTYPES:
            raise NotImplementedError(f"the CPU kernel takes bfloat16 and float32, {what} is {dtype}")
    if w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")


def _matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant) -> jax.Array:
    # Batch invariant as it is: the kernel's order depends on neither N nor the number of threads.
    alone = bias is None and residual is None
    dtype = out_dtype if alone else jnp.float32
    y = lane_planar_ops.matmul(x, w.payload, *w.matrix_shape, out_dtype=dtype)
    return y if alone else finish(y, bias, residual, out_dtype)


def _check_take(table: CompressedTensor, ids: jax.Array) -> None:
    _check_format(table)
    if table.output_axis != TABLE_AXIS:
        raise NotImplementedError("the kernel takes rows of a table [M, K]; compress it with output_axis=-2")


def _take(table: CompressedTensor, ids: jax.Array) -> jax.Array:
    return lane_planar_ops.take(ids, table.payload, *table.matrix_shape)
