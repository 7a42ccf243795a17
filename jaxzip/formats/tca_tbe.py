"""TCA-TBE, the Tensor-Core-Aware Triple Bitmap Encoding of bf16 weights (ZipServ, ASPLOS'26, arXiv 2603.17435).

A weight whose exponent lies in a window of 7 consecutive exponents is a 3-bit code (one bit in each of three bitmaps)
and a sign+mantissa byte; every other weight is code 0 and keeps its 16 bits.

    matrix W[M, K]                    BlockTile 64x64              band 16x64: four 16x16       16x16: FragTiles 8x8
    +----+----+----+                  +--------------+             +-----+-----+-----+-----+    +----+----+
    | B0 | B1 | B2 |  row-major       | band 0 16x64 |             |  0  |  1  |  2  |  3  |    | 0  | 2  |
    +----+----+----+  over blocks     | band 1       |             +-----+-----+-----+-----+    +----+----+
    | B3 | B4 | B5 |                  | band 2, 3    |                                          | 1  | 3  |
    +----+----+----+                  +--------------+             position in a FragTile: row * 8 + column
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxzip.errors import CorruptDataError
from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload, check_field_shapes

BLOCK = 64
BAND_ROWS = 16
FRAG = 8
POSITIONS = FRAG * FRAG
FRAGS_PER_BLOCK = (BLOCK // FRAG) ** 2
FRAGS_PER_BAND = FRAGS_PER_BLOCK // (BLOCK // BAND_ROWS)
BANDS_PER_BLOCK = BLOCK // BAND_ROWS
WINDOW = 7
MAX_START_EXP = 255 - WINDOW
SIGN_MANTISSA_ALIGN = 16
FULL_ALIGN = 8
#: The two data-dependent arrays are padded in steps of 1/512 of the matrix size (and at least MIN_BUCKET values).
BUCKET_FRACTION = 512
MIN_BUCKET = 64

_EXPONENT_SHIFT = 7
# A matrix [M, K] reshaped to these axes and permuted is in FragTile order, see the picture above.
_SPLIT_AXES = (0, 4, 1, 5, 6, 2, 3, 7)
_MERGE_AXES = tuple(int(i) for i in np.argsort(_SPLIT_AXES))


def block_grid(m: int, k: int) -> tuple[int, int]:
    """Number of BlockTiles along M and along K."""
    return -(-m // BLOCK), -(-k // BLOCK)


def choose_start_exp(bits: np.ndarray) -> int:
    """``start_exp``: one below the first of the 7 consecutive exponents (>= 1) that cover most elements.

    Ties go to the lowest window. The window never contains exponent 0, whose code would underflow.
    """
    histogram = np.bincount(((bits >> _EXPONENT_SHIFT) & 0xFF).ravel(), minlength=256)
    total = np.concatenate([[0], np.cumsum(histogram)])
    starts = np.arange(1, 256 - WINDOW + 1)
    return int(starts[np.argmax(total[starts + WINDOW] - total[starts])]) - 1


def _to_frag_order(padded: np.ndarray) -> np.ndarray:
    rows, cols = padded.shape
    split = padded.reshape(rows // BLOCK, BANDS_PER_BLOCK, 2, FRAG, cols // BLOCK, 4, 2, FRAG)
    return split.transpose(_SPLIT_AXES).reshape(-1, POSITIONS)


def _aligned_runs(values: np.ndarray, counts: np.ndarray, align: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays the runs of ``counts`` values out with each start aligned; returns (array, starts plus the total)."""
    padded = -(-counts // align) * align
    starts = np.concatenate([[0], np.cumsum(padded)])
    out = np.zeros(starts[-1], values.dtype)
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    out[np.repeat(starts[:-1] - before, counts) + np.arange(values.size)] = values
    return out, starts


def _pair(bits64: np.ndarray) -> np.ndarray:
    """uint64 ``[n]`` as uint32 ``[n, 2]``, low word first: JAX has no uint64 without x64 mode."""
    return np.ascontiguousarray(bits64).astype("<u8").view("<u4").reshape(-1, 2)


class TcaTbe(Format):
    """See the module's docstring; array by array, ``F`` FragTiles and ``B`` BlockTiles:

    ============== ====== ============ =====================================================================
    array          dtype  shape        content
    ============== ====== ============ =====================================================================
    start_exp      uint8  []           exponent = start_exp + code
    bitmap1..3     uint32 [F, 2]       bit p of the code's bit 0..2 at position p; low word first
    sign_mantissa  uint8  [S]          sign << 7 | mantissa of the elements with code != 0
    full           uint16 [U]          the 16 bits of the elements with code == 0
    tile_offsets   uint32 [B + 1, 2]   each BlockTile's start in sign_mantissa and in full, then the totals
    band_offsets   int32  [4 B, 2]     each band's start, relative to its BlockTile
    ============== ====== ============ =====================================================================
    """

    name = "tca-tbe"
    version = 1
    dtypes = (np.dtype(ml_dtypes.bfloat16),)

    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        blocks = int(np.prod(block_grid(m, k)))
        bitmap = FieldSpec(np.dtype(np.uint32), (blocks * FRAGS_PER_BLOCK, 2))
        return {
            "start_exp": FieldSpec(np.dtype(np.uint8), ()),
            "bitmap1": bitmap,
            "bitmap2": bitmap,
            "bitmap3": bitmap,
            "sign_mantissa": FieldSpec(np.dtype(np.uint8), (None,)),
            "full": FieldSpec(np.dtype(np.uint16), (None,)),
            "tile_offsets": FieldSpec(np.dtype(np.uint32), (blocks + 1, 2)),
            "band_offsets": FieldSpec(np.dtype(np.int32), (blocks * BANDS_PER_BLOCK, 2)),
        }

    def encode(self, bits: np.ndarray) -> Payload:
        m, k = bits.shape
        start_exp = choose_start_exp(bits)
        grid = block_grid(m, k)
        # Padding is cheap and never escapes: it has code 1 and a zero sign+mantissa byte.
        padded = np.full((grid[0] * BLOCK, grid[1] * BLOCK), (start_exp + 1) << _EXPONENT_SHIFT, np.uint16)
        padded[:m, :k] = bits
        elements = _to_frag_order(padded)
        code = ((elements >> _EXPONENT_SHIFT) & 0xFF).astype(np.int16) - start_exp
        code[(code < 1) | (code > WINDOW)] = 0
        planes = [
            np.packbits(((code >> bit) & 1).astype(np.uint8), axis=1, bitorder="little").view("<u8").ravel()
            for bit in range(3)
        ]
        inside = code != 0
        sign_mantissa = (((elements >> 8) & 0x80) | (elements & 0x7F)).astype(np.uint8)
        per_frag = inside.sum(1)
        per_block = per_frag.reshape(-1, FRAGS_PER_BLOCK).sum(1)
        low, low_starts = _aligned_runs(sign_mantissa[inside], per_block, SIGN_MANTISSA_ALIGN)
        full, full_starts = _aligned_runs(elements[~inside], BLOCK * BLOCK - per_block, FULL_ALIGN)
        if max(low_starts[-1], full_starts[-1]) > np.iinfo(np.uint32).max:
            raise OverflowError(f"tca-tbe: offsets of a {m}x{k} matrix do not fit 32 bits; store it raw or split it")
        per_band = per_frag.reshape(-1, BANDS_PER_BLOCK, FRAGS_PER_BAND).sum(2)
        band_low = np.cumsum(per_band, axis=1) - per_band
        band_full = np.arange(BANDS_PER_BLOCK) * BAND_ROWS * BLOCK - band_low
        return {
            "start_exp": np.asarray(start_exp, np.uint8),
            "bitmap1": _pair(planes[0]),
            "bitmap2": _pair(planes[1]),
            "bitmap3": _pair(planes[2]),
            "sign_mantissa": low,
            "full": full,
            "tile_offsets": np.stack([low_starts, full_starts], -1).astype(np.uint32),
            "band_offsets": np.stack([band_low.ravel(), band_full.ravel()], -1).astype(np.int32),
        }

    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        grid_m, grid_k = block_grid(m, k)
        if payload["sign_mantissa"].shape[0] > np.iinfo(np.int32).max:
            raise NotImplementedError("the XLA reference of tca-tbe indexes with 32 bits: at most 2^31 - 1 elements")
        start_exp = payload["start_exp"].astype(jnp.uint16)
        # An exact payload may have no element of a kind; XLA does not gather from empty arrays.
        sign_mantissa, full = (
            payload[name] if payload[name].shape[0] else jnp.zeros(1, payload[name].dtype)
            for name in ("sign_mantissa", "full")
        )

        def decode_block_row(row):
            bitmaps, offsets = row
            return _decode_frags(bitmaps, offsets, start_exp, sign_mantissa, full)

        # One row of BlockTiles at a time: the reference needs some 40 bytes per weight while it runs.
        bitmaps = jnp.stack([payload[f"bitmap{i}"] for i in (1, 2, 3)], 1).reshape(grid_m, -1, 3, 2)
        offsets = payload["tile_offsets"][:-1].astype(jnp.int32).reshape(grid_m, grid_k, 2)
        frags = jax.lax.map(decode_block_row, (bitmaps, offsets))
        split = frags.reshape(grid_m, grid_k, BANDS_PER_BLOCK, 4, 2, 2, FRAG, FRAG)
        return split.transpose(_MERGE_AXES).reshape(grid_m * BLOCK, grid_k * BLOCK)[:m, :k]

    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        check_field_shapes(self, payload, m, k)
        if int(payload["start_exp"]) > MAX_START_EXP:
            raise CorruptDataError(f"tca-tbe: start_exp is {int(payload['start_exp'])}, at most {MAX_START_EXP}")
        inside = _popcounts(payload)
        per_block = inside.reshape(-1, FRAGS_PER_BLOCK).sum(1)
        offsets = payload["tile_offsets"].astype(np.int64)
        runs = ((0, "sign_mantissa", SIGN_MANTISSA_ALIGN, per_block), (1, "full", FULL_ALIGN, BLOCK**2 - per_block))
        for column, name, align, counts in runs:
            want = np.concatenate([[0], np.cumsum(-(-counts // align) * align)])
            wrong = np.flatnonzero(offsets[:, column] != want)
            if wrong.size:
                i = int(wrong[0])
                raise CorruptDataError(
                    f"tca-tbe: tile_offsets[{i}, {column}] (start in {name}) is {offsets[i, column]}, the bitmaps say "
                    f"{want[i]}; the tensor is corrupt, convert it again from its source"
                )
            if want[-1] > payload[name].shape[0]:
                raise CorruptDataError(
                    f"tca-tbe: {name} has {payload[name].shape[0]} values, the offsets need {want[-1]}: it is truncated"
                )
        per_band = inside.reshape(-1, BANDS_PER_BLOCK, FRAGS_PER_BAND).sum(2)
        band_low = np.cumsum(per_band, axis=1) - per_band
        band_full = np.arange(BANDS_PER_BLOCK) * BAND_ROWS * BLOCK - band_low
        want = np.stack([band_low.ravel(), band_full.ravel()], -1)
        wrong = np.argwhere(payload["band_offsets"] != want)
        if wrong.size:
            i, column = (int(v) for v in wrong[0])
            raise CorruptDataError(
                f"tca-tbe: band_offsets[{i}, {column}] is {payload['band_offsets'][i, column]}, the bitmaps say "
                f"{want[i, column]}; the tensor is corrupt, convert it again from its source"
            )

    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        inside = _popcounts(payload)
        return Coverage(size=m * k, escapes=int(inside.size * POSITIONS - inside.sum()))

    def bucket_lengths(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> dict[str, int]:
        # The escapes determine both lengths up to alignment, so one bucket serves both: the number of traces is the
        # number of buckets of `full`, not a product. At least one step, so that no kernel sees an empty array.
        blocks = int(np.prod(block_grid(m, k)))
        step = max(MIN_BUCKET, m * k // BUCKET_FRACTION // MIN_BUCKET * MIN_BUCKET)
        full = max(step, -(-payload["full"].shape[-1] // step) * step)
        slack = blocks * (SIGN_MANTISSA_ALIGN - 1 + FULL_ALIGN - 1)
        low = min(blocks * BLOCK**2, blocks * BLOCK**2 - full + step + slack)
        return {"sign_mantissa": -(-low // SIGN_MANTISSA_ALIGN) * SIGN_MANTISSA_ALIGN, "full": full}


def _popcounts(payload: Mapping[str, np.ndarray]) -> np.ndarray:
    """Elements inside the window, per FragTile."""
    inside = payload["bitmap1"] | payload["bitmap2"] | payload["bitmap3"]
    return np.bitwise_count(inside).astype(np.int64).sum(1)


def _decode_frags(bitmaps, offsets, start_exp, sign_mantissa, full):
    """Bits of the elements of one row of BlockTiles: ``bitmaps[F, 3, 2]``, ``offsets[B, 2]`` -> uint16 ``[F, 64]``."""
    shifts = jnp.arange(32, dtype=jnp.uint32)
    planes = ((bitmaps[..., None] >> shifts) & 1).reshape(-1, 3, POSITIONS).astype(jnp.int32)
    code = planes[:, 0] + 2 * planes[:, 1] + 4 * planes[:, 2]
    inside = code != 0
    blocks = offsets.shape[0]
    taken = inside.reshape(blocks, -1).astype(jnp.int32)
    rank = jnp.cumsum(taken, axis=1) - taken
    position = jnp.arange(BLOCK * BLOCK, dtype=jnp.int32)
    low_index = (offsets[:, :1] + rank).reshape(code.shape)
    full_index = (offsets[:, 1:] + position - rank).reshape(code.shape)
    low = jnp.take(sign_mantissa, low_index, mode="clip").astype(jnp.uint16)
    exponent = (start_exp + code.astype(jnp.uint16)) << _EXPONENT_SHIFT
    from_code = ((low & 0x80) << 8) | exponent | (low & 0x7F)
    return jnp.where(inside, from_code, jnp.take(full, full_index, mode="clip"))
