"""What a warp group does with one lane-planar block in shared memory: escapes to its patch planes, words to registers.

Warp w takes tile w. Its patch plane holds a byte for each of the tile's 1024 weights, in order of position: the five
high exponent bits, where they stand in a weight's upper byte, among bits that nobody reads. They are the constant,
except where the block's entries put others while it is decoded. So escapes cost no branch; what is rare (more than 32
entries in a tile, overflow entries) is a loop that a warp jumps over.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxzip.pallas_kernels import mosaic_lanes as lanes

from jaxzip.formats import lane_planar as layout

#: Of a plane that nothing is patched in.
_CONSTANT_WORD = 0x3C3C3C3C
_TILE_BYTES = 1024  # of a plane
#: Bytes of a warp group's planes, with a word a warp where lanes without an escape store.
PLANE_SHAPE = (layout.POSITIONS + 16,)
_UNUSED = layout.POSITIONS
#: Words of a block as a TMA box: a product of two numbers up to 256, the inner one a multiple of 4 and wide.
BOXES = {1424: (89, 16), 1440: (6, 240), 1456: (7, 208), 1464: (6, 244), 1472: (8, 184)}
_BLOCK_A = plgpu.ShapeDtypeStruct((layout.BLOCK, layout.BLOCK), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
#: Entries from here on have the five high exponent bits of infinity and NaN.
LARGEST = 31 << layout.ENTRY_POSITION_BITS
# `prmt` selectors of a word of lower bytes (0 to 3) and one of upper bytes (4 to 7): an even, an odd register.
_REGISTERS = 0x6240, 0x7351

# Operands: 0 where the lane's byte went, 1 its entry or 0; 2 and 3 the entry's index and the end of the tile's, 4 its
# address, 5 the tile's plane, 6 where lanes without an entry store.
_FIRST_ENTRY = """{
.reg .pred p;
.reg .b32 c;
setp.lt.u32 p, $2, $3;
mov.b32 $1, 0;
@p ld.shared.u16 $1, [$4];
and.b32 c, $1, 1023;
add.u32 c, c, $5;
selp.b32 $0, c, $6, p;
shr.u32 c, $1, 9;
st.shared.b8 [$0], c;
}"""

# Entries of the tile from the lane's 33rd, 65th, ... on; then the block's overflow entries, a lane each.
# Operands: 0 the largest entry that the lane put, with 12, the first one; 1 whether there is anything to do, 2 the
# first entry's index, 3 the end of the tile's, 4 the first entry's address, 5 the tile's plane, 6 to 8 first, list and
# length of overflow entries, 9 the block, 10 the lane, 11 the tile.
_RARE = """{
.reg .pred p, q;
.reg .b32 i, e, c, a;
.reg .b64 g;
mov.b32 $0, $12;
setp.eq.u32 p, $1, 0;
@p bra DONE;
mov.b32 a, $4;
add.u32 i, $2, 32;
INSIDE:
setp.ge.u32 p, i, $3;
@p bra SPILLED;
add.u32 a, a, 64;
ld.shared.u16 e, [a];
max.u32 $0, $0, e;
shr.u32 c, e, 9;
and.b32 e, e, 1023;
add.u32 e, e, $5;
st.shared.b8 [e], c;
add.u32 i, i, 32;
bra INSIDE;
SPILLED:
setp.eq.u32 p, $6, 0;
@p bra DONE;
sub.u32 i, $6, 1;
add.u32 i, i, $10;
OVERFLOW:
setp.ge.u32 p, i, $8;
@p bra DONE;
mad.wide.u32 g, i, 8, $7;
ld.global.nc.v2.b32 {c, e}, [g];
setp.ne.u32 p, c, $9;
@p bra DONE;
shr.u32 c, e, 10;
and.b32 a, c, 3;
setp.eq.u32 q, a, $11;
and.b32 a, e, 1023;
add.u32 a, a, $5;
@q st.shared.b8 [a], c;
shr.u32 e, e, 1;
@q max.u32 $0, $0, e;
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
        at = lanes.add(lanes.shared_address(plane), lanes.multiply(lanes.thread(), 32))
        for i in range(2):
            lanes.asm(f"st.shared.v4.b32 [$0+{16 * i}], {{$1, $1, $1, $1}};", "r,r", at, lanes.constant(_CONSTANT_WORD))
        lanes.warp_group_barrier()

    fill(plane_ref)


def decode(block_ref, plane_ref, overflow_ref, number: jax.Array) -> jax.Array:
    """The shifted weights of a block as bf16 ``[64, 64]`` in registers, the A operand of wgmma.

    Args:
      block_ref: u32 words of the block in shared memory, in any shape.
      plane_ref: u8 PLANE_SHAPE in shared memory, filled; the same after the call.
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
    """For code of single lanes: the 16 words of the A operand, and the largest entry that this lane put into the plane.

    Rows are shifted as they are stored. Weights of a warp whose lanes put no entry from ``LARGEST`` on are finite.
    """
    add, both, multiply, i32 = lanes.add, lanes.both, lanes.multiply, lanes.i32()
    thread = lanes.thread()
    tile, lane = lanes.shift_left(thread, -5), both(thread, 31)
    block_at, planes_at = lanes.shared_address(block), lanes.shared_address(plane)
    tile_plane, unused = add(planes_at, multiply(tile, _TILE_BYTES)), add(planes_at, _UNUSED, multiply(tile, 4))

    # Escapes to the plane: a lane takes one entry of its tile.
    ends, first_overflow = _load(block_at, 4 * layout.HEADER, 2)
    select = "prmt.b32 $0, $1, 0, $2;"
    before = lanes.asm(select, "=r,r,r", ends, _selector(tile, -1), results=[i32], pure=True)[0]
    last = lanes.asm(select, "=r,r,r", ends, _selector(tile, 0), results=[i32], pure=True)[0]
    index = add(before, lane)
    entry_at = add(block_at, 4 * layout.ENTRY_START, multiply(index, 2))
    patched, entry = lanes.asm(
        _FIRST_ENTRY, "=&r,=&r,r,r,r,r,r", index, last, entry_at, tile_plane, unused, results=[i32, i32]
    )  # fmt: skip
    (rare,) = lanes.asm(
        "{ .reg .pred p; .reg .b32 c; sub.u32 c, $1, $2; setp.gt.u32 p, c, 32; selp.b32 c, 1, 0, p;"
        " or.b32 $0, c, $3; }",
        "=r,r,r,r", last, before, first_overflow, results=[i32], pure=True,
    )  # fmt: skip
    (largest,) = lanes.asm(
        _RARE, "=&r,r,r,r,r,r,r,l,r,r,r,r,r", rare, index, last, entry_at, tile_plane, first_overflow,
        lanes.global_address(overflow), lanes.constant(overflow_length), lanes.scalar(number), lane, tile, entry,
        results=[i32],
    )  # fmt: skip

    own = multiply(lane, 16)
    lower_at = add(block_at, multiply(tile, _TILE_BYTES), own)
    lower = _load(lower_at, 0, 4) + _load(lower_at, 512, 4)
    codes_at = add(block_at, multiply(tile, 384))
    codes = _load(add(codes_at, multiply(lane, 8)), 4 * layout.CODE_START, 2)
    codes += _load(add(codes_at, multiply(lane, 4)), 4 * layout.CODE_START + 256, 1)

    lanes.warp_barrier()
    own_plane = add(tile_plane, own)
    high = _load(own_plane, 0, 4) + _load(own_plane, 512, 4)
    lanes.warp_barrier()
    _store_byte(patched, lanes.constant(_CONSTANT_WORD & 0xFF))
    lanes.asm(_FILL_IF, "r,r,r", rare, own_plane, lanes.constant(_CONSTANT_WORD))
    lanes.warp_barrier()
    return _merge(lower, codes, high), largest


def _merge(lower: list, codes: list, high: list) -> list:
    """16 registers of eight words of lower bytes, three of codes and eight of a plane."""
    registers = []
    for word in range(layout.LANE_WORDS):
        upper = _select(layout.CODES, _code_in_place(codes, word), high[word])
        registers += [_pure(f"prmt.b32 $0, $1, $2, {selector:#x};", lower[word], upper) for selector in _REGISTERS]
    return registers


def _code_in_place(codes: list, word: int):
    """The codes of a word of lower bytes, among bits of others."""
    if word < 3:
        return codes[word]
    if word < 6:
        return _pure("shf.r.wrap.b32 $0, $1, $1, 3;", codes[word - 3])
    signs, exponents = lanes.shift_left(codes[2], word - 5), lanes.shift_left(codes[word - 6], -5)
    return _select(layout.SIGNS, signs, exponents)


def _select(mask: int, a, b):
    """Bits of ``a`` where ``mask`` has ones, else of ``b``: one instruction, which the compiler does not find."""
    return _pure(f"lop3.b32 $0, {int(mask):#x}, $1, $2, 0xCA;", a, b)


def _pure(text: str, *operands):
    """The word that one instruction makes of others."""
    return lanes.asm(text, ",".join(["=r"] + ["r"] * len(operands)), *operands, results=[lanes.i32()], pure=True)[0]


def _selector(tile, of: int):
    """The `prmt` selector that takes byte ``tile + of`` of a word, and zeros for byte -1 and for the other three."""
    (selector,) = lanes.asm(
        "{ .reg .pred p; .reg .b32 c; add.s32 c, $1, $2; setp.lt.s32 p, c, 0; selp.b32 c, 4, c, p;"
        " or.b32 $0, c, 0x4440; }",
        "=r,r,r", tile, lanes.constant(of), results=[lanes.i32()], pure=True,
    )  # fmt: skip
    return selector


def _store_byte(address, value) -> None:
    lanes.asm("st.shared.b8 [$0], $1;", "r,r", address, value)
