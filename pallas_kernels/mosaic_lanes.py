"""The one file that leans on private parts of jax: code for single lanes inside a Mosaic GPU kernel, as PTX and MLIR.

Pallas speaks of whole arrays and warp groups; decoding wants to say what each lane loads and which register it fills.
`plgpu.inline_mgpu` takes a Python function that emits such code; what the function may need is here, and nothing else
of jax's internals is used anywhere. `unavailable_reason` says what a jax release changed, if it did.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

try:
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    _needed = (
        *(
            getattr(plgpu, name)
            for name in ("inline_mgpu", "kernel", "RefType", "RefUnion", "ACC", "set_max_registers")
        ),
        *(getattr(mgpu, name) for name in ("FragmentedArray", "WGMMA_LAYOUT", "thread_idx")),
        mgpu.utils.memref_ptr,
    )
    _missing = ""
except (ImportError, AttributeError) as error:
    _missing = f"jax {jax.__version__} lacks a part of Mosaic GPU that they are made of: {error}"


def unavailable_reason() -> str:
    """Why the Mosaic kernels cannot exist with this jax; empty if they can."""
    return _missing


WARP_GROUP = 128


def i32():
    return ir.IntegerType.get_signless(32)


def f32():
    return ir.F32Type.get()


def constant(value: int):
    """A 32-bit integer, given as any number whose low 32 bits it is."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), (value + (1 << 31)) % (1 << 32) - (1 << 31)))


def asm(text: str, constraints: str, *operands, results: Sequence = (), pure: bool = False) -> list:
    """PTX with ``$0..`` for results, then operands; not ``pure``: it keeps its place and may touch memory."""
    if not pure:
        constraints = f"{constraints},~{{memory}}" if constraints else "~{memory}"
    options = {"has_side_effects": not pure, "asm_dialect": 0}
    if len(results) == 0:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, **options)
        return []
    if len(results) == 1:
        return [llvm.inline_asm(results[0], list(operands), text, constraints, **options)]
    struct = llvm.inline_asm(llvm.StructType.get_literal(list(results)), list(operands), text, constraints, **options)
    return [llvm.extractvalue(t, struct, [i]) for i, t in enumerate(results)]


def add(*terms):
    return functools.reduce(arith.addi, [constant(t) if isinstance(t, int) else t for t in terms])


def multiply(a, b: int):
    return arith.muli(a, constant(b))


def both(a, b):
    return arith.andi(a, constant(b) if isinstance(b, int) else b)


def either(a, b):
    return arith.ori(a, constant(b) if isinstance(b, int) else b)


def shift_left(a, by: int):
    """``a << by``, or ``a >> -by``."""
    return arith.shli(a, constant(by)) if by > 0 else arith.shrui(a, constant(-by)) if by < 0 else a


def thread():
    """This thread's number in its warp group."""
    return both(mgpu.thread_idx(), WARP_GROUP - 1)


def shared_address(ref):
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(ref))


def global_address(ref):
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref))


def scalar(array):
    """The 32-bit integer that Pallas passed as an array of no dimensions."""
    return array.registers.item()


def operand_a(registers: Sequence) -> mgpu.FragmentedArray:
    """bf16 ``[64, 64]``, the A operand of wgmma, from a lane's 16 words: register r of k-step j is word 4 j + r."""
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    shape = mgpu.WGMMA_LAYOUT.registers_shape((64, 64))
    array = np.empty(len(registers), object)
    # Rows of 8 columns come first there, then the upper and the lower 8 rows.
    order = [4 * (group // 2) + 2 * (group % 2) + half for group in range(8) for half in range(2)]
    array[:] = [llvm.bitcast(pair, registers[i]) for i in order]
    return mgpu.FragmentedArray(_registers=array.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def sums_by_column_group(sums: mgpu.FragmentedArray) -> list[list]:
    """A lane's fp32 sums of wgmma by groups of 8 columns: row g of columns 2 t, 2 t + 1, then row g + 8 of both."""
    pairs = sums.registers.ravel()
    return [
        [vector.extract(pair, dynamic_position=[], static_position=[i]) for pair in pairs[at : at + 2] for i in (0, 1)]
        for at in range(0, len(pairs), 2)
    ]


def float_operation(text: str, *operands):
    """The fp32 result of one instruction on fp32 operands."""
    return asm(text, ",".join(["=f"] + ["f"] * len(operands)), *operands, results=[f32()], pure=True)[0]


def warp_barrier() -> None:
    asm("bar.warp.sync -1;", "")


def warp_group_barrier() -> None:
    mgpu.warpgroup_barrier()


def inline(arguments: Sequence, returns=None):
    """`plgpu.inline_mgpu` for a function that does not need the launch context."""

    def wrap(function):
        emit = plgpu.inline_mgpu(arg_types=tuple(arguments), return_type=returns)
        return emit(lambda context, *values: function(*values))

    return wrap
