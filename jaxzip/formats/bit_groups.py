"""Small fields of ``b`` bits, eight weights a group: byte ``p`` of a group is bit ``p`` of the field of each of them.

    row of K fields            [K / 8] groups of b bytes
    f0 f1 ... f7 | f8 ...  ->  byte 0: bit 0 of f7..f0, byte 1: bit 1 of f7..f0, ... byte b-1   | next group

The number of planes is the last axis, so that padding it with zeros appends planes of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import jax
import numpy as np

GROUP = 8
_SLAB = 1 << 17  # fields


def groups(k: int) -> int:
    """Groups of a row of ``k`` fields."""
    return -(-k // GROUP)


def pack(fields: np.ndarray, planes: tuple[int, ...]) -> np.ndarray:
    """uint8 ``[M, ceil(K / 8), len(planes)]``: the bits of ``fields`` (unsigned, ``[M, K]``) that ``planes`` names."""
    m, k = fields.shape
    out = np.empty((m, groups(k), len(planes)), np.uint8)
    for rows in slabs(m, k):
        slab = np.ascontiguousarray(fields[rows])
        for i, bit in enumerate(planes):
            out[rows, :, i] = np.packbits(slab & slab.dtype.type(1 << bit) != 0, axis=1, bitorder="little")
    return out


def slabs(m: int, k: int) -> Iterator[slice]:
    """Slices of the rows of an ``[m, k]`` matrix that stay in the cache while they are worked on."""
    step = max(1, _SLAB // max(k, 1))
    return (slice(start, min(m, start + step)) for start in range(0, m, step))


def unpack(packed, planes: tuple[int, ...], k: int, xp: ModuleType = np) -> np.ndarray | jax.Array:
    """uint8 ``[..., M, k]``: the fields of ``packed`` ``[..., M, ceil(k / 8), len(planes)]``; other bits are zero.

    ``xp`` is ``numpy`` or ``jax.numpy``.
    """
    if xp is np:
        return _unpack_on_host(packed, planes, k)
    lane = xp.arange(GROUP, dtype=xp.uint8)
    shape = (*packed.shape[:-2], packed.shape[-2] * GROUP)
    fields = xp.zeros(shape, xp.uint8)
    for i, bit in enumerate(planes):
        plane = (packed[..., i, None] >> lane) & xp.uint8(1)
        fields = fields | (plane << xp.uint8(bit)).reshape(shape)
    return fields[..., :k]


def _unpack_on_host(packed: np.ndarray, planes: tuple[int, ...], k: int) -> np.ndarray:
    fields = np.zeros((*packed.shape[:-2], k), np.uint8)
    for i, bit in enumerate(planes):
        fields |= np.unpackbits(packed[..., i], axis=-1, count=k, bitorder="little") << np.uint8(bit)
    return fields
