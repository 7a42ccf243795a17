"""``convert``: any known checkpoint in, a compressed Orbax checkpoint out, one tensor in memory at a time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxzip.checkpoint import kernel_layout, layout
from jaxzip.checkpoint.checksum import checksum
from jaxzip.checkpoint.partial import PartialCheckpoint, StoredNames, check_name
from jaxzip.checkpoint.progress import ProgressCallback, Tracker
from jaxzip.checkpoint.source import Source, TensorInfo, identity, open_source
from jaxzip.checkpoint.tree_metadata import DICT_KEY, Leaf, check_paths
from jaxzip.compress import compress, format_for
from jaxzip.errors import CheckpointError, JaxzipError, with_name
from jaxzip.rules import (
    DEFAULT_RULES,
    CompressionReport,
    CompressionRule,
    TensorReport,
    not_smaller,
    rule_for,
    tensor_report,
)
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    rules: Sequence[CompressionRule] = DEFAULT_RULES,
    cast: str | None = None,
    progress: ProgressCallback | None = None,
    resume: bool = True,
) -> CompressionReport:
    """Compresses the checkpoint at ``src`` into a new Orbax checkpoint at ``dst``.

    ``dst`` appears in one step, complete, or not at all. Until then the work is in ``dst`` + ".jaxzip-partial"; the
    same call after a crash or ``kill -9`` goes on after the tensors that are complete there, provided that the source's
    files (names, sizes, times; of small ones beside the weights, such as config.json, the contents), the rules and
    ``cast`` are the same. ``src`` is only read. Leaves that no rule takes, and those that compression would not shrink,
    are carried over unchanged.

    Args:
      src: see :func:`jaxzip.checkpoint.open_source`.
      dst: must not exist.
      rules: see :func:`jaxzip.compress_params`.
      cast: "bfloat16" rounds fp32 leaves to bf16 first; recorded in the metadata.
      progress: called as ``progress(done_bytes, total_bytes, tensor)`` at the beginning and after each tensor.
      resume: ``False`` starts anew.

    Raises:
      CheckpointError: unknown or incomplete source, existing destination, full disk (what was written stays and is used
        by the next call).
      CorruptDataError: the source is damaged; what was written is deleted.
      UnsupportedDtypeError: a rule's format does not take a tensor's dtype; what was written is deleted.
    """
    # Imported here: jaxzip.__init__ imports nothing of this package, and holds the version.
    from jaxzip import __version__

    source = open_source(src, cast=cast)
    destination = Path(dst).absolute()
    check_apart(source.path, destination)
    infos = source.tensors()
    _check_names(source)
    source_identity = identity(source)
    extra_files = {name: hashlib.sha256(content).hexdigest() for name, content in source.extra_files.items()}
    plan = {
        "operation": "convert",
        "layout_version": layout.LAYOUT_VERSION,
        "library_version": __version__,
        "source": source_identity | {"path": str(source.path)},
        "rules": [dataclasses.asdict(rule) for rule in rules],
        "cast": cast,
        "hf_config": source.hf_config,
        "extra_files": extra_files,
    }
    with PartialCheckpoint(destination, plan, resume=resume) as partial:
        todo = [info for info in infos if info.path not in partial.entries]
        total = sum(info.nbytes for info in infos)
        tracker = Tracker(progress, total, total - sum(info.nbytes for info in todo))
        for info in todo:
            _convert_tensor(source, info, rules, partial)
            tracker.advance(info.name, info.nbytes)
        entries = [partial.entries[info.path] for info in infos]
        if not partial.finished:
            document = {
                "layout_version": layout.version_for(entries),
                "library_version": __version__,
                "source": source_identity | {"cast": cast, "notes": list(source.notes)},
                "source_custom_metadata": source.custom_metadata,
                "hf_config": source.hf_config,
                "extra_files": extra_files,
                "tensors": entries,
                "other_leaves": [leaf.to_json() for leaf in source.other_leaves()],
            }
            leaves = [leaf for entry in entries for leaf in stored_leaves(entry)]
            partial.finish((*leaves, *source.other_leaves()), layout.custom_metadata(document), source.extra_files)
    used = {next((r for r in rules if r.matches(info.name)), None) for info in infos}
    return CompressionReport(
        tuple(entry_report(entry) for entry in entries), tuple(rule for rule in rules if rule not in used)
    )


def _convert_tensor(
    source: Source, info: TensorInfo, rules: Sequence[CompressionRule], partial: PartialCheckpoint
) -> None:
    rule = rule_for(info.name, info.shape, info.dtype, rules)
    if info.leaf.extension or info.leaf.value_type == "scalar":
        rule = "not a plain array"
    try:
        array = source.read(info)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # hashing runs beside encoding, both without the GIL
            digest = pool.submit(checksum, array)
            z = None if isinstance(rule, str) else _compress(array, info, rule)
            entry = _entry(info, z, rule if isinstance(rule, str) else "", digest.result())
    except (JaxzipError, TypeError, ValueError):
        partial.discard()
        raise
    if entry["format"] == "raw":
        arrays = {"": array}
    else:
        arrays = dict(z.payload)
        del array
    partial.add(info.leaf, arrays, entry)


def _compress(array: np.ndarray, info: TensorInfo, rule: CompressionRule) -> CompressedTensor:
    axis = rule.output_axis if info.output_axis is None else info.output_axis
    if info.axes is not None:
        array, axis = np.ascontiguousarray(info.axes.to_matrix(array)), KERNEL_AXIS
    try:
        return compress(array, format=format_for(array.dtype, rule.format), output_axis=axis, on_host=True)
    except (TypeError, ValueError) as error:
        raise with_name(info.name, error) from error


def _entry(info: TensorInfo, z: CompressedTensor | None, note: str, digest: dict[str, Any]) -> dict[str, Any]:
    """The JSON entry of a tensor in the checkpoint's metadata."""
    entry = {
        "path": list(info.path),
        "leaf": info.leaf.to_json(),
        "shape": list(info.shape),
        "dtype": str(info.dtype),
        "format": "raw",
        "original_bytes": info.nbytes,
        "stored_bytes": info.nbytes,
        "checksum": digest,
        "note": note or (not_smaller(z) if z.format == "raw" else ""),
    }
    if info.source_name is not None:
        entry["source_name"] = info.source_name
    if info.source_names:
        entry["source_names"] = list(info.source_names)
    if info.derived is not None:
        entry["derived"] = info.derived
    if z is None or z.format == "raw":
        return entry
    if info.axes is not None:
        entry[kernel_layout.MATRIX_KEY] = kernel_layout.to_json(info.axes)
    report = tensor_report(info.name, z)
    window = {"start_exp": np.asarray(z.payload["start_exp"]).tolist()} if "start_exp" in z.payload else None
    return entry | {
        "format": z.format,
        "format_version": z.layout_version,
        "output_axis": z.output_axis,
        "core_ndim": len(z.core_shape),
        "stored_bytes": z.nbytes,
        "escapes": report.escapes,
        "note": report.note,
        "window": window,
        "payload": {n: {"dtype": str(a.dtype), "shape": list(a.shape)} for n, a in z.payload.items()},
    }


