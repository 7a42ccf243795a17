"""``jaxzip restore SRC DST``: the original checkpoint back, bit for bit."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from jaxzip.cli.console import byte_progress, out


def restore_command(
    src: Annotated[pathlib.Path, typer.Argument(help="A compressed checkpoint.")],
    dst: Annotated[pathlib.Path, typer.Argument(help="Directory to make; it must not exist.")],
    format: Annotated[
        str, typer.Option(help="orbax, or safetensors (a Hugging Face directory) if it was converted from one.")
    ] = "orbax",
) -> None:
    """Decode a compressed checkpoint to a plain one with the original tree, dtypes and bits."""
    from jaxzip.checkpoint import restore

    with byte_progress(f"restoring {src.name}") as update:
        restore(src, dst, format=format, progress=update)
    out.print(f"wrote {dst}")
