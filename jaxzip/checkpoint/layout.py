"""Layout of a compressed checkpoint: its version, its JSON document in Orbax's custom metadata, and its files.

    checkpoint/
      _CHECKPOINT_METADATA     Orbax's; custom_metadata = {"jaxzip": document, "jaxzip_sha256": its digest}
      _METADATA                Orbax's tree: a compressed leaf is a dict of its payload arrays
      layers.0.mlp.up_proj.kernel.bitmap1/ ...   one zarr3 array each
      _jaxzip/                 small files: tokenizer.json, config.json, headers of safetensors files

The document holds what arrays cannot say: format, logical shape, dtype and checksum of each tensor, and the source.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxzip.checkpoint import kernel_layout
from jaxzip.checkpoint.tree_metadata import read_json, write_json
from jaxzip.errors import CheckpointError, CorruptDataError, UnsupportedVersionError

#: The newest version that is read. 2: kernels of rank 3 and more are stored as matrices, with their axes.
LAYOUT_VERSION = 2
CHECKPOINT_FILE = "_CHECKPOINT_METADATA"
COMMIT_FILE = "commit_success.txt"
EXTRA_DIRECTORY = "_jaxzip"
PARTIAL_SUFFIX = ".jaxzip-partial"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def version_for(entries: Iterable[dict[str, Any]]) -> int:
    """The oldest version whose readers understand these entries: what older ones can read stays readable for them."""
    return 2 if any(kernel_layout.MATRIX_KEY in entry for entry in entries) else 1


def document_digest(document: dict[str, Any]) -> str:
    """SHA-256 of the document with sorted keys, so that a flipped bit in the metadata is found."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def write_checkpoint_file(directory: Path, custom_metadata: dict[str, Any]) -> None:
    """Writes Orbax's top-level metadata."""
    now = time.time_ns()
    document = {
        "item_handlers": _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": custom_metadata,
    }
    write_json(directory / CHECKPOINT_FILE, document)


def custom_metadata(document: dict[str, Any]) -> dict[str, Any]:
    """What goes into Orbax's custom metadata."""
    return {"jaxzip": document, "jaxzip_sha256": document_digest(document)}


def is_compressed(path: Path) -> bool:
    """Whether a directory is a finished compressed checkpoint (readable or not)."""
    try:
        return "jaxzip" in read_json(path / CHECKPOINT_FILE).get("custom_metadata", {})
    except (CheckpointError, CorruptDataError, AttributeError, TypeError):
        return False


def read_document(path: Path) -> dict[str, Any]:
    """Reads and checks the document of a compressed checkpoint.

    Raises:
      CheckpointError: there is no checkpoint at ``path``, or it is not compressed by jaxzip.
      UnsupportedVersionError: a newer version of jaxzip wrote it.
      CorruptDataError: the document is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of a compressed checkpoint")
    if not (path / CHECKPOINT_FILE).exists():
        raise CheckpointError(
            f"{path} has no {CHECKPOINT_FILE}: it is no compressed checkpoint; make one with jaxzip convert"
        )
    metadata = read_json(path / CHECKPOINT_FILE)
    custom = metadata.get("custom_metadata") if isinstance(metadata, dict) else None
    if not isinstance(custom, dict) or "jaxzip" not in custom:
        raise CheckpointError(f"{path} is not compressed by jaxzip; compress it with jaxzip convert")
    document = custom["jaxzip"]
    version = document.get("layout_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > LAYOUT_VERSION:
        raise UnsupportedVersionError(
            f"{path} has layout version {version} (written by jaxzip {document.get('library_version')}), "
            "this jaxzip reads "
            f"up to {LAYOUT_VERSION}; upgrade jaxzip"
        )
    if not isinstance(document, dict) or document_digest(document) != custom.get("jaxzip_sha256"):
        raise CorruptDataError(f"{path / CHECKPOINT_FILE}: jaxzip's metadata is corrupt; get the checkpoint again")
    return document


def not_found(name: str, names: Iterable[str], path: Path) -> str:
    """Message for a tensor that is not there, with the nearest names."""
    near = difflib.get_close_matches(name, list(names), 3, 0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; jaxzip inspect lists the tensors"
    return f"{path} has no tensor {name!r}{hint}"
