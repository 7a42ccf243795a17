"""What every benchmark shares: paired timing, the record of where and on what it ran, a table and a JSON file."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def time_paired(functions: Mapping[str, Callable[[int], Any]], *, repeats: int, warmup: int = 2) -> dict[str, dict]:
    """Times functions in turns, so that what disturbs the machine disturbs them all.

    Args:
        functions: by name; each takes the number of the repeat (to rotate copies of its data) and returns once done.
        repeats: timed calls of each.
        warmup: untimed calls of each before.

    Returns:
        By name: median and minimum in milliseconds, and the number of repeats.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-warmup, repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function(i)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_ms": statistics.median(s) * 1e3, "min_ms": min(s) * 1e3, "repeats": repeats}
        for name, s in seconds.items()
    }


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Commit, date, machine and versions; nothing that identifies the host."""
    devices = sorted({d.device_kind for d in jax.devices()})
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "backend": jax.default_backend(),
        "devices": devices,
    }


def write_result(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Writes bench/results/<name>.json: `content` beside the environment it was measured in."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "environment": environment(), **content}, indent=1) + "\n")
    return path


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table; columns are the keys of the first."""
    table = rich.table.Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width to fit
    console.print(table)
