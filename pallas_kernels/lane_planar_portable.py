"""Lane-planar by public Pallas only, on the CPU by interpretation and on a GPU through Triton: any machine's fallback.

One program decodes blocks of 64x64 by index arithmetic: every weight finds its byte and its code by its row and column,
and its escape by comparing its position with every entry of the block. That is slow and needs nothing but loads, shifts
and comparisons of 32-bit integers; `lane_planar_block` is the fast path and must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxzip.pallas_kernels import portable_matmul

from jaxzip.formats import lane_planar as layout
from jaxzip.ops.manual_axes import result_like, varying_alike

_WARPS = 4


def decompress(payload: Mapping[str, jax.Array], m: int, k: int, *, transposed: bool, interpret: bool) -> jax.Array:
    """The weight of a payload, bf16 ``[K, M]`` (``transposed``) or ``[M, K]``; ``interpret``: on the CPU."""
    rows, columns = layout.block_grid(m, k)

    def kernel(shift_ref, blocks_ref, overflow_ref, out_ref):
        block = pl.program_id(0) * columns + pl.program_id(1)
        bits = _shift_exponents(
            _decode(lambda word: blocks_ref[word], overflow_ref, block), shift_ref[...].astype(jnp.int32)[:, None]
        )
        out_ref[...] = (bits.T if transposed else bits).astype(jnp.uint16)

    shape = (columns, rows) if transposed else (rows, columns)
    operands = varying_alike((payload["shift"], payload["blocks"], _never_empty(payload["overflow"])))
    out = pl.pallas_call(
        kernel,
        out_shape=result_like(tuple(layout.BLOCK * side for side in shape), jnp.uint16, operands[0]),
        grid=(rows, columns),
        in_specs=[
            pl.BlockSpec((layout.BLOCK,), lambda i, j: (i,)),
            pl.BlockSpec((None, None, payload["blocks"].shape[2]), lambda i, j: (i, j, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(
            (layout.BLOCK, layout.BLOCK), (lambda i, j: (j, i)) if transposed else (lambda i, j: (i, j))
        ),
        name="jaxzip_lane_planar_decompress",
        interpret=interpret,
        compiler_params=portable_matmul.compiler_params(interpret, _WARPS),
    )(*operands)
    out = out[:k, :m] if transposed else out[:m, :k]
    return lax.bitcast_convert_type(out, jnp.bfloat16)


def matmul(x: jax.Array, payload: Mapping[str, jax.Array], m: int, k: int, *, interpret: bool) -> jax.Array:
    """fp32 sums ``[N, M]`` of ``x[N, K] @ W.T`` for the weight of a payload, scaled back; x is bf16 or fp32."""
    columns = layout.block_grid(m, k)[1]

    def weights(refs, i, j):
        blocks_ref, overflow_ref = refs
        return _decode(lambda word: blocks_ref[j, word], overflow_ref, i * columns + j)

    blocks = pl.BlockSpec((None, columns, payload["blocks"].shape[2]), lambda _, i, part: (i, 0, 0))
    operands = (payload["blocks"], _never_empty(payload["overflow"]))
    specs = (blocks, pl.BlockSpec(memory_space=pl.ANY))
    options = {"name": "jaxzip_lane_planar_matmul", "interpret": interpret}
    sums = portable_matmul.sums(x, operands, specs, weights, m, k, **options)
    return sums * lax.bitcast_convert_type((127 - payload["shift"][:m].astype(jnp.int32)) << 23, jnp.float32)


def raw_matmul(x: jax.Array, w: jax.Array, *, rows_first: bool, interpret: bool) -> jax.Array:
    """The same sums by the same kernel over a dense bf16 weight, ``[K, M]`` or ``[M, K]``: the control of `matmul`."""
    bits = lax.bitcast_convert_type(w if rows_first else w.T, jnp.uint16)
    m, k = bits.shape
    rows, columns = layout.block_grid(m, k)
    padded = jnp.pad(bits, ((0, rows * layout.BLOCK - m), (0, columns * layout.BLOCK - k)))

    def weights(refs, i, j):
        return refs[0][:, pl.ds(j * layout.BLOCK, layout.BLOCK)].astype(jnp.uint32)

    spec = pl.BlockSpec((layout.BLOCK, columns * layout.BLOCK), lambda _, i, part: (i, 0))
    options = {"name": "jaxzip_raw_matmul", "interpret": interpret}
    return portable_matmul.sums(x, (padded,), (spec,), weights, m, k, **options)


def _never_empty(overflow: jax.Array) -> jax.Array:
    return overflow if overflow.shape[0] else jnp.zeros(2, jnp.uint32)


def _shift_exponents(bits: jax.Array, shift: jax.Array) -> jax.Array:
    """Takes the shift back; zeros, subnormals, infinities and NaN keep their exponents."""
    exponent = (bits >> 7) & 0xFF
    moved = (exponent - shift.astype(jnp.uint32)) & 0xFF
    return (bits & 0x807F) | jnp.where((exponent == 0) | (exponent == 255), exponent, moved) << 7


def _decode(read: Callable, overflow_ref, block) -> jax.Array:
    """uint32 ``[64, 64]``: the shifted bf16 bits of block number ``block``; ``read(i)`` gives its words."""
    row = lax.broadcasted_iota(jnp.int32, (layout.BLOCK, layout.BLOCK), 0)
    column = lax.broadcasted_iota(jnp.int32, (layout.BLOCK, layout.BLOCK), 1)
    tile, lane = row >> 4, (row & 7) << 2 | (column >> 1 & 3)
    pair, word = column >> 5, column >> 3 & 7  # of k-steps; of the lane's words of lower bytes
    in_word = (column & 1) << 1 | (row >> 3 & 1)
    position = tile << 10 | pair << 9 | lane << 4 | (word & 3) << 2 | in_word
    in_word = (in_word << 3).astype(jnp.uint32)

    lower = read(position >> 2) >> in_word & 0xFF
    codes, which = layout.CODE_START + tile * 96, lax.rem(word, 3)
    code = read(codes + jnp.where(which == 2, lane + 64, 2 * lane + which))
    rotation = jnp.where(word < 3, 0, jnp.where(word < 6, 3, 5)).astype(jnp.uint32)
    code = code >> rotation | code << (-rotation & 31)
    last_signs = read(codes + lane + 64) << ((word & 1) + 1).astype(jnp.uint32)
    signs = jnp.where(word < 6, code, last_signs) & layout.SIGNS
    upper = (signs | (code & layout.EXPONENTS)) >> in_word & 0xFF

    ends = read(layout.HEADER)
    middle, count = (ends >> 8 & 0xFF).astype(jnp.int32), (ends >> 24).astype(jnp.int32)

    def entry(i, high):
        both = read(layout.ENTRY_START + (i >> 1))
        one = (both >> ((i & 1) << 4).astype(jnp.uint32) & 0xFFFF).astype(jnp.int32)
        first_tile = (i >= middle).astype(jnp.int32) << 1  # of a pair, of which the entry tells one
        listed = (one >> layout.ENTRY_POSITION_BITS).astype(jnp.uint32)
        return jnp.where(position == layout.entry_position(one, first_tile), listed, high)

    high = jnp.full((layout.BLOCK, layout.BLOCK), layout.CONSTANT_HIGH, jnp.uint32)
    high = lax.fori_loop(0, count, entry, high)

    length = overflow_ref.shape[0] // 2
    owner = (block + 1).astype(jnp.uint32)

    def owned(i):
        return overflow_ref[2 * jnp.minimum(i, length - 1)] == owner

    def spilled(state):
        i, high = state
        one = overflow_ref[2 * i + 1]
        return i + 1, jnp.where(position == (one & 0xFFF).astype(jnp.int32), one >> 12, high)

    first = read(layout.OVERFLOW_WORD).astype(jnp.int32)
    start = jnp.where(first == 0, length, first - 1)
    _, high = lax.while_loop(lambda state: (state[0] < length) & owned(state[0]), spilled, (start, high))
    return lower | (upper | high << 2) << 8
