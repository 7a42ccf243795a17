"""Typed wrappers around the FFI handlers that encode to lane-planar on a CUDA device, step by step.

`bits` is uint16 [M, K], or [K, M] where `transposed`; see `jaxzip.ops.encode`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxzip.ffi.custom_call import call, call_with_results

from jaxzip.formats.lane_planar import BLOCK, block_grid


def _grid(bits: jax.Array, transposed: bool) -> tuple[int, int]:
    return block_grid(*(bits.shape[::-1] if transposed else bits.shape))


def shifts(bits: jax.Array, *, transposed: bool) -> jax.Array:
    """int8 [64 R]: what to add to the exponents of each row."""
    rows, _ = _grid(bits, transposed)
    return call("jaxzip_lane_planar_shifts", (rows * BLOCK,), jnp.int8, bits, transposed=transposed)


def counts(bits: jax.Array, shift: jax.Array, *, transposed: bool) -> jax.Array:
    """uint32 [R C]: escapes of each block."""
    rows, columns = _grid(bits, transposed)
    return call("jaxzip_lane_planar_counts", (rows * columns,), jnp.uint32, bits, shift, transposed=transposed)


def payload(
    bits: jax.Array, shift: jax.Array, starts: jax.Array, *, width: int, overflow: int, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """`blocks` uint32 [R, C, width] and the overflow list of `overflow` words; `starts` uint32 [R C + 1]."""
    results = [
        jax.ShapeDtypeStruct((*_grid(bits, transposed), width), jnp.uint32),
        jax.ShapeDtypeStruct((overflow,), jnp.uint32),
    ]
    blocks, entries = call_with_results(
        "jaxzip_lane_planar_encode", results, bits, shift, starts, transposed=transposed
    )
    return blocks, entries
