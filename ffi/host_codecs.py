"""The C++ codecs and transcoders on NumPy arrays, as ``jaxzip.ops.host`` wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxzip.ffi.format_ops import BY_FORMAT
from jaxzip.ffi.libraries import cpu_module

from jaxzip import formats
from jaxzip.errors import CorruptDataError
from jaxzip.ops.host import HostCodec, register_host_codec, register_transcoder

TCA_TBE = "tca-tbe"
LANE_PLANAR = "lane-planar"
Payload = Mapping[str, np.ndarray]


def register_host_codecs() -> None:
    """Registers every codec and transcoder of the extension module."""
    cpu = cpu_module()
    register_host_codec(
        TCA_TBE,
        HostCodec(_encoder(cpu.encode_tca_tbe), _decoder(cpu.decode_tca_tbe, _tca_tbe), check_tca_tbe),
    )
    register_host_codec(
        LANE_PLANAR,
        HostCodec(_encoder(cpu.encode_lane_planar), _decoder(cpu.decode_lane_planar, _lane_planar), check_lane_planar),
    )
    register_transcoder(TCA_TBE, LANE_PLANAR, _transcoder(TCA_TBE, cpu.tca_tbe_to_lane_planar, _tca_tbe))
    register_transcoder(LANE_PLANAR, TCA_TBE, _transcoder(LANE_PLANAR, cpu.lane_planar_to_tca_tbe, _lane_planar))


def check_tca_tbe(payload: Payload, m: int, k: int) -> None:
    """The format's validation, in C++.

    Raises:
      CorruptDataError: naming the array, the place, what was expected and what was found.
    """
    with _Corrupt(TCA_TBE):
        cpu_module().check_tca_tbe(*_tca_tbe(payload), m, k)


def check_lane_planar(payload: Payload, m: int, k: int) -> None:
    """The format's validation, in C++, in the reference's words.

    Raises:
      CorruptDataError: naming the array, the place and what is wrong with it.
    """
    formats.get(LANE_PLANAR).check_shapes(payload, m, k)
    with _Corrupt(LANE_PLANAR):
        cpu_module().check_lane_planar(*_lane_planar(payload), m, k)


class _Corrupt:
    """Turns the extension's ValueError into a CorruptDataError of a format."""

    def __init__(self, format: str):
        self.format = format

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ValueError):
            raise CorruptDataError(f"{self.format}: {error}") from None


def _tca_tbe(payload: Payload) -> list[np.ndarray]:
    return [payload[name] for name in BY_FORMAT[TCA_TBE].fields]


def _lane_planar(payload: Payload) -> list[np.ndarray]:
    return [payload[name] for name in BY_FORMAT[LANE_PLANAR].fields]


def _encoder(encode: Callable[[np.ndarray], Payload]) -> Callable[[np.ndarray], Payload]:
    # Fields of records lie at any byte; C++ wants elements where their type does.
    return lambda bits: encode(bits if bits.flags.aligned else bits.copy())


def _decoder(decode: Callable[..., None], arrays: Callable) -> Callable[[Payload, np.ndarray], None]:
    return lambda payload, out: decode(*arrays(payload), out)


def _transcoder(source: str, transcode: Callable[..., Payload], arrays: Callable) -> Callable[..., Payload]:
    def run(payload: Payload, m: int, k: int) -> Payload:
        with _Corrupt(source):
            return transcode(*arrays(payload), m, k)

    return run
