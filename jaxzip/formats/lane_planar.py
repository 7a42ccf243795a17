"""Lane-planar: bf16 weights laid out for a Hopper kernel, every weight in a fixed place, escapes apart.

A weight is its lower byte and three bits of the upper one, its code: the sign, and the two last, which belong to the
exponent. The five bits between are a constant, except for the few escapes, which are listed. Rows are scaled by a power
of two first, so that the constant is 01111.

    block of 64 rows x 64 k (u32 words)                               tile of 16 rows x 64 k: an A operand of mma
    0               1024           1408   1409       1410             lane = 4 g + t, k-step j, register r, half h:
    +---------------+--------------+------+----------+-------------+    row = g + 8 (r & 1)
    | lower bytes   | codes        | ends | overflow | u16 entries |    column = 16 j + 2 t + 8 (r >> 1) + h
    | 4 tiles x 256 | 4 tiles x 96 |      |          | (up to 124) |  position, of a byte: tile<<10 | (j>>1)<<9 |
    +---------------+--------------+------+----------+-------------+    lane<<4 | (j&1)<<3 | (r>>1)<<2 | h<<1 | (r&1)

A register's two weights are then two byte permutations away from a word of lower and a word of upper bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxzip.errors import CorruptDataError
from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload, check_field_shapes

BLOCK = 64
TILES = 4
POSITIONS = BLOCK * BLOCK
WINDOW = 8
#: First exponent of every row's window once it is shifted.
WINDOW_START = 120
MAX_SHIFT = 40
#: Rows with a weight outside these exponents (2^-63 to 2^64) are not shifted: unless activations are as extreme, no sum
#: then overflows or becomes subnormal that would not have done so unshifted.
MIN_SHIFTED, MAX_SHIFTED = 64, 190
CODE_START = 1024
HEADER = 1408
OVERFLOW_WORD = 1409
ENTRY_START = 1410
#: Block sizes in words. Each is a product of two numbers up to 256, the inner one a multiple of 4, as TMA wants boxes.
WIDTHS = (1424, 1440, 1456, 1464, 1472)
#: The narrowest width is taken that holds the escapes of all but this share of the blocks.
OVERFLOW_SHARE = 1 / 128
MIN_OVERFLOW_BUCKET = 64

#: Bits of a code in each upper byte of a word, and of them the sign and the exponent.
CODES, SIGNS, EXPONENTS = (np.uint32(mask) for mask in (0x83838383, 0x80808080, 0x03030303))
#: Words of lower bytes that a lane has of a tile.
LANE_WORDS = 8
#: Bits of an entry that tell a position in a pair of tiles; above are the five high exponent bits.
ENTRY_POSITION_BITS = 11
CONSTANT_HIGH = 15
PADDING = WINDOW_START << 7
_CHUNK = 1 << 22  # elements that the encoder works on at a time

# [M, K] as (row block, tile, r & 1, g, k block, j >> 1, j & 1, r >> 1, t, h), permuted, is in position order.
_SPLIT = (TILES, 2, 8), (2, 2, 2, 4, 2)
_TO_POSITIONS = (0, 4, 1, 5, 3, 8, 6, 7, 9, 2)
_FROM_POSITIONS = tuple(int(i) for i in np.argsort(_TO_POSITIONS))


def block_grid(m: int, k: int) -> tuple[int, int]:
    """Number of blocks along M and along K."""
    return -(-m // BLOCK), -(-k // BLOCK)


def room(width: int) -> int:
    """Entries that fit into a block of ``width`` words."""
    return 2 * (width - ENTRY_START)


def choose_width(overflowing: Sequence[float]) -> int:
    """Words of a block, given the share of blocks that would overflow at each of ``WIDTHS``."""
    return next((width for width, share in zip(WIDTHS, overflowing) if share <= OVERFLOW_SHARE), WIDTHS[-1])


def overflow_bucket(used: int) -> int:
    """Words that are stored for an overflow list of ``used`` words, so that tensors of one shape share traces."""
    return max(MIN_OVERFLOW_BUCKET, 1 << max(0, used - 1).bit_length())


def choose_shifts(bits: np.ndarray) -> np.ndarray:
    """int8 ``[M]``: what to add to the exponents of each row so that its best window of 8 becomes 120..127.

    Ties go to the lowest window. 0 where the shift exceeds MAX_SHIFT or the row has a nonzero weight outside of
    MIN_SHIFTED..MAX_SHIFTED (subnormals among them): the kernel multiplies by the shifted weights and scales the sums.
    """
    m = bits.shape[0]
    exponents = ((bits >> 7) & 0xFF).astype(np.int64) + np.arange(m)[:, None] * 256
    histogram = np.bincount(exponents.ravel(), minlength=256 * m).reshape(m, 256)
    total = np.concatenate([np.zeros((m, 1), np.int64), histogram.cumsum(1)], 1)
    starts = np.arange(1, 256 - WINDOW)
    covered = total[:, starts + WINDOW] - total[:, starts]
    shift = WINDOW_START - starts[covered.argmax(1)]
    normal = histogram[:, 1:255] > 0
    lowest = normal.argmax(1) + 1
    highest = 254 - normal[:, ::-1].argmax(1)
    subnormal = (((bits & 0x7F80) == 0) & ((bits & 0x7F) != 0)).any(1)
    safe = (
        (covered.max(1) > 0)
        & (abs(shift) <= MAX_SHIFT)
        & (lowest >= MIN_SHIFTED)
        & (highest <= MAX_SHIFTED)
        & ~subnormal
    )
    return np.where(safe, shift, 0).astype(np.int8)


def shift_exponents(values, shifts, where):
    """Adds each row's shift to the exponents of normal numbers; zeros, subnormals, infinities and NaN keep theirs."""
    exponent = (values >> 7) & 0xFF
    moved = (exponent + shifts) & 0xFF
    return (values & 0x807F) | where((exponent == 0) | (exponent == 255), exponent, moved) << 7


