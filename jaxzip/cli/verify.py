"""``jaxzip verify SRC DST``: the proof that nothing changed."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer
from rich.text import Text

from jaxzip.cli.console import byte_progress, human_bytes, out


def verify_command(
    src: Annotated[pathlib.Path, typer.Argument(help="The checkpoint that was converted.")],
    dst: Annotated[pathlib.Path, typer.Argument(help="The compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Decode every tensor of DST and compare it with SRC bit for bit; names the first difference."""
    from jaxzip.checkpoint import verify

    with byte_progress(f"verifying {dst.name}") as update:
        result = verify(src, dst, progress=update)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    elif result.identical:
        out.print(f"identical: {result.tensors} tensors, {human_bytes(result.bytes)}, every bit")
    else:
        out.print(Text.assemble(("DIFFERENT", "bold red"), f": {result.difference}"))
    if not result.identical:
        raise typer.Exit(1)
