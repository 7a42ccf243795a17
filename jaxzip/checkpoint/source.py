"""What a converter reads from: the ``Source`` protocol, and ``open_source``, which finds out what a path is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from jaxzip.checkpoint import hf_names, layout
from jaxzip.checkpoint.tree_metadata import DICT_KEY, TREE_FILE, Leaf
from jaxzip.errors import CheckpointError, CorruptDataError

if TYPE_CHECKING:
    from jaxzip.modules.kernel import KernelAxes

BF16 = np.dtype(ml_dtypes.bfloat16)
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SMALL_BYTES = 64 << 20
KINDS = "an Orbax checkpoint, a directory of *.safetensors, a .safetensors file, a .gguf file"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One array of a source.

    Attributes:
      leaf: where it is in the tree, and what kind of leaf Orbax has there.
      shape: logical shape, as :meth:`Source.read` returns it.
      dtype: NumPy dtype.
      output_axis: axis of output features where the source knows it (PyTorch weights: -2), else ``None``.
      source_name: its name in the source file, where that is not the path.
      derived: how its bits came from the source's, if they are not the source's own.
      source_names: of a stack that the source holds as separate matrices, in the order of the stack.
      axes: of a kernel of rank 3 or more that is to be compressed as a matrix.
    """

    leaf: Leaf
    shape: tuple[int, ...]
    dtype: np.dtype
    output_axis: int | None = None
    source_name: str | None = None
    derived: str | None = None
    source_names: tuple[str, ...] = ()
    axes: KernelAxes | None = None

    @property
    def path(self) -> tuple[str, ...]:
        return self.leaf.path

    @property
    def name(self) -> str:
        """The '/'-joined path."""
        return "/".join(self.path)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A checkpoint that is read one tensor at a time and never written to."""

    kind: str
    path: Path
    #: The model's configuration in the terms of Hugging Face's config.json.
    hf_config: dict[str, Any] | None
    #: Small files to keep beside the weights, by name: tokenizer.json, config.json, safetensors headers.
    extra_files: dict[str, bytes]
    #: The user's own metadata in an Orbax checkpoint, which a restored one gets back.
    custom_metadata: dict[str, Any] | None
    #: What a user should know about how the source was understood.
    notes: tuple[str, ...]

    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every array, in the order in which it is best read."""

    def other_leaves(self) -> tuple[Leaf, ...]:
        """Leaves without an array: strings, ``None``, empty dicts."""

    def read(self, info: TensorInfo) -> np.ndarray:
        """Reads one tensor; it may be a strided view.

        Raises:
          CheckpointError: a file is missing.
          CorruptDataError: a file is truncated or corrupt.
        """

    def files(self) -> tuple[Path, ...]:
        """The files that hold the source's data."""


def dict_leaf(path: Iterable[str]) -> Leaf:
    """An array leaf in nested dicts."""
    path = tuple(path)
    return Leaf(path, (DICT_KEY,) * len(path), "np.ndarray")


def dotted_paths(names: Iterable[str], known: Iterable[tuple[str, ...]] = ()) -> dict[str, tuple[str, ...]]:
    """Paths of tensors whose names are split at the dots, beside tensors at ``known`` paths.

    A tensor has nothing below it: "a.weight.absmax" beside "a.weight" stays one key.
    """
    paths = {name: tuple(name.split(".")) for name in names}
    taken = {*paths.values(), *known}
    below = {name for name, path in paths.items() if any(path[:i] in taken for i in range(1, len(path)))}
    return {name: (name,) if name in below else path for name, path in paths.items()}


def small_files(directory: Path) -> dict[str, bytes]:
    """The files beside the weights that a model needs (configuration, tokenizer), by name."""
    files = (f for f in sorted(directory.iterdir()) if f.is_file() and f.suffix in _SMALL_SUFFIXES)
    return {f.name: f.read_bytes() for f in files if f.stat().st_size <= _SMALL_BYTES and not f.name.startswith("_")}


def model_config(directory: Path, files: dict[str, bytes]) -> dict[str, Any] | None:
    """The model's configuration, if ``config.json`` is among ``files`` and is that of a family that jaxzip knows.

    Raises:
      CorruptDataError: it is no JSON, or the model's family in it is no name; ``directory`` is where it lies.
    """
    try:
        config = json.loads(files.get("config.json", b"null"))
        known = isinstance(config, dict) and hf_names.model_type(config) in hf_names.MODEL_TYPES
    except ValueError as error:
        path = directory / "config.json"
        raise CorruptDataError(f"{path} is truncated or corrupt ({error}); get it again") from None
    return config if known else None


def identity(source: Source) -> dict[str, Any]:
    """Which files a source is, without reading them: names, sizes and times, and a fingerprint over those."""
    files = sorted(source.files())
    stats = [(str(f.relative_to(source.path) if f != source.path else f.name), f.stat()) for f in files]
    listing = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in stats)
    return {
        "kind": source.kind,
        "name": source.path.name,
        "files": len(files),
        "bytes": sum(stat.st_size for _, stat in stats),
        "fingerprint": hashlib.sha256(listing.encode()).hexdigest(),
    }


