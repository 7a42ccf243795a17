"""Registers the Pallas kernels as implementation ``"pallas"``: interpreted on the CPU, compiled on a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxzip.ops import registry
from jaxzip.ops.matmul import finish
from jaxzip.pallas_kernels import lane_planar_portable
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

LANE_PLANAR = "lane-planar"
#: An interpreted kernel is for tests: nobody gets it without asking.
INTERPRETED_PRIORITY = -1


def register_backend() -> None:
    """Entry point of the group ``jaxzip.backends``."""
    add = functools.partial(registry.register, name="pallas", platforms=("cpu",), priority=INTERPRETED_PRIORITY)
    add("decompress", fn=functools.partial(_decompress, interpret=True), check=_check_format)
    add("matmul", fn=functools.partial(_matmul, interpret=True), check=_check_matmul)


def _check_format(z: CompressedTensor) -> None:
    if z.format != LANE_PLANAR:
        raise NotImplementedError(f"no Pallas kernel for format {z.format}")


def _check_matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant) -> None:
    if w.format == "raw":
        if w.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the Pallas kernels multiply raw bfloat16 weights, this one is {w.dtype}")
    else:
        _check_format(w)
        if w.output_axis != KERNEL_AXIS:
            raise NotImplementedError(
                "the kernel contracts along K; this tensor's first axis is its output axis: use w.T"
            )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the Pallas kernels take bfloat16 and float32, x is {x.dtype}")
    if batch_invariant:
        raise NotImplementedError("the Pallas kernels' order of accumulation depends on the rows of x")


def _decompress(z: CompressedTensor, *, interpret: bool) -> jax.Array:
    m, k = z.matrix_shape
    options = {"transposed": z.output_axis == KERNEL_AXIS, "interpret": interpret}
    one = functools.partial(lane_planar_portable.decompress, m=m, k=k, **options)
    for _ in z.batch_shape:
        one = jax.vmap(one)
    return one(dict(z.payload))


def _matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, interpret: bool) -> jax.Array:
    if w.format == "raw":
        values = w.payload["values"]
        sums = lane_planar_portable.raw_matmul(x, values, rows_first=w.raw_transposed, interpret=interpret)
    else:
        sums = lane_planar_portable.matmul(x, w.payload, *w.matrix_shape, interpret=interpret)
    return finish(sums, bias, residual, out_dtype)
