"""Values of a Hugging Face config, read by their key: one of another kind is refused by key and value.

Where there is a ``default``, it is for a key that is missing or ``null``; without, a missing key is a KeyError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxzip.errors import JaxzipError

CONFIG = "config: "
_REQUIRED = object()


class UnsupportedConfigError(JaxzipError, ValueError):
    """A model configuration asks for something that this implementation does not compute, or contradicts itself."""


def or_default(value, default):
    """``value``, and ``default`` for ``None``: a config's ``null``."""
    return default if value is None else value


def whole(hf: Mapping[str, Any], key: str, default: Any = _REQUIRED, *, least: int = 1, where: str = CONFIG) -> Any:
    """An integer from ``least`` on."""
    value = _value(hf, key, default)
    if value is default:
        return default
    if not _is_int(value) or value < least:
        raise _refused(where, key, value, "a positive integer" if least == 1 else f"an integer from {least} on")
    return value


def number(
    hf: Mapping[str, Any], key: str, default: Any = _REQUIRED, *, zero: bool = False, where: str = CONFIG
) -> Any:
    """A positive finite number, or one in quotes, as a float; with ``zero`` also 0."""
    value = _value(hf, key, default)
    if value is default:
        return default
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (0 <= found < math.inf if zero else 0 < found < math.inf):
        raise _refused(where, key, value, "a number from 0 on" if zero else "a positive number")
    return found


def flag(hf: Mapping[str, Any], key: str, default: bool, *, where: str = CONFIG) -> bool:
    """``true`` or ``false``."""
    value = _value(hf, key, default)
    if not isinstance(value, bool):
        raise _refused(where, key, value, "true or false")
    return value


def mapping(hf: Mapping[str, Any], key: str, *, where: str = CONFIG) -> Mapping[str, Any]:
    """An object; an empty one for a key that is missing or ``null``."""
    value = _value(hf, key, {})
    if not isinstance(value, Mapping):
        raise _refused(where, key, value, "an object or null")
    return value


def items(hf: Mapping[str, Any], key: str, kind: type, *, where: str = CONFIG) -> tuple:
    """A list whose items are of a kind (``int``, ``str``); an empty one for a key that is missing or ``null``."""
    value = _value(hf, key, ())
    if not _is_list(value, kind):
        raise _refused(where, key, value, f"a list of {'integers' if kind is int else 'strings'}, or null")
    return tuple(value)


def token_id(hf: Mapping[str, Any], key: str, *, where: str = CONFIG) -> int | None:
    """The id of a token, if there is one."""
    value = hf.get(key)
    if value is not None and not _is_int(value):
        raise _refused(where, key, value, "an integer or null")
    return value


def token_ids(hf: Mapping[str, Any], key: str, *, where: str = CONFIG) -> tuple[int, ...]:
    """Ids of tokens: none, one or a list."""
    value = _value(hf, key, ())
    ids = [value] if _is_int(value) else value
    if not _is_list(ids, int):
        raise _refused(where, key, value, "an integer, a list of integers, or null")
    return tuple(ids)


def _value(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    return hf[key] if default is _REQUIRED else or_default(hf.get(key), default)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(item) is kind for item in value)


def _refused(where: str, key: str, value: Any, expected: str) -> UnsupportedConfigError:
    return UnsupportedConfigError(f"{where}{key} is {value!r}, expected {expected}")
