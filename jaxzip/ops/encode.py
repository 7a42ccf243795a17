"""Encoding on the device that holds the weight: the reference encoder's bytes, without a trip through the host.

Three steps, since arrays in a program have fixed sizes: windows (lane-planar: shifts of rows), counts of escapes; then
the host looks at a few sums and chooses the lengths of lists (lane-planar: the width of blocks too); then the payload.
XLA's versions are in ``jaxzip.formats.lane_planar_device`` and ``tca_tbe_device``; backends register theirs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip import formats
from jaxzip.formats import lane_planar, lane_planar_device, tca_tbe_device
from jaxzip.ops import registry
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

#: Operations of the registry, one a step: lane-planar's, then TCA-TBE's.
SHIFTS, COUNTS, PAYLOAD = "encode shifts", "encode counts", "encode payload"
TCA_TBE_WINDOW, TCA_TBE_COUNTS = "encode tca-tbe window", "encode tca-tbe counts"
TCA_TBE_PAYLOAD = "encode tca-tbe payload"

registry.register(SHIFTS, registry.XLA, lane_planar_device.shifts)
registry.register(COUNTS, registry.XLA, lane_planar_device.counts)
registry.register(PAYLOAD, registry.XLA, lane_planar_device.payload)
registry.register(TCA_TBE_WINDOW, registry.XLA, tca_tbe_device.start_exp)
registry.register(TCA_TBE_COUNTS, registry.XLA, tca_tbe_device.counts)
registry.register(TCA_TBE_PAYLOAD, registry.XLA, tca_tbe_device.payload)


def encode_on_device(
    w: jax.Array,
    output_axis: int = KERNEL_AXIS,
    *,
    format: str = lane_planar.LanePlanar.name,
    implementation: str | None = None,
) -> CompressedTensor:
    """Encodes bf16 ``w`` where it is, byte for byte as the host's encoders do.

    Args:
      w: bfloat16 ``[..., K, M]``, or with ``output_axis=-2`` ``[..., M, K]``; leading dimensions are a stack, whose
        matrices are encoded one after another.
      format: ``"lane-planar"`` or ``"tca-tbe"``.
      implementation: ``"ffi"`` (CUDA, lane-planar only), ``"xla"``, or ``None`` for the best one here.

    Raises:
      TypeError: ``w`` is a tracer (the sizes of the result depend on its values) or not bfloat16.
      ValueError: no such format or implementation, or ``w`` is no matrix, or has no elements.
      NotImplementedError: the format has no encoder on the device, or a matrix is too large for its indices.
    """
    fmt = formats.get(format)
    if format not in _ENCODERS:
        raise NotImplementedError(
            f"encode_on_device: {format} is encoded on the host only, by compress; here: {', '.join(_ENCODERS)}"
        )
    if isinstance(w, jax.core.Tracer):
        raise TypeError("encode_on_device: sizes depend on the values of w: call it outside of jit")
    if w.dtype != jnp.bfloat16:
        raise TypeError(f"encode_on_device: {format} takes bfloat16, w has dtype {w.dtype}")
    if w.ndim < 2 or w.size == 0:
        raise ValueError(f"encode_on_device: w has shape {w.shape}, expected matrices with elements; store it raw")
    batch, core = w.shape[:-2], w.shape[-2:]
    matrices = w.reshape(-1, *core) if batch else [w]
    payloads = _ENCODERS[format](matrices, output_axis == KERNEL_AXIS, implementation)
    stacked = {
        name: jnp.stack([p[name] for p in payloads]).reshape(*batch, *payloads[0][name].shape) if batch else first
        for name, first in payloads[0].items()
    }
    return CompressedTensor(stacked, tuple(core), np.dtype(w.dtype), fmt.name, output_axis, fmt.version)


# Matrices are taken by their numbers: iterating over an array copies many of them at once.
def _encode_lane_planar(matrices, transposed, implementation):
    planned = [_plan(matrices[i], transposed, implementation) for i in range(len(matrices))]
    overflow = max(lane_planar.overflow_bucket(2 * spilled) for *_, spilled in planned)
    payloads = [
        {"shift": shift, **_payload(matrices[i], shift, counts, width, overflow, transposed, implementation)}
        for i, (shift, counts, width, _) in enumerate(planned)
    ]
    widest = max(width for *_, width, _ in planned)
    for payload in payloads:
        payload["blocks"] = jnp.pad(payload["blocks"], ((0, 0), (0, 0), (0, widest - payload["blocks"].shape[-1])))
    return payloads


def _plan(matrix, transposed, implementation):
    """Shifts and counts on the device; the width of blocks and the number of overflow entries on the host."""
    shift, counts, over, spilled = _measure(matrix, transposed, implementation)
    over, spilled = jax.device_get((over, spilled))
    width = lane_planar.choose_width(list(over / len(counts)))
    return shift, counts, width, int(spilled[lane_planar.WIDTHS.index(width)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _measure(matrix, transposed, implementation):
    bits = jax.lax.bitcast_convert_type(matrix, jnp.uint16)
    shift = registry.run(SHIFTS, implementation, bits, transposed=transposed)
    counts = registry.run(COUNTS, implementation, bits, shift, transposed=transposed)
    over = jnp.stack([(counts > lane_planar.room(width)).sum() for width in lane_planar.WIDTHS])
    spilled = jnp.stack([_spilled(counts, width).sum() for width in lane_planar.WIDTHS])
    return shift, counts, over, spilled


def _spilled(counts, width):
    """uint32 ``[R C]``: escapes of each block that have no place in it."""
    room = lane_planar.room(width)
    return jnp.where(counts > room, counts - room, 0)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _payload(matrix, shift, counts, width, overflow, transposed, implementation):
    bits = jax.lax.bitcast_convert_type(matrix, jnp.uint16)
    starts = jnp.pad(_spilled(counts, width).cumsum(dtype=jnp.uint32), (1, 0))
    sizes = {"width": width, "overflow": overflow, "transposed": transposed}
    blocks, entries = registry.run(PAYLOAD, implementation, bits, shift, starts, **sizes)
    return {"blocks": blocks, "overflow": entries}


def _encode_tca_tbe(matrices, transposed, implementation):
    m, k = matrices[0].shape[::-1] if transposed else matrices[0].shape
    tca_tbe_device.check_size(m, k)
    planned = [_plan_tca_tbe(matrices[i], transposed, implementation) for i in range(len(matrices))]
    fmt = formats.get("tca-tbe")
    totals = jax.device_get([offsets[-1, 1] for _, offsets in planned])
    lists = [jax.ShapeDtypeStruct((int(total),), jnp.uint16) for total in totals]
    lengths = [fmt.bucket_lengths({"full": full}, m, k) for full in lists]
    sizes = [max(each[name] for each in lengths) for name in ("sign_mantissa", "full")]
    payloads = [
        _tca_tbe_payload(matrices[i], start_exp, offsets, *sizes, transposed, implementation)
        for i, (start_exp, offsets) in enumerate(planned)
    ]
    return [{name: payload[name] for name in fmt.fields(m, k)} for payload in payloads]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _plan_tca_tbe(matrix, transposed, implementation):
    """The window, and the offsets of BlockTiles in the lists, whose last pair says how long those are."""
    bits = jax.lax.bitcast_convert_type(matrix, jnp.uint16)
    start_exp = registry.run(TCA_TBE_WINDOW, implementation, bits, transposed=transposed)
    counts = registry.run(TCA_TBE_COUNTS, implementation, bits, start_exp, transposed=transposed)
    return start_exp, tca_tbe_device.tile_offsets(counts)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _tca_tbe_payload(matrix, start_exp, offsets, sign_mantissa, full, transposed, implementation):
    bits = jax.lax.bitcast_convert_type(matrix, jnp.uint16)
    sizes = {"sign_mantissa": sign_mantissa, "full": full, "transposed": transposed}
    return registry.run(TCA_TBE_PAYLOAD, implementation, bits, start_exp, offsets, **sizes)


_ENCODERS = {"lane-planar": _encode_lane_planar, "tca-tbe": _encode_tca_tbe}
