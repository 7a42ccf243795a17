"""``jaxzip inspect CKPT``: what is in a compressed checkpoint, tensor by tensor and in total; and what it will take."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer
from rich.table import Table

from jaxzip.cli.console import fail, human_bytes, out, print_table


def inspect_command(
    ckpt: Annotated[pathlib.Path, typer.Argument(help="A compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="What generation takes of a device's memory.")] = False,
    memory: Annotated[
        str,
        typer.Option(help="With --plan: the device's memory, such as 141GB or 80GiB; default: that of the GPU here."),
    ] = "",
    context: Annotated[
        int | None,
        typer.Option(
            help="With --plan: tokens of a sequence, prompt and new ones; default: 4096, or all that the model takes."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="With --plan: sequences at a time.", max=2**31 - 1)] = 1,
    new_tokens: Annotated[
        int | None,
        typer.Option(help="With --plan: how many of the context's tokens are new; default: 256, or all but one."),
    ] = None,
) -> None:
    """Show shape, format, bits per weight, window coverage and escapes of every tensor; or plan a device's memory."""
    from jaxzip.checkpoint import inspect

    if plan:
        from jaxzip.cli.plan import show_plan

        show_plan(ckpt, memory=memory, context=context, batch=batch, new_tokens=new_tokens, as_json=as_json)
        return
    given = {
        "--memory": memory,
        "--context": context is not None,
        "--batch": batch != 1,
        "--new-tokens": new_tokens is not None,
    }
    if names := " and ".join(name for name in given if given[name]):
        raise fail(f"{names}: only what --plan shows depends on it; give --plan, too")
    data = inspect(ckpt)
    if as_json:
        print(json.dumps(data, indent=2))
        return
    print_table(tensor_table(data["tensors"]))
    total = data["total"]
    out.print(
        f"{len(data['tensors'])} tensors, {human_bytes(total['original_bytes'])} -> "
        f"{human_bytes(total['stored_bytes'])} ({100 * total['stored_bytes'] / max(total['original_bytes'], 1):.1f}%), "
        f"{total['bits_per_weight']:.2f} bits per weight"
    )
    for dtype, size in data["dtypes"].items():
        before, after = human_bytes(size["original_bytes"]), human_bytes(size["stored_bytes"])
        out.print(
            f"  {dtype}: {size['compressed']} of {size['tensors']} tensors compressed, {before} -> {after} "
            f"({100 * size['ratio']:.1f}%), {size['bits_per_weight']:.2f} bits per weight"
        )
    for line in data.get("notes", ()):
        out.print(line)


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
