"""Which operations the CUDA kernels take, and their registration as implementation ``"ffi"`` on CUDA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxzip.ffi import cuda_configs, cuda_encode, cuda_ops, format_ops
from jaxzip.ffi.decode_chain import register_decode_chain
from jaxzip.ffi.decode_layer import register_decode_layer
from jaxzip.ffi.gated_matmul import register_gated_matmul
from jaxzip.ffi.libraries import compute_capabilities, register_cuda
from jaxzip.ffi.ragged import register_ragged_on_cuda

from jaxzip.formats import auto
from jaxzip.ops import registry
from jaxzip.ops.encode import COUNTS, PAYLOAD, SHIFTS
from jaxzip.ops.matmul import check_no_config, measured_config
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor

TCA_TBE = "tca-tbe"
LANE_PLANAR = "lane-planar"
#: Ahead of the XLA reference.
PRIORITY = 10
#: The control must not be what a raw tensor gets by itself: XLA's dot on it is faster.
CONTROL_PRIORITY = 0
#: Rows of x beyond which decoding the weight once and XLA's dot are as fast as the format's fused kernel, or faster.
FUSED_ROWS = {LANE_PLANAR: 16384, "raw": 16384, TCA_TBE: 32}
#: Rows of a decode step beyond which a chain gains nothing.
CHAIN_ROWS = 256
#: Where lane-planar's kernels run.
HOPPER = (9, 0)


def register_cuda_backend() -> None:
    """Registers handlers and implementations, or says what is missing."""
    try:
        register_cuda()
    except ImportError as error:
        registry.report_missing("ffi", f"on CUDA: {error}")
        return
    add = functools.partial(registry.register, name="ffi", platforms=("cuda",))
    add("decompress", fn=format_ops.decompress, check=_check_decompress, priority=PRIORITY)
    add("matmul", fn=_matmul, check=_check_matmul, priority=PRIORITY, configurations=_configurations)
    add("matmul", fn=_raw_matmul, check=_check_raw_matmul, priority=CONTROL_PRIORITY, configurations=_configurations)
    add("take", fn=format_ops.take, check=_check_take, priority=PRIORITY)
    register_ragged_on_cuda(_check_hopper, PRIORITY, CONTROL_PRIORITY)
    register_gated_matmul(_check_hopper, FUSED_ROWS[LANE_PLANAR], PRIORITY, CONTROL_PRIORITY)
    for register_chain in (register_decode_chain, register_decode_layer):
        register_chain(_check_hopper, CHAIN_ROWS, PRIORITY)
    for step, fn in ((SHIFTS, cuda_encode.shifts), (COUNTS, cuda_encode.counts), (PAYLOAD, cuda_encode.payload)):
        add(step, fn=fn, check=lambda *_, **__: _check_hopper(), priority=PRIORITY)
    auto.prefer(LANE_PLANAR, platform="cuda", compute_capability=HOPPER)


def _check_hopper() -> None:
    # Without a GPU here the program is being lowered for one elsewhere, which the handler will look at.
    other = compute_capabilities() - {HOPPER}
    if other:
        found = ", ".join(f"{major}.{minor}" for major, minor in sorted(other))
        raise NotImplementedError(f"lane-planar's CUDA kernels need compute capability 9.0, here is {found}")


def _check_decompress(z: CompressedTensor) -> None:
    if z.format == LANE_PLANAR:
        _check_hopper()
    elif z.format != TCA_TBE:
        raise NotImplementedError(f"no CUDA kernel for format {z.format}")


def _check_operands(x, w, bias, residual, out_dtype, batch_invariant) -> None:
    for name, value in (("x", x), ("bias", bias), ("residual", residual)):
        if value is not None and value.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the CUDA kernels take bfloat16, {name} is {value.dtype}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the CUDA kernels return bfloat16 and float32, not {out_dtype}")
    most = FUSED_ROWS[w.format]
    if x.shape[0] > most and not batch_invariant:
        raise NotImplementedError(
            f"x has {x.shape[0]} rows: above {most}, decoding a {w.format} weight once and XLA's dot are faster"
        )


def _check_config(x, w, batch_invariant, config) -> None:
    if config is None or x.shape[0] == 0:
        return
    raw = w.format == "raw"
    why = cuda_configs.problem(config, x.shape[0], *w.matrix_shape, batch_invariant=batch_invariant, raw=raw)
    if why or not config:
        raise ValueError(f'matmul, implementation="ffi": {why or "config is an empty string: give none"}')


def _configurations(x, w, *_, **__) -> tuple[str, ...]:
    return () if w.format == TCA_TBE else cuda_configs.configurations(x.shape[0], *w.matrix_shape)


def _config_options(x, w, batch_invariant, config) -> dict:
    """What the kernel is told: the configuration asked for, else the one measured. Raw weights get lane-planar's."""
    if config is not None:
        return {"config": config, "config_asked_for": True}
    return {} if batch_invariant else {"config": measured_config("ffi", "cuda", x, w, format=LANE_PLANAR) or ""}


def _check_matmul(x, w, bias, residual, *, out_dtype, batch_invariant, config=None) -> None:
    if w.format not in (LANE_PLANAR, TCA_TBE):
        raise NotImplementedError(f"no fused CUDA kernel for format {w.format}")
    if w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")
    if w.format == LANE_PLANAR:
        _check_hopper()
    elif batch_invariant:
        raise NotImplementedError(
            "the TCA-TBE kernel's order of accumulation depends on the rows of x; use lane-planar"
        )
    _check_operands(x, w, bias, residual, out_dtype, batch_invariant)
    if w.format == TCA_TBE:
        check_no_config("the TCA-TBE kernel", config)
    _check_config(x, w, batch_invariant, config)


def _matmul(x, w, bias, residual, *, out_dtype, batch_invariant, config=None) -> jax.Array:
    options = {"bias": bias, "residual": residual, "out_dtype": out_dtype}
    if w.format == TCA_TBE:
        return cuda_ops.tca_tbe_matmul(x, w.payload, *w.matrix_shape, **options)
    options |= {"batch_invariant": bool(batch_invariant), **_config_options(x, w, batch_invariant, config)}
    return cuda_ops.lane_planar_matmul(x, w.payload, *w.matrix_shape, **options)


def _check_raw_matmul(x, w, bias, residual, *, out_dtype, batch_invariant, config=None) -> None:
    if w.format != "raw":
        raise NotImplementedError(f"this is the control for raw weights, not for format {w.format}")
    if w.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the CUDA kernels multiply raw bfloat16 weights, this one is {w.dtype}")
    _check_hopper()
    _check_operands(x, w, bias, residual, out_dtype, batch_invariant)
    _check_config(x, w, batch_invariant, config)


def _raw_matmul(x, w, bias, residual, *, out_dtype, batch_invariant, config=None) -> jax.Array:
    options = {"bias": bias, "residual": residual, "out_dtype": out_dtype, "batch_invariant": bool(batch_invariant)}
    options |= _config_options(x, w, batch_invariant, config)
    return cuda_ops.raw_matmul(x, w.payload["values"], w.raw_transposed, **options)


def _check_take(table: CompressedTensor, ids: jax.Array) -> None:
    if table.format != LANE_PLANAR:
        raise NotImplementedError(f"no CUDA kernel that takes rows of format {table.format}")
    if table.output_axis != TABLE_AXIS:
        raise NotImplementedError("the kernel takes rows of a table [M, K]; compress it with output_axis=-2")
    _check_hopper()
