"""``jaxzip tune CKPT``: measures what multiplies a model's weights fastest on this machine."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxzip.cli.console import err, out, print_table

#: Of x, so that it and the result stay small beside the weights of a model.
MOST_ROWS = 1 << 16


def tune_command(
    ckpt: Annotated[pathlib.Path, typer.Argument(help="A compressed checkpoint.")],
    rows: Annotated[
        str, typer.Option(help="Rows of x to measure: the batches of generation, and of short prompts.")
    ] = "1,8,16,32,64,128,256",
    repeats: Annotated[int, typer.Option(help="Timings of each; their median counts.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure implementations and configurations of matmul on this model's shapes; the fastest run from then on.

    A tie, within 2%, leaves the implementation that runs unmeasured too.
    """
    from jaxzip import tuning
    from jaxzip.ops import measured

    counts = parse_rows(rows)
    measured.check_writable()  # before the weights are read
    weights = distinct_weights(ckpt)
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("measuring", total=len(weights) * len(counts))
        for w in weights:
            m, k = w.matrix_shape
            progress.update(task, description=f"{w.format} {m}x{k}")
            found += tuning.tune(w, counts, repeats=repeats, progress=lambda _: progress.advance(task))
    if as_json:
        print(json.dumps([vars(measurement) | {"fastest": measurement.fastest} for measurement in found], indent=2))
        return
    table = Table(box=None, header_style="bold")
    names = list(dict.fromkeys(name for measurement in found for name in measurement.us))
    for name, justify in (
        ("format", "left"),
        ("M x K", "right"),
        ("rows", "right"),
        *((f"{n} us", "right") for n in names),
    ):
        table.add_column(name, justify=justify)
    if with_configs := any(f.fastest in f.configs for f in found):
        table.add_column("configuration")
    for f in found:
        cells = (f"{f.us[n]:.1f}" + (" *" if n == f.fastest else "  ") if n in f.us else "" for n in names)
        config = [f.configs.get(f.fastest, "its own choice")] if with_configs else []
        table.add_row(f.format, f"{f.m} x {f.k}", str(f.rows), *cells, *config)
    print_table(table)
    out.print(f"* runs on {found[0].device_kind} from now on: recorded in {tuning.cache_file()}")


def parse_rows(text: str) -> list[int]:
    """``"1,8,32"`` as numbers.

    Raises:
      ValueError: it is something else.
    """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1 or max(counts) > MOST_ROWS:
        raise ValueError(
            f"--rows {text!r}: expected numbers from 1 to {MOST_ROWS} with commas between them, such as 1,8,32"
        )
    return counts


def distinct_weights(ckpt: pathlib.Path) -> list:
    """One weight for every format and shape that the model multiplies by, as the running model has them.

    Raises:
      CheckpointError: the checkpoint has no compressed matrix, or cannot be read.
    """
    import jax

    from jaxzip.checkpoint import open_checkpoint
    from jaxzip.errors import CheckpointError
    from jaxzip.formats.auto import default_device
    from jaxzip.models.fuse import fuse_projections
    from jaxzip.models.loading import model_params, read_config
    from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

    checkpoint = open_checkpoint(ckpt)
    fuse = checkpoint.hf_config is not None and default_device().platform == "gpu"
    params = checkpoint.load_tree(format="auto", on_host=fuse)
    if checkpoint.hf_config is not None:
        params = model_params(read_config(checkpoint, ckpt), params)
    if fuse:
        params = fuse_projections(params)
    weights = {}
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, CompressedTensor)):
        if isinstance(leaf, CompressedTensor) and leaf.ndim == 2 and leaf.format != "raw":
            w = leaf if leaf.output_axis == KERNEL_AXIS else leaf.T  # a table as a tied head
            weights.setdefault((w.format, *w.matrix_shape), w)
    if not weights:
        raise CheckpointError(f"{ckpt} has no compressed matrix: there is nothing to measure")
    return [jax.device_put(w) for w in weights.values()]
