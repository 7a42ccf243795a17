"""``restore``: a compressed checkpoint back to a plain one: an Orbax tree, or the safetensors files it came from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from jaxzip.checkpoint import array_store, checksum, layout
from jaxzip.checkpoint.convert import check_apart
from jaxzip.checkpoint.partial import PartialCheckpoint, PartialDirectory
from jaxzip.checkpoint.progress import ProgressCallback, Tracker
from jaxzip.checkpoint.read import Checkpoint, dense, open_checkpoint
from jaxzip.checkpoint.safetensors_source import HEADER_SUFFIX, INDEX_FILE, parse_header
from jaxzip.checkpoint.tree_metadata import Leaf, check_paths, write_file
from jaxzip.errors import CheckpointError, CorruptDataError

FORMATS = ("orbax", "safetensors")


def restore(
    src: str | Path,
    dst: str | Path,
    *,
    format: str = "orbax",
    progress: ProgressCallback | None = None,
    resume: bool = True,
) -> None:
    """Writes the original of the compressed checkpoint ``src`` to ``dst``, comparing each checksum on the way.

    ``dst`` appears in one step, complete, or not at all.

    Args:
      format: "orbax": the original tree with its dtypes and bits (arrays are ``np.ndarray`` leaves, so that they
        restore on any number of devices), the model's configuration and tokenizer beside it; resumable like
        :func:`jaxzip.checkpoint.convert`. "safetensors": a directory with the very files that were converted, byte for
        byte, and their configuration and tokenizer; an interrupted run starts anew.
      progress: see :func:`jaxzip.checkpoint.convert`.
      resume: ``False`` starts anew.

    Raises:
      ValueError: unknown ``format``.
      CheckpointError: ``dst`` exists, the disk is full, or the source was no safetensors (or was rounded when read).
      CorruptDataError: ``src`` is damaged, the message names the tensor.
      UnsupportedVersionError: a newer jaxzip wrote ``src``.
    """
    if format not in FORMATS:
        raise ValueError(f"restore: unknown format {format!r}; expected {' or '.join(FORMATS)}")
    checkpoint = open_checkpoint(src)
    destination = Path(dst).absolute()
    check_apart(checkpoint.path, destination)
    if format == "orbax":
        _restore_orbax(checkpoint, destination, progress, resume)
    else:
        _restore_safetensors(checkpoint, destination, progress)


def _restore_orbax(checkpoint: Checkpoint, destination: Path, progress: ProgressCallback | None, resume: bool) -> None:
    check_paths(tuple(entry["path"]) for entry in checkpoint.tensors.values())
    plan = {
        "operation": "restore",
        "source": str(checkpoint.path),
        "document": layout.document_digest(dict(checkpoint.metadata)),
    }
    with PartialCheckpoint(destination, plan, resume=resume) as partial:
        todo = {n: e for n, e in checkpoint.tensors.items() if tuple(e["path"]) not in partial.entries}
        total = _total_bytes(checkpoint)
        tracker = Tracker(progress, total, total - sum(entry["original_bytes"] for entry in todo.values()))
        for name, entry in todo.items():
            _restore_tensor(checkpoint, name, partial)
            tracker.advance(name, entry["original_bytes"])
        if not partial.finished:
            leaves = [Leaf.from_json(entry["leaf"]) for entry in checkpoint.tensors.values()]
            metadata = checkpoint.metadata["source_custom_metadata"] or {}
            partial.finish((*leaves, *checkpoint.other_leaves), metadata, _small_files(checkpoint), ".")


def _restore_tensor(checkpoint: Checkpoint, name: str, partial: PartialCheckpoint) -> None:
    entry = checkpoint.entry(name)
    try:
        array = _checked(checkpoint, name)
    except (CheckpointError, CorruptDataError):
        partial.discard()
        raise
    if entry["checksum"]["order"] == checksum.SWAPPED:
        array = array.swapaxes(-1, -2)
    partial.add(Leaf.from_json(entry["leaf"]), {"": array}, {})


def _small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Configuration and tokenizer, so that what is restored is a model again."""
    config = {"config.json": json.dumps(checkpoint.hf_config).encode()} if checkpoint.hf_config else {}
    names = (name for name in checkpoint.metadata["extra_files"] if not name.endswith((HEADER_SUFFIX, INDEX_FILE)))
    return config | {name: checkpoint.extra_file(name) for name in names}


def _restore_safetensors(checkpoint: Checkpoint, destination: Path, progress: ProgressCallback | None) -> None:
    source = checkpoint.metadata["source"]
    if source["kind"] != "safetensors":
        raise CheckpointError(f'{checkpoint.path} was made from {source["kind"]}, not safetensors; use format="orbax"')
    if any("derived" in entry for entry in checkpoint.tensors.values()):
        raise CheckpointError(f'{checkpoint.path} holds rounded weights, not its source\'s bits; use format="orbax"')
    with PartialDirectory(destination) as partial:
        try:
            _write_files(checkpoint, partial.tree, progress)
            partial.place()
        except OSError as error:
            partial.discard()
            raise array_store.write_error(error, partial.tree) from error
        except BaseException:
            partial.discard()
            raise


def _write_files(checkpoint: Checkpoint, directory: Path, progress: ProgressCallback | None) -> None:
    names, tensors = _places_by_source_name(checkpoint), _Recent(checkpoint)
    tracker = Tracker(progress, _total_bytes(checkpoint))
    for file in checkpoint.metadata["extra_files"]:
        content = checkpoint.extra_file(file)
        if not file.endswith(HEADER_SUFFIX):
            write_file(directory / file, content)
            continue
        path = directory / file.removesuffix(HEADER_SUFFIX)
        with open(path, "wb") as out:
            out.write(content)
            for tensor in parse_header(path, content):
                name, expert = names[tensor.name]
                bits = checksum.as_bytes(tensors.dense(name, expert))
                out.write(bits.data)
                tracker.advance(name, bits.nbytes)
            out.flush()
            os.fsync(out.fileno())


def _places_by_source_name(checkpoint: Checkpoint) -> dict[str, tuple[str, int | None]]:
    """Where each of the source's tensors is: a name, and the number in a stack of experts."""
    names: dict[str, tuple[str, int | None]] = {}
    for name, entry in checkpoint.tensors.items():
        if "source_names" in entry:
            names |= {source: (name, i) for i, source in enumerate(entry["source_names"])}
        else:
            names[entry["source_name"]] = (name, None)
    return names


class _Recent:
    """Decoded tensors of a checkpoint, with the last stacks kept: files hold an expert's matrices side by side."""

    _KEPT = 3  # gate, up and down

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._stacks: dict[str, np.ndarray] = {}

    def dense(self, name: str, expert: int | None) -> np.ndarray:
        if expert is None:
            return _checked(self._checkpoint, name)
        if name not in self._stacks:
            while len(self._stacks) >= self._KEPT:
                self._stacks.pop(next(iter(self._stacks)))
            self._stacks[name] = _checked(self._checkpoint, name)
        return self._stacks[name][expert]


def _total_bytes(checkpoint: Checkpoint) -> int:
    return sum(entry["original_bytes"] for entry in checkpoint.tensors.values())


def _checked(checkpoint: Checkpoint, name: str):
    """One tensor, contiguous in the order of its checksum (that of the source's file), compared with it."""
    entry = checkpoint.entry(name)
    array = dense(checkpoint.load(name), entry["checksum"]["order"])
    if not checksum.matches(array, entry["checksum"]):
        raise CorruptDataError(
            f"{name}: the decoded bits do not have the checksum of the original; get {checkpoint.path} again"
        )
    return array
