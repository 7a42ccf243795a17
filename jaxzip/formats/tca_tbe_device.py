"""TCA-TBE's encoder as array programs of XLA: the same bytes as the reference, on any device.

``bits`` is uint16 ``[M, K]``, or ``[K, M]`` where ``transposed``. Three passes, each over some rows of BlockTiles at a
time: the window, the elements inside it, the payload. See ``jaxzip.ops.encode`` for who chooses the lengths of lists.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxzip.formats import tca_tbe as layout

_HALF = 32  # positions of a FragTile that one word of a bitmap holds
#: Indices are int32 and may pass the end of a list by what a pass looks at together and by the padding of the list.
_MOST_ELEMENTS = (1 << 31) - (1 << 24)
#: Elements that a pass looks at together: it needs some 30 bytes for each.
_TOGETHER = 1 << 22


def start_exp(bits: jax.Array, *, transposed: bool) -> jax.Array:
    """uint8 ``[]``: one below the first exponent of the window, see ``tca_tbe.choose_start_exp``."""
    rows, _ = _grid(bits, transposed)

    def count(first, blocks, inside, histograms):
        exponents = jnp.where(inside, blocks >> 7 & 0xFF, 256).astype(jnp.int32)
        row = jnp.arange(len(blocks))[:, None]
        flat = exponents.reshape(len(blocks), -1)
        counted = jnp.zeros((len(blocks), 256), jnp.uint32).at[row, flat].add(1, mode="drop")
        return jax.lax.dynamic_update_slice(histograms, counted, (first, 0))

    # One histogram a row of BlockTiles: a step may come by a row that an earlier one has counted.
    histograms = _over_rows(bits, transposed, count, jnp.zeros((rows, 256), jnp.uint32))
    total = jnp.pad(histograms.sum(0, dtype=jnp.uint32).cumsum(dtype=jnp.uint32), (1, 0))
    starts = jnp.arange(1, 256 - layout.WINDOW + 1)
    return jnp.argmax(total[starts + layout.WINDOW] - total[starts]).astype(jnp.uint8)


def counts(bits: jax.Array, start_exp: jax.Array, *, transposed: bool) -> jax.Array:
    """int32 ``[B]``: of each BlockTile, the elements inside the window, padding among them."""
    rows, columns = _grid(bits, transposed)

    def count(first, blocks, inside, found):
        coded = _codes(jnp.where(inside, blocks, _padding(start_exp)), start_exp) != 0
        return jax.lax.dynamic_update_slice(found, coded.sum((2, 3), dtype=jnp.int32), (first, 0))

    return _over_rows(bits, transposed, count, jnp.zeros((rows, columns), jnp.int32)).reshape(-1)


def tile_offsets(counts: jax.Array) -> jax.Array:
    """uint32 ``[B + 1, 2]`` of the elements inside the window in each of ``B`` BlockTiles."""
    aligned = [
        -(-number // align) * align
        for number, align in ((counts, layout.SIGN_MANTISSA_ALIGN), (layout.BLOCK**2 - counts, layout.FULL_ALIGN))
    ]
    return jnp.pad(jnp.stack(aligned, -1).astype(jnp.uint32).cumsum(0, dtype=jnp.uint32), ((1, 0), (0, 0)))


def payload(
    bits: jax.Array, start_exp: jax.Array, offsets: jax.Array, *, sign_mantissa: int, full: int, transposed: bool
) -> dict[str, jax.Array]:
    """Every array of the format. ``offsets`` is `tile_offsets`; the lists get ``sign_mantissa`` and ``full`` values."""
    rows, columns = _grid(bits, transposed)
    frags = (rows, columns, layout.FRAGS_PER_BLOCK)
    starts = offsets[:-1].astype(jnp.int32).reshape(rows, columns, 2)
    position = jnp.arange(layout.BLOCK**2, dtype=jnp.int32)

    def encode(first, blocks, inside, state):
        bitmaps, bands, low, whole = state
        elements = _frag_order(jnp.where(inside, blocks, _padding(start_exp)))
        code = _codes(elements, start_exp)
        words = [_words(code >> bit & 1) for bit in range(3)]
        coded = code != 0
        rank, before_band = _ranks(words[0] | words[1] | words[2])
        start = jax.lax.dynamic_slice_in_dim(starts, first, len(blocks))[..., None, :]
        low_index = start[..., 0] + rank
        full_index = start[..., 1] + position - rank
        # What is not in a list goes past its end, each to a place of its own: indices are distinct.
        nowhere = jnp.arange(elements.size, dtype=jnp.int32).reshape(elements.shape)
        sign_mantissa_byte = (elements >> 8 & 0x80 | elements & 0x7F).astype(jnp.uint8)
        low = _put(low, jnp.where(coded, low_index, sign_mantissa + nowhere), sign_mantissa_byte)
        whole = _put(whole, jnp.where(coded, full + nowhere, full_index), elements)
        at = (first, 0, 0, 0)
        bitmaps = [jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(bitmaps, words)]
        return bitmaps, jax.lax.dynamic_update_slice(bands, before_band, at[:3]), low, whole

    nothing = (
        [jnp.zeros((*frags, 2), jnp.uint32)] * 3,
        jnp.zeros((rows, columns, layout.BANDS_PER_BLOCK), jnp.int32),
        jnp.zeros(sign_mantissa, jnp.uint8),
        jnp.zeros(full, jnp.uint16),
    )
    bitmaps, bands, low, whole = _over_rows(bits, transposed, encode, nothing)
    band_starts = jnp.arange(layout.BANDS_PER_BLOCK, dtype=jnp.int32) * (layout.BAND_ROWS * layout.BLOCK)
    return {
        "start_exp": start_exp,
        **{f"bitmap{i + 1}": bitmap.reshape(-1, 2) for i, bitmap in enumerate(bitmaps)},
        "sign_mantissa": low,
        "full": whole,
        "tile_offsets": offsets,
        "band_offsets": jnp.stack([bands, band_starts - bands], -1).reshape(-1, 2),
    }


def check_size(m: int, k: int) -> None:
    """Raises NotImplementedError where indices of an ``[m, k]`` matrix do not fit 32 bits."""
    rows, columns = layout.block_grid(m, k)
    if (rows + _rows_together(rows, columns)) * columns * layout.BLOCK**2 > _MOST_ELEMENTS:
        raise NotImplementedError(
            f"tca-tbe on the device indexes with 32 bits: a {m}x{k} matrix is too large; encode it on the host"
        )


def _grid(bits: jax.Array, transposed: bool) -> tuple[int, int]:
    return layout.block_grid(*(bits.shape[::-1] if transposed else bits.shape))


def _rows_together(rows: int, columns: int) -> int:
    return min(rows, max(1, _TOGETHER // (columns * layout.BLOCK**2)))


def _over_rows(bits: jax.Array, transposed: bool, step: Callable, state):
    """``state = step(first, blocks, inside, state)`` for some rows of BlockTiles at a time, of which ``first`` is one.

    ``blocks`` is uint16 ``[r, C, 64, 64]`` and ``inside`` says which of them the matrix has. The last step may come by
    rows that the one before it has seen.
    """
    rows, columns = _grid(bits, transposed)
    m, k = bits.shape[::-1] if transposed else bits.shape
    together = _rows_together(rows, columns)
    pad = ((0, rows * layout.BLOCK - m), (0, columns * layout.BLOCK - k))
    padded = jnp.pad(bits, pad[::-1] if transposed else pad)

    def body(i, state):
        first = jnp.minimum(i * together, rows - together)
        at, size = first * layout.BLOCK, together * layout.BLOCK
        part = jax.lax.dynamic_slice_in_dim(padded, at, size, axis=1 if transposed else 0)
        part = part.T if transposed else part
        inside = (at + jnp.arange(size) < m)[:, None] & (jnp.arange(part.shape[1]) < k)
        return step(first, _split(part, columns), _split(inside, columns), state)

    return jax.lax.fori_loop(0, -(-rows // together), body, state)


def _split(matrix: jax.Array, columns: int) -> jax.Array:
    """``[64 r, 64 C]`` -> ``[r, C, 64, 64]``."""
    return matrix.reshape(-1, layout.BLOCK, columns, layout.BLOCK).swapaxes(1, 2)


def _padding(start_exp: jax.Array) -> jax.Array:
    """The bits of elements past the edges: code 1 and a zero sign+mantissa byte."""
    return (start_exp.astype(jnp.uint16) + 1) << 7


def _codes(bits: jax.Array, start_exp: jax.Array) -> jax.Array:
    """uint16 of the same shape: 1..7 inside the window, else 0."""
    code = (bits >> 7 & 0xFF) - start_exp.astype(jnp.uint16)  # below the window it wraps around
    return jnp.where(code <= layout.WINDOW, code, 0)


def _frag_order(blocks: jax.Array) -> jax.Array:
    """``[r, C, 64, 64]`` -> ``[r, C, 4096]``, FragTile after FragTile."""
    r, c = blocks.shape[:2]
    # (r, C, band, m0, row, tile, k0, column) -> (r, C, band, tile, k0, m0, row, column)
    split = blocks.reshape(r, c, layout.BANDS_PER_BLOCK, 2, layout.FRAG, 4, 2, layout.FRAG)
    return split.transpose(0, 1, 2, 5, 6, 3, 4, 7).reshape(r, c, layout.BLOCK**2)


def _words(bits: jax.Array) -> jax.Array:
    """Bits ``[r, C, 4096]`` -> uint32 ``[r, C, 64 FragTiles, 2]``, low word first."""
    split = bits.astype(jnp.uint32).reshape(*bits.shape[:2], layout.FRAGS_PER_BLOCK, 2, _HALF)
    return (split << jnp.arange(_HALF, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def _ranks(inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of bits ``[r, C, 64, 2]``, how many are set before each position ``[r, C, 4096]`` and each band ``[r, C, 4]``."""
    of_half = jax.lax.population_count(inside).astype(jnp.int32).reshape(*inside.shape[:2], -1)
    before_half = of_half.cumsum(-1) - of_half
    below = jnp.asarray((1 << np.arange(_HALF, dtype=np.uint64)) - 1, jnp.uint32)
    in_half = jax.lax.population_count(inside.reshape(of_half.shape)[..., None] & below).astype(jnp.int32)
    rank = (before_half[..., None] + in_half).reshape(*inside.shape[:2], -1)
    return rank, before_half[..., :: 2 * layout.FRAGS_PER_BAND]


def _put(values: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
    return values.at[index].set(new, mode="drop", unique_indices=True)
