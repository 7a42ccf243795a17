"""``PartialCheckpoint``: a checkpoint while it is written; survives ``kill -9``, appears at its path in one step.

``PartialDirectory`` is the same for files that are written in one go.

    model.jaxzip-partial/
      lock           held (flock) by the process that writes
      journal.jsonl  first line: what is being made; then one line per tensor, added when its arrays are on the disk
      checkpoint/    becomes model/ by a rename

Orbax's own partial saves (``experimental.v1.partial`` of 0.12) are not used: each leaves a directory, and ``finalize``
merges them in place, JSON files included, so that a kill there cannot be resumed; every merge compares all pairs of
keys (half a second each with the 2,300 arrays of a 32-layer model). The result here is what Orbax
would write without OCDBT, and Orbax opens it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxzip.checkpoint import array_store, layout
from jaxzip.checkpoint.tree_metadata import OCDBT_FILE, Leaf, write_file, write_tree
from jaxzip.errors import CheckpointError

Entry = dict[str, Any]
_RESERVED = (
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_strings.json",
    "_sharding",
    "array_metadatas",
    OCDBT_FILE,
    layout.COMMIT_FILE,
    layout.EXTRA_DIRECTORY,
)


class PartialDirectory:
    """A directory while it is written: under a lock, and moved to its path in one step.

    Use as a context manager; leaving it releases the lock. What an earlier process left there is deleted.

    Args:
      destination: where the directory will be.

    Attributes:
      tree: what becomes ``destination``.

    Raises:
      CheckpointError: the destination exists, its folder does not, or another process is writing there.
    """

    def __init__(self, destination: Path):
        self.destination = destination
        self._root = destination.parent / (destination.name + layout.PARTIAL_SUFFIX)
        self.tree = self._root / "checkpoint"
        self._journal_file = self._root / "journal.jsonl"
        self._lock = None

    def __enter__(self) -> Self:
        if not self._root.exists():
            self._check_free()
        if not self.destination.parent.is_dir():
            raise CheckpointError(f"{self.destination.parent} is no directory; create it, or give another destination")
        try:
            self._root.mkdir(exist_ok=True)
            self._lock = open(self._root / "lock", "w")
        except OSError as error:
            raise array_store.write_error(error, self._root) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:  # deleted by the process that held it
                raise BlockingIOError
            self._open()
        except BlockingIOError:
            self._lock.close()
            raise CheckpointError(f"another process is writing {self.destination}; wait for it") from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def place(self) -> None:
        """Moves what was written to its place.

        Raises:
          CheckpointError: the disk is full, or the destination has come into being meanwhile.
        """
        try:
            sync_directory(self.tree)
            self._check_free()
            os.rename(self.tree, self.destination)
            sync_directory(self.destination.parent)
        except OSError as error:
            raise array_store.write_error(error, self.tree) from error
        shutil.rmtree(self._root, ignore_errors=True)

    def discard(self) -> None:
        """Deletes everything that was written."""
        with contextlib.suppress(OSError):
            self._empty()
            # Last, when nothing is left that a process with a new lock could lose.
            (self._root / "lock").unlink(missing_ok=True)
            self._root.rmdir()

    def _open(self) -> None:
        self._check_free()
        try:
            self._empty()
            self.tree.mkdir()
        except OSError as error:
            raise array_store.write_error(error, self._root) from error

    def _empty(self) -> None:
        # The journal first: without it no array of the tree is taken for complete.
        self._journal_file.unlink(missing_ok=True)
        shutil.rmtree(self.tree, ignore_errors=True)

    def _check_free(self) -> None:
        if os.path.lexists(self.destination):
            raise CheckpointError(f"{self.destination} exists; give another destination, or delete it first")


class PartialCheckpoint(PartialDirectory):
    """Writes a tree of arrays tensor by tensor.

    Leaving the context keeps what was written, for the next run with the same ``plan``. ``entries`` has the journal:
    the JSON entry of each tensor that is complete, by path.

    Args:
      destination: where the checkpoint will be.
      plan: JSON that says what is made from what; a partial checkpoint with another plan is discarded.
      resume: ``False`` discards one with the same plan, too.

    Raises:
      CheckpointError: see :class:`PartialDirectory`.
    """

    def __init__(self, destination: Path, plan: dict[str, Any], *, resume: bool = True):
        super().__init__(destination)
        self.entries: dict[tuple[str, ...], Entry] = {}
        #: An earlier run put the checkpoint in its place and was killed before it could clean up.
        self.finished = False
        self._plan = json.loads(json.dumps(plan))
        self._resume = resume
        self._names = StoredNames()
        self._journal = None

    def __exit__(self, *_) -> None:
        if self._journal is not None:
            self._journal.close()
        super().__exit__()

    def add(self, leaf: Leaf, arrays: Mapping[str, np.ndarray], entry: Entry) -> None:
        """Writes the arrays of one tensor (``{"": array}`` for the leaf itself), then its journal entry.

        Raises:
          CheckpointError: the disk is full or cannot be written, or a name is not possible in a checkpoint (what was
            written is deleted).
        """
        stored = {child_name(leaf, field): array for field, array in arrays.items()}
        try:
            for name in stored:
                self._names.add(name)
        except CheckpointError:
            self.discard()
            raise
        array_store.write_arrays(self.tree, stored)
        self._append(entry | {"path": list(leaf.path)})
        self.entries[leaf.path] = entry

    def finish(
        self,
        leaves: Sequence[Leaf],
        custom_metadata: dict[str, Any],
        extra_files: Mapping[str, bytes],
        extra_directory: str = layout.EXTRA_DIRECTORY,
    ) -> None:
        """Writes the metadata and moves the checkpoint to its place, in one step.

        Raises:
          CheckpointError: the disk is full, or the destination has come into being meanwhile.
        """
        try:
            write_tree(self.tree, leaves)
            for name, content in extra_files.items():
                (self.tree / extra_directory).mkdir(exist_ok=True)
                write_file(self.tree / extra_directory / name, content)
            layout.write_checkpoint_file(self.tree, custom_metadata)
            write_file(self.tree / layout.COMMIT_FILE, b"commit_success")
        except OSError as error:
            raise array_store.write_error(error, self.tree) from error
        self.place()

    def _open(self) -> None:
        plan, entries, end = self._read_journal()
        moved = self.destination.exists() and plan == self._plan and not self.tree.exists()
        if not moved:
            self._check_free()
        try:
            if moved:
                self.finished = True
                shutil.rmtree(self._root)
            elif plan == self._plan and self._resume and self.tree.is_dir():
                os.truncate(self._journal_file, end)
                self._journal = open(self._journal_file, "ab")
                self.entries = {tuple(entry["path"]): entry for entry in entries}
                self._names = _names_in(entries)
            else:
                self._empty()
                self.tree.mkdir()
                self._journal = open(self._journal_file, "wb")
                self._append(self._plan)
        except OSError as error:
            raise array_store.write_error(error, self._root) from error
        if moved:
            self.entries = {tuple(entry["path"]): entry for entry in entries}

    def _read_journal(self) -> tuple[Any, list[Entry], int]:
        """The plan, the entries and the length of what is intact: a kill may have torn the last line."""
        if not self._journal_file.exists():
            return None, [], 0
        lines, end = [], 0
        try:
            with open(self._journal_file, "rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    lines.append(json.loads(line))
                    end += len(line)
            _names_in(lines[1:])
        except (ValueError, TypeError, KeyError, AttributeError, CheckpointError):  # these are no entries
            return None, [], 0
        return (lines[0] if lines else None), lines[1:], end

    def _append(self, line: Any) -> None:
        try:
            self._journal.write(json.dumps(line).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise array_store.write_error(error, self._journal_file) from error


class StoredNames:
    """Names of stored arrays: each is a directory of its own, so that none may lie inside another."""

    def __init__(self):
        self._names: set[str] = set()
        #: Directories above names with slashes, and a name in each.
        self._above: dict[str, str] = {}

    def add(self, name: str) -> None:
        """Adds a name.

        Raises:
          CheckpointError: it cannot be a name, or it is another's, or one of the two would lie inside the other.
        """
        check_name(name)
        above = [name[:i] for i, character in enumerate(name) if character == "/"]
        outer = next((other for other in above if other in self._names), None)
        if name in self._names:
            raise CheckpointError(f"two tensors would both be stored as {name!r}; rename one in the source")
        if outer is not None or name in self._above:
            inner, outer = (name, outer) if outer is not None else (self._above[name], name)
            raise CheckpointError(f"{inner!r} would be stored inside {outer!r}, an array; rename one in the source")
        self._names.add(name)
        self._above |= dict.fromkeys(above, name)


def _names_in(entries: Sequence[Entry]) -> StoredNames:
    """Names of the arrays of a journal's entries."""
    names = StoredNames()
    for entry in entries:
        leaf = Leaf(tuple(entry["path"]), (), "")
        for field in entry.get("payload") or [""]:
            names.add(child_name(leaf, field))
    return names


def child_name(leaf: Leaf, field: str) -> str:
    """The name under which a payload array of ``leaf`` is stored; the leaf itself for ``""``."""
    return f"{leaf.store_name}.{field}" if field else leaf.store_name


def check_name(name: str) -> None:
    """Refuses names that would leave the checkpoint's directory or overwrite its own files.

    Raises:
      CheckpointError: naming it.
    """
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts) or parts[0] in _RESERVED:
        raise CheckpointError(
            f"a tensor is called {name!r}, which cannot be a name in a checkpoint; rename it in the source"
        )


def sync_directory(path: Path) -> None:
    """Makes the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