def _positions(bits: np.ndarray, shifts: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Chunks of row blocks: (their slice, uint16 ``[blocks, 4096]`` shifted weights in position order)."""
    m, k = bits.shape
    rows, columns = block_grid(m, k)
    step = max(1, _CHUNK // (columns * POSITIONS))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        part = bits[start * BLOCK : stop * BLOCK]
        padded = np.full(((stop - start) * BLOCK, columns * BLOCK), PADDING, np.uint16)
        scale = shifts[start * BLOCK : stop * BLOCK].astype(np.uint16)[:, None]
        padded[: part.shape[0], :k] = shift_exponents(part, scale, np.where)
        split = padded.reshape(stop - start, *_SPLIT[0], columns, *_SPLIT[1]).transpose(_TO_POSITIONS)
        yield slice(start * columns, stop * columns), split.reshape(-1, POSITIONS)


def _escapes(elements: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block, position and five high exponent bits of every escape, in order."""
    high = shifted_high(elements)
    block, position = np.nonzero(high != CONSTANT_HIGH)
    return block, position, high[block, position].astype(np.uint32)


def shifted_high(elements):
    """The five high exponent bits of weights whose exponents are shifted: ``CONSTANT_HIGH`` but for escapes."""
    return (elements >> 10) & 31


def code_words(upper):
    """Three words a lane from eight words of upper bytes.

    Words 0 to 2 as they are, 3 to 5 rotated left by 3; of 6 and 7 the exponent bits are in words 0 and 1, the signs in
    word 2.

    Args:
      upper: eight uint32 arrays, of bits of ``CODES`` only.
    """
    words = [upper[i] | upper[3 + i] << 3 | upper[3 + i] >> 29 for i in range(3)]
    for i in range(2):
        words[i] |= (upper[6 + i] & EXPONENTS) << 5
        words[2] |= (upper[6 + i] & SIGNS) >> (1 + i)
    return words


def upper_words(codes):
    """The reverse: eight words of upper bytes, without high exponent bits."""
    rotated = [c >> 3 | c << 29 for c in codes]
    last = [codes[2] << (1 + i) & SIGNS | codes[i] >> 5 & EXPONENTS for i in range(2)]
    return [word & CODES for word in (*codes, *rotated)] + last


def entry_of(position, high):
    """An entry of a block, of an escape's position and five high exponent bits."""
    return position & (1 << ENTRY_POSITION_BITS) - 1 | high << ENTRY_POSITION_BITS


def _planes(elements: np.ndarray) -> np.ndarray:
    """uint32 ``[blocks, 1408]``: the words of lower bytes and of codes."""
    n = elements.shape[0]
    lower = elements.astype(np.uint8).view("<u4")
    upper = (elements >> 8).astype(np.uint8).view("<u4")
    lanes = (upper & CODES).reshape(n, TILES, 2, 32, 4).transpose(2, 4, 0, 1, 3).reshape(LANE_WORDS, n, TILES, 32)
    return np.concatenate([lower, join_codes(code_words(lanes), np).reshape(n, -1)], 1)


def join_codes(words, numpy):
    """``[..., 96]``: two words of each lane, then the third of each, ``words`` being three arrays ``[..., 32]``."""
    pairs = numpy.stack(words[:2], -1).reshape(*words[0].shape[:-1], 64)
    return numpy.concatenate([pairs, words[2]], -1)


class LanePlanar(Format):
    """See the module's docstring; array by array, for ``R x C`` blocks:

    ========= ====== ============ ==========================================================================
    array     dtype  shape        content
    ========= ====== ============ ==========================================================================
    shift     int8   [64 R]       stored exponent = exponent + shift of its row
    blocks    uint32 [R, C, W]    ends: four u8, entries before the end of tile 0..3; overflow: 0, or 1 + index of
                                  the block's first overflow entry; entry: position without its first bit | five
                                  high exponent bits << 11, in order of position
    overflow  uint32 [2 V]        1 + block, position | five high exponent bits << 12: escapes that have no room in
                                  their block, in order; zeros at the end are padding
    ========= ====== ============ ==========================================================================
    """

    name = "lane-planar"
    version = oldest_version = 2
    dtypes = (np.dtype(ml_dtypes.bfloat16),)

    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        rows, columns = block_grid(m, k)
        return {
            "shift": FieldSpec(np.dtype(np.int8), (rows * BLOCK,)),
            "blocks": FieldSpec(np.dtype(np.uint32), (rows, columns, None)),
            "overflow": FieldSpec(np.dtype(np.uint32), (None,)),
        }

    def encode(self, bits: np.ndarray) -> Payload:
        m, k = bits.shape
        rows, columns = block_grid(m, k)
        shifts = choose_shifts(bits)
        escapes = np.zeros(rows * columns, np.int64)
        for where, elements in _positions(bits, shifts):
            escapes[where] = (shifted_high(elements) != CONSTANT_HIGH).sum(1)
        width = choose_width([(escapes > room(width)).mean() for width in WIDTHS])

        blocks = np.zeros((rows * columns, width), np.uint32)
        overflow = []
        for where, elements in _positions(bits, shifts):
            out = blocks[where]
            out[:, :HEADER] = _planes(elements)
            block, position, high = _escapes(elements)
            first = np.concatenate([[0], np.cumsum(escapes[where])])
            rank = np.arange(block.size) - first[block]
            inside = rank < room(width)
            entries = np.zeros((elements.shape[0], room(width)), np.uint16)
            entries[block[inside], rank[inside]] = entry_of(position[inside], high[inside])
            out[:, ENTRY_START:] = entries.view("<u4")
            per_tile = np.bincount(
                block[inside] * TILES + (position[inside] >> 10), minlength=TILES * elements.shape[0]
            )
            out[:, HEADER] = per_tile.reshape(-1, TILES).cumsum(1).astype(np.uint8).view("<u4").ravel()
            spilled = np.stack([block[~inside] + where.start + 1, position[~inside] | high[~inside] << 12], -1)
            overflow.append(spilled.astype(np.uint32))
        overflow = np.concatenate(overflow)
        blocks[:, OVERFLOW_WORD] = _first_overflow(overflow[:, 0], rows * columns)
        return {
            "shift": np.pad(shifts, (0, rows * BLOCK - m)),
            "blocks": blocks.reshape(rows, columns, width),
            "overflow": overflow.ravel(),
        }

    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        rows, columns = block_grid(m, k)
        owner, entry = payload["overflow"][0::2], payload["overflow"][1::2]
        index = (owner - 1).astype(jnp.int32)
        row = jnp.where(owner == 0, rows, index // columns)
        column = index % columns * POSITIONS + (entry & (POSITIONS - 1)).astype(jnp.int32)
        high = jnp.full((rows, columns * POSITIONS), CONSTANT_HIGH, jnp.uint8)
        high = high.at[row, column].set((entry >> 12).astype(jnp.uint8), mode="drop")
        # One row of blocks at a time: the reference needs some 30 bytes per weight while it runs.
        elements = jax.lax.map(_decode_blocks, (payload["blocks"], high.reshape(rows, columns, POSITIONS)))
        split = elements.reshape(rows, columns, TILES, 2, 8, 4, 2, 2, 2, 2).transpose(_FROM_POSITIONS)
        shifts = payload["shift"].astype(jnp.uint16)[:, None]
        return shift_exponents(split.reshape(rows * BLOCK, columns * BLOCK), -shifts, jnp.where)[:m, :k]

    def check_shapes(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        """The part of :meth:`validate` that looks at no value.

        Raises:
          CorruptDataError: see :meth:`validate`.
        """
        check_field_shapes(self, payload, m, k)
        width, length = payload["blocks"].shape[2], payload["overflow"].shape[0]
        if width not in WIDTHS:
            raise CorruptDataError(f"lane-planar: blocks have {width} words, expected one of {WIDTHS}")
        if length % 2:
            raise CorruptDataError(f"lane-planar: overflow has {length} words, expected pairs: it is truncated")

    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        self.check_shapes(payload, m, k)
        width = payload["blocks"].shape[2]
        _expect(abs(payload["shift"].astype(np.int32)) <= MAX_SHIFT, "shift", f"exceeds {MAX_SHIFT}")
        blocks = payload["blocks"].reshape(-1, width)
        ends = np.ascontiguousarray(blocks[:, HEADER]).view(np.uint8).reshape(-1, TILES).astype(np.int32)
        _expect(np.diff(ends, axis=1, prepend=0).min(1) >= 0, "blocks", "has ends that decrease")
        _expect(
            ends[:, -1] <= room(width), "blocks", f"counts more entries than the {room(width)} that it has room for"
        )
        entries = np.ascontiguousarray(blocks[:, ENTRY_START:]).view("<u2").reshape(-1, room(width)).astype(np.int32)
        slot = np.arange(room(width))
        used = slot < ends[:, -1:]
        _expect(((entries == 0) | used).all(1), "blocks", "has entries past its ends")
        tile = _tile_of_slot(ends, slot, np)
        position = entry_position(entries, tile)
        ordered = (np.diff(position, axis=1, prepend=-1) > 0) | ~used
        _expect(ordered.all(1), "blocks", "has entries out of order")
        _expect(((position >> 10 == tile) | ~used).all(1), "blocks", "has an entry outside the tile that its ends say")
        owner, entry = payload["overflow"][0::2].astype(np.int64), payload["overflow"][1::2]
        place = owner * POSITIONS + (entry & (POSITIONS - 1))
        in_order = (owner[:-1] != 0) & (np.diff(place) > 0)
        _expect(in_order | (owner[1:] == 0), "overflow", "has entries out of order")
        _expect(owner <= blocks.shape[0], "overflow", f"names a block past the {blocks.shape[0]} that there are")
        _expect(entry < 1 << 17, "overflow", "has an entry of more than 17 bits")
        last = np.where(used, position, -1).max(1, initial=-1)[owner - 1]
        behind = (owner == 0) | (place - owner * POSITIONS > last)
        _expect(behind, "overflow", "has an entry before the end of its block's own")
        _expect(
            blocks[:, OVERFLOW_WORD] == _first_overflow(owner, blocks.shape[0]),
            "blocks",
            "points to a wrong overflow entry",
        )

    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        inside = (payload["blocks"][..., HEADER] >> 24).sum(dtype=np.int64)
        return Coverage(size=m * k, escapes=int(inside + np.count_nonzero(payload["overflow"][..., 0::2])))

    def bucket_lengths(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> dict[str, int]:
        overflow = overflow_bucket(payload["overflow"].shape[-1])
        return {"blocks": payload["blocks"].shape[-1], "overflow": overflow}


def _tile_of_slot(ends, slot, numpy):
    """``[blocks, slots]``: the tile of each entry, by the ``[blocks, 4]`` ends; 4 past the last one."""
    return (slot[None, :, None] >= ends[:, None, :]).sum(-1, dtype=numpy.int32)


def entry_position(entries, tile):
    """The whole position of entries whose tiles are known."""
    return entries & (1 << ENTRY_POSITION_BITS) - 1 | tile >> 1 << ENTRY_POSITION_BITS


def _first_overflow(owner: np.ndarray, blocks: int) -> np.ndarray:
    """uint32 ``[blocks]``: 1 + index of each block's first overflow entry, 0 for none; ``owner`` is 1 + block."""
    first = np.zeros(blocks + 1, np.uint32)
    names, index = np.unique(owner[owner != 0], return_index=True)
    first[names] = index + 1
    return first[1:]


def _expect(good: np.ndarray, array: str, problem: str) -> None:
    """Raises unless all of ``good`` holds; names the first place that does not."""
    wrong = np.flatnonzero(~good)
    if wrong.size:
        raise CorruptDataError(
            f"lane-planar: {array}[{int(wrong[0])}] {problem}; the tensor is corrupt, convert it again from its source"
        )


def _decode_blocks(row):
    """Shifted weights: uint32 ``[C, W]`` and high bits uint8 ``[C, 4096]`` -> uint16 ``[C, 4096]``."""
    blocks, high = row
    n = blocks.shape[0]
    codes = blocks[:, CODE_START:HEADER].reshape(n, TILES, 96)
    upper = jnp.stack(
        upper_words([codes[..., 0:64:2], codes[..., 1:64:2], codes[..., 64:]]), -1
    )  # block tile lane word
    upper = upper.reshape(n, TILES, 32, 2, 4).transpose(0, 1, 3, 2, 4).reshape(n, CODE_START)

    halves = jnp.stack([blocks[:, ENTRY_START:] & 0xFFFF, blocks[:, ENTRY_START:] >> 16], -1)
    entries = halves.reshape(n, -1).astype(jnp.int32)
    ends = (blocks[:, HEADER, None] >> (8 * jnp.arange(TILES, dtype=jnp.uint32)) & 0xFF).astype(jnp.int32)
    slot = jnp.arange(entries.shape[1])
    position = entry_position(entries, _tile_of_slot(ends, slot, jnp))
    position = jnp.where(slot < ends[:, -1:], position, POSITIONS)
    listed = (entries >> ENTRY_POSITION_BITS).astype(jnp.uint8)
    high = high.at[jnp.arange(n)[:, None], position].set(listed, mode="drop")
    return _bytes(blocks[:, :CODE_START]) | _bytes(upper) << 8 | high.astype(jnp.uint16) << 10


def _bytes(words):
    """uint16 ``[C, 4 V]``: the bytes of words uint32 ``[C, V]``."""
    shifts = 8 * jnp.arange(4, dtype=jnp.uint32)
    return (words[..., None] >> shifts & 0xFF).astype(jnp.uint16).reshape(words.shape[0], -1)
