"""What a warp group does with one lane-planar block in shared memory: escapes to its patch planes, words to registers.

Warp w takes tile w. Its patch plane holds the five high exponent bits of the tile's 1024 weights, in fragment order:
the constant, except where the block's entries put others while it is decoded. So escapes cost no branch; what is rare
(more than 32 entries in a tile, overflow entries) is a loop that a warp jumps over.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxzip.pallas_kernels import mosaic_lanes as lanes

from jaxzip.formats import lane_planar as layout

#: bf16 bits of the constant high exponent bits, twice.
_CONSTANT_PAIR = 0x3C003C00
_TILE_BYTES = 2048  # of a patch plane
#: u16 elements of a warp group's planes, with a word a warp where lanes without an escape store.
PLANE_SHAPE = (layout.POSITIONS + 8,)
_UNUSED = 4 * _TILE_BYTES
#: Words of a block as a TMA box: a product of two numbers up to 256, the inner one a multiple of 4 and wide.
BOXES = {1424: (89, 16), 1440: (6, 240), 1456: (7, 208), 1464: (6, 244), 1472: (8, 184)}
_BLOCK_A = plgpu.ShapeDtypeStruct((layout.BLOCK, layout.BLOCK), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
_SIGN_MANTISSA, _CODE = 0x807F807F, 0x03800380

# Entries of the tile from the lane's 33rd, 65th, ... on; then the block's overflow entries, a lane each.
_RARE = """{
.reg .pred p, q;
.reg .b32 i, e, c, a;
.reg .b16 h;
.reg .b64 g;
setp.eq.u32 p, $0, 0;
@p bra DONE;
add.u32 i, $1, 32;
INSIDE:
setp.ge.u32 p, i, $2;
@p bra SPILLED;
shl.b32 a, i, 1;
add.u32 a, a, $3;
ld.shared.b16 h, [a];
cvt.u32.u16 e, h;
and.b32 a, e, 4095;
shl.b32 a, a, 1;
add.u32 a, a, $4;
and.b32 c, e, 61440;
setp.ne.u32 q, c, 0;
add.u32 c, c, 12288;
shr.u32 c, c, 2;
selp.b32 c, c, 0, q;
cvt.u16.u32 h, c;
st.shared.b16 [a], h;
add.u32 i, i, 32;
bra INSIDE;
SPILLED:
setp.eq.u32 p, $5, 0;
@p bra DONE;
sub.u32 i, $5, 1;
add.u32 i, i, $9;
OVERFLOW:
setp.ge.u32 p, i, $7;
@p bra DONE;
mad.wide.u32 g, i, 8, $6;
ld.global.nc.v2.b32 {a, e}, [g];
setp.ne.u32 p, a, $8;
@p bra DONE;
and.b32 c, e, 4095;
shr.u32 a, c, 10;
setp.eq.u32 q, a, $10;
shl.b32 c, c, 1;
add.u32 c, c, $4;
shr.u32 a, e, 12;
and.b32 a, a, 31;
shl.b32 a, a, 10;
cvt.u16.u32 h, a;
@q st.shared.b16 [c], h;
add.u32 i, i, 32;
bra OVERFLOW;
DONE:
}"""

_FILL_IF = """{
.reg .pred p;
setp.eq.u32 p, $0, 0;
@p bra DONE;
st.shared.v4.b32 [$1], {$2, $2, $2, $2};
st.shared.v4.b32 [$1+512], {$2, $2, $2, $2};
st.shared.v4.b32 [$1+1024], {$2, $2, $2, $2};
st.shared.v4.b32 [$1+1536], {$2, $2, $2, $2};
DONE:
}"""


def boxes(payload: Mapping[str, jax.Array]) -> jax.Array:
    """The blocks as TMA copies them, u32 ``[R, C, a, b]``."""
    blocks = payload["blocks"]
    return blocks.reshape(*blocks.shape[:2], *BOXES[blocks.shape[2]])


def overflow_list(payload: Mapping[str, jax.Array]) -> jax.Array:
    """The overflow entries, never an empty array."""
    overflow = payload["overflow"]
    return overflow if overflow.shape[0] else jnp.zeros(2, jnp.uint32)


def fill_plane(plane_ref) -> None:
    """Puts the constant everywhere; the warp group then may decode."""

    @lanes.inline([plgpu.RefType()])
    def fill(plane):
        at = lanes.add(lanes.shared_address(plane), lanes.multiply(lanes.thread(), 64))
        for i in range(4):
            lanes.asm(f"st.shared.v4.b32 [$0+{16 * i}], {{$1, $1, $1, $1}};", "r,r", at, lanes.constant(_CONSTANT_PAIR))
        lanes.warp_group_barrier()

    fill(plane_ref)


def decode(block_ref, plane_ref, overflow_ref, number: jax.Array) -> jax.Array:
    """The shifted weights of a block as bf16 ``[64, 64]`` in registers, the A operand of wgmma.

    Args:
      block_ref: u32 words of the block in shared memory, in any shape.
      plane_ref: u16 PLANE_SHAPE in shared memory, filled; the same after the call.
      overflow_ref: u32 ``[2 V]`` in global memory.
      number: int32, 1 + the block's number, as overflow entries give it.
    """
    entries = overflow_ref.shape[0] // 2

    @lanes.inline([plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT], _BLOCK_A)
    def emit(block, plane, overflow, number):
        return lanes.operand_a(decode_words(block, plane, overflow, entries, number)[0])

    return emit(block_ref, plane_ref, overflow_ref, number)


def _load(address, offset: int, words: int) -> list:
    if words == 1:
        return lanes.asm(f"ld.shared.b32 $0, [$1+{offset}];", "=r,r", address, results=[lanes.i32()])
    names = ", ".join(f"${i}" for i in range(words))
    text = f"ld.shared.v{words}.b32 {{{names}}}, [${words}+{offset}];"
    return lanes.asm(text, ",".join(["=r"] * words + ["r"]), address, results=[lanes.i32()] * words)


def decode_words(block, plane, overflow, overflow_length: int, number) -> tuple[list, object]:
    """For code of single lanes: the 16 words of the A operand, and 0 if the block has no overflow entries.

    Rows are shifted as they are stored. Only overflow entries make infinities and NaN.
    """
    add, both, multiply, i32 = lanes.add, lanes.both, lanes.multiply, lanes.i32()
    thread = lanes.thread()
    tile, lane = lanes.shift_left(thread, -5), both(thread, 31)
    block_at, planes_at = lanes.shared_address(block), lanes.shared_address(plane)
    tile_plane = add(planes_at, multiply(tile, _TILE_BYTES))  # where a position of the block is at 2 * position

    # Escapes to the plane: a lane takes one entry of its tile.
    ends, first_overflow = _load(block_at, 4 * layout.HEADER, 2)
    select = "prmt.b32 $0, $1, 0, $2;"
    before = lanes.asm(select, "=r,r,r", ends, _selector(tile, -1), results=[i32], pure=True)[0]
    last = lanes.asm(select, "=r,r,r", ends, _selector(tile, 0), results=[i32], pure=True)[0]
    index = add(before, lane)
    entries_at = add(block_at, 4 * layout.ENTRY_START)
    (entry,) = lanes.asm(
        "{ .reg .pred p; .reg .b16 h; mov.b16 h, 0; setp.lt.u32 p, $2, $3; @p ld.shared.b16 h, [$1];"
        " cvt.u32.u16 $0, h; }",
        "=r,r,r,r", add(entries_at, lanes.shift_left(index, 1)), index, last, results=[i32],
    )  # fmt: skip
    patched, high = lanes.asm(
        "{ .reg .pred p, q; .reg .b32 c; and.b32 $0, $2, 4095; mad.lo.u32 $0, $0, 2, $3; setp.lt.u32 p, $4, $5;"
        " selp.b32 $0, $0, $6, p; and.b32 c, $2, 61440; setp.ne.u32 q, c, 0; add.u32 c, c, 12288; shr.u32 c, c, 2;"
        " selp.b32 $1, c, 0, q; }",
        "=&r,=&r,r,r,r,r,r", entry, planes_at, index, last, add(planes_at, _UNUSED, multiply(tile, 4)),
        results=[i32, i32], pure=True,
    )  # fmt: skip
    _store_half(patched, high)
    (rare,) = lanes.asm(
        "{ .reg .pred p; .reg .b32 c; sub.u32 c, $1, $2; setp.gt.u32 p, c, 32; selp.b32 c, 1, 0, p;"
        " or.b32 $0, c, $3; }",
        "=r,r,r,r", last, before, first_overflow, results=[i32], pure=True,
    )  # fmt: skip
    lanes.asm(
        _RARE, "r,r,r,r,r,r,l,r,r,r,r", rare, index, last, entries_at, planes_at, first_overflow,
        lanes.global_address(overflow), lanes.constant(overflow_length), lanes.scalar(number), lane, tile,
    )  # fmt: skip

    sign_mantissa_at = add(block_at, multiply(tile, 1024), multiply(lane, 16))
    sign_mantissa = _load(sign_mantissa_at, 0, 4) + _load(sign_mantissa_at, 512, 4)
    codes_at = add(block_at, multiply(tile, 384))
    codes = _load(add(codes_at, multiply(lane, 8)), 4 * layout.CODE_START, 2)
    codes += _load(add(codes_at, multiply(lane, 4)), 4 * layout.CODE_START + 256, 1)

    lanes.warp_barrier()
    own_plane = add(tile_plane, multiply(lane, 16))
    high = sum((_load(own_plane, 512 * j, 4) for j in range(4)), [])
    lanes.warp_barrier()
    _store_half(patched, lanes.constant(_CONSTANT_PAIR & 0xFFFF))
    lanes.asm(_FILL_IF, "r,r,r", rare, own_plane, lanes.constant(_CONSTANT_PAIR))
    lanes.warp_barrier()
    return _merge(sign_mantissa, codes, high), first_overflow


def _merge(sign_mantissa: list, codes: list, high: list) -> list:
    both, either = lanes.both, lanes.either
    registers = []
    for p in range(16):
        if p < 15:
            placed = lanes.shift_left(codes[p // 5], 7 - layout.CODE_BITS[p % 5])
            exponent = both(placed, _CODE)
        else:
            bits = [lanes.shift_left(both(codes[q], 0x00010001), 7 + q) for q in range(3)]
            exponent = either(either(bits[0], bits[1]), bits[2])
        packed = sign_mantissa[p // 2]
        if p % 2:  # odd registers lie byte-swapped in the same word
            (packed,) = lanes.asm("prmt.b32 $0, $1, 0, 0x2301;", "=r,r", packed, results=[lanes.i32()], pure=True)
        registers.append(either(both(packed, _SIGN_MANTISSA), either(exponent, high[p])))
    return registers


def _selector(tile, of: int):
    """The `prmt` selector that takes byte ``tile + of`` of a word, and zeros for byte -1 and for the other three."""
    (selector,) = lanes.asm(
        "{ .reg .pred p; .reg .b32 c; add.s32 c, $1, $2; setp.lt.s32 p, c, 0; selp.b32 c, 4, c, p;"
        " or.b32 $0, c, 0x4440; }",
        "=r,r,r", tile, lanes.constant(of), results=[lanes.i32()], pure=True,
    )  # fmt: skip
    return selector


def _store_half(address, value) -> None:
    lanes.asm("{ .reg .b16 h; cvt.u16.u32 h, $1; st.shared.b16 [$0], h; }", "r,r", address, value)
