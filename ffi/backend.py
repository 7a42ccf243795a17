"""Registers the FFI kernels as implementation ``"ffi"`` of jaxzip's operations: CPU here, CUDA next door."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxzip.ffi import format_ops, ragged
from jaxzip.ffi.cuda_backend import register_cuda_backend
from jaxzip.ffi.format_ops import BY_FORMAT, raw_matmul
from jaxzip.ffi.host_codecs import register_host_codecs
from jaxzip.ffi.libraries import cpu_available

from jaxzip.ops import registry
from jaxzip.ops.matmul import check_no_config, finish
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor

_KERNEL_DTYPES = (jnp.bfloat16, jnp.float32)
#: Ahead of the XLA reference.
PRIORITY = 10


def register_backend() -> None:
    """Entry point of the group ``jaxzip.backends``."""
    available = cpu_available()
    if not available:
        raise ImportError(available.reason)
    add = functools.partial(registry.register, name="ffi", platforms=("cpu",), priority=PRIORITY)
    add("decompress", fn=format_ops.decompress, check=_check_format)
    add("matmul", fn=_matmul, check=_check_matmul)
    add("ragged_matmul", fn=ragged.on_cpu, check=ragged.check_cpu)
    add("take", fn=format_ops.take, check=_check_take)
    register_host_codecs()
    register_cuda_backend()


def _check_format(z: CompressedTensor) -> None:
    if z.format not in BY_FORMAT:
        raise NotImplementedError(f"no CPU kernel for format {z.format}")


def _check_matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None) -> None:
    check_no_config("the CPU kernel", config)
    for what, dtype in (("x", x.dtype), ("the result", out_dtype)):
        if dtype not in _KERNEL_DTYPES:
            raise NotImplementedError(f"the CPU kernel takes bfloat16 and float32, {what} is {dtype}")
    if 0 in w.core_shape:
        raise NotImplementedError(f"the CPU kernel takes weights with elements, this one is {w.core_shape}")
    if w.format == "raw":
        if w.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the CPU kernel multiplies raw bfloat16 weights, this one is {w.dtype}")
        return
    _check_format(w)
    if w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")


def _matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None) -> jax.Array:
    # Batch invariant as it is: the kernel's order depends on neither N nor the number of threads.
    alone = bias is None and residual is None
    dtype = out_dtype if alone else jnp.float32
    if w.format == "raw":
        y = raw_matmul(x, w.payload["values"], rows_first=w.raw_transposed, out_dtype=dtype)
    else:
        y = BY_FORMAT[w.format].matmul(x, w.payload, *w.matrix_shape, out_dtype=dtype)
    return y if alone else finish(y, bias, residual, out_dtype)


def _check_take(table: CompressedTensor, ids: jax.Array) -> None:
    _check_format(table)
    if table.output_axis != TABLE_AXIS:
        raise NotImplementedError("the kernel takes rows of a table [M, K]; compress it with output_axis=-2")
