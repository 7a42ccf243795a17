"""fp16 and fp32 split in two: a head of 16 bits that a bf16 format takes, and the low mantissa bits as they are.

    fp16  s eeeee mmmmmmm mmm                   head = s | eeeee + 112 | mmmmmmm,   low = the last 3 bits
    fp32  s eeeeeeee mmmmmmm mmmmmmmm mmmmmmmm  head = s | eeeeeeee    | mmmmmmm,   low = the last 2 bytes

112 is the difference of the two biases: the head of a normal fp16 number is that number cut to bf16, and fp16's window
is one of its own exponents. Mantissas have no redundancy, so low is stored raw, but for trailing planes that are zero
in the whole tensor: an fp32 tensor that was bf16 once has no low at all, an fp16 one that was bf16 neither.

Sizes on Gaussian weights, in bits a weight: fp16 11.3 + 3, fp32 11.3 + 16. There is no fused kernel: matmul decodes.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip.formats import bit_groups
from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload, check_field_shapes
from jaxzip.formats.tca_tbe import TcaTbe

LOW = "low"
_FP16_BIAS_DIFFERENCE = 127 - 15
_LOW_BITS = 3
_LOW_BYTES = 2


class SplitFormat(Format):
    """The arrays of the head's format, and ``low``: uint8 ``[M, ..., P]`` of the ``P`` planes that are not all zero.

    Planes are ordered from the most significant, so that a stack of tensors pads ``low`` with zeros at its end.
    """

    version = 1
    #: The format of the head, one for bf16.
    head: Format = TcaTbe()
    #: Most planes that ``low`` can have.
    planes: int

    @abc.abstractmethod
    def split(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Head uint16 ``[M, K]`` and ``low`` of ``bits`` ``[M, K]``, unsigned integers of the dtype's width."""

    @abc.abstractmethod
    def merge(self, head, low, xp: ModuleType = jnp) -> jax.Array | np.ndarray:
        """The bits of head uint16 ``[..., M, K]`` and ``low``; ``xp`` is ``numpy`` or ``jax.numpy``."""

    @abc.abstractmethod
    def _low_shape(self, m: int, k: int) -> tuple[int | None, ...]: ...

    def head_payload(self, payload: Mapping) -> dict:
        """The arrays of the head."""
        return {name: array for name, array in payload.items() if name != LOW}

    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        return self.head.fields(m, k) | {LOW: FieldSpec(np.dtype(np.uint8), self._low_shape(m, k))}

    def encode(self, bits: np.ndarray) -> Payload:
        head, low = self.split(bits)
        return self.head.encode(head) | {LOW: low}

    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        return self.merge(self.head.decode(self.head_payload(payload), m, k), payload[LOW])

    def check_low(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        """The part of :meth:`validate` that is not the head's.

        Raises:
          CorruptDataError: see :meth:`validate`.
        """
        from jaxzip.errors import CorruptDataError

        check_field_shapes(self, payload, m, k)
        found = payload[LOW].shape[-1]
        if found > self.planes:
            raise CorruptDataError(f"{self.name}: low has {found} planes, at most {self.planes}; convert it again")

    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        self.check_low(payload, m, k)
        self.head.validate(self.head_payload(payload), m, k)

    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        return self.head.coverage(self.head_payload(payload), m, k)

    def bucket_lengths(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> dict[str, int]:
        return self.head.bucket_lengths(self.head_payload(payload), m, k) | {LOW: payload[LOW].shape[-1]}


class SplitFp16(SplitFormat):
    """fp16; ``low`` is uint8 ``[M, ceil(K / 8), P]``, bit planes of the 3 low bits, see ``bit_groups``."""

    name = "split-fp16"
    dtypes = (np.dtype(np.float16),)
    planes = _LOW_BITS

    def _low_shape(self, m: int, k: int) -> tuple[int | None, ...]:
        return (m, bit_groups.groups(k), None)

    def split(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        head = np.empty(bits.shape, np.uint16)
        for rows in bit_groups.slabs(*bits.shape):
            slab = np.ascontiguousarray(bits[rows])
            magnitude = (slab & 0x7FFF) >> _LOW_BITS
            head[rows] = (slab & 0x8000) | (magnitude + (_FP16_BIAS_DIFFERENCE << 7))
        used = int(np.bitwise_or.reduce(bits, axis=None)) & ((1 << _LOW_BITS) - 1)
        lowest = (used & -used).bit_length() - 1 if used else _LOW_BITS
        return head, bit_groups.pack(bits, tuple(range(_LOW_BITS - 1, lowest - 1, -1)))

    def merge(self, head, low, xp: ModuleType = jnp) -> jax.Array | np.ndarray:
        planes = tuple(_LOW_BITS - 1 - i for i in range(low.shape[-1]))
        fields = bit_groups.unpack(low, planes, head.shape[-1], xp)
        magnitude = ((head & 0x7FFF) - xp.uint16(_FP16_BIAS_DIFFERENCE << 7)) << _LOW_BITS
        return (head & 0x8000) | (magnitude & 0x7FFF) | fields.astype(xp.uint16)


class SplitFp32(SplitFormat):
    """fp32; ``low`` is uint8 ``[M, K, P]``, the two low bytes of each weight, the more significant one first."""

    name = "split-fp32"
    dtypes = (np.dtype(np.float32),)
    planes = _LOW_BYTES

    def _low_shape(self, m: int, k: int) -> tuple[int | None, ...]:
        return (m, k, None)

    def split(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        used = int(np.bitwise_or.reduce(bits, axis=None))
        count = 2 if used & 0xFF else 1 if used & 0xFF00 else 0
        head, low = np.empty(bits.shape, np.uint16), np.empty((*bits.shape, count), np.uint8)
        for rows in bit_groups.slabs(*bits.shape):
            slab = np.ascontiguousarray(bits[rows])
            head[rows] = slab >> 16
            for i in range(count):
                low[rows, :, i] = slab >> (8 - 8 * i)
        return head, low

    def merge(self, head, low, xp: ModuleType = jnp) -> jax.Array | np.ndarray:
        bits = head.astype(xp.uint32) << 16
        for i in range(low.shape[-1]):
            bits = bits | low[..., i].astype(xp.uint32) << (8 - 8 * i)
        return bits
