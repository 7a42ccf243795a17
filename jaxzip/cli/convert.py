"""``jaxzip convert SRC DST``: a checkpoint in, a losslessly compressed Orbax checkpoint out."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Annotated

import typer

from jaxzip.cli.console import byte_progress, err, fail, human_bytes, out
from jaxzip.rules import DEFAULT_RULES, CompressionReport, CompressionRule

Source = Annotated[
    pathlib.Path,
    typer.Argument(help="Orbax checkpoint, Hugging Face directory of safetensors, .safetensors or .gguf file."),
]


def convert_command(
    src: Source,
    dst: Annotated[pathlib.Path, typer.Argument(help="Directory to make; it must not exist.")],
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=FORMAT: tensors whose whole path matches the regular expression get FORMAT (see --format). "
            "Repeatable, the first match wins; after them come the default rules."
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="What the default rules compress to: tca-tbe, lane-planar, raw, or auto, which for a checkpoint is "
            "the smallest (tca-tbe) on every machine; loading changes it to what runs fastest there."
        ),
    ] = "auto",
    cast: Annotated[
        str | None,
        typer.Option(help="bfloat16: round fp32 tensors to it on the way in, others stay. Lossy, never default."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted conversion of the same source.")] = True,
) -> None:
    """Compress a checkpoint, one tensor in memory at a time.

    The source is only read. DST appears when everything in it is complete; after an interruption (even kill -9) run the
    same command again.
    """
    from jaxzip.checkpoint import convert

    own = tuple(parse_rule(text) for text in rule or ())
    try:
        rules = (*own, *(dataclasses.replace(default, format=format) for default in DEFAULT_RULES))
    except ValueError as error:
        raise fail(f"--format: {error}") from None
    with byte_progress(f"converting {src.name}") as update:
        report = convert(src, dst, rules=rules, cast=cast, progress=update, resume=resume)
    print_summary(report, own)
    out.print(f"wrote {dst}")


def parse_rule(text: str) -> CompressionRule:
    """``PATTERN=FORMAT`` from the command line."""
    pattern, separator, name = text.rpartition("=")
    if not separator:
        raise fail(f"--rule {text!r}: expected PATTERN=FORMAT, for instance '.*mlp.*=tca-tbe'")
    try:
        return CompressionRule(pattern, format=name)
    except (ValueError, re.error) as error:
        raise fail(f"--rule {text!r}: {error}") from None


def print_summary(report: CompressionReport, own: tuple[CompressionRule, ...]) -> None:
    """Two lines of result, and those of the user's ``own`` rules that matched nothing."""
    compressed = [t for t in report.tensors if t.format != "raw"]
    size = sum(t.size for t in compressed)
    bits = 8 * sum(t.stored_bytes for t in compressed) / max(size, 1)
    out.print(
        f"{human_bytes(report.original_bytes)} -> {human_bytes(report.stored_bytes)} "
        f"({100 * report.ratio:.1f}% of the original)"
    )
    out.print(
        f"{len(compressed)} tensors compressed at {bits:.2f} bits per weight, "
        f"{len(report.tensors) - len(compressed)} carried over unchanged"
    )
    for unused in report.unused_rules:
        if unused in own:
            err.print(f"warning: rule {unused.module_path}={unused.format} matched no tensor")
