"""``format_sizes``: bytes that a checkpoint's weights take on a device, dense and in each format; metadata only."""

from __future__ import annotations

from typing import Any

from jaxzip.checkpoint import kernel_layout
from jaxzip.checkpoint.read import Checkpoint
from jaxzip.formats import lane_planar
from jaxzip.tensor import KERNEL_AXIS

DENSE = "dense"
#: Bits that lane-planar takes for each weight of whole blocks, on average over real models' matrices; some 0.1 either
#: way. Exact sizes are known once a tensor is encoded.
LANE_PLANAR_BITS = 11.45


def format_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of all weights: dense, in the formats of the checkpoint, and as lane-planar (estimated unless stored)."""
    sizes = {DENSE: 0, "as stored": 0, "lane-planar": 0}
    for entry in checkpoint.tensors.values():
        sizes[DENSE] += entry["original_bytes"]
        sizes["as stored"] += entry["stored_bytes"]
        sizes["lane-planar"] += _lane_planar(entry)
    return sizes


def _lane_planar(entry: dict[str, Any]) -> int:
    if entry["format"] in ("raw", "lane-planar") or entry["dtype"] != "bfloat16":
        return entry["stored_bytes"]
    *stack, first, second = entry["shape"]
    if kernel_layout.MATRIX_KEY in entry:
        axes = kernel_layout.from_json(entry[kernel_layout.MATRIX_KEY])
        *batch, first, second = axes.matrix_shape
        stack = [*entry["shape"][: len(entry["shape"]) - len(axes.shape)], *batch]
    m, k = (second, first) if entry["output_axis"] == KERNEL_AXIS else (first, second)
    rows, columns = lane_planar.block_grid(m, k)
    weights = rows * columns * lane_planar.POSITIONS
    for length in stack:
        weights *= length
    return min(entry["original_bytes"], int(weights * LANE_PLANAR_BITS / 8))
