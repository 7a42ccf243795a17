"""Checksums of the original bits of a tensor: SHA-256 over its elements in a stated order, without a copy of it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

#: hashlib's SHA-256 uses the CPU's SHA instructions: 1.0-1.5 GB/s on one core here, blake2b 0.8-0.9 GB/s.
ALGORITHM = "sha256"
_SLAB_BYTES = 16 << 20
C_ORDER, SWAPPED = "C", "swapped"


def checksum(array: np.ndarray) -> dict[str, Any]:
    """The checksum entry of ``array``.

    ``order`` says how the elements were taken: ``"C"``, or ``"swapped"``: C order of the array with its last two axes
    swapped. The latter is for views of files that hold the transpose, so that hashing does not have to copy.
    """
    swapped = array.ndim >= 2 and not array.flags.c_contiguous and array.swapaxes(-1, -2).flags.c_contiguous
    order = SWAPPED if swapped else C_ORDER
    return {"algorithm": ALGORITHM, "order": order, "value": digest(array.swapaxes(-1, -2) if swapped else array)}


def matches(in_order: np.ndarray, entry: dict[str, Any]) -> bool:
    """Whether ``in_order``, whose C order is the entry's order, has the entry's checksum."""
    return digest(in_order) == entry["value"]


def digest(array: np.ndarray) -> str:
    """Hex SHA-256 of the bytes of ``array`` in C order."""
    state = hashlib.sha256()
    if array.ndim == 0 or array.flags.c_contiguous:
        state.update(as_bytes(np.ascontiguousarray(array)))
        return state.hexdigest()
    rows = max(1, _SLAB_BYTES // max(1, array.nbytes // max(1, array.shape[0])))
    for start in range(0, array.shape[0], rows):
        state.update(as_bytes(np.ascontiguousarray(array[start : start + rows])))
    return state.hexdigest()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """A contiguous array as a flat view of its bytes."""
    return array.reshape(-1).view(np.uint8)
