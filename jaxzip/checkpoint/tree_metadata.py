"""Orbax's description of a tree on disk: ``_METADATA`` (keys and kinds of leaves), ``_strings.json``, extensions.

The files are JSON that Orbax has kept stable. They are read and written here rather than through Orbax's handlers,
because those hold the whole tree: a converter that streams needs the tree's shape without its arrays.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxzip.errors import CheckpointError, CorruptDataError

TREE_FILE = "_METADATA"
STRINGS_FILE = "_strings.json"
OCDBT_FILE = "manifest.ocdbt"
EXTENSIONS_FILE = "array_metadatas/process_0"
SHARDING_FILE = "_sharding"
#: Where a random key is restored if Orbax is not told; it has no such entry for ``np.ndarray``.
_ON_CPU = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})
SEQUENCE_KEY, DICT_KEY = 1, 2
#: Kinds of leaves that have an array on disk; the others live in the JSON files alone.
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple", "EmptyNode", "string")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a tree: its keys (``key_types`` as Orbax numbers them), kind, and the value if it is no array.

    ``extension`` is what Orbax keeps beside an array: the implementation of a random key.
    """

    path: tuple[str, ...]
    key_types: tuple[int, ...]
    value_type: str
    value: Any = None
    extension: Any = None

    @property
    def has_array(self) -> bool:
        return self.value_type not in _NO_ARRAY

    @property
    def store_name(self) -> str:
        """The name under which Orbax stores the leaf."""
        return ".".join(self.path)

    def to_json(self) -> dict[str, Any]:
        """The leaf as JSON, defaults left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Leaf:
        return cls(**{**data, "path": tuple(data["path"]), "key_types": tuple(data["key_types"])})


@dataclasses.dataclass(frozen=True)
class TreeMetadata:
    """The leaves of a tree directory and how its arrays are stored."""

    leaves: tuple[Leaf, ...]
    ocdbt: bool
    zarr3: bool


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
      CheckpointError: it is missing.
      CorruptDataError: it is no JSON (truncated).
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, get it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise CorruptDataError(f"{path} is truncated or corrupt ({error}); get the checkpoint again") from None


def read_tree(directory: Path) -> TreeMetadata:
    """Reads the description of the tree in ``directory``.

    Raises:
      CheckpointError: a file is missing.
      CorruptDataError: a file is truncated or does not have Orbax's structure.
    """
    document = read_json(directory / TREE_FILE)
    strings = read_json(directory / STRINGS_FILE) if (directory / STRINGS_FILE).exists() else {}
    extensions = {}
    for file in sorted((directory / EXTENSIONS_FILE).parent.glob("process_*")):
        extensions |= _read_extensions(file)
    leaves = []
    try:
        for entry in document["tree_metadata"].values():
            keys, value = entry["key_metadata"], entry["value_metadata"]
            path = tuple(str(k["key"]) for k in keys)
            name = ".".join(path)
            kind = value["value_type"]
            if kind == "string" and name not in strings:
                raise CheckpointError(
                    f"{directory / STRINGS_FILE} has no value of {name!r}; the checkpoint is incomplete"
                )
            leaves.append(Leaf(path, tuple(k["key_type"] for k in keys), kind, strings.get(name), extensions.get(name)))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"{directory / TREE_FILE} is not a tree description of Orbax ({type(error).__name__}: {error}); "
            "it is corrupt "
            "or of a version of Orbax that jaxzip does not know"
        ) from error
    ocdbt = document.get("use_ocdbt")
    if ocdbt is None:
        ocdbt = (directory / OCDBT_FILE).exists()
    if ocdbt and not (directory / OCDBT_FILE).exists():
        raise CheckpointError(f"{directory / OCDBT_FILE} is missing; the checkpoint is incomplete, get it again")
    return TreeMetadata(tuple(leaves), bool(ocdbt), bool(document.get("use_zarr3", False)))


def _read_extensions(file: Path) -> dict[str, Any]:
    document = read_json(file)
    try:
        entries = [item["array_metadata"] for item in document.get("array_metadatas", ())]
        return {entry["param_name"]: entry["ext_metadata"] for entry in entries if entry.get("ext_metadata")}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"{file} does not describe arrays as Orbax does ({type(error).__name__}: {error}); get the checkpoint again"
        ) from error


def write_tree(directory: Path, leaves: Iterable[Leaf]) -> None:
    """Writes the files that make ``directory``, whose arrays are there, a tree that Orbax restores.

    Arrays are written as ``np.ndarray`` leaves: they restore on any number of devices. Random keys stay what they are:
    where there is no CPU device, as in any checkpoint that was saved on another machine, Orbax must be told theirs.
    """
    tree, strings, extensions, shardings = {}, {}, [], {}
    for leaf in leaves:
        kind = leaf.value_type
        if leaf.extension:
            extensions.append({"array_metadata": _extension(directory, leaf)})
            shardings[base64.b64encode(leaf.store_name.encode()).decode()] = _ON_CPU
        elif leaf.has_array and kind != "scalar":
            kind = "np.ndarray"
        if kind == "string":
            strings[leaf.store_name] = leaf.value
        tree[str(leaf.path)] = {
            "key_metadata": [{"key": k, "key_type": t} for k, t in zip(leaf.path, leaf.key_types)],
            "value_metadata": {"value_type": kind, "skip_deserialize": not leaf.has_array and kind != "string"},
        }
    document = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    write_json(directory / TREE_FILE, document)
    if strings:
        write_json(directory / STRINGS_FILE, strings)
    if extensions:
        (directory / EXTENSIONS_FILE).parent.mkdir(exist_ok=True)
        write_json(directory / EXTENSIONS_FILE, {"array_metadatas": extensions})
        write_json(directory / SHARDING_FILE, shardings)


def _extension(directory: Path, leaf: Leaf) -> dict[str, Any]:
    """What Orbax keeps beside the array of ``leaf``, which is in ``directory``; it reads none without the shapes."""
    array = read_json(directory / leaf.store_name / "zarr.json")
    return {
        "param_name": leaf.store_name,
        "write_shape": array["shape"],
        "chunk_shape": array["chunk_grid"]["configuration"]["chunk_shape"],
        "ext_metadata": leaf.extension,
    }


def write_json(path: Path, document: Any) -> None:
    """Writes and syncs a JSON file."""
    write_file(path, json.dumps(document).encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a file."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_paths(paths: Iterable[tuple[str, ...]]) -> None:
    """Refuses leaves that one tree of dicts cannot hold.

    Raises:
      CheckpointError: a leaf is below another.
    """
    leaves = set(paths)
    for path in leaves:
        above = next((path[:i] for i in range(1, len(path)) if path[:i] in leaves), None)
        if above is not None:
            raise CheckpointError(
                f"{'/'.join(path)!r} is below {'/'.join(above)!r}, which is a tensor: no tree holds both; load them "
                "one by one, or rename one in the source"
            )


class _Branch(dict):
    """A node of the tree, as opposed to a leaf that is an empty dict."""


def nest(pairs: Sequence[tuple[Leaf, Any]]) -> Any:
    """Builds the tree of ``(leaf, value)`` pairs: dicts, and lists where Orbax recorded a sequence.

    Raises:
      CheckpointError: see :func:`check_paths`.
    """
    check_paths(leaf.path for leaf, _ in pairs)
    root, sequences = _Branch(), set()
    for leaf, value in pairs:
        if not leaf.path:
            return value
        node = root
        for key in leaf.path[:-1]:
            node = node.setdefault(key, _Branch())
        node[leaf.path[-1]] = value
        sequences.update(leaf.path[:i] for i, kind in enumerate(leaf.key_types) if kind == SEQUENCE_KEY)

    def settle(node, path):
        if not isinstance(node, _Branch):
            return node
        items = {key: settle(child, (*path, key)) for key, child in node.items()}
        return [items[k] for k in sorted(items, key=int)] if path in sequences else items

    return settle(root, ())
