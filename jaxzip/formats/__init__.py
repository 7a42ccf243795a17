"""Storage formats, one module each: layout, sizes, reference encode and decode, checks.

``base`` says what a format is; ``auto`` chooses among them.

    bf16  tca_tbe, lane_planar     fp16, fp32  split (a bf16 format and raw low bits)     fp8  window_fp8     any  raw

Nothing here knows of kernels, pytrees or files.
"""

from __future__ import annotations

from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload
from jaxzip.formats.lane_planar import LanePlanar
from jaxzip.formats.raw import Raw
from jaxzip.formats.split import SplitFp16, SplitFp32
from jaxzip.formats.tca_tbe import TcaTbe
from jaxzip.formats.window_fp8 import fp8_formats

_FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (TcaTbe(), LanePlanar(), SplitFp16(), SplitFp32(), *fp8_formats(), Raw())
}


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
