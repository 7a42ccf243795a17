"""TCA-TBE decompression by public Pallas only: interpreted on the CPU, through Triton on a GPU.

One program decodes one BlockTile as ``[64 FragTiles, 64 positions]``. A weight's place in its list is the number of
weights of its kind before it: bits of the bitmaps, counted without a popcount instruction, which Triton does not lower.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxzip.pallas_kernels import portable_matmul

from jaxzip.formats import tca_tbe as layout
from jaxzip.ops.manual_axes import result_like, varying_alike

BITMAPS = ("bitmap1", "bitmap2", "bitmap3")
_WORD_BITS = 32
_MOST_VALUES = (1 << 31) - 1
_WARPS = 4


def decompress(payload: Mapping[str, jax.Array], m: int, k: int, *, transposed: bool, interpret: bool) -> jax.Array:
    """The weight of a payload, bf16 ``[K, M]`` (``transposed``) or ``[M, K]``; ``interpret``: on the CPU.

    Raises:
      NotImplementedError: the lists are too long for 32-bit indices.
    """
    check_size(payload)
    rows, columns = layout.block_grid(m, k)

    def kernel(start_ref, one_ref, two_ref, three_ref, sign_mantissa_ref, full_ref, offsets_ref, out_ref):
        block = pl.program_id(0) * columns + pl.program_id(1)
        lists = (sign_mantissa_ref, full_ref, offsets_ref)
        bits = _decode((one_ref, two_ref, three_ref), *lists, start_ref[0].astype(jnp.uint32), block)
        row, column = _places()
        out_ref[(column, row) if transposed else (row, column)] = bits.astype(jnp.uint16)

    shape = (columns, rows) if transposed else (rows, columns)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    bitmap = pl.BlockSpec((layout.FRAGS_PER_BLOCK, 2), lambda i, j: (i * columns + j, 0))
    operands = [payload["start_exp"].reshape(1), *(payload[name] for name in BITMAPS)]
    operands += [never_empty(payload["sign_mantissa"]), never_empty(payload["full"]), payload["tile_offsets"]]
    operands = varying_alike(operands)
    out = pl.pallas_call(
        kernel,
        out_shape=result_like(tuple(layout.BLOCK * side for side in shape), jnp.uint16, operands[0]),
        grid=(rows, columns),
        in_specs=[anywhere, bitmap, bitmap, bitmap, anywhere, anywhere, anywhere],
        out_specs=pl.BlockSpec(
            (layout.BLOCK, layout.BLOCK), (lambda i, j: (j, i)) if transposed else (lambda i, j: (i, j))
        ),
        name="jaxzip_tca_tbe_decompress",
        interpret=interpret,
        compiler_params=portable_matmul.compiler_params(interpret, _WARPS),
    )(*operands)
    return lax.bitcast_convert_type(out[:k, :m] if transposed else out[:m, :k], jnp.bfloat16)


def check_size(payload: Mapping[str, jax.Array]) -> None:
    """Raises NotImplementedError where the lists are too long for 32-bit indices."""
    if max(payload["sign_mantissa"].shape[0], payload["full"].shape[0]) > _MOST_VALUES:
        raise NotImplementedError("the kernel indexes with 32 bits: at most 2^31 - 1 elements")


def never_empty(values: jax.Array) -> jax.Array:
    """A list that a kernel may read, which no empty one is."""
    return values if values.shape[0] else jnp.zeros(1, values.dtype)


def _indices() -> tuple[jax.Array, jax.Array]:
    """FragTile and position of every element of a BlockTile."""
    shape = (layout.FRAGS_PER_BLOCK, layout.POSITIONS)
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def _places() -> tuple[jax.Array, jax.Array]:
    """Row and column of every element: FragTiles go band by band, in a band by 16x16 tiles, in a tile down first."""
    frag, position = _indices()
    row = (frag >> 4) * layout.BAND_ROWS + (frag & 1) * layout.FRAG + (position >> 3)
    column = (frag >> 2 & 3) * 2 * layout.FRAG + (frag >> 1 & 1) * layout.FRAG + (position & 7)
    return row, column


def count_bits(words: jax.Array) -> jax.Array:
    """Ones of each uint32: sums of neighbouring fields of 1, 2 and 4 bits, then all bytes by one multiplication."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((fours + (fours >> 4) & 0x0F0F0F0F) * jnp.uint32(0x01010101) >> 24).astype(jnp.int32)


def _decode(bitmap_refs, sign_mantissa_ref, full_ref, offsets_ref, start_exp, block) -> jax.Array:
    """uint32 ``[64 FragTiles, 64 positions]``: the bf16 bits of BlockTile number ``block``."""
    frag, position = _indices()
    word, bit = position >> 5, (position & (_WORD_BITS - 1)).astype(jnp.uint32)
    planes = [ref[frag, word] for ref in bitmap_refs]
    lower = [ref[frag, 0 * word] for ref in bitmap_refs]
    inside, lower = planes[0] | planes[1] | planes[2], lower[0] | lower[1] | lower[2]
    code = (planes[0] >> bit & 1) | (planes[1] >> bit & 1) << 1 | (planes[2] >> bit & 1) << 2

    one = lax.broadcasted_iota(jnp.int32, (layout.FRAGS_PER_BLOCK,), 0)
    of_frag = sum(
        count_bits(bitmap_refs[0][one, half] | bitmap_refs[1][one, half] | bitmap_refs[2][one, half])
        for half in (0 * one, 0 * one + 1)
    )
    before_frag = jnp.sum(jnp.where(frag > position, of_frag[None, :], 0), axis=1)  # both indices count to 64
    in_frag = count_bits(inside & ((jnp.uint32(1) << bit) - 1)) + jnp.where(word == 1, count_bits(lower), 0)
    before = before_frag[:, None] + in_frag

    is_coded = code != 0
    first_coded, first_full = (offsets_ref[block, i].astype(jnp.int32) for i in (0, 1))
    coded_at = jnp.where(is_coded, first_coded + before, 0)
    full_at = jnp.where(is_coded, 0, first_full + frag * layout.POSITIONS + position - before)
    byte = sign_mantissa_ref[coded_at].astype(jnp.uint32)
    coded = (byte & 0x80) << 8 | (start_exp + code) << 7 | (byte & 0x7F)
    return jnp.where(is_coded, coded, full_ref[full_at].astype(jnp.uint32))
