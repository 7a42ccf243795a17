"""``jaxzip inspect CKPT --plan``: what fits a device's memory, dense and compressed."""

from __future__ import annotations

import json
import pathlib
import re
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from jaxzip.cli.console import fail, human_bytes, out, print_table

if TYPE_CHECKING:
    from jaxzip.checkpoint import Checkpoint
    from jaxzip.models import DecoderConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
#: Tokens of a sequence, and of those the new ones, where nothing is asked for.
CONTEXT, NEW_TOKENS = 4096, 256
MOST_SEQUENCES = 1 << 16
MOST_BYTES = 1 << 60


def show_plan(
    ckpt: pathlib.Path, *, memory: str, context: int | None, batch: int, new_tokens: int | None, as_json: bool
) -> None:
    """Prints one line for each way to hold the weights: bytes by purpose, whether it fits, and what would at most.

    Args:
      context: tokens of a sequence; ``None``: CONTEXT, or as many as the model takes.
      new_tokens: how many of them are new; ``None``: NEW_TOKENS, or all but one.

    Raises:
      CheckpointError: there is no compressed checkpoint, or it has no model's configuration.
      UnsupportedConfigError: the model is not one that ``jaxzip.models`` computes.
    """
    from jaxzip.checkpoint import open_checkpoint
    from jaxzip.models.loading import read_config

    if batch < 1:
        raise fail(f"--batch is {batch}, expected 1 or more")
    available = parse_bytes(memory) if memory else _device_memory()
    checkpoint = open_checkpoint(ckpt)
    config = read_config(checkpoint, ckpt)
    most = config.max_position_embeddings
    if context is not None and context < 2:
        raise fail(f"--context is {context}, expected 2 or more: a prompt's token and a new one")
    if context is not None and context > most:
        raise fail(f"--context is {context}, but {ckpt} is a model of at most {most} tokens; give {most} or less")
    limited = context is None and most < CONTEXT
    context = min(CONTEXT, most) if context is None else context
    new_tokens = max(1, min(NEW_TOKENS, context - 1)) if new_tokens is None else new_tokens
    if not 1 <= new_tokens < context:
        raise fail(f"--new-tokens is {new_tokens}, expected a number from 1 to --context={context}, without it")
    rows = plan_rows(checkpoint, config, available, context, batch, new_tokens)
    if as_json:
        print(json.dumps({"memory": available, "context": context, "batch": batch, "plan": rows}, indent=2))
        return
    tokens = f"{batch} x {context} tokens" + (" (more the model does not take)" if limited else "")
    out.print(f"{human_bytes(available)} of memory, {tokens}, {new_tokens} of them new")
    table = Table(box=None, header_style="bold")
    for name in ("weights", "bytes", "KV cache", "working", "total", "fits", "most sequences", "longest context"):
        table.add_column(name, justify="left" if name in ("weights", "fits") else "right")
    for row in rows:
        sizes = (human_bytes(row[key]) for key in ("weight_bytes", "cache_bytes", "working_bytes", "total_bytes"))
        most = (str(row[key]) for key in ("most_sequences", "longest_context"))
        table.add_row(row["weights"], *sizes, "yes" if row["fits"] else Text("no", style="red"), *most)
    print_table(table)
    out.print("Total is the peak of JAX's arrays; about 1 GiB more is CUDA's own, and counted in what fits.")


def plan_rows(
    checkpoint: Checkpoint, config: DecoderConfig, memory: int, context: int, batch: int, new_tokens: int
) -> list[dict[str, Any]]:
    """The plan as plain data."""
    from jaxzip.checkpoint.format_sizes import DENSE, format_sizes
    from jaxzip.models.memory_plan import largest, memory_plan

    rows = []
    others = {entry["format"] for entry in checkpoint.tensors.values()} - {"raw", "lane-planar"}
    formats = {DENSE: None, "as stored": min(others, default="lane-planar"), "lane-planar": "lane-planar"}
    for name, weight_bytes in format_sizes(checkpoint).items():

        def plan(batch, context):
            new = min(new_tokens, context - 1)
            return memory_plan(config, weight_bytes, batch, context - new, new, format=formats[name])  # noqa: B023

        here = plan(batch, context)
        rows.append(
            {
                "weights": name,
                "weight_bytes": here.weights,
                "cache_bytes": here.cache,
                "working_bytes": here.working,
                "total_bytes": here.total,
                "fits": here.fits(memory),
                "most_sequences": largest(lambda n: plan(n, context).fits(memory), MOST_SEQUENCES),  # noqa: B023
                "longest_context": largest(
                    lambda n: plan(batch, max(n, 2)).fits(memory),  # noqa: B023 - a prompt's token and a new one
                    config.max_position_embeddings,
                ),
            }
        )
    return rows


def parse_bytes(text: str) -> int:
    """``"141GB"``, ``"80 GiB"`` or a plain number as bytes.

    Raises:
      ValueError: it is none of these, or more than any device has.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"--memory {text!r}: expected a size such as 141GB or 80GiB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= MOST_BYTES:
        raise ValueError(f"--memory {text[:40]!r}: expected less than {human_bytes(MOST_BYTES)}")
    return int(size)


def _device_memory() -> int:
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise fail("there is no GPU here: say how much memory the device has, such as --memory 141GB")
    return stats["bytes_limit"]
