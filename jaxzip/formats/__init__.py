"""Storage formats, one module each: layout, sizes, reference encode and decode, checks.

``base`` says what a format is; ``tca_tbe``, ``lane_planar`` and ``raw`` are formats, ``auto`` chooses among them.
Nothing here knows of kernels, pytrees or files.
"""

from __future__ import annotations

from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload
from jaxzip.formats.lane_planar import LanePlanar
from jaxzip.formats.raw import Raw
from jaxzip.formats.tca_tbe import TcaTbe

_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (TcaTbe(), LanePlanar(), Raw())}


def names() -> tuple[str, ...]:
    """Names of the formats that this version knows."""
    return tuple(_FORMATS)


def get(name: str) -> Format:
    """The format called ``name``.

    Raises:
      ValueError: no such format; the message lists those that exist.
    """
    try:
        return _FORMATS[name]
    except KeyError:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(_FORMATS)}") from None


__all__ = ["Coverage", "FieldSpec", "Format", "Payload", "get", "names"]
