"""The product behind the public-API kernels of every format, and of raw weights, their control: one order of sums.

A program has a tile of rows of x and a row of 64x64 blocks of W, or a part of it where that gives the GPU enough to do:
it decodes one block after another and multiplies. Sums of parts are added in the order of K.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxzip.ops.manual_axes import result_like, varying_alike

BLOCK = 64
_SMALLEST_DOT = 16  # rows that a Triton dot takes
#: Rows of a tile of x, by the bytes of an element: those of which a program's registers hold the sums.
_LARGEST_ROWS = {2: 256, 4: 64}
# With fewer, what a program decodes and sums at once does not fit the registers of its threads.
_WARPS = 8
_BY_K = (((1,), (1,)), ((), ()))
#: K is split until there are so many programs, two for each multiprocessor of an H200.
_PROGRAMS = 264
_FEWEST_BLOCKS = 4  # of a part
_MOST_PARTS = 16


def compiler_params(interpret: bool, warps: int) -> triton.CompilerParams | None:
    """On a GPU the compiler parameters are what chooses Triton."""
    return None if interpret else triton.CompilerParams(num_warps=warps, num_stages=1)


def parts_of_k(programs: int, columns: int) -> tuple[int, int]:
    """Parts that ``columns`` blocks along K are split into, and the blocks of each, with so many programs a part."""
    parts = max(1, min(_PROGRAMS // programs, columns // _FEWEST_BLOCKS, _MOST_PARTS))
    blocks = pl.cdiv(columns, parts)
    return pl.cdiv(columns, blocks), blocks


def sums(
    x: jax.Array,
    operands: Sequence[jax.Array],
    specs: Sequence[pl.BlockSpec],
    weights: Callable,
    m: int,
    k: int,
    *,
    name: str,
    interpret: bool,
) -> jax.Array:
    """fp32 sums ``[N, M]`` of ``x[N, K] @ W.T``.

    Args:
      x: bf16 or fp32.
      operands: the arrays of W.
      specs: one for each; their maps get the numbers of a tile of x, of a row of blocks, of a part of K.
      weights: ``weights(refs, i, j)`` gives the bf16 bits of block j of row i, uint32 ``[64, 64]``.
      m: rows of W.
      k: columns of W.
      name: of the kernel.
      interpret: on the CPU.
    """
    n = x.shape[0]
    if n == 0:
        return jnp.zeros((0, m), jnp.float32)
    rows, columns = pl.cdiv(m, BLOCK), pl.cdiv(k, BLOCK)
    step = min(_LARGEST_ROWS[x.dtype.itemsize], max(_SMALLEST_DOT, pl.next_power_of_2(n)))
    tiles = pl.cdiv(n, step)
    parts, blocks = parts_of_k(tiles * rows, columns)
    x = jnp.pad(x, ((0, tiles * step - n), (0, columns * BLOCK - k)))

    def kernel(x_ref, *refs):
        *weight_refs, y_ref = refs
        row_block, first = pl.program_id(1), pl.program_id(2) * blocks

        def add(i, total):
            bits = weights(weight_refs, row_block, first + i)
            part = x_ref[:, pl.ds((first + i) * BLOCK, BLOCK)]
            values = lax.bitcast_convert_type(bits << 16, jnp.float32).astype(part.dtype)
            return total + lax.dot_general(part, values, _BY_K, lax.Precision.HIGHEST, jnp.float32)

        count = blocks if columns % blocks == 0 else jnp.minimum(blocks, columns - first)
        y_ref[...] = lax.fori_loop(0, count, add, jnp.zeros((step, BLOCK), jnp.float32))

    operands = varying_alike((x, *operands))
    y = pl.pallas_call(
        kernel,
        out_shape=result_like((parts, tiles * step, rows * BLOCK), jnp.float32, operands[0]),
        grid=(tiles, rows, parts),
        in_specs=[pl.BlockSpec((step, columns * BLOCK), lambda i, j, part: (i, 0)), *specs],
        out_specs=pl.BlockSpec((None, step, BLOCK), lambda i, j, part: (part, i, j)),
        name=name,
        interpret=interpret,
        compiler_params=compiler_params(interpret, _WARPS),
    )(*operands)
    return functools.reduce(operator.add, [y[part] for part in range(parts)])[:n, :m]
