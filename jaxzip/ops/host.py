"""Encode, decode and validate one matrix on the host (NumPy in, NumPy out): conversion, verification, loading.

Each format has a reference; a backend may add a faster codec that must agree with it bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jaxzip import formats
from jaxzip.ops import registry

Payload = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HostCodec:
    """A fast codec: ``encode(bits[M, K]) -> payload``; ``decode(payload, out[M, K])``; ``validate(payload, m, k)``."""

    encode: Callable[[np.ndarray], formats.Payload]
    decode: Callable[[Payload, np.ndarray], None]
    validate: Callable[[Payload, int, int], None]


_codecs: dict[str, HostCodec] = {}


def register_host_codec(format_name: str, codec: HostCodec) -> None:
    """Adds the fast codec of a format; called by backends."""
    _codecs[format_name] = codec


def _fast(format_name: str, implementation: str | None) -> HostCodec | None:
    registry.load_backends()
    if implementation not in (None, "reference", "ffi"):
        raise ValueError(f"unknown host codec {implementation!r}; there are: reference, ffi")
    if implementation == "ffi" and format_name not in _codecs:
        raise ValueError(f"no fast codec of {format_name} here; there are: {', '.join(_codecs) or 'none'}")
    return None if implementation == "reference" else _codecs.get(format_name)


def encode(bits: np.ndarray, format_name: str, *, implementation: str | None = None) -> formats.Payload:
    """The exact, unpadded payload of ``bits`` uint16 ``[M, K]`` (any strides).

    Args:
      implementation: ``"reference"`` (NumPy), ``"ffi"`` (C++), or ``None`` for the best one here.

    Raises:
      ValueError: unknown format or implementation.
      OverflowError: more elements than the format can address.
    """
    fast = _fast(format_name, implementation)
    return fast.encode(bits) if fast else formats.get(format_name).encode(bits)


def decode(payload: Payload, format_name: str, out: np.ndarray, *, implementation: str | None = None) -> None:
    """Writes the 16 bits of every element into ``out`` uint16 ``[M, K]`` (any strides).

    The payload must be valid (see :func:`validate`).
    """
    fast = _fast(format_name, implementation)
    if fast:
        fast.decode(payload, out)
    else:
        out[...] = np.asarray(formats.get(format_name).decode(dict(payload), *out.shape))


def validate(payload: Payload, format_name: str, m: int, k: int, *, implementation: str | None = None) -> None:
    """Checks every length, offset and count that a kernel later trusts.

    Raises:
      CorruptDataError: naming the array, the place, what was expected and what was found.
    """
    fast = _fast(format_name, implementation)
    if fast:
        fast.validate(payload, m, k)
    else:
        formats.get(format_name).validate(payload, m, k)
