"""Autotuning: times implementations of ``matmul`` on the device, with cold weights, and records them.

:mod:`jaxzip.ops.measured` keeps what was recorded and answers while programs are traced; nothing is timed then.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxzip.ops import measured, registry
from jaxzip.ops.matmul import matmul
from jaxzip.ops.measured import cache_file, disabled
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

__all__ = ["Measurement", "cache_file", "disabled", "tune"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Copies of a weight together exceed the last cache: several times an H200's L2, more than most CPUs' L3.
COLD_BYTES = {"cuda": 420e6, "cpu": 200e6}
MOST_COPIES = 64
#: What a program may return, and how long a queue of its calls should take at least: one dispatch costs 1 ms on a GPU.
OUTPUT_BYTES = 4e9
QUEUE_US = {"cuda": 30e3, "cpu": 30e3}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Microseconds of one product by each implementation that takes it; ``fastest`` is what ``matmul`` will run."""

    device_kind: str
    format: str
    m: int
    k: int
    rows: int
    us: dict[str, float]

    @property
    def fastest(self) -> str:
        return min(self.us, key=self.us.__getitem__)


def tune(
    w: CompressedTensor,
    rows: Sequence[int] = ROWS,
    *,
    repeats: int = 5,
    cold_bytes: float | None = None,
    save: bool = True,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Measurement]:
    """Measures every implementation of ``x @ w`` for each number of rows of ``x`` on the device that holds ``w``.

    What is recorded is what :func:`jaxzip.matmul` takes from then on for this format, shape and kind of device, in
    programs that are traced later. Implementations differ in the order of accumulation, so results may differ in their
    last bits from those before; ``implementation=`` and ``batch_invariant=`` are not touched.

    Args:
      w: one compressed matrix; its values matter little, its format and shape do.
      rows: of x; each is rounded up to a power of two.
      repeats: of each timing; the median counts.
      cold_bytes: bytes of copies of ``w`` that are used in turns, so that caches do not help.
      save: whether to record in the user's table, see :func:`cache_file`.
      progress: called with the rows after each measurement.

    Raises:
      TypeError: ``w`` is a tracer or no compressed matrix in kernel order: nothing is timed inside a trace.
      NotImplementedError: no implementation takes this product here.
    """
    _check(w)
    platform, device = _platform(w)
    kind = measured.device_kind(platform) or platform
    m, k = w.matrix_shape
    count = math.ceil((cold_bytes or COLD_BYTES[platform]) / max(w.nbytes, 1))
    copies = copies_of(w, min(MOST_COPIES, max(1, count)))
    found = []
    for n in dict.fromkeys(measured.bucket(n) for n in rows):
        x = jax.device_put(jax.random.normal(jax.random.key(n), (n, k), jnp.bfloat16), device)
        us = {name: _microseconds(name, x, copies, platform, repeats) for name in candidates(x, w, platform)}
        if not us:
            raise NotImplementedError(
                f"tune: no implementation multiplies a {w.format} weight by {n} rows on {platform}"
            )
        found.append(Measurement(kind, w.format, m, k, n, us))
        if save:
            measured.record(kind, w.format, m, k, n, us)
        progress(n)
    return found


def candidates(x: jax.Array, w: CompressedTensor, platform: str) -> list[str]:
    """Names of the implementations that take this product, without those that nobody gets unasked."""
    options = {"out_dtype": jnp.dtype(jnp.bfloat16), "batch_invariant": False}
    names = registry.candidates("matmul", platform, x, w, None, None, **options)
    # Where both are there they are the same program, but for who decodes.
    return [name for name in names if name != registry.XLA or "decompress" not in names]


def copies_of(weight: Any, count: int) -> list:
    """``weight`` and ``count - 1`` copies of it in memory of their own."""
    return [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(count - 1))]


def launches_of(weights: int, product_bytes: float, output_bytes: float, *, most: int) -> int:
    """How often a program multiplies: whole rounds through its weights, within what it may return, but at least one."""
    return weights * max(1, min(most, int(output_bytes / product_bytes)) // weights)


def products(multiply: Callable[[Any, Any], Any], launches: int) -> Callable:
    """A jitted program of products of x ``[N, K]`` by weights in turns: ``(x, weights) -> (products, x)``.

    All products are returned, since XLA drops what nobody reads and copies what a loop carries. Operands stand behind
    the product before, since XLA merges products of one x or one weight; and every round through the weights has
    another x, since it computes once what is alike.
    """

    def run(x, weights):
        results = []
        for i in range(launches):
            x, w = jax.lax.optimization_barrier((x, weights[i % len(weights)]))
            x, y = jax.lax.optimization_barrier((x, multiply(x, w)))
            results.append(y)
            if i % len(weights) == len(weights) - 1:
                x = x.at[0, 0].set(y[0, 0].astype(x.dtype))
        return results, x

    return jax.jit(run)


def median_us(compiled: Callable, arguments: tuple, launches: int, repeats: int, calls: int) -> float:
    """Median microseconds of one of a program's ``launches``, over queues of ``calls`` calls."""
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            results = compiled(*arguments)
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / (calls * launches) * 1e6)
    return statistics.median(times)


def _microseconds(name: str, x: jax.Array, weights: list, platform: str, repeats: int) -> float:
    launches = launches_of(len(weights), 2 * x.shape[0] * weights[0].shape[1], OUTPUT_BYTES, most=MOST_COPIES)
    program = products(lambda x, w: matmul(x, w, implementation=name), launches)
    compiled = program.lower(x, weights).compile()
    once = median_us(compiled, (x, weights), launches, 1, 1)
    calls = max(1, math.ceil(QUEUE_US[platform] / (once * launches)))
    return median_us(compiled, (x, weights), launches, repeats, calls)


def _check(w: CompressedTensor) -> None:
    if not isinstance(w, CompressedTensor):
        raise TypeError(f"tune: w must be a CompressedTensor, got {type(w).__name__}")
    leaves = jax.tree.leaves(w)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError("tune measures on the device: call it outside of jit and other transformations")
    if w.ndim != 2 or w.output_axis != KERNEL_AXIS:
        raise TypeError(
            f"tune: w has shape {w.shape}, output axis {w.output_axis}; expected one matrix [K, M], or a table's .T"
        )


def _platform(w: CompressedTensor) -> tuple[str, jax.Device]:
    leaf = jnp.asarray(jax.tree.leaves(w)[0])
    device = min(leaf.devices(), key=lambda d: d.id)
    return ("cuda" if device.platform == "gpu" else device.platform), device
