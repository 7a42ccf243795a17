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
    """uint32 ``[R C, 2]``: of each block, the escapes that may stand in it, and those that have no code."""
    rows = _row_blocks(bits, shift, transposed)

    def of_row(row):
        high = lp.shifted_high(_positions(*row))
        escapes = high != lp.CONSTANT_HIGH
        coded = escapes & lp.has_code(high)
        return jnp.stack([coded.sum(1), (escapes & ~coded).sum(1)], -1).astype(jnp.uint32)

    return jax.lax.map(of_row, rows).reshape(-1, 2)


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
        coded = escapes & lp.has_code(high)
        rank = coded.cumsum(1) - 1
        inside = coded & (rank < room)
        code = jnp.where(high == 0, 0, high - lp.HIGH_BIAS)
        entries = jnp.zeros((columns, room), jnp.uint32)
        entries = entries.at[block, jnp.where(inside, rank, room)].set(position | code << 12, mode="drop")
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
    # (block, tile, r & 1, g, j, r >> 1, t, h) -> (block, tile, j, g, t, r >> 1, r & 1, h)
    split = scaled.reshape(-1, lp.TILES, 2, 8, 4, 2, 4, 2).transpose(0, 1, 4, 3, 6, 5, 2, 7)
    return split.reshape(-1, lp.POSITIONS)


def _planes(elements):
    """uint32 ``[C, 1408]``: the sign+mantissa and code words."""
    n = elements.shape[0]
    values = elements.reshape(n, lp.TILES, 4, 32, 2, 2, 2).astype(jnp.uint32)  # tile j lane r>>1 r&1 h
    sign, mantissa = values >> 15, values & 0x7F
    halves = sign[..., 0, :] << 15 | mantissa[..., 1, :] << 8 | sign[..., 1, :] << 7 | mantissa[..., 0, :]
    words = (halves[..., 0] | halves[..., 1] << 16).reshape(n, lp.TILES, 2, 2, 32, 2)
    sign_mantissa = words.transpose(0, 1, 2, 4, 3, 5).reshape(n, lp.CODE_START)
    low = (values >> 7 & 7).reshape(n, lp.TILES, 4, 32, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    low = low.reshape(n, lp.TILES, 32, 16, 2)
    fields = [low[..., p, :] << lp.CODE_BITS[p % 5] for p in range(15)]
    codes = [sum(fields[5 * i + 1 : 5 * i + 5], fields[5 * i]) | low[..., 15, :] >> i & 1 for i in range(3)]
    codes = [code[..., 0] | code[..., 1] << 16 for code in codes]  # tile lane
    pairs = jnp.stack(codes[:2], -1).reshape(n, lp.TILES, 64)
    return jnp.concatenate([sign_mantissa, jnp.concatenate([pairs, codes[2]], -1).reshape(n, -1)], 1)
