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

#: Of a plane that nothing is patched in: the upper bytes of weights without sign and code.
_CONSTANT_WORD = 0x3C3C3C3C
_TILE_BYTES = 1024  # of a plane
#: Bytes of a warp group's planes, with a word a warp where lanes without an escape store.
PLANE_SHAPE = (layout.POSITIONS + 16,)
_UNUSED = layout.POSITIONS
#: Words of a block as a TMA box: a product of two numbers up to 256, the inner one a multiple of 4 and wide.
BOXES = {1424: (89, 16), 1440: (6, 240), 1456: (7, 208), 1464: (6, 244), 1472: (8, 184)}
_BLOCK_A = plgpu.ShapeDtypeStruct((layout.BLOCK, layout.BLOCK), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
_CODE, _HIGH = 0x03800380, 0x7C007C00

# A word of a plane has two registers of a lane, where their signs and mantissas lie in the packed word: byte 2 h + 1 is
# half h of the even register, byte 2 h that of the odd one. From a position in $at to its place, with b as scratch:
_TO_PLANE = """and.b32 b, $at, 3;
or.b32 b, b, 0x4440;
prmt.b32 b, 0x02000301, 0, b;
and.b32 $at, $at, 4092;
or.b32 $at, $at, b;
add.u32 $at, $at, $planes;
"""
# The byte of an entry's code in c: 0 for 0, else the five high exponent bits, two up.
_CODE_TO_BYTE = """setp.ne.u32 q, c, 0;
add.u32 c, c, 12288;
shr.u32 c, c, 10;
selp.b32 c, c, 0, q;
"""


def _to_plane(at: str, planes: str) -> str:
    return _TO_PLANE.replace("$at", at).replace("$planes", planes)


# Entries of the tile from the lane's 33rd, 65th, ... on; then the block's overflow entries, a lane each.
_RARE = f"""{{
.reg .pred p, q;
.reg .b32 i, e, c, a, b;
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
cvt.u32.u16 a, h;
and.b32 c, a, 61440;
{_to_plane("a", "$4")}{_CODE_TO_BYTE}st.shared.b8 [a], c;
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
ld.global.nc.v2.b32 {{c, e}}, [g];
setp.ne.u32 p, c, $8;
@p bra DONE;
shr.u32 a, e, 10;
and.b32 a, a, 3;
setp.eq.u32 q, a, $10;
mov.b32 a, e;
{_to_plane("a", "$4")}shr.u32 c, e, 12;
shl.b32 c, c, 2;
@q st.shared.b8 [a], c;
add.u32 i, i, 32;
bra OVERFLOW;
DONE:
}}"""

_FIRST_ENTRY = f"""{{
.reg .pred p, q;
.reg .b32 b, c;
and.b32 c, $2, 61440;
mov.b32 $0, $2;
{_to_plane("$0", "$3")}{_CODE_TO_BYTE}mov.b32 $1, c;
setp.lt.u32 p, $4, $5;
selp.b32 $0, $0, $6, p;
}}"""

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
    """For code of single lanes: the 16 words of the A operand, and 0 if the block has no overflow entries.

    Rows are shifted as they are stored. Only overflow entries make infinities and NaN.
    """
    add, both, multiply, i32 = lanes.add, lanes.both, lanes.multiply, lanes.i32()
    thread = lanes.thread()
    tile, lane = lanes.shift_left(thread, -5), both(thread, 31)
    block_at, planes_at = lanes.shared_address(block), lanes.shared_address(plane)

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
    patched, value = lanes.asm(
        _FIRST_ENTRY, "=&r,=&r,r,r,r,r,r", entry, planes_at, index, last, add(planes_at, _UNUSED, multiply(tile, 4)),
        results=[i32, i32], pure=True,
    )  # fmt: skip
    _store_byte(patched, value)
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
    tile_plane = add(planes_at, multiply(tile, _TILE_BYTES))
    own_plane = add(tile_plane, multiply(lane, 8))
    high = sum((_load(own_plane, 256 * j, 2) for j in range(4)), [])
    lanes.warp_barrier()
    _store_byte(patched, lanes.constant(_CONSTANT_WORD & 0xFF))
    lanes.asm(_FILL_IF, "r,r,r", rare, add(tile_plane, multiply(lane, 16)), lanes.constant(_CONSTANT_WORD))
    lanes.warp_barrier()
    return _merge(sign_mantissa, codes, high), first_overflow


def _select(mask: int, a, b):
    """Bits of ``a`` where ``mask`` has ones, else of ``b``."""
    return lanes.either(lanes.both(a, mask), lanes.both(b, ~mask))


def _merge(sign_mantissa: list, codes: list, high: list) -> list:
    both, either = lanes.both, lanes.either
    registers = []
    for p in range(16):
        if p < 15:
            placed = lanes.shift_left(codes[p // 5], 7 - layout.CODE_BITS[p % 5])
        else:
            bits = [lanes.shift_left(both(codes[q], 0x00010001), 7 + q) for q in range(3)]
            placed = either(either(bits[0], bits[1]), bits[2])
        if p % 2:  # odd registers lie byte-swapped in the same words
            others = _select(_HIGH >> 8, high[p // 2], sign_mantissa[p // 2])
            (others,) = lanes.asm("prmt.b32 $0, $1, 0, 0x2301;", "=r,r", others, results=[lanes.i32()], pure=True)
        else:
            others = _select(_HIGH, high[p // 2], sign_mantissa[p // 2])
        registers.append(_select(_CODE, placed, others))
    return registers


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
