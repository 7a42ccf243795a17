"""``jaxzip inspect CKPT``: what is in a compressed checkpoint, tensor by tensor and in total."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer
from rich.table import Table

from jaxzip.cli.console import human_bytes, out


def inspect_command(
    ckpt: Annotated[pathlib.Path, typer.Argument(help="A compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show shape, format, bits per weight, window coverage and escapes of every tensor."""
    from jaxzip.checkpoint import inspect

    data = inspect(ckpt)
    if as_json:
        print(json.dumps(data, indent=2))
        return
    out.print(tensor_table(data["tensors"]))
    total = data["total"]
    out.print(
        f"{len(data['tensors'])} tensors, {human_bytes(total['original_bytes'])} -> "
        f"{human_bytes(total['stored_bytes'])} ({100 * total['stored_bytes'] / max(total['original_bytes'], 1):.1f}%), "
        f"{total['bits_per_weight']:.2f} bits per weight"
    )
    for line in data.get("notes", ()):
        out.print(line, markup=False)


def tensor_table(rows: list[dict]) -> Table:
    """One line a tensor."""
    table = Table(box=None, header_style="bold")
    for name, justify in (
        ("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("format", "left"), ("bytes", "right"),
        ("bits/weight", "right"), ("coverage", "right"), ("escapes", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "tensor")
    for row in rows:
        escapes = row.get("escapes")
        table.add_row(
            row["path"],
            "x".join(map(str, row["shape"])) or "scalar",
            row["dtype"],
            row["format"],
            human_bytes(row["stored_bytes"]),
            f"{row['bits_per_weight']:.2f}",
            "" if escapes is None else f"{100 * row['coverage']:.2f}%",
            "" if escapes is None else str(escapes),
        )
    return table
