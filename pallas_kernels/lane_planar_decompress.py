"""Lane-planar decompression on a Hopper GPU through Mosaic: a warp group decodes 64x64 blocks of one row of blocks.

Blocks come through a TMA pipeline; a decoded block goes by `stmatrix`, transposed if the result is, into a tile with
TMA's 128-byte swizzle, and from there by TMA to its place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxzip.pallas_kernels import lane_planar_block
from jaxzip.pallas_kernels import mosaic_lanes as lanes

from jaxzip.formats import lane_planar as layout
from jaxzip.ops.manual_axes import varying, varying_alike, varying_over

_PER_STEP = 4  # blocks of a pipeline step; four of any width end on 128 bytes
_STAGES = 3
_TILES = 2  # output tiles in flight
_STEPS = 4  # of a CTA, at most
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# Exponents of both halves of a word less their row's shift, but for 0 and 255.
_UNSHIFT_WORD = """
shr.u32 e, $IN, 7; and.b32 e, e, 255; sub.u32 m, e, $SHIFT; and.b32 m, m, 255;
setp.eq.u32 q, e, 0; setp.eq.or.u32 q, e, 255, q; selp.b32 l, e, m, q;
shr.u32 e, $IN, 23; and.b32 e, e, 255; sub.u32 m, e, $SHIFT; and.b32 m, m, 255;
setp.eq.u32 q, e, 0; setp.eq.or.u32 q, e, 255, q; selp.b32 m, e, m, q;
and.b32 $OUT, $IN, 0x807F807F; shl.b32 l, l, 7; or.b32 $OUT, $OUT, l; shl.b32 m, m, 23; or.b32 $OUT, $OUT, m;"""


def decompress(payload: Mapping[str, jax.Array], m: int, k: int, *, transposed: bool) -> jax.Array:
    """The weight of a payload, bf16 ``[K, M]`` (``transposed``) or ``[M, K]``."""
    rows, columns = layout.block_grid(m, k)
    width = payload["blocks"].shape[2]
    box = lane_planar_block.BOXES[width]
    steps = pl.cdiv(columns, _PER_STEP)
    parts = pl.cdiv(steps, _STEPS)

    def kernel(blocks_ref, overflow_ref, shift_ref, out_ref, plane, tiles):
        row_block, part = lax.axis_index("row"), lax.axis_index("part")
        lane_planar_block.fill_plane(plane)
        own_steps = jnp.minimum(_STEPS, steps - part * _STEPS)

        def step(index, blocks):
            first = (part * _STEPS + index[0]) * _PER_STEP

            def decode(i):
                column, tile = first + i, tiles.at[i % _TILES]
                plgpu.wait_smem_to_gmem(_TILES - 1, wait_read_only=True)
                number = 1 + row_block * columns + column
                _decode_to_tile(blocks.at[0, i], plane, overflow_ref, shift_ref, tile, row_block, number, transposed)
                plgpu.commit_smem()
                place = tuple(pl.ds(at * layout.BLOCK, layout.BLOCK) for at in (row_block, column))
                plgpu.copy_smem_to_gmem(tile, out_ref.at[place[::-1] if transposed else place])

            for i in range(_PER_STEP):
                # Past the last column TMA would not drop the tile where the output is one tile wide.
                pl.when(first + i < columns)(functools.partial(decode, i))

        plgpu.emit_pipeline(
            step,
            grid=(own_steps,),
            max_concurrent_steps=_STAGES,
            in_specs=[plgpu.BlockSpec((1, _PER_STEP, *box), lambda i: (row_block, part * _STEPS + i, 0, 0))],
        )(blocks_ref)
        plgpu.wait_smem_to_gmem(0)

    shape = tuple(layout.BLOCK * side for side in ((columns, rows) if transposed else (rows, columns)))
    operands = varying_alike(
        (lane_planar_block.boxes(payload), lane_planar_block.overflow_list(payload), payload["shift"])
    )
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        grid=(rows, parts),
        grid_names=("row", "part"),
        kernel_name="jaxzip_lane_planar_decompress",
        scratch_types={
            "plane": plgpu.SMEM(lane_planar_block.PLANE_SHAPE, jnp.uint8),
            "tiles": plgpu.SMEM((_TILES, layout.BLOCK, layout.BLOCK), jnp.bfloat16, transforms=_SWIZZLED),
        },
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands)
    out = varying_over(varying(operands), out)
    return out[:k, :m] if transposed else out[:m, :k]


def _decode_to_tile(
    block_ref, plane_ref, overflow_ref, shift_ref, tile_ref, row_block, number, transposed: bool
) -> None:
    entries = overflow_ref.shape[0] // 2
    refs = [plgpu.RefType()] * 4 + [plgpu.RefType(_SWIZZLED)]

    @lanes.inline([*refs, plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT])
    def emit(block, plane, overflow, shift, tile, row_block, number):
        words, largest = lane_planar_block.decode_words(block, plane, overflow, entries, number)
        lanes.warp_group_barrier()  # the tile's last content has been read
        _store_tile(_unshift(words, largest, shift, lanes.scalar(row_block)), tile, transposed)

    emit(block_ref, plane_ref, overflow_ref, shift_ref, tile_ref, jnp.int32(row_block), jnp.int32(number))


def _unshift(words: list, largest, shift, row_block) -> list:
    """Takes the shifts of rows g and g + 8 back.

    A product with a power of two is exact, for zeros and subnormals too (rows of subnormals have shift 0), but may
    change a NaN's payload. Warps that put an entry which may be a NaN's count exponents instead.
    """
    thread = lanes.thread()
    warp, g = lanes.shift_left(thread, -5), lanes.shift_left(lanes.both(thread, 31), -2)
    row = lanes.add(lanes.multiply(row_block, layout.BLOCK), lanes.multiply(warp, layout.BLOCK // 4), g)
    base = lanes.global_address(shift)
    shifts = [
        lanes.asm(
            f"{{ .reg .b64 a; .reg .s16 h; cvt.u64.u32 a, $2; add.u64 a, a, $1; ld.global.nc.s8 h, [a+{8 * half}];"
            " cvt.s32.s16 $0, h; }",
            "=r,l,r", base, row, results=[lanes.i32()],
        )[0]
        for half in range(2)
    ]  # fmt: skip
    scales = [
        lanes.asm(
            "{ .reg .b32 s; sub.s32 s, 127, $1; shl.b32 s, s, 7; prmt.b32 $0, s, s, 0x1010; }", "=r,r", s,
            results=[lanes.i32()], pure=True,
        )[0]
        for s in shifts
    ]  # fmt: skip
    products = [
        lanes.asm("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", word, scales[p % 2], results=[lanes.i32()], pure=True)[0]
        for p, word in enumerate(words)
    ]
    # Operands: 0..15 the results; 16..31 the words, 32 and 33 the shifts, 34 the largest entry, 35..50 the products.
    text = ["{ .reg .pred p, q; .reg .b32 e, m, l;"]
    text += [f"mov.b32 ${p}, ${35 + p};" for p in range(16)]
    text += [f"setp.ge.u32 p, $34, {lane_planar_block.LARGEST}; vote.sync.any.pred p, p, -1; @!p bra DONE;"]
    for p in range(16):
        word = _UNSHIFT_WORD.replace("$IN", f"${16 + p}").replace("$OUT", f"${p}")
        text.append(word.replace("$SHIFT", f"${32 + p % 2}"))
    text += ["DONE: }"]
    constraints = ",".join(["=&r"] * 16 + ["r"] * (16 + 2 + 1 + 16))
    return lanes.asm("\n".join(text), constraints, *words, *shifts, largest, *products, results=[lanes.i32()] * 16)


def _store_tile(words: list, tile, transposed: bool) -> None:
    """`stmatrix` of the four 8x8 matrices of each k-step: rows of 128 bytes, 16-byte chunks permuted by the row."""
    add, both, shift_left = lanes.add, lanes.both, lanes.shift_left
    thread = lanes.thread()
    warp, lane = shift_left(thread, -5), both(thread, 31)
    in_matrix, lower, right = both(lane, 7), both(shift_left(lane, -3), 1), shift_left(lane, -4)
    base = lanes.shared_address(tile)
    for j in range(4):
        if transposed:
            row, chunk = add(in_matrix, lanes.multiply(right, 8), 16 * j), add(lanes.multiply(warp, 2), lower)
        else:
            row = add(in_matrix, lanes.multiply(lower, 8), lanes.multiply(warp, 16))
            chunk = add(right, 2 * j)
        at = add(base, lanes.multiply(row, 128), lanes.multiply(lanes.arith.xori(chunk, in_matrix), 16))
        kind = "x4.trans" if transposed else "x4"
        lanes.asm(
            f"stmatrix.sync.aligned.m8n8.{kind}.shared.b16 [$0], {{$1, $2, $3, $4}};",
            "r,r,r,r,r", at, *words[4 * j : 4 * j + 4],
        )  # fmt: skip
