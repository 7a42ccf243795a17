"""Encode, decode and validate one matrix on the host (NumPy in, NumPy out): conversion, verification, loading.

Each format has a reference; a backend may add a faster codec that must agree with it bit for bit, and a transcoder
from one format to another that never holds the whole matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxzip import formats
from jaxzip.ops import registry
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

Payload = Mapping[str, np.ndarray]
_LINE = 64


@dataclasses.dataclass(frozen=True)
class HostCodec:
    """A fast codec: ``encode(bits[M, K]) -> payload``; ``decode(payload, out[M, K])``; ``validate(payload, m, k)``."""

    encode: Callable[[np.ndarray], formats.Payload]
    decode: Callable[[Payload, np.ndarray], None]
    validate: Callable[[Payload, int, int], None]


Transcoder = Callable[[Payload, int, int], formats.Payload]

_codecs: dict[str, HostCodec] = {}
_transcoders: dict[tuple[str, str], Transcoder] = {}


def register_host_codec(format_name: str, codec: HostCodec) -> None:
    """Adds the fast codec of a format; called by backends."""
    _codecs[format_name] = codec


def register_transcoder(source: str, target: str, transcode: Transcoder) -> None:
    """Adds ``transcode(payload, m, k)`` from format ``source`` to ``target``; called by backends."""
    _transcoders[source, target] = transcode


def _fast(format_name: str, implementation: str | None) -> HostCodec | None:
    registry.load_backends()
    if implementation not in (None, "reference", "ffi"):
        raise ValueError(f"unknown host codec {implementation!r}; there are: reference, ffi")
    if implementation == "ffi" and format_name not in _codecs:
        raise ValueError(f"no fast codec of {format_name} here; there are: {', '.join(_codecs) or 'none'}")
    return None if implementation == "reference" else _codecs.get(format_name)


def encode(bits: np.ndarray, format_name: str, *, implementation: str | None = None) -> formats.Payload:
    """The exact, unpadded payload of ``bits`` ``[M, K]`` (any strides), unsigned integers of the dtype's width.

    Args:
      implementation: ``"reference"`` (NumPy), ``"ffi"`` (C++), or ``None`` for the best one here.

    Raises:
      ValueError: unknown format or implementation.
      OverflowError: more elements than the format can address.
    """
    fast = _fast(format_name, implementation)
    return fast.encode(bits) if fast else formats.get(format_name).encode(bits)


def decode(payload: Payload, format_name: str, out: np.ndarray, *, implementation: str | None = None) -> None:
    """Writes the bits of every element into ``out`` ``[M, K]`` (any strides), unsigned integers of the dtype's width.

    The payload must be valid (see :func:`validate`).
    """
    fast = _fast(format_name, implementation)
    if fast:
        fast.decode(payload, out)
    else:
        out[...] = np.asarray(_decode_by_reference(dict(payload), format_name, *out.shape))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _decode_by_reference(payload: Payload, format_name: str, m: int, k: int) -> jax.Array:
    """One program for payloads of the same sizes: run operation by operation, its loops are compiled for every call."""
    return formats.get(format_name).decode(payload, m, k)


def transcode(
    payload: Payload, source: str, target: str, m: int, k: int, *, implementation: str | None = None
) -> formats.Payload:
    """The payload that :func:`encode` makes of the matrix ``[m, k]`` that ``payload`` (valid) stands for.

    With a backend's transcoder 64 rows at a time are dense; without, the whole matrix.
    """
    _fast(source, implementation)
    if implementation != "reference" and (source, target) in _transcoders:
        return _transcoders[source, target](payload, m, k)
    dense = np.empty((m, k), np.uint16)
    decode(payload, source, dense, implementation=implementation)
    return encode(dense, target, implementation=implementation)


def bits(array: np.ndarray) -> np.ndarray:
    """``array`` as unsigned integers of its dtype's width, without a copy."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def matrix(z: CompressedTensor, index: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The payload of one matrix of a stack, on the host."""
    return {name: np.asarray(array[index]) for name, array in z.payload.items()}


def dense(z: CompressedTensor, *, swapped: bool = False) -> np.ndarray:
    """The array that ``z`` (valid) stands for, C-contiguous, decoded without JAX; ``swapped``: its last two axes."""
    if z.format == "raw":
        values = np.asarray(z.payload["values"])
        return values.swapaxes(-1, -2) if swapped != z.raw_transposed else values
    shape = (*z.shape[:-2], *z.shape[:-3:-1]) if swapped else z.shape
    out = _empty_aligned(shape, z.dtype)
    rows = bits(out)  # [..., M, K]: what the codec fills, whatever the order of the result
    if swapped != (z.output_axis == KERNEL_AXIS):
        rows = rows.swapaxes(-1, -2)
    for index in np.ndindex(z.batch_shape):
        decode(matrix(z, index), z.format, rows[index])
    return out


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array on a 64-byte boundary, as decoders write past the cache only to whole lines."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


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
