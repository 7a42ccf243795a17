"""Lane-planar's encoder as array programs of XLA: the same bytes as the reference, on any device.

``bits`` is uint16 ``[M, K]``, or ``[K, M]`` where ``transposed``. Sizes that depend on values are arguments; see
``jaxzip.ops.encode`` for how they are chosen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzip.formats import lane_planar as lp


def shifts(bits: jax.Array, *, transposed: bool) -> jax.Array:
    """int8 ``[64 R]``: what to add to the exponents of each row, see ``lane_planar.choose_shifts``; 0 past M."""
    rows = bits.T if transposed else bits
    exponents = (rows >> 7 & 0xFF).astype(jnp.int32)
    # One row at a time: a histogram of all would be as large as the matrix.
    histogram = jax.lax.map(lambda row: jnp.zeros(256, jnp.int32).at[row].add(1), exponents)
    total = jnp.pad(histogram.cumsum(1), ((0, 0), (1, 0)))
    starts = jnp.arange(1, 256 - lp.WINDOW)
    covered = total[:, starts + lp.WINDOW] - total[:, starts]
    shift = lp.WINDOW_START - (1 + covered.argmax(1))
    normal = histogram[:, 1:255] > 0
    lowest, highest = normal.argmax(1) + 1, 254 - normal[:, ::-1].argmax(1)
    subnormal = ((rows & 0x7F80 == 0) & (rows & 0x7F != 0)).any(1)
    safe = (covered.max(1) > 0) & (abs(shift) <= lp.MAX_SHIFT) & ~subnormal
    safe &= (lowest >= lp.MIN_SHIFTED) & (highest <= lp.MAX_SHIFTED)
    return jnp.pad(jnp.where(safe, shift, 0).astype(jnp.int8), (0, -len(rows) % lp.BLOCK))


def counts(bits: jax.Array, shift: jax.Array, *, transposed: bool) -> jax.Array:
    """uint32 ``[R C]``: escapes of each block."""
    rows = _row_blocks(bits, shift, transposed)

    def of_row(row):
        return (lp.shifted_high(_positions(*row)) != lp.CONSTANT_HIGH).sum(1, dtype=jnp.uint32)

    return jax.lax.map(of_row, rows).reshape(-1)


def payload(
    bits: jax.Array, shift: jax.Array, starts: jax.Array, *, width: int, overflow: int, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """``blocks`` uint32 ``[R, C, width]`` and the list of ``overflow`` words.

    ``starts`` uint32 ``[R C + 1]`` says where each block's overflow entries begin.
    """
    rows = _row_blocks(bits, shift, transposed)
    columns, room = rows[0].shape[1], lp.room(width)
    position = jnp.arange(lp.POSITIONS, dtype=jnp.uint32)
    block = jnp.arange(columns)[:, None]

    def of_row(row):
        elements = _positions(*row)
        high = lp.shifted_high(elements).astype(jnp.uint32)
        escapes = high != lp.CONSTANT_HIGH
        rank = escapes.cumsum(1) - 1
        inside = escapes & (rank < room)
        entries = jnp.zeros((columns, room), jnp.uint32)
        entries = entries.at[block, jnp.where(inside, rank, room)].set(lp.entry_of(position, high), mode="drop")
        ends = inside.reshape(columns, lp.TILES, -1).sum(2).cumsum(1).astype(jnp.uint32)
        ends = (ends << (8 * jnp.arange(lp.TILES, dtype=jnp.uint32))).sum(1, dtype=jnp.uint32)
        spilled = escapes & ~inside
        return _planes(elements), ends, entries[:, 0::2] | entries[:, 1::2] << 16, spilled, high

    planes, ends, entries, spilled, high = jax.lax.map(of_row, rows)
    spilled, high = spilled.reshape(-1, lp.POSITIONS), high.reshape(-1, lp.POSITIONS)
    first = jnp.where(starts[1:] > starts[:-1], starts[:-1] + 1, 0).reshape(ends.shape)
    blocks = jnp.concatenate([planes, ends[..., None], first[..., None], entries], -1)
    owner, where = jnp.nonzero(spilled, size=overflow // 2, fill_value=-1)
    entry = where.astype(jnp.uint32) | high[owner, where] << 12
    listed = jnp.where(owner[:, None] < 0, 0, jnp.stack([(owner + 1).astype(jnp.uint32), entry], -1))
    return blocks, listed.reshape(-1)


def _row_blocks(bits, shift, transposed):
    """Scan operands: uint16 ``[R, C, 64, 64]`` weights, padded, and int8 ``[R, 64]`` shifts."""
    rows = bits.T if transposed else bits
    m, k = rows.shape
    r, c = lp.block_grid(m, k)
    pad = ((0, r * lp.BLOCK - m), (0, c * lp.BLOCK - k))
    padded = jnp.pad(rows, pad, constant_values=lp.PADDING)
    inside = jnp.pad(jnp.ones((m, k), bool), pad)
    split = lambda a: a.reshape(r, lp.BLOCK, c, lp.BLOCK).swapaxes(1, 2)  # noqa: E731
    return split(padded), split(inside), shift.reshape(r, lp.BLOCK)


def _positions(blocks, inside, shift):
    """uint16 ``[C, 4096]``: a row of blocks with shifted exponents, in order of position."""
    scaled = lp.shift_exponents(blocks, shift.astype(jnp.uint16)[None, :, None], jnp.where)
    scaled = jnp.where(inside, scaled, lp.PADDING)
    # (block, tile, r & 1, g, j >> 1, j & 1, r >> 1, t, h) -> (block, tile, j >> 1, g, t, j & 1, r >> 1, h, r & 1)
    split = scaled.reshape(-1, lp.TILES, 2, 8, 2, 2, 2, 4, 2).transpose(0, 1, 4, 3, 7, 5, 6, 8, 2)
    return split.reshape(-1, lp.POSITIONS)


def _planes(elements):
    """uint32 ``[C, 1408]``: the words of lower bytes and of codes."""
    n = elements.shape[0]
    lower, upper = _words(elements & 0xFF), _words(elements >> 8) & lp.CODES
    lanes = upper.reshape(n, lp.TILES, 2, 32, 4).transpose(2, 4, 0, 1, 3).reshape(lp.LANE_WORDS, n, lp.TILES, 32)
    return jnp.concatenate([lower, lp.join_codes(lp.code_words(lanes), jnp).reshape(n, -1)], 1)


def _words(values):
    """uint32 ``[C, V / 4]`` of bytes ``[C, V]``."""
    four = values.astype(jnp.uint32).reshape(values.shape[0], -1, 4)
    return (four << (8 * jnp.arange(4, dtype=jnp.uint32))).sum(-1, dtype=jnp.uint32)
