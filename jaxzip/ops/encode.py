"""Encoding on the device that holds the weight: the reference encoder's bytes, without a trip through the host.

Three steps, since arrays in a program have fixed sizes: shifts of rows, counts of escapes; then the host looks at a few
sums, chooses the width of blocks and the length of the overflow list; then the payload. XLA's versions are in
``jaxzip.formats.lane_planar_device``; backends register theirs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip.formats import lane_planar, lane_planar_device
from jaxzip.ops import registry
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

#: Operations of the registry, one a step.
SHIFTS, COUNTS, PAYLOAD = "encode shifts", "encode counts", "encode payload"

registry.register(SHIFTS, registry.XLA, lane_planar_device.shifts)
registry.register(COUNTS, registry.XLA, lane_planar_device.counts)
registry.register(PAYLOAD, registry.XLA, lane_planar_device.payload)


def encode_on_device(
    w: jax.Array, output_axis: int = KERNEL_AXIS, *, implementation: str | None = None
) -> CompressedTensor:
    """Encodes bf16 ``w`` to lane-planar where it is, byte for byte as the host's encoders do.

    Args:
      w: bfloat16 ``[..., K, M]``, or with ``output_axis=-2`` ``[..., M, K]``; leading dimensions are a stack, whose
        matrices are encoded one after another.
      implementation: ``"ffi"`` (CUDA), ``"xla"``, or ``None`` for the best one here.

    Raises:
      TypeError: ``w`` is a tracer (the sizes of the result depend on its values) or not bfloat16.
      ValueError: no such implementation.
    """
    if isinstance(w, jax.core.Tracer):
        raise TypeError("encode_on_device: sizes depend on the values of w: call it outside of jit")
    if w.dtype != jnp.bfloat16:
        raise TypeError(f"encode_on_device: lane-planar takes bfloat16, w has dtype {w.dtype}")
    transposed = output_axis == KERNEL_AXIS
    batch, core = w.shape[:-2], w.shape[-2:]
    matrices = w.reshape(-1, *core)
    planned = [_plan(matrix, transposed, implementation) for matrix in matrices]
    overflow = max(lane_planar.overflow_bucket(2 * spilled) for *_, spilled in planned)
    payloads = [
        {"shift": shift, **_payload(matrix, shift, counts, width, overflow, transposed, implementation)}
        for matrix, (shift, counts, width, _) in zip(matrices, planned)
    ]
    widest = max(width for *_, width, _ in planned)
    for payload in payloads:
        payload["blocks"] = jnp.pad(payload["blocks"], ((0, 0), (0, 0), (0, widest - payload["blocks"].shape[-1])))
    stacked = {
        name: jnp.stack([p[name] for p in payloads]).reshape(*batch, *payloads[0][name].shape) if batch else first
        for name, first in payloads[0].items()
    }
    fmt = lane_planar.LanePlanar
    return CompressedTensor(stacked, tuple(core), np.dtype(w.dtype), fmt.name, output_axis, fmt.version)


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
    over = jnp.stack([(counts[:, 0] > lane_planar.room(width)).sum() for width in lane_planar.WIDTHS])
    spilled = jnp.stack([_spilled(counts, width).sum() for width in lane_planar.WIDTHS])
    return shift, counts, over, spilled


def _spilled(counts, width):
    """uint32 ``[R C]``: escapes of each block that have no place in it."""
    room = lane_planar.room(width)
    return counts[:, 1] + jnp.where(counts[:, 0] > room, counts[:, 0] - room, 0)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _payload(matrix, shift, counts, width, overflow, transposed, implementation):
    bits = jax.lax.bitcast_convert_type(matrix, jnp.uint16)
    starts = jnp.pad(_spilled(counts, width).cumsum(dtype=jnp.uint32), (1, 0))
    sizes = {"width": width, "overflow": overflow, "transposed": transposed}
    blocks, entries = registry.run(PAYLOAD, implementation, bits, shift, starts, **sizes)
    return {"blocks": blocks, "overflow": entries}
