"""x @ W.T for TCA-TBE weights by public Pallas only: interpreted on the CPU, through Triton on a GPU.

A dot wants a BlockTile by rows and columns, not by FragTiles. A word of a bitmap covers half a FragTile, 4 rows of 8
weights, and everything about it is found once: `[4 bands, 32 halves]`, halves by rows, then columns, which repeated
over 4 rows and 8 columns is the BlockTile. What comes before a half in the lists: its BlockTile's offset, its band's,
and the weights of its kind in the halves of the band that FragTile order puts before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxzip.pallas_kernels import portable_matmul
from jaxzip.pallas_kernels.tca_tbe_portable import BITMAPS, check_size, count_bits, never_empty

from jaxzip.formats import tca_tbe as layout

_HALF_ROWS, _HALF = 4, 32
_HALVES = layout.FRAGS_PER_BAND * 2


def matmul(x: jax.Array, payload: Mapping[str, jax.Array], m: int, k: int, *, interpret: bool) -> jax.Array:
    """fp32 sums ``[N, M]`` of ``x[N, K] @ W.T`` for the weight of a payload; x is bf16 or fp32.

    Raises:
      NotImplementedError: the lists are too long for 32-bit indices.
    """
    check_size(payload)
    columns = layout.block_grid(m, k)[1]
    operands = [payload["start_exp"].reshape(1), *(payload[name] for name in BITMAPS)]
    operands += [never_empty(payload["sign_mantissa"]), never_empty(payload["full"])]
    operands += [payload["tile_offsets"], payload["band_offsets"]]

    def weights(refs, i, j):
        return _decode(*refs, i * columns + j)

    specs = [pl.BlockSpec(memory_space=pl.ANY)] * len(operands)
    options = {"name": "jaxzip_tca_tbe_matmul", "interpret": interpret}
    return portable_matmul.sums(x, operands, specs, weights, m, k, **options)


def _decode(start_ref, one_ref, two_ref, three_ref, sign_mantissa_ref, full_ref, tile_ref, band_ref, block):
    """uint32 ``[64 rows, 64 columns]``: the bf16 bits of BlockTile number ``block``."""
    band, place = (lax.broadcasted_iota(jnp.int32, (layout.BANDS_PER_BLOCK, _HALVES), axis) for axis in (0, 1))
    order = _frag_order(place)
    frag = block * layout.FRAGS_PER_BLOCK + band * layout.FRAGS_PER_BAND + (order >> 1)
    words = [ref[frag, order & 1] for ref in (one_ref, two_ref, three_ref)]
    before = _before(count_bits(words[0] | words[1] | words[2]))
    at_band = block * layout.BANDS_PER_BLOCK + band
    coded_from = tile_ref[block, 0].astype(jnp.int32) + band_ref[at_band, 0 * band] + before
    full_from = tile_ref[block, 1].astype(jnp.int32) + band_ref[at_band, 0 * band + 1] + order * _HALF - before

    row, column = (lax.broadcasted_iota(jnp.int32, (layout.BLOCK, layout.BLOCK), axis) for axis in (0, 1))
    bit = (row & (_HALF_ROWS - 1)) * layout.FRAG + (column & (layout.FRAG - 1))
    shift = bit.astype(jnp.uint32)
    words = [_over_weights(word) for word in words]
    code = (words[0] >> shift & 1) | (words[1] >> shift & 1) << 1 | (words[2] >> shift & 1) << 2
    lower = count_bits((words[0] | words[1] | words[2]) & ((jnp.uint32(1) << shift) - 1))

    is_coded = code != 0
    byte = sign_mantissa_ref[jnp.where(is_coded, _over_weights(coded_from) + lower, 0)].astype(jnp.uint32)
    full = full_ref[jnp.where(is_coded, 0, _over_weights(full_from) + bit - lower)].astype(jnp.uint32)
    coded = (byte & 0x80) << 8 | (start_ref[0].astype(jnp.uint32) + code) << 7 | (byte & 0x7F)
    return jnp.where(is_coded, coded, full)


def _frag_order(place: jax.Array) -> jax.Array:
    """Number in FragTile order of the half of a band that is at ``place`` by rows (of 4), then columns (of 8)."""
    down, across = place >> 3, place & 7
    return (across >> 1) << 3 | (across & 1) << 2 | down


def _before(counts: jax.Array) -> jax.Array:
    """Of int32 ``[4, 32]``: the sum over the halves of a band that come before each in FragTile order."""
    shape = (layout.BANDS_PER_BLOCK, _HALVES, _HALVES)
    own, other = (_frag_order(lax.broadcasted_iota(jnp.int32, shape, axis)) for axis in (1, 2))
    return jnp.sum(jnp.where(other < own, counts[:, None, :], 0), axis=2)


def _over_weights(of_half: jax.Array) -> jax.Array:
    """``[4, 32]`` -> ``[64, 64]``: each weight gets its half's value."""
    across = layout.BLOCK // layout.FRAG
    down = layout.BLOCK // _HALF_ROWS
    split = of_half.reshape(down, 1, across, 1)
    return jnp.broadcast_to(split, (down, _HALF_ROWS, across, layout.FRAG)).reshape(layout.BLOCK, layout.BLOCK)
