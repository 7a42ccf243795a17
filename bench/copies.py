"""A copy on the GPU of as many bytes as another kernel moves: what small kernels can be compared with.

A kernel takes microseconds to start and to end, so that one of 24 MB reaches less than one of 1 GB does. The copy is a
Pallas kernel because XLA drops copies of its own that a program does not need.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxzip.tuning import median_us, products

TRIPS = 4
#: Elements and warps of a program; the fastest counts.
BLOCKS = ((2048, 4), (8192, 4), (16384, 8))


def copy_us(moved: int, cold_bytes: float, repeats: int, calls: int) -> float:
    """Microseconds of a kernel that reads ``moved / 2`` bytes and writes them, from copies of ``cold_bytes`` in all."""
    return min(_copy_us(moved, cold_bytes, repeats, calls, *block) for block in BLOCKS)


def _copy_us(moved: int, cold_bytes: float, repeats: int, calls: int, block: int, warps: int) -> float:
    rows = math.ceil(moved / 4 / block)
    source = jnp.zeros((rows, block), jnp.bfloat16)
    sources = [jnp.copy(source) for _ in range(max(2, math.ceil(cold_bytes / source.nbytes)))]

    def kernel(from_ref, to_ref):
        to_ref[...] = from_ref[...]

    copy = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(source.shape, source.dtype),
        grid=(rows,),
        in_specs=[pl.BlockSpec((1, block), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((1, block), lambda i: (i, 0)),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        name="copy",
    )
    arguments = jnp.zeros((1, 1), jnp.bfloat16), sources
    program = products(lambda _, source: copy(source), 1, TRIPS).lower(*arguments).compile()
    return median_us(program, arguments, TRIPS * len(sources), repeats, calls)
