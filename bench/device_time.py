"""Which kernels a GPU ran, and when, by JAX's profiler."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's run: its name, with the operations of XLA that it is of, and its times on the device."""

    name: str
    of: str
    start_us: float
    end_us: float


def kernels(run: Callable[[], Any]) -> list[Kernel]:
    """Those of everything that ``run()`` returns, on all GPUs; run it once before, so that nothing compiles."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    return [
        _kernel(event)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def _kernel(event) -> Kernel:
    of = " ".join(str(value) for key, value in event.stats if key in ("tf_op", "name", "hlo_op"))
    return Kernel(event.name, of, event.start_ns / 1e3, (event.start_ns + event.duration_ns) / 1e3)


def busy_us(found: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of the kernels ran; some start before others have ended, and wait."""
    busy = until = 0.0
    for kernel in sorted(found, key=lambda kernel: kernel.start_us):
        busy += max(0.0, kernel.end_us - max(until, kernel.start_us))
        until = max(until, kernel.end_us)
    return busy
