"""Reads safetensors: a Hugging Face directory (known models into the tree of ``jaxzip.models``) or a single file."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxzip.checkpoint import hf_names
from jaxzip.checkpoint.source import TensorInfo, dict_leaf, dotted_paths, model_config, small_files
from jaxzip.checkpoint.tree_metadata import Leaf, read_json
from jaxzip.errors import CheckpointError, CorruptDataError
from jaxzip.tensor import TABLE_AXIS

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{
        f"{sign}{bits}": np.dtype(f"{kind}{bits}")
        for sign, kind in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
INDEX_FILE = "model.safetensors.index.json"
#: Where a converted checkpoint keeps the headers, so that the files can be written again byte for byte.
HEADER_SUFFIX = ".header"
_MAX_HEADER = 100 << 20
_NO_MODEL = (
    "no model that jaxzip.models computes by its config.json: tensors keep their own names, matrices are [M, K] as in "
    "PyTorch"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file; ``start`` and ``end`` count from the beginning of the file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[bytes, list[Entry]]:
    """The raw header of a safetensors file (length and JSON) and its tensors, in file order.

    Raises:
      CheckpointError: the file is missing, or has a dtype that jaxzip does not know.
      CorruptDataError: the header is truncated or no JSON, or a tensor lies outside the file or over another, or its
        size contradicts its shape.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            header = file.read(length) if 0 < length <= min(size - 8, _MAX_HEADER) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the model is incomplete, get it again") from None
    if not header:
        raise CorruptDataError(
            f"{path}: the header needs {length} bytes, the file has {size}; it is truncated or corrupt"
        )
    return prefix + header, parse_header(path, prefix + header, size)


def parse_header(path: Path, header: bytes, size: int | None = None) -> list[Entry]:
    """The tensors of a header (length and JSON) in file order; ``size`` is the file's, if it is to be compared.

    Raises:
      CheckpointError, CorruptDataError: see :func:`read_header`.
    """
    length = len(header) - 8
    try:
        table = json.loads(header[8:])
        table.pop("__metadata__", None)
        items = [(n, e["dtype"], tuple(map(int, e["shape"])), *map(int, e["data_offsets"])) for n, e in table.items()]
        items.sort(key=lambda item: item[3:])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"{path}: the header is corrupt ({error}); get the file again") from None
    entries, end_before = [], 0
    for name, dtype, shape, start, end in items:
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {dtype}; jaxzip knows {', '.join(DTYPES)}")
        want = math.prod(shape) * DTYPES[dtype].itemsize
        if start != end_before or end - start != want or min(shape, default=0) < 0:
            raise CorruptDataError(
                f"{path}: {name} {dtype}{list(shape)} needs {want} bytes from {end_before} on, its offsets are "
                f"{start}..{end}; get the file again"
            )
        if size is not None and 8 + length + end > size:
            raise CorruptDataError(
                f"{path}: {name} ends at byte {8 + length + end}, the file has {size}; it is truncated, get it again"
            )
        entries.append(Entry(name, path, DTYPES[dtype], shape, 8 + length + start, 8 + length + end))
        end_before = end
    if size is not None and 8 + length + end_before != size:
        raise CorruptDataError(
            f"{path}: the header describes {8 + length + end_before} bytes, the file has {size}; get it again"
        )
    return entries


