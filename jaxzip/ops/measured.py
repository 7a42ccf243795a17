"""What was measured: for every kind of device, format, shape and number of rows, the microseconds of implementations.

A time is a number, or ``{"us": number, "config": name}`` where a configuration of the implementation took it that the
implementation would not have chosen by itself.

Two layers of JSON: files that come with the package (``measurements/*.json``) and one in the user's cache
directory, which goes first. The table is read when a program is traced; a compiled program keeps what it was given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from jaxzip import formats
from jaxzip.errors import CacheDirectoryError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

VERSION = 2
#: Tables of version 1 have no configurations.
READABLE = (1, 2)
#: ``off`` (or ``0``): the table is not consulted.
SWITCH = "JAXZIP_TUNING"
#: Directory of the user's table, instead of the platform's cache directory.
DIRECTORY = "JAXZIP_CACHE_DIR"
SHIPPED = Path(__file__).parent / "measurements"

Times = dict[str, float]  # microseconds by implementation
Entry = float | dict[str, float | str]  # an implementation's, as in the file

_disabled = 0
_epoch = 1
_recording = threading.Lock()


def cache_file() -> Path:
    """The user's table: ``$JAXZIP_CACHE_DIR``, ``$XDG_CACHE_HOME/jaxzip`` or ``~/.cache/jaxzip``, ``tuning.json``.

    Raises:
      CacheDirectoryError: none of these is set, and there is no home directory.
    """
    if directory := os.environ.get(DIRECTORY):
        return Path(directory) / "tuning.json"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxzip" / "tuning.json"
    except RuntimeError as error:
        raise CacheDirectoryError(
            f"no directory for the table of measurements ({error}); set {DIRECTORY} to one"
        ) from None


def check_writable() -> None:
    """Tries what :func:`record` will do, before anything is measured.

    Raises:
      CacheDirectoryError: there is no cache directory, or it cannot be written.
    """
    path = cache_file()
    with _only_writer(path), tempfile.TemporaryFile(dir=path.parent):
        pass


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Programs traced inside take the built-in order of implementations, whatever was measured."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def is_on() -> bool:
    return not _disabled and os.environ.get(SWITCH, "").lower() not in ("off", "0", "false")


def epoch() -> int:
    """Part of what identifies a trace: 0 where the table is off, else another number after every change of it."""
    return _epoch if is_on() else 0


def device_kind(platform_name: str) -> str | None:
    """The kind of device that a table is for, or ``None`` if there is none of this platform (``cpu``, ``cuda``)."""
    if platform_name == "cpu":
        return f"{_processor()}, {os.cpu_count()} threads"
    try:
        devices = jax.local_devices(backend=platform_name)
    except RuntimeError:
        return None
    return devices[0].device_kind


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def bucket(rows: int) -> int:
    """Rows of x are measured at powers of two; others take the next larger one."""
    return 1 << max(0, rows - 1).bit_length()


def key(format: str, m: int, k: int, rows: int) -> str:
    """Names a product: x ``[rows, K]`` times a weight of ``M`` output features.

    With the format's version: other versions have other kernels, of which nothing is known.
    """
    return f"{format} v{formats.get(format).version} {m}x{k} n{bucket(rows)}"


def times(kind: str, format: str, m: int, k: int, rows: int) -> Times | None:
    """What was measured for this product on this kind of device, or ``None``."""
    found = _entries(kind, format, m, k, rows)
    return found and {name: _us(entry) for name, entry in found.items()}


def config(kind: str, format: str, m: int, k: int, rows: int, implementation: str) -> str | None:
    """The fastest configuration of an implementation; ``None``: its own choice, or nothing was measured."""
    entry = (_entries(kind, format, m, k, rows) or {}).get(implementation)
    return entry.get("config") if isinstance(entry, dict) else None


def _us(entry: Entry) -> float:
    return entry["us"] if isinstance(entry, dict) else entry


def _entries(kind: str, format: str, m: int, k: int, rows: int) -> Mapping[str, Entry] | None:
    if not is_on():
        return None
    name = key(format, m, k, rows)
    for layer in (_user_layer(), _shipped_layer()):
        if found := layer.get(kind, {}).get(name):
            return found
    return None


def record(
    kind: str, format: str, m: int, k: int, rows: int, measured: Times, configs: Mapping[str, str] | None = None
) -> None:
    """Adds a measurement to the user's table, in place of an earlier one. Other processes may write meanwhile.

    ``configs`` are the configurations that took these times, of implementations that would choose another.

    Raises:
      CacheDirectoryError: there is no cache directory, or it cannot be written.
    """
    global _epoch
    path = cache_file()
    entries: dict[str, Entry] = {name: round(us, 3) for name, us in measured.items()}
    entries |= {name: {"us": entries[name], "config": config} for name, config in (configs or {}).items()}
    with _only_writer(path):
        devices = _read(path)
        devices.setdefault(kind, {})[key(format, m, k, rows)] = entries
        content = json.dumps({"version": VERSION, "unit": "us", "devices": devices}, indent=1, sort_keys=True)
        _replace(path, content)
        _user_layer_of.cache_clear()
        _epoch += 1


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    """Makes the table's directory; one thread of one process at a time is inside. What fails is the directory's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _recording, open(path.with_suffix(".lock"), "w") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise CacheDirectoryError(
            f"{path.parent}, for the table of measurements, cannot be written ({error}); set {DIRECTORY} to a "
            "directory that can"
        ) from error


def _replace(path: Path, content: str) -> None:
    """Writes a file in one step, or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def forget() -> None:
    """Drops what was read, and what was traced with it: for a change that is not made by :func:`record`."""
    global _epoch
    _user_layer_of.cache_clear()
    _shipped_layer.cache_clear()
    _epoch += 1


def _user_layer() -> Mapping[str, Mapping[str, Mapping[str, Entry]]]:
    try:
        return _user_layer_of(cache_file())
    except CacheDirectoryError:  # nowhere to look
        return {}


@functools.lru_cache(maxsize=4)
def _user_layer_of(path: Path) -> Mapping[str, Mapping[str, Mapping[str, Entry]]]:
    return _read(path)


@functools.cache
def _shipped_layer() -> Mapping[str, Mapping[str, Mapping[str, Entry]]]:
    layer: dict[str, dict[str, dict[str, Entry]]] = {}
    for path in sorted(SHIPPED.glob("*.json")):
        for kind, rows in _read(path).items():
            layer.setdefault(kind, {}).update(rows)
    return layer


def _read(path: Path) -> dict[str, dict[str, dict[str, Entry]]]:
    """The devices of a table; empty if there is no such file, or if it is not one (said in a warning)."""
    try:
        content = json.loads(path.read_text())
        if content["version"] not in READABLE:
            raise ValueError(f"version {content['version']}, this jaxzip reads {' and '.join(map(str, READABLE))}")
        devices = content["devices"]
        for entry in (entry for rows in devices.values() for found in rows.values() for entry in found.values()):
            if not _us(entry) > 0:
                raise ValueError("a time that is not positive")
            if isinstance(entry, dict) and not isinstance(entry.get("config", ""), str):
                raise ValueError("a configuration that is not a string")
        return devices
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"jaxzip: {path} is no table of measurements ({type(error).__name__}: {error}); it is ignored, and "
            "replaced by the next measurement: delete it or run `jaxzip tune` again",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