def open_source(path: str | Path, *, cast: str | None = None) -> Source:
    """Opens a checkpoint of any known kind for reading.

    Args:
      path: an Orbax checkpoint (v0 or v1; of several steps the latest is taken and a note says so), a Hugging Face
        directory, a .safetensors file, a .gguf file.
      cast: "bfloat16" rounds fp32 leaves to bf16 while they are read.

    Raises:
      CheckpointError: there is nothing at ``path``, or nothing that jaxzip knows, or a checkpoint that is already
        compressed or incomplete.
      CorruptDataError: a file that describes the checkpoint is corrupt.
      ValueError: unknown ``cast``.
    """
    if cast not in (None, "bfloat16"):
        raise ValueError(f'cast is {cast!r}; expected "bfloat16" or None')
    source = _open(Path(path).absolute())
    return CastSource(source) if cast else source


def _open(path: Path) -> Source:
    from jaxzip.checkpoint.gguf_source import GgufSource
    from jaxzip.checkpoint.orbax_source import OrbaxSource
    from jaxzip.checkpoint.safetensors_source import SafetensorsSource

    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of {KINDS}")
    if path.is_file():
        if path.suffix == ".safetensors":
            return SafetensorsSource(path)
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            return GgufSource(path)
        raise CheckpointError(f"{path}: unknown format; expected {KINDS}")
    if layout.is_compressed(path):
        raise CheckpointError(
            f"{path} is already compressed by jaxzip; restore it first (jaxzip.checkpoint.restore) to convert it again"
        )
    if ".orbax-checkpoint-tmp" in path.name or path.name.endswith((".partial_save", layout.PARTIAL_SUFFIX)):
        raise CheckpointError(f"{path} is a checkpoint whose writing was not finished; give a finished one")
    if any(file.is_file() for file in path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return SafetensorsSource(path)
    notes: list[str] = []
    tree = tree_directory(path, notes)
    if tree is not None:
        return OrbaxSource(path, tree, tuple(notes))
    ggufs = sorted(file for file in path.glob("*.gguf") if file.is_file())
    if len(ggufs) == 1:
        return GgufSource(ggufs[0])
    if len(ggufs) > 1:
        raise CheckpointError(
            f"{path} holds {len(ggufs)} GGUF files; give one of them: {', '.join(f.name for f in ggufs)}"
        )
    if (path / "_CHECKPOINT_METADATA").exists() or (path / "manifest.ocdbt").exists():
        raise CheckpointError(f"{path / TREE_FILE} is missing; the Orbax checkpoint is incomplete, get it again")
    raise CheckpointError(f"{path}: unknown format; expected {KINDS}")


def tree_directory(path: Path, notes: list[str]) -> Path | None:
    """The directory below ``path`` that holds the tree: itself, an item, or the latest step's item."""
    if (path / TREE_FILE).exists():
        return path
    items = sorted(d for d in path.iterdir() if d.is_dir() and (d / TREE_FILE).exists())
    if len(items) == 1:
        return items[0]
    if items:
        names = ", ".join(d.name for d in items)
        raise CheckpointError(f"{path} holds several trees ({names}); give the path of one, such as {items[0]}")
    steps = sorted((d for d in path.iterdir() if d.is_dir() and d.name.isdigit()), key=lambda d: int(d.name))
    if not steps:
        return None
    notes.append(f"{path.name} holds the steps {', '.join(d.name for d in steps)}; took the latest, {steps[-1].name}")
    return tree_directory(steps[-1], notes)


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


class CastSource:
    """A source whose fp32 leaves are rounded to bf16, to nearest even, when they are read."""

    DERIVED = "fp32 rounded to bf16"

    def __init__(self, source: Source):
        self._source = source
        self.kind, self.path = source.kind, source.path
        self.hf_config, self.extra_files = source.hf_config, source.extra_files
        self._infos = {info.path: info for info in source.tensors()}
        self._rounded = {
            path for path, info in self._infos.items() if info.dtype == np.float32 and info.leaf.value_type != "scalar"
        }
        self.custom_metadata = source.custom_metadata
        self.notes = (*source.notes, "fp32 tensors are rounded to bf16: the checkpoint holds the rounded bits")

    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(
            dataclasses.replace(info, dtype=BF16, derived=self.DERIVED) if path in self._rounded else info
            for path, info in self._infos.items()
        )

    def read(self, info: TensorInfo) -> np.ndarray:
        array = self._source.read(self._infos[info.path])
        return array.astype(BF16) if info.path in self._rounded else array

    def other_leaves(self) -> tuple[Leaf, ...]:
        return self._source.other_leaves()

    def files(self) -> tuple[Path, ...]:
        return self._source.files()
