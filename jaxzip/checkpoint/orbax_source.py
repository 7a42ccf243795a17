"""Reads an Orbax tree (v0 or v1, zarr or zarr3, OCDBT or a directory per array) leaf by leaf."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxzip.checkpoint import array_store, gemma_names
from jaxzip.checkpoint.kernel_layout import kernel_axes, names
from jaxzip.checkpoint.layout import CHECKPOINT_FILE
from jaxzip.checkpoint.source import TensorInfo, model_config, small_files
from jaxzip.checkpoint.tree_metadata import Leaf, read_json, read_tree
from jaxzip.errors import CorruptDataError
from jaxzip.tensor import TABLE_AXIS


class OrbaxSource:
    """A tree directory of Orbax.

    Orbax's restore takes the whole tree, or asks for its structure in placeholders, and wants shardings for the devices
    of the machine that saved it. The arrays below are plain tensorstore arrays, so they are opened one by one instead.
    """

    kind = "orbax"

    def __init__(self, path: Path, tree: Path, notes: tuple[str, ...] = ()):
        self.path, self.notes = path, notes
        self.extra_files = small_files(path)
        self.hf_config = model_config(path, self.extra_files)
        self._directory = tree
        top = next((d for d in (tree, tree.parent) if (d / CHECKPOINT_FILE).exists()), None)
        self.custom_metadata = _custom_metadata(top / CHECKPOINT_FILE) if top else None
        self._tree = read_tree(tree)
        self._infos: tuple[TensorInfo, ...] | None = None
        if self.hf_config is None and gemma_names.is_gemma(leaf.path for leaf in self._tree.leaves):
            self._guess_config()

    def _guess_config(self) -> None:
        """A released Gemma checkpoint has no configuration beside it: its shapes say which model it is."""
        dtypes = {gemma_names.key(info.path): info for info in self.tensors()}
        self.hf_config = gemma_names.config({name: info.shape for name, info in dtypes.items()})
        if self.hf_config is None:
            self.notes += (gemma_names.UNKNOWN,)
        else:
            self.hf_config["dtype"] = str(dtypes[gemma_names.EMBEDDING].dtype)

    def tensors(self) -> tuple[TensorInfo, ...]:
        if self._infos is None:
            infos = [self._info(leaf) for leaf in self._tree.leaves if leaf.has_array]
            axes = kernel_axes({info.path: info.shape for info in infos})
            self._infos = tuple(dataclasses.replace(info, axes=axes.get(info.path)) for info in infos)
        return self._infos

    def other_leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for leaf in self._tree.leaves if not leaf.has_array)

    def read(self, info: TensorInfo) -> np.ndarray:
        return array_store.read_array(
            self._directory, info.leaf.store_name, shape=info.shape, dtype=info.dtype, **self._storage
        )

    def files(self) -> tuple[Path, ...]:
        return tuple(f for f in self._directory.rglob("*") if f.is_file())

    @property
    def _storage(self) -> dict[str, Any]:
        return {"driver": "zarr3" if self._tree.zarr3 else "zarr", "ocdbt": self._tree.ocdbt}

    def _info(self, leaf: Leaf) -> TensorInfo:
        store = array_store.open_array(self._directory, leaf.store_name, **self._storage)
        axis = TABLE_AXIS if names(leaf.path)[-1] == gemma_names.TABLE else None
        return TensorInfo(leaf, tuple(store.shape), np.dtype(store.dtype.numpy_dtype), axis)


def _custom_metadata(file: Path) -> Any:
    document = read_json(file)
    if not isinstance(document, dict):
        raise CorruptDataError(
            f"{file} holds {type(document).__name__}, not Orbax's description of a checkpoint; get the checkpoint again"
        )
    return document.get("custom_metadata")
