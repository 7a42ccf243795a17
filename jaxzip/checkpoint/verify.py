"""Proofs that a compressed checkpoint is its source: bit for bit, or by the recorded checksums."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxzip.checkpoint import checksum
from jaxzip.checkpoint.progress import ProgressCallback, Tracker
from jaxzip.checkpoint.read import Checkpoint, dense, open_checkpoint
from jaxzip.checkpoint.source import Source, TensorInfo, open_source
from jaxzip.checkpoint.tree_metadata import Leaf

_SLAB_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """What a verification found. ``difference`` says the first one: tensor, index and both bit patterns."""

    tensors: int
    bytes: int
    difference: str | None = None

    @property
    def identical(self) -> bool:
        return self.difference is None

    def __bool__(self) -> bool:
        return self.identical

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return dataclasses.asdict(self) | {"identical": self.identical}

    def __str__(self) -> str:
        if self.identical:
            return f"identical: {self.tensors} tensors, {self.bytes} bytes, every bit"
        return f"DIFFERENT after {self.tensors} tensors: {self.difference}"


def verify(src: str | Path, dst: str | Path, *, progress: ProgressCallback | None = None) -> VerifyResult:
    """Compares every leaf of ``src`` with the decoded one of the compressed checkpoint ``dst``, one at a time.

    If ``dst`` was made with a cast, the source is cast in the same way first. Stops at the first difference.

    Raises:
      CheckpointError, CorruptDataError, UnsupportedVersionError: one of the two cannot be read.
    """
    checkpoint = open_checkpoint(dst)
    source = open_source(src, cast=checkpoint.metadata["source"]["cast"])
    infos = source.tensors()
    tracker = Tracker(progress, sum(info.nbytes for info in infos))
    done = 0
    missing = {info.name for info in infos} ^ set(checkpoint.tensors)
    if missing:
        return VerifyResult(0, 0, f"{sorted(missing)[0]} is only in one of the two")
    if sorted(map(str, source.other_leaves())) != sorted(map(str, checkpoint.other_leaves)):
        return VerifyResult(0, 0, "the leaves without arrays (strings, None, empty dicts) are not the same")
    for index, info in enumerate(infos):
        difference = _difference(source, info, checkpoint)
        if difference is not None:
            return VerifyResult(index, done, difference)
        done += info.nbytes
        tracker.advance(info.name, info.nbytes)
    return VerifyResult(len(infos), done)


def verify_checksums(dst: str | Path, *, progress: ProgressCallback | None = None) -> VerifyResult:
    """Decodes every tensor of ``dst`` and compares it with the checksum of the original bits; needs no source.

    Raises:
      CheckpointError, CorruptDataError, UnsupportedVersionError: ``dst`` cannot be read.
    """
    checkpoint = open_checkpoint(dst)
    tracker = Tracker(progress, sum(e["original_bytes"] for e in checkpoint.tensors.values()))
    done = 0
    for name in checkpoint.metadata["extra_files"]:
        checkpoint.extra_file(name)
    for index, (name, entry) in enumerate(checkpoint.tensors.items()):
        found = checksum.digest(dense(checkpoint.load(name), entry["checksum"]["order"]))
        if found != entry["checksum"]["value"]:
            return VerifyResult(index, done, f"{name}: SHA-256 is {found}, recorded is {entry['checksum']['value']}")
        done += entry["original_bytes"]
        tracker.advance(name, entry["original_bytes"])
    return VerifyResult(len(checkpoint.tensors), done)


def _difference(source: Source, info: TensorInfo, checkpoint: Checkpoint) -> str | None:
    """Compares one tensor; a function of its own, so that its arrays are freed before the next one is read."""
    entry = checkpoint.entry(info.name)
    found = (tuple(entry["shape"]), np.dtype(entry["dtype"]))
    if found != (info.shape, info.dtype):
        have, want = (f"{d}{list(s)}" for s, d in (found, (info.shape, info.dtype)))
        return f"{info.name} is {want} in the source and {have} in the checkpoint"
    if Leaf.from_json(entry["leaf"]) != info.leaf:
        return f"{info.name} is another kind of leaf in the source"
    stored = dense(checkpoint.load(info.name), entry["checksum"]["order"])
    if entry["checksum"]["order"] == checksum.SWAPPED:
        stored = stored.swapaxes(-1, -2)
    place = first_difference(source.read(info), stored)
    return None if place is None else f"{info.name}{place}"


def first_difference(a: np.ndarray, b: np.ndarray) -> str | None:
    """Index and both bit patterns of the first element (in C order) whose bits differ; ``None`` if none does."""
    a, b = _bits(a), _bits(b)
    if a.ndim == 0:
        a, b = a[None], b[None]
    rows = max(1, _SLAB_BYTES // max(1, a.nbytes // max(1, a.shape[0])))
    for start in range(0, a.shape[0], rows):
        differs = a[start : start + rows] != b[start : start + rows]
        if differs.any():
            index = tuple(int(i) for i in np.argwhere(differs)[0])
            index = (index[0] + start, *index[1:])
            digits = 2 * a.dtype.itemsize
            ours, theirs = (f"{int(bits[index]):#0{digits + 2}x}" for bits in (b, a))
            return f"{list(index)}: {theirs} in the source, {ours} in the checkpoint"
    return None


def _bits(array: np.ndarray) -> np.ndarray:
    size = array.dtype.itemsize
    if size <= 8:
        return array.view(f"u{size}")
    return np.ascontiguousarray(array)[..., None].view("u8")