def stored_leaves(entry: dict[str, Any]) -> list[Leaf]:
    """The leaves that a tensor has in the stored tree: itself, or its payload arrays."""
    leaf = Leaf.from_json(entry["leaf"])
    if entry["format"] == "raw":
        return [leaf]
    return [Leaf((*leaf.path, name), (*leaf.key_types, DICT_KEY), "np.ndarray") for name in entry["payload"]]


def entry_report(entry: dict[str, Any]) -> TensorReport:
    """The report row of a tensor's entry."""
    return TensorReport(
        "/".join(entry["path"]),
        tuple(entry["shape"]),
        entry["dtype"],
        entry["format"],
        entry["original_bytes"],
        entry["stored_bytes"],
        entry.get("escapes"),
        entry["note"],
    )


def check_apart(source: Path, destination: Path) -> None:
    """Refuses to write inside the source.

    Raises:
      CheckpointError: naming both.
    """
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise CheckpointError(f"the destination {destination} is inside the source {source}; give another destination")


def _check_names(source: Source) -> None:
    """Refuses leaves that a checkpoint cannot hold side by side, before anything is written."""
    infos, others = source.tensors(), source.other_leaves()
    check_paths(leaf.path for leaf in (*(info.leaf for info in infos), *others))
    seen: dict[str, str] = {}
    for leaf in (*(info.leaf for info in infos), *others):
        check_name(leaf.store_name)
        if leaf.store_name in seen:
            raise CheckpointError(
                f"{source.path}: {'/'.join(leaf.path)} and {seen[leaf.store_name]} would both be stored as "
                f"{leaf.store_name!r}; rename one of them"
            )
        seen[leaf.store_name] = "/".join(leaf.path)
    stored, called = StoredNames(), {}
    for info in infos:
        stored.add(info.leaf.store_name)
        if info.name in called:
            raise CheckpointError(
                f"{source.path}: {info.path} and {called[info.name]} would both be called {info.name!r}; "
                "rename one of them"
            )
        called[info.name] = info.path
