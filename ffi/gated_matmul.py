"""The product of many rows with its gate applied, on CUDA: which arguments the kernel takes, and its registration."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxzip.ffi import cuda_ops

from jaxzip.ops import registry
from jaxzip.ops.gated_matmul import OP, fills_gpu
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

ACTIVATIONS = ("silu", "gelu_tanh")
#: What M and K are multiples of.
_M_STEP, _K_STEP = 128, 8


def register_gated_matmul(check_device: Callable[[], None], rows: int, priority: int, control_priority: int) -> None:
    """Registers it: ``check_device`` refuses GPUs, ``rows`` is the most that one fused product is good for."""
    add = functools.partial(registry.register, OP, "ffi", _on_cuda, platforms=("cuda",))
    for format, rank in (("lane-planar", priority), ("raw", control_priority)):
        add(check=functools.partial(_check, format, check_device, rows), priority=rank)


def _check(format: str, check_device, most: int, x, w: CompressedTensor, *, activation: str) -> None:
    m, k = w.matrix_shape
    if w.format != format:
        raise NotImplementedError(f"the kernel for {format} weights does not take {w.format}")
    if w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"the kernel has the activations {' and '.join(ACTIVATIONS)}, not {activation}")
    if dtypes := {x.dtype.name, w.dtype.name} - {"bfloat16"}:
        raise NotImplementedError(f"the kernel takes bfloat16, not {sorted(dtypes)}")
    if m % _M_STEP or k % _K_STEP:
        raise NotImplementedError(f"the kernel takes M in steps of {_M_STEP} and K of {_K_STEP}, not {m} and {k}")
    if x.shape[0] > most:
        raise NotImplementedError(f"x has {x.shape[0]} rows: above {most}, decoding the weight first is faster")
    if not fills_gpu(x.shape[0], m):
        raise NotImplementedError(f"x has {x.shape[0]} rows for {m} columns: the product, then the gate, is faster")
    check_device()


def _on_cuda(x, w: CompressedTensor, *, activation: str) -> jax.Array:
    if w.format == "raw":
        return cuda_ops.raw_matmul(x, w.payload["values"], w.raw_transposed, activation=activation)
    return cuda_ops.lane_planar_matmul(x, w.payload, *w.matrix_shape, out_dtype=jnp.bfloat16, activation=activation)
