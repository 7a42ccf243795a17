"""Autotuning: times implementations of ``matmul`` and their configurations on the device, and records them.

:mod:`jaxzip.ops.measured` keeps what was recorded and answers while programs are traced; nothing is timed then.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxzip.ops import measured, registry
from jaxzip.ops.matmul import matmul
from jaxzip.ops.measured import cache_file, disabled
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

__all__ = ["Measurement", "cache_file", "configurations", "disabled", "tune"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Copies of a weight together exceed the last cache: several times an H200's L2, more than most CPUs' L3.
COLD_BYTES = {"cuda": 420e6, "cpu": 200e6}
MOST_COPIES = 64
#: After each round through the copies x is changed, which takes 4 to 8 us on an H200.
FEWEST_COPIES = {"cuda": 4, "cpu": 1}
#: A loop's step costs 25 us on an H200 beside its products, whose instructions XLA compiles one by one. What
#: a step should take, about, by what memory gives; most products of one; and how many steps.
STEP_US, BYTES_PER_US = 1500, {"cuda": 4e6, "cpu": 2e4}
MOST_PRODUCTS, TRIPS = 64, {"cuda": 4, "cpu": 1}
#: How long a queue of calls should take at least: one dispatch costs 1 ms on a GPU.
QUEUE_US = {"cuda": 30e3, "cpu": 30e3}
#: An implementation whose own choice takes so many times the fastest's is not tried in other configurations.
HOPELESS = 1.5
#: A configuration must take at most so much of what the implementation's own choice takes to replace it.
WORTH = 0.99
#: Implementations that take up to so many times the fastest's are timed so often more, in turns: minutes apart, times
#: of one program differ by 8% on an H200, whose clock follows what it did before.
RIVAL, TURNS = 1.15, 3
#: Repeats in the first comparison of configurations; the best is timed again.
FIRST_REPEATS = 3
#: Threads that compile what will be timed, at most.
COMPILERS = 8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Microseconds of one product by each implementation that takes it, the preferred one first.

    ``fastest`` is what ``matmul`` will run: the preferred one unless another takes at most 0.98 of its time.
    ``configs`` has the configurations that took these times, of implementations that would have chosen another.
    """

    device_kind: str
    format: str
    m: int
    k: int
    rows: int
    us: dict[str, float]
    configs: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fastest(self) -> str:
        return registry.cheapest(list(self.us), self.us)  # measured in the order of preference


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

    Each is timed as it is, then those that are not far behind in their best configurations by their own models. What is
    recorded is what :func:`jaxzip.matmul` takes from then on for this format, shape and kind of device, in programs
    that are traced later: the fastest implementation (a tie leaves the preferred one), and of each, also one asked for
    by ``implementation=``, the fastest configuration. These differ in the order of accumulation, so results may differ
    in their last bits from those before; ``config=`` and ``batch_invariant=`` are not touched.

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
      CacheDirectoryError: the user's table cannot be written; nothing was measured.
    """
    _check(w)
    if save:
        measured.check_writable()
    platform, device = _platform(w)
    kind = measured.device_kind(platform) or platform
    m, k = w.matrix_shape
    count = math.ceil((cold_bytes or COLD_BYTES[platform]) / max(w.nbytes, 1))
    copies = copies_of(w, min(MOST_COPIES, max(FEWEST_COPIES[platform], count)))
    found = []
    for n in dict.fromkeys(measured.bucket(n) for n in rows):
        x = jax.device_put(jax.random.normal(jax.random.key(n), (n, k), jnp.bfloat16), device)
        if not candidates(x, w, platform):
            raise NotImplementedError(
                f"tune: no implementation multiplies a {w.format} weight by {n} rows on {platform}"
            )
        us, configs = _measure(x, copies, platform, repeats)
        found.append(Measurement(kind, w.format, m, k, n, us, configs))
        if save:
            measured.record(kind, w.format, m, k, n, us, configs)
        progress(n)
    return found


def configurations(w: CompressedTensor, rows: int) -> dict[str, tuple[str, ...]]:
    """What ``config`` may be in ``matmul(x [rows, K], w, implementation=name, config=config)``, by name.

    For the device that holds ``w`` and bfloat16 ``x``; only implementations that have configurations. The first of each
    is its own choice; the others are worth timing, and not all that there are.

    Raises:
      TypeError: ``w`` is a tracer or no compressed matrix in kernel order.
    """
    _check(w)
    platform, _ = _platform(w)
    x = jax.ShapeDtypeStruct((rows, w.matrix_shape[1]), jnp.bfloat16)
    listed = {name: _configurations(name, x, w, platform) for name in candidates(x, w, platform)}
    return {name: configs for name, configs in listed.items() if configs}


def _configurations(name: str, x, w: CompressedTensor, platform: str) -> tuple[str, ...]:
    options = {"out_dtype": jnp.dtype(jnp.bfloat16), "batch_invariant": False}
    return registry.configurations("matmul", name, platform, x, w, None, None, **options)


def candidates(x: jax.Array, w: CompressedTensor, platform: str) -> list[str]:
    """Names of the implementations that take this product, without those that nobody gets unasked."""
    options = {"out_dtype": jnp.dtype(jnp.bfloat16), "batch_invariant": False}
    names = registry.candidates("matmul", platform, x, w, None, None, **options)
    # Where both are there they are the same program, but for who decodes.
    return [name for name in names if name != registry.XLA or "decompress" not in names]


def copies_of(weight: Any, count: int) -> list:
    """``weight`` and ``count - 1`` copies of it in memory of their own."""
    return [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(count - 1))]


def rounds_of(weights: int, most: int) -> int:
    """How often a loop's body goes through its weights: as often as ``most`` products allow, but at least once."""
    return max(1, most // weights)


def products(multiply: Callable[[Any, Any], Any], rounds: int, trips: int) -> Callable:
    """A jitted program of ``trips`` times so many rounds of products of x ``[N, K]`` by each of the weights.

    ``(x, weights) -> x``. A loop, as one that generates tokens: its buffers stay where they are. A program without one
    would have new results in every call, whose addresses the host writes into each kernel of XLA's CUDA graphs, which
    can take longer than the kernels. A corner of every product goes into the next round's x, since XLA drops what
    nobody reads and computes once what is alike; operands stand behind the product before, since it merges products of
    one x or one weight.
    """
    multiply = jax.jit(multiply)  # traced and lowered once

    def one_round(x, weights):
        corners = []
        for weight in weights:
            x, w = jax.lax.optimization_barrier((x, weight))
            x, y = jax.lax.optimization_barrier((x, multiply(x, w)))
            corners.append(y[0, 0])
        corner = jnp.stack(corners).astype(jnp.float32).mean()
        return x.at[0, 0].set(jnp.clip(corner, -1, 1).astype(x.dtype))

    def run(x, weights):
        return jax.lax.fori_loop(0, trips, lambda _, x: functools.reduce(one_round, [weights] * rounds, x), x)

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


class _Timer:
    """One way to multiply, compiled: an implementation in a configuration, or in its own choice (``None``)."""

    def __init__(self, name: str, config: str | None, x: jax.Array, weights: list, platform: str):
        self._arguments, self._queue_us = (x, weights), QUEUE_US[platform]
        enough = math.ceil(STEP_US * BYTES_PER_US[platform] / max(weights[0].nbytes, 1))
        rounds, trips = rounds_of(len(weights), min(MOST_PRODUCTS, enough)), TRIPS[platform]
        self._launches = rounds * trips * len(weights)
        program = products(lambda x, w: matmul(x, w, implementation=name, config=config), rounds, trips)
        self._compiled = program.lower(*self._arguments).compile()

    def __call__(self, repeats: int) -> float:
        """Median microseconds of a product."""
        once = median_us(self._compiled, self._arguments, self._launches, 1, 1)
        calls = max(1, math.ceil(self._queue_us / (once * self._launches)))
        return median_us(self._compiled, self._arguments, self._launches, repeats, calls)


_Way = tuple[str, str | None]  # an implementation, and a configuration of it


def _measure(x: jax.Array, weights: list, platform: str, repeats: int) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of each implementation, and the configurations that took them where it would choose another."""
    own = [(name, None) for name in candidates(x, weights[0], platform)]
    timers = _compiled(own, x, weights, platform)
    us = {name: _or_raise(timers[name, None])(repeats) for name, _ in own}
    close = [name for name in us if us[name] <= HOPELESS * min(us.values())]
    ways = [(name, config) for name in close for config in _configurations(name, x, weights[0], platform)[1:]]
    timers |= _compiled(ways, x, weights, platform)
    configs = {}
    for name in close:
        first = {}
        for config in (config for other, config in ways if other == name):
            try:
                first[config] = _or_raise(timers[name, config])(min(FIRST_REPEATS, repeats))
            except _DOES_NOT_RUN as error:
                warnings.warn(
                    f"tune: {name} lists the configuration {config!r} for x {x.shape} and a weight {weights[0].shape}, "
                    f"but it does not run ({type(error).__name__}: {error}); passed over",
                    RuntimeWarning,
                    stacklevel=3,
                )
        best = min(first, key=first.__getitem__, default=None)
        if best is None or first[best] > WORTH * us[name]:
            continue
        own_us, best_us = timers[name, None](repeats), timers[name, best](repeats)  # side by side: clocks drift
        if best_us <= WORTH * own_us:
            configs[name], us[name] = best, best_us
    rivals = [name for name in us if us[name] <= RIVAL * min(us.values())]
    if len(rivals) > 1:
        turns = [{name: timers[name, configs.get(name)](repeats) for name in rivals} for _ in range(TURNS)]
        us |= {name: statistics.median(turn[name] for turn in turns) for name in rivals}
    return us, configs


_DOES_NOT_RUN = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)


def _compiled(ways: list[_Way], x: jax.Array, weights: list, platform: str) -> dict[_Way, _Timer | Exception]:
    """A timer of each way to multiply, or why it does not compile. What was recorded plays no part."""

    def compile(way: _Way) -> _Timer | Exception:
        try:
            return _Timer(*way, x, weights, platform)
        except _DOES_NOT_RUN as error:
            return error

    with disabled(), concurrent.futures.ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
        return dict(zip(ways, pool.map(compile, ways), strict=True))


def _or_raise(found: _Timer | Exception) -> _Timer:
    if isinstance(found, Exception):
        raise found
    return found


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
