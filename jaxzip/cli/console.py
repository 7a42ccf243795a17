"""The terminal: where messages and tables go, how bytes are written, how a failure ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

#: Text is printed as it is: paths and names may have brackets and colons, which rich's markup would swallow.
_PLAIN = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
_WIDEST = 1 << 16
out = Console(**_PLAIN)
#: Progress and errors, so that standard output stays clean for pipes and ``--json``.
err = Console(stderr=True, **_PLAIN)


def print_table(table: Table) -> None:
    """Prints ``table`` at its own width: rich would cut names and numbers down to the terminal's, or a pipe's 80."""
    Console(file=out.file, width=_WIDEST, **_PLAIN).print(table)


def fail(message: str) -> typer.Exit:
    """Prints ``message`` as an error; raise what it returns."""
    err.print(Text.assemble(("error:", "bold red"), f" {message}"))
    return typer.Exit(1)


def human_bytes(count: int) -> str:
    """``count`` with a binary unit: 191.3 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value /= 1024
    else:
        unit = "TiB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@contextlib.contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar of bytes, rate and time left; yields ``update(done, total, name_of_the_tensor)``."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", markup=False),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=None, tensor="")

        def update(done: int, total: int, tensor: str) -> None:
            progress.update(task, completed=done, total=total, tensor=tensor)

        yield update
