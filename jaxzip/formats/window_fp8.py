"""fp8 weights (e4m3fn, e5m2): a window of exponents of its own, every weight in a fixed place, escapes listed apart.

    weight      s eeee mmm                       field of a weight inside the window, E + M bits or fewer
    code        exponent - start_exp, b bits     +--------+---+----------+
    escape      exponent outside the window      | code b | s | mantissa |     stored as bit planes, see bit_groups
                                                 +--------+---+----------+
    chunk of 2^(16 - E) weights, row-major: entry = exponent << (16 - E) | position, one for each escape

``b`` is what takes the fewest bytes: 3 on Gaussian weights, which then take 7.2 bits (e4m3fn) or 6.2 (e5m2). Of eight
bits only the exponent's four or five have redundancy: e4m3fn hardly shrinks. There is no fused kernel: matmul decodes.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxzip.errors import CorruptDataError
from jaxzip.formats import bit_groups
from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload, check_field_shapes

_ENTRY_BITS = 16
#: ``escapes`` is padded in steps of 1/512 of the matrix size (and at least MIN_BUCKET entries).
BUCKET_FRACTION = 512
MIN_BUCKET = 64


class WindowFp8(Format):
    """See the module's docstring; array by array, for ``C`` chunks:

    ========= ====== ==================== ================================================================
    array     dtype  shape                content
    ========= ====== ==================== ================================================================
    start_exp uint8  []                   exponent = start_exp + code
    fields    uint8  [M, ceil(K/8), P]    planes of mantissa, sign, code (from its lowest bit); zero code for escapes
    escapes   uint16 [V]                  exponent and position in its chunk of every escape, in order; then zeros
    starts    uint32 [C + 1]              each chunk's first entry in escapes, then the total
    ========= ====== ==================== ================================================================

    The code comes last, so that a stack of tensors of several widths pads ``fields`` with zeros at its end.
    """

    version = 1

    def __init__(self, name: str, dtype: np.dtype):
        info = ml_dtypes.finfo(dtype)
        self.name = name
        self.dtypes = (np.dtype(dtype),)
        self.exponent_bits = info.nexp
        self.mantissa_bits = info.nmant
        self._position_bits = _ENTRY_BITS - info.nexp
        #: Weights of a chunk.
        self.chunk = 1 << self._position_bits
        self._first_code_plane = info.nmant + 1

    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        return {
            "start_exp": FieldSpec(np.dtype(np.uint8), ()),
            "fields": FieldSpec(np.dtype(np.uint8), (m, bit_groups.groups(k), None)),
            "escapes": FieldSpec(np.dtype(np.uint16), (None,)),
            "starts": FieldSpec(np.dtype(np.uint32), (self._chunks(m, k) + 1,)),
        }

    def choose_window(self, exponents: np.ndarray) -> tuple[int, int]:
        """``(start_exp, b)``: the first exponent and the width of the code that take the fewest bits.

        Ties go to the narrower code, then to the lower window.
        """
        count = 1 << self.exponent_bits
        histogram = sum(
            np.bincount(exponents[rows].ravel(), minlength=count) for rows in bit_groups.slabs(*exponents.shape)
        )
        total = np.concatenate([[0], np.cumsum(histogram)])
        best = None
        for width in range(self.exponent_bits + 1):
            starts = np.arange(count - (1 << width) + 1)
            covered = total[starts + (1 << width)] - total[starts]
            start = int(np.argmax(covered))
            cost = width * exponents.size + _ENTRY_BITS * (exponents.size - int(covered[start]))
            if best is None or cost < best[0]:
                best = cost, start, width
        return best[1:]

    def encode(self, bits: np.ndarray) -> Payload:
        """As in :class:`Format`; ``bits`` are uint8 ``[M, K]``.

        Raises:
          OverflowError: more than 2^32 - 1 escapes.
        """
        m, k = bits.shape
        bits = np.ascontiguousarray(bits)
        exponents = (bits & 0x7F) >> self.mantissa_bits
        start_exp, width = self.choose_window(exponents)
        code = exponents - np.uint8(start_exp)  # wraps below the window
        outside = code >= 1 << width
        code[outside] = 0
        sign_mantissa = (bits >> 7 << self.mantissa_bits) | (bits & ((1 << self.mantissa_bits) - 1))
        values = sign_mantissa | code << self._first_code_plane
        where = np.flatnonzero(outside)
        if where.size > np.iinfo(np.uint32).max:
            raise OverflowError(f"{self.name}: {where.size} escapes, at most 2^32 - 1")
        per_chunk = np.bincount(where >> self._position_bits, minlength=self._chunks(m, k))
        position = (where & (self.chunk - 1)).astype(np.uint16)
        return {
            "start_exp": np.array(start_exp, np.uint8),
            "fields": bit_groups.pack(values, tuple(range(self._first_code_plane + width))),
            "escapes": position | exponents.ravel()[where].astype(np.uint16) << self._position_bits,
            "starts": np.concatenate([[0], np.cumsum(per_chunk)]).astype(np.uint32),
        }

    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        values, exponents = self._unpack(payload, k, jnp)
        chunks = self._chunks(m, k)
        entry = payload["escapes"]
        index = jnp.arange(entry.shape[0], dtype=jnp.uint32)
        # Padding lies past the last chunk, and is dropped.
        chunk = jnp.searchsorted(payload["starts"][1:], index, side="right")
        flat = jnp.pad(exponents.reshape(-1), (0, chunks * self.chunk - m * k)).reshape(chunks, self.chunk)
        listed = (entry >> self._position_bits).astype(jnp.uint8)
        flat = flat.at[chunk, entry & (self.chunk - 1)].set(listed, mode="drop")
        return self._join(values, flat.reshape(-1)[: m * k].reshape(m, k))

    def decode_on_host(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> np.ndarray:
        """:meth:`decode` without JAX: uint8 ``[m, k]`` of a valid payload."""
        values, exponents = self._unpack(payload, k, np)
        starts = payload["starts"].astype(np.int64)
        entry = payload["escapes"][: starts[-1]]
        chunk = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        exponents = np.ascontiguousarray(exponents)
        exponents.reshape(-1)[chunk * self.chunk + (entry & (self.chunk - 1))] = entry >> self._position_bits
        return self._join(values, exponents)

    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        check_field_shapes(self, payload, m, k)
        planes = payload["fields"].shape[-1]
        if not self._first_code_plane <= planes <= 8:
            self._refuse(f"fields has {planes} planes, expected {self._first_code_plane} to 8")
        if int(payload["start_exp"]) >= 1 << self.exponent_bits:
            self._refuse(f"start_exp is {int(payload['start_exp'])}, expected less than {1 << self.exponent_bits}")
        starts = payload["starts"].astype(np.int64)
        counts = np.diff(starts)
        wrong = np.flatnonzero((counts < 0) | (counts > self.chunk))
        if starts[0] != 0 or wrong.size:
            place = int(wrong[0]) + 1 if starts[0] == 0 else 0
            self._refuse(f"starts[{place}] is {starts[place]}, expected 0 first and then up to {self.chunk} more each")
        entry = payload["escapes"].astype(np.int64)
        if starts[-1] > entry.size:
            self._refuse(f"escapes has {entry.size} entries, starts needs {starts[-1]}: it is truncated")
        if entry[starts[-1] :].any():
            self._refuse(f"escapes has entries past the {starts[-1]} that starts counts")
        position = np.repeat(np.arange(counts.size), counts) * self.chunk + (entry[: starts[-1]] & (self.chunk - 1))
        disordered = np.flatnonzero(np.diff(position, append=m * k) <= 0)
        if disordered.size:
            self._refuse(f"escapes[{int(disordered[0])}] is out of order or outside the matrix")

    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        return Coverage(size=m * k, escapes=int(payload["starts"][-1]))

    def bucket_lengths(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> dict[str, int]:
        step = max(MIN_BUCKET, m * k // BUCKET_FRACTION // MIN_BUCKET * MIN_BUCKET)
        entries = max(step, -(-payload["escapes"].shape[-1] // step) * step)
        return {"fields": payload["fields"].shape[-1], "escapes": entries}

    def _chunks(self, m: int, k: int) -> int:
        return -(-m * k // self.chunk)

    def _unpack(self, payload, k: int, xp):
        """Fields, and exponents with zero codes where there are escapes, both uint8 ``[M, k]``."""
        packed = payload["fields"]
        values = bit_groups.unpack(packed, tuple(range(packed.shape[-1])), k, xp)
        return values, payload["start_exp"] + (values >> self._first_code_plane)

    def _join(self, values, exponents):
        mantissa = values & ((1 << self.mantissa_bits) - 1)
        return (values >> self.mantissa_bits & 1) << 7 | (exponents << self.mantissa_bits & 0x7F) | mantissa

    def _refuse(self, problem: str) -> None:
        raise CorruptDataError(f"{self.name}: {problem}; the tensor is corrupt, convert it again from its source")


def fp8_formats() -> tuple[WindowFp8, ...]:
    """The two formats of fp8."""
    return (
        WindowFp8("window-fp8-e4m3fn", ml_dtypes.float8_e4m3fn),
        WindowFp8("window-fp8-e5m2", ml_dtypes.float8_e5m2),
    )
