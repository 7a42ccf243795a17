"""fp16, fp32 and fp8 beside the operations for bf16: their codecs on the host, and the decode of split tensors.

A split tensor's head is a bf16 tensor in a format of its own: whatever is fast there decodes it (C++ on the host, an
FFI handler on a CPU or a GPU), and XLA joins the low bits to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip import formats
from jaxzip.formats import bit_groups
from jaxzip.formats.split import LOW, SplitFormat
from jaxzip.formats.window_fp8 import WindowFp8
from jaxzip.ops import host
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

Payload = Mapping[str, np.ndarray]


def is_split(z: CompressedTensor) -> bool:
    """Whether ``z`` has a head in a bf16 format."""
    return isinstance(formats.get(z.format), SplitFormat)


def decompress_split(z: CompressedTensor, decompress: Callable[[CompressedTensor], jax.Array]) -> jax.Array:
    """The dense array of a split tensor or a stack of them; ``decompress`` decodes its head."""
    fmt = formats.get(z.format)
    head = CompressedTensor(
        fmt.head_payload(z.payload), z.core_shape, fmt.head.dtypes[0], fmt.head.name, z.output_axis, fmt.head.version
    )
    rows = jax.lax.bitcast_convert_type(decompress(head), jnp.uint16)
    if z.output_axis == KERNEL_AXIS:
        rows = rows.swapaxes(-1, -2)
    bits = fmt.merge(rows, z.payload[LOW])
    return jax.lax.bitcast_convert_type(bits.swapaxes(-1, -2) if z.output_axis == KERNEL_AXIS else bits, z.dtype)


def _encode_split(fmt: SplitFormat, bits: np.ndarray) -> formats.Payload:
    head, low = fmt.split(bits)
    return host.encode(head, fmt.head.name) | {LOW: low}


def _decode_split(fmt: SplitFormat, payload: Payload, out: np.ndarray) -> None:
    head = np.empty(out.shape, np.uint16)
    host.decode(fmt.head_payload(payload), fmt.head.name, head)
    for rows in bit_groups.slabs(*out.shape):
        out[rows] = fmt.merge(head[rows], payload[LOW][rows], np)


def _validate_split(fmt: SplitFormat, payload: Payload, m: int, k: int) -> None:
    fmt.check_low(payload, m, k)
    host.validate(fmt.head_payload(payload), fmt.head.name, m, k)


def _decode_fp8(fmt: WindowFp8, payload: Payload, out: np.ndarray) -> None:
    out[...] = fmt.decode_on_host(payload, *out.shape)


def _register() -> None:
    for name in formats.names():
        fmt = formats.get(name)
        if isinstance(fmt, SplitFormat):
            parts = (functools.partial(f, fmt) for f in (_encode_split, _decode_split, _validate_split))
            host.register_host_codec(name, host.HostCodec(*parts))
        elif isinstance(fmt, WindowFp8):
            host.register_host_codec(
                name, host.HostCodec(fmt.encode, functools.partial(_decode_fp8, fmt), fmt.validate)
            )


_register()