class SafetensorsSource:
    """Tensors of one or several safetensors files.

    A model of a family that jaxzip knows (``config.json`` says so) gets the tree of ``jaxzip.models``: kernels as
    transposed views, experts of a layer as one stack. Anything else keeps its names, split at the dots (see
    ``dotted_paths``), and PyTorch's ``[M, K]`` matrices.
    """

    kind = "safetensors"
    custom_metadata = None

    def __init__(self, path: Path):
        self.path = path
        self._files = self._list_files(path)
        self.extra_files = small_files(path) if path.is_dir() else {}
        self.hf_config = model_config(path, self.extra_files)
        self.notes: tuple[str, ...] = () if self.hf_config is not None else (_NO_MODEL,)
        #: The entries of each tensor: one, or those of a stack by number.
        self._entries: dict[tuple[str, ...], dict[int | None, Entry]] = {}
        entries: list[Entry] = []
        for file in self._files:
            header, found = read_header(file)
            self.extra_files[file.name + HEADER_SUFFIX] = header
            entries += found
        places = {entry.name: self._place(entry.name) for entry in entries}
        own = (name for name, place in places.items() if place is None)
        paths = dotted_paths(own, (place.path for place in places.values() if place is not None))
        for entry in entries:
            self._add(entry, places[entry.name] or hf_names.Place(paths[entry.name]))
        self._infos = tuple(self._info(path, found) for path, found in self._entries.items())

    def tensors(self) -> tuple[TensorInfo, ...]:
        return self._infos

    def other_leaves(self) -> tuple[Leaf, ...]:
        return ()

    def read(self, info: TensorInfo) -> np.ndarray:
        entries = self._entries[info.path]
        if None in entries:
            array = _read_entry(entries[None])
        else:
            first = entries[0]
            array = np.empty((len(entries), *first.shape), first.dtype)
            for number, entry in entries.items():
                array[number] = _read_entry(entry)
        return array.swapaxes(-1, -2) if self._transposed(info.path, array.ndim) else array

    def files(self) -> tuple[Path, ...]:
        return self._files

    def _place(self, name: str) -> hf_names.Place | None:
        return hf_names.place(name) if self.hf_config is not None else None

    def _transposed(self, path: tuple[str, ...], ndim: int) -> bool:
        known = self._place(next(iter(self._entries[path].values())).name) is not None
        return known and hf_names.is_kernel(path) and ndim >= 2

    def _add(self, entry: Entry, place: hf_names.Place) -> None:
        found = self._entries.setdefault(place.path, {})
        if place.expert in found:
            raise CorruptDataError(
                f"{entry.file}: {entry.name} is also in {found[place.expert].file}; keep one of them"
            )
        found[place.expert] = entry

    def _info(self, path: tuple[str, ...], entries: dict[int | None, Entry]) -> TensorInfo:
        entry = next(iter(entries.values()))
        axis = None
        if len(entry.shape) >= 2:
            known = self._place(entry.name) is not None
            axis = hf_names.output_axis(path) if known else TABLE_AXIS
        if None in entries:
            shape = entry.shape[::-1] if len(entry.shape) == 2 and self._transposed(path, 2) else entry.shape
            return TensorInfo(dict_leaf(path), shape, entry.dtype, axis, entry.name)
        _check_stack("/".join(path), entries)
        names = tuple(entries[number].name for number in range(len(entries)))
        shape = (len(entries), *entry.shape[::-1])
        return TensorInfo(dict_leaf(path), shape, entry.dtype, axis, source_names=names)

    @staticmethod
    def _list_files(path: Path) -> tuple[Path, ...]:
        if path.is_file():
            return (path,)
        if not (path / INDEX_FILE).exists():
            return tuple(sorted(file for file in path.glob("*.safetensors") if file.is_file()))
        index = read_json(path / INDEX_FILE)
        try:
            names = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise CorruptDataError(f"{path / INDEX_FILE} has no weight_map; get the model again") from None
        for name in names:
            if Path(name).name != name:
                raise CorruptDataError(
                    f"{path / INDEX_FILE} names {name!r}, outside the directory; get the model again"
                )
            if not (path / name).exists():
                raise CheckpointError(f"{path / name} is missing, {INDEX_FILE} names it; get the file")
        return tuple(path / name for name in names)


def _read_entry(entry: Entry) -> np.ndarray:
    # Not a memory map: its pages would count as this process's memory.
    array = np.fromfile(entry.file, entry.dtype, math.prod(entry.shape), offset=entry.start)
    if array.size != math.prod(entry.shape):
        raise CorruptDataError(f"{entry.file}: {entry.name} is truncated; get the file again")
    return array.reshape(entry.shape)


def _check_stack(name: str, entries: dict[int | None, Entry]) -> None:
    """Experts are matrices, numbered from 0 without a gap, and alike."""
    missing = [number for number in range(max(entries) + 1) if number not in entries]
    if missing:
        raise CorruptDataError(f"{name}: expert {missing[0]} of {max(entries) + 1} is missing; get the model again")
    first = entries[0]
    for entry in entries.values():
        if (entry.shape, entry.dtype) != (first.shape, first.dtype) or len(entry.shape) != 2:
            raise CorruptDataError(
                f"{entry.file}: {entry.name} is {entry.dtype}{list(entry.shape)}, {first.name} is "
                f"{first.dtype}{list(first.shape)}; experts of a layer must be matrices of one shape and dtype"
            )
