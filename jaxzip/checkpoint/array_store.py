"""One array on disk, in the layout in which Orbax stores a tree's leaves: a zarr3 directory (or any that Orbax wrote).

Arrays go straight through tensorstore, as Orbax itself writes them. Every chunk carries a CRC-32C, so that a flipped
bit is found when it is read, by Orbax too, and chunks are small, so that writing needs no second copy of a large array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorstore as ts

from jaxzip.errors import CheckpointError, CorruptDataError

CHUNK_BYTES = 32 << 20
#: Few chunks in flight: each costs its size in memory while it is encoded and written.
_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 4}, "data_copy_concurrency": {"limit": 2}})


def chunk_shape(shape: tuple[int, ...], itemsize: int, limit: int = CHUNK_BYTES) -> list[int]:
    """The largest chunk of at most ``limit`` bytes that is a contiguous run of a C-ordered array."""
    chunk = [max(1, n) for n in shape]
    for axis in range(len(chunk)):
        nbytes = math.prod(chunk) * itemsize
        if nbytes <= limit:
            break
        chunk[axis] = max(1, chunk[axis] * limit // nbytes)
    return chunk


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``arrays`` under their names; when it returns they are on the disk (synced).

    Raises:
      CheckpointError: the disk is full, or the file system refuses; the caller decides what becomes of the directory.
    """
    for name, array in arrays.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{directory.resolve() / name}/"},
            "metadata": {
                "shape": list(array.shape),
                "data_type": str(array.dtype),
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": chunk_shape(array.shape, array.dtype.itemsize)},
                },
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            # Without this a chunk of zeros would be left out, and could not be told from a lost one.
            "store_data_equal_to_fill_value": True,
            "create": True,
            "delete_existing": True,
        }
        try:
            store = ts.open(spec, context=_CONTEXT).result()
            store.write(array, can_reference_source_data_indefinitely=True).result()
        except (OSError, ValueError, RuntimeError) as error:
            raise write_error(error, directory / name) from error


def write_error(error: Exception, path: Path) -> CheckpointError:
    """The typed error of a failed write to ``path``."""
    if "No space left" in str(error) or getattr(error, "errno", None) == 28 or "quota" in str(error).lower():
        return CheckpointError(
            f"disk full while writing {path}: free some space and run the same command again ({error})"
        )
    return CheckpointError(f"cannot write {path}: {error}")


def read_array(
    directory: Path,
    name: str,
    *,
    driver: str = "zarr3",
    ocdbt: bool = False,
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype | None = None,
) -> np.ndarray:
    """Reads the array ``name`` of a tree directory; nothing is filled in for what is missing.

    Args:
      driver: "zarr" or "zarr3".
      ocdbt: the directory is one OCDBT database instead of a directory per array.
      shape: expected shape, checked before anything is read.
      dtype: expected dtype, likewise.

    Raises:
      CheckpointError: the array or one of its chunks is missing.
      CorruptDataError: a chunk is truncated or has a wrong checksum, or the stored shape or dtype is not the expected.
    """
    store = open_array(directory, name, driver=driver, ocdbt=ocdbt)
    found = (tuple(store.shape), store.dtype.numpy_dtype)
    expected = (found[0] if shape is None else tuple(shape), found[1] if dtype is None else np.dtype(dtype))
    if found != expected:
        raise CorruptDataError(
            f"{name}: {directory / name} holds {found[1]}{list(found[0])}, the checkpoint's metadata says "
            f"{expected[1]}{list(expected[0])}; one of them is corrupt, get the checkpoint again"
        )
    try:
        return store.read().result()
    except (OSError, ValueError, RuntimeError) as error:
        raise _read_error(error, directory, name) from error


def open_array(directory: Path, name: str, *, driver: str = "zarr3", ocdbt: bool = False) -> ts.TensorStore:
    """Opens an array without reading its elements; raises like :func:`read_array`."""
    root = directory.resolve()  # tensorstore takes no path with ".."
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": f"file://{root}/", "path": f"{name}/"}
    else:
        kvstore = {"driver": "file", "path": f"{root / name}/"}
    spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False, "open": True}
    try:
        return ts.open(spec, context=_CONTEXT, read=True).result()
    except (OSError, ValueError, RuntimeError) as error:
        raise _read_error(error, directory, name) from error


def _read_error(error: Exception, directory: Path, name: str) -> CheckpointError | CorruptDataError:
    text = str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]
    if "NOT_FOUND" in text or "does not exist" in text or "missing" in text:
        return CheckpointError(f"{name}: a file is missing in {directory}: {text}; get the checkpoint again")
    return CorruptDataError(f"{name}: cannot be read from {directory}: {text}; it is corrupt, get the checkpoint again")
