"""``inspect``: what a compressed checkpoint holds, as plain data for a table or JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jaxzip.checkpoint.convert import entry_report
from jaxzip.checkpoint.read import open_checkpoint
from jaxzip.rules import sizes_by_dtype


def inspect(path: str | Path) -> dict[str, Any]:
    """Sizes, formats and coverage, per tensor and in total; reads the metadata only.

    Raises:
      CheckpointError, CorruptDataError, UnsupportedVersionError: see :func:`jaxzip.checkpoint.open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    rows, formats = [], {}
    reports = [entry_report(entry) for entry in checkpoint.tensors.values()]
    for (name, entry), report in zip(checkpoint.tensors.items(), reports):
        rows.append(
            {
                "path": name,
                "shape": entry["shape"],
                "dtype": entry["dtype"],
                "format": entry["format"],
                "original_bytes": report.original_bytes,
                "stored_bytes": report.stored_bytes,
                "bits_per_weight": report.bits_per_weight,
                "coverage": report.coverage,
                "escapes": report.escapes,
                "window": entry.get("window"),
                "checksum": entry["checksum"],
                "derived": entry.get("derived"),
                "note": report.note,
            }
        )
        formats[entry["format"]] = formats.get(entry["format"], 0) + 1
    original, stored = (sum(row[key] for row in rows) for key in ("original_bytes", "stored_bytes"))
    compressed = [row for row in rows if row["format"] != "raw"]
    weights = sum(math.prod(row["shape"]) for row in compressed)
    return {
        "path": str(checkpoint.path),
        "layout_version": checkpoint.metadata["layout_version"],
        "library_version": checkpoint.metadata["library_version"],
        "source": checkpoint.metadata["source"],
        "notes": checkpoint.metadata["source"]["notes"],
        "model_type": (checkpoint.hf_config or {}).get("model_type"),
        "extra_files": sorted(checkpoint.metadata["extra_files"]),
        "tensors": rows,
        "dtypes": sizes_by_dtype(reports),
        "total": {
            "tensors": len(rows),
            "formats": formats,
            "original_bytes": original,
            "stored_bytes": stored,
            "ratio": stored / max(original, 1),
            "bits_per_weight": 8 * stored / max(sum(math.prod(row["shape"]) for row in rows), 1),
            "compressed_bits_per_weight": 8 * sum(row["stored_bytes"] for row in compressed) / weights
            if weights
            else None,
        },
    }
