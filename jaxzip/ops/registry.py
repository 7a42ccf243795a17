"""The table of implementations of each operation, and the choice among them.

An operation (``matmul``, ``decompress``, ``take``) has a plain XLA implementation that always works. Backends add
theirs through entry points of the group ``jaxzip.backends``: each names a function that calls :func:`register`. So no
operation names a backend, and a machine without one just has fewer names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxzip.ops.unavailable import unavailable

ENTRY_POINT_GROUP = "jaxzip.backends"
XLA = "xla"
_PLATFORMS = ("cpu", "cuda")
#: What priorities prefer gives way to what costs at most so much of it. Times of one program differ by up to 3% on an
#: H200 under load, and another implementation adds in another order: a tie should not change a result's last bits.
WORTH = 0.98


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    ``check(*args, **options)`` sees the operation's arguments (arrays may be tracers) and raises
    ``NotImplementedError`` with a reason when ``fn`` cannot take them; ``platforms`` limits where it runs
    (``None``: everywhere). Higher ``priority`` is tried first. ``configurations`` sees what ``check`` sees, and names
    those that ``fn`` takes as its option ``config``, the one that it takes unasked first.
    """

    name: str
    fn: Callable[..., Any]
    check: Callable[..., None]
    platforms: tuple[str, ...] | None
    priority: int
    configurations: Callable[..., Sequence[str]] | None = None


#: Given a platform and an operation's arguments, what implementations cost there, by name, or ``None`` if not known.
CostTable = Callable[..., Mapping[str, float] | None]

_registry: dict[str, list[Implementation]] = {}
_costs: dict[str, CostTable] = {}
_missing: dict[str, str] = {}


def register(
    op: str,
    name: str,
    fn: Callable[..., Any],
    *,
    check: Callable[..., None] = lambda *args, **options: None,
    platforms: tuple[str, ...] | None = None,
    priority: int = 0,
    configurations: Callable[..., Sequence[str]] | None = None,
) -> None:
    """Adds implementation ``name`` of ``op``; a backend may register one per platform."""
    _registry.setdefault(op, []).append(Implementation(name, fn, check, platforms, priority, configurations))
    _registry[op].sort(key=lambda impl: -impl.priority)


def choose_by(op: str, costs: CostTable) -> None:
    """``costs(platform, *args, **options)`` decides if the caller named nothing, and priorities where that is a tie."""
    _costs[op] = costs


def cheapest(preferred: Sequence[str], costs: Mapping[str, float]) -> str:
    """The name that costs least, unless the first one, in order of preference, costs about as much."""
    first, best = preferred[0], min(preferred, key=lambda name: costs.get(name, math.inf))
    return best if costs.get(best, math.inf) <= WORTH * costs.get(first, math.inf) else first


def report_missing(name: str, reason: str) -> None:
    """Records why backend ``name`` (or a part of it) is not there; shown when a user asks for it by name."""
    _missing[name] = f"{_missing[name]}; {reason}" if name in _missing else reason


_loading = threading.RLock()


def load_backends() -> None:
    """Imports the backends, once; one that cannot be imported is reported and left out. Threads wait for the first."""
    with _loading:
        _load_once()


@functools.cache
def _load_once() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()()
        except ImportError as error:
            report_missing(entry.name, f"{type(error).__name__}: {error}")
            warnings.warn(f"jaxzip: backend {entry.name!r} is not available: {error}", RuntimeWarning, stacklevel=3)


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of ``op`` on this installation, in the order in which they are tried."""
    load_backends()
    return tuple(dict.fromkeys(impl.name for impl in _registry[op]))


def candidates(op: str, platform: str, *args, **options) -> list[str]:
    """Names of the implementations that take these arguments on ``platform``, those left out that need asking for."""
    load_backends()
    return list(dict.fromkeys(impl.name for impl in _usable(op, None, args, options)[0] if _is_for(impl, platform)))


def configurations(op: str, name: str, platform: str, *args, **options) -> tuple[str, ...]:
    """Configurations of implementation ``name`` for these arguments, what it takes unasked first; or none."""
    load_backends()
    for impl in _usable(op, name, args, options)[0]:
        if platform in (impl.platforms or _PLATFORMS):
            return tuple(impl.configurations(*args, **options)) if impl.configurations else ()
    return ()


def _is_for(impl: Implementation, platform: str) -> bool:
    return platform in (impl.platforms or _PLATFORMS) and impl.priority >= 0


def _usable(op: str, name: str | None, args, options) -> tuple[list[Implementation], list[str]]:
    """Implementations that take these arguments, and why others do not."""
    usable: list[Implementation] = []
    reasons: list[str] = []
    for impl in _registry[op]:
        if name in (None, impl.name):
            try:
                impl.check(*args, **options)
                usable.append(impl)
            except NotImplementedError as error:
                reasons.append(f"{impl.name} ({'/'.join(impl.platforms or ('any',))}): {error}")
    return usable, reasons


def run(op: str, implementation: str | None, *args, **options):
    """Runs ``op`` by the implementation asked for, or by the best one that takes these arguments.

    The platform is the one that the surrounding computation is lowered for, not the process's default. What the user
    has JAX think of arrays of different ranks is about the user's code: implementations are traced with JAX's default.

    Raises:
      ValueError: ``implementation`` is not a known name; lists the known ones and why others are missing.
      NotImplementedError: nothing can run these arguments (or nothing on the platform for which the program is
        compiled, which shows then); lists every reason.
    """
    names = implementations(op)
    if implementation is not None and implementation not in names:
        reason = (
            f" ({implementation} is missing here: {_missing[implementation]})" if implementation in _missing else ""
        )
        raise ValueError(f"{op}: unknown implementation {implementation!r}; there are: {', '.join(names)}{reason}")
    with jax.numpy_rank_promotion("allow"):
        return _run_best(op, implementation, args, options)


def _run_best(op: str, implementation: str | None, args, options):
    usable, reasons = _usable(op, implementation, args, options)
    branches = {}
    for platform in _PLATFORMS:
        here = [impl for impl in usable if platform in (impl.platforms or _PLATFORMS)]
        if implementation is None and len(here) > 1 and op in _costs:
            costs = _costs[op](platform, *args, **options) or {}
            best = cheapest([impl.name for impl in here], costs)
            here.sort(key=lambda impl: impl.name != best)  # stable: priorities decide among the others
        if here:
            branches[platform] = here[0]
    default = next((impl for impl in usable if impl.platforms is None), None)
    missing = [f"{name}: {why}" for name, why in _missing.items()]
    refusal = f"{op}: no implementation takes these arguments here: {'; '.join(reasons + missing)}"
    if not branches:
        raise NotImplementedError(refusal)
    if default is not None and all(impl is default for impl in branches.values()):
        return default.fn(*args, **options)
    calls = {platform: functools.partial(impl.fn, **options) for platform, impl in branches.items()}
    if default is not None:
        calls["default"] = functools.partial(default.fn, **options)
    elif len(branches) < len(_PLATFORMS):
        shapes = jax.eval_shape(next(iter(calls.values())), *args)
        calls["default"] = lambda *_: unavailable(shapes, refusal)
    return jax.lax.platform_dependent(*args, **calls)
