"""The grouped products of the FFI backends: which ones their kernels take, and the custom calls."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxzip.ffi.cuda_ops import fragment_blocks
from jaxzip.ffi.custom_call import call, sizes
from jaxzip.ffi.format_ops import BY_FORMAT, LANE_PLANAR

from jaxzip.ops import registry
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

_KERNEL_DTYPES = (jnp.bfloat16, jnp.float32)
#: Rows a group, on average, beyond which decoding the stack once and XLA's ``ragged_dot`` are faster on a GPU.
_FUSED_ROWS = 64
#: Experts whose places in x the CUDA kernel's tables hold.
_MOST_EXPERTS = 1024


def check_cpu(x, w: CompressedTensor, group_sizes, *, out_dtype) -> None:
    """Raises NotImplementedError where the CPU's kernels do not take these arguments."""
    for what, dtype in (("x", x.dtype), ("the result", out_dtype)):
        if dtype not in _KERNEL_DTYPES:
            raise NotImplementedError(f"the CPU kernel takes bfloat16 and float32, {what} is {dtype}")
    if 0 in w.core_shape:
        raise NotImplementedError(f"the CPU kernel takes weights with elements, each of these is {w.core_shape}")
    if w.format == "raw":
        _check_raw(w)
    elif w.format not in BY_FORMAT:
        raise NotImplementedError(f"no CPU kernel for format {w.format}")
    else:
        _check_axis(w)


def on_cpu(x, w: CompressedTensor, group_sizes, *, out_dtype) -> jax.Array:
    """Decodes the experts that have rows, a band at a time in cache; sums in the order of the CPU's ``matmul``."""
    if w.format == "raw":
        values, options = w.payload["values"], {"rows_first": w.raw_transposed}
        return _call("jaxzip_raw_ragged_matmul", x, w, group_sizes, [values], out_dtype, **options)
    fmt = BY_FORMAT[w.format]
    return _call(f"{fmt.prefix}_ragged_matmul", x, w, group_sizes, fmt.operands(w.payload), out_dtype)


def register_ragged_on_cuda(check_device: Callable[[], None], priority: int, control_priority: int) -> None:
    """Adds the CUDA kernel to the registry: for lane-planar, and for raw weights as the control that must be asked for.

    ``check_device()`` raises NotImplementedError where a device here cannot run it.
    """

    def check_format(format: str):
        def check(x, w: CompressedTensor, group_sizes, *, out_dtype) -> None:
            if w.format != format:
                raise NotImplementedError(f"the grouped kernel for {format} weights does not take {w.format}")
            _check_cuda(x, w, out_dtype)
            check_device()

        return check

    add = functools.partial(registry.register, "ragged_matmul", "ffi", on_cuda, platforms=("cuda",))
    add(check=check_format("lane-planar"), priority=priority)
    add(check=check_format("raw"), priority=control_priority)


def _check_cuda(x, w: CompressedTensor, out_dtype) -> None:
    if w.format == "raw":
        _check_raw(w)
    else:
        _check_axis(w)
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the CUDA kernel takes bfloat16, x is {x.dtype}")
    if out_dtype not in _KERNEL_DTYPES:
        raise NotImplementedError(f"the CUDA kernel returns bfloat16 and float32, not {out_dtype}")
    experts = w.shape[0]
    if experts > _MOST_EXPERTS:
        raise NotImplementedError(f"the CUDA kernel takes up to {_MOST_EXPERTS} experts, w has {experts}")
    if x.shape[0] > _FUSED_ROWS * experts:
        raise NotImplementedError(
            f"x has {x.shape[0]} rows for {experts} experts: above {_FUSED_ROWS} each, decoding the stack once and "
            "XLA's ragged_dot are faster"
        )


def on_cuda(x, w: CompressedTensor, group_sizes, *, out_dtype) -> jax.Array:
    """Streams the blocks of the experts that have rows; a raw stack goes through the same kernel, as its control."""
    raw = w.format == "raw"
    if raw:
        values = w.payload["values"]
        rows_first = values if w.raw_transposed else values.swapaxes(-1, -2)
        operands = jax.vmap(fragment_blocks)(rows_first)
    else:
        operands = LANE_PLANAR.operands(w.payload)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)))  # the kernel copies rows 16 bytes at a time
    return _call("jaxzip_lane_planar_ragged_gemm", x, w, group_sizes, operands, out_dtype, raw=raw)


def _check_raw(w: CompressedTensor) -> None:
    if w.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the kernels multiply raw bfloat16 weights, these are {w.dtype}")


def _check_axis(w: CompressedTensor) -> None:
    if w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")


def _call(name, x, w, group_sizes, operands, out_dtype, **attributes):
    _, k, m = w.shape
    return call(name, (x.shape[0], m), out_dtype, x, group_sizes, *operands, **sizes(m, k), **attributes)
