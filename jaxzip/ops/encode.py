"""Encoding of one matrix on the host: the fast encoder where it is there, the NumPy reference where not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxzip import formats

Encoder = Callable[[np.ndarray], formats.Payload]
_fast: dict[str, Encoder] = {}


def register_encoder(format_name: str, encoder: Encoder) -> None:
    """Adds a fast encoder of ``bits`` uint16 ``[M, K]`` (any strides); it must equal the format's own bit for bit."""
    _fast[format_name] = encoder


def encode(bits: np.ndarray, format_name: str, *, implementation: str | None = None) -> formats.Payload:
    """Encodes ``bits`` uint16 ``[M, K]`` to the exact, unpadded payload of ``format_name`` (host arrays).

    Args:
      implementation: ``"reference"`` (NumPy), ``"ffi"`` (C++), or ``None`` for the best one here.

    Raises:
      ValueError: unknown format or implementation, or more elements than the format can address.
    """
    from jaxzip.ops import registry

    registry.load_backends()
    if implementation not in (None, "reference", "ffi"):
        raise ValueError(f"encode: unknown implementation {implementation!r}; there are: reference, ffi")
    if implementation == "ffi" and format_name not in _fast:
        raise ValueError(f"encode: no fast encoder of {format_name} here; there are: {', '.join(_fast) or 'none'}")
    fast = None if implementation == "reference" else _fast.get(format_name)
    return fast(bits) if fast else formats.get(format_name).encode(bits)
