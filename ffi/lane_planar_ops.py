"""Typed wrappers around the CPU's FFI handlers of lane-planar, for code that is being traced by JAX.

As in `cpu_ops`, they check nothing that the handlers check again, and every operand may carry leading batch dimensions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxzip.ffi.cpu_ops import Payload, call, sizes

LANE_PLANAR_FIELDS = ("shift", "blocks", "overflow")


def _operands(payload: Payload) -> list[jax.Array]:
    return [payload[name] for name in LANE_PLANAR_FIELDS]


def decompress(payload: Payload, m: int, k: int, transposed: bool = True) -> jax.Array:
    """Decodes a lane-planar payload.

    Args:
      payload: the arrays of one weight [M, K], by the names in `LANE_PLANAR_FIELDS`.
      m: logical rows of the weight (output features).
      k: logical columns (input features).
      transposed: whether to return a Flax kernel [K, M] instead of [M, K].

    Returns:
      bfloat16 [K, M] or [M, K].

    Raises:
      jax.errors.JaxRuntimeError: at run time, when shapes do not fit m and k, or a count or index in the payload would
        lead out of an array.
    """
    shape = (k, m) if transposed else (m, k)
    name = "jaxzip_lane_planar_decompress"
    return call(name, shape, jnp.bfloat16, *_operands(payload), **sizes(m, k), transposed=bool(transposed))


def matmul(x: jax.Array, payload: Payload, m: int, k: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ W.T for a compressed W [M, K], decoded 16 rows at a time in cache; see `cpu_ops.matmul`, same bits.

    Args:
      x: [..., K], bfloat16 or float32.
      payload: as in `decompress`.
      m: logical rows of the weight.
      k: logical columns of the weight.
      out_dtype: bfloat16 or float32; that of x when None.

    Returns:
      [..., M] of `out_dtype`.
    """
    rows = x.reshape(-1, k)
    shape = (rows.shape[0], m)
    y = call("jaxzip_lane_planar_matmul", shape, out_dtype or x.dtype, rows, *_operands(payload), **sizes(m, k))
    return y.reshape(*x.shape[:-1], m)


def take(ids: jax.Array, payload: Payload, m: int, k: int) -> jax.Array:
    """Rows of a compressed W [M, K], decoding only what they need (embedding lookup).

    Args:
      ids: int32 of any shape; one outside [0, M) gives a row of NaN.
      payload: as in `decompress`.
      m: logical rows of the weight.
      k: logical columns of the weight.

    Returns:
      bfloat16 [*ids.shape, K].
    """
    flat = ids.reshape(-1)
    rows = call("jaxzip_lane_planar_take", (flat.shape[0], k), jnp.bfloat16, flat, *_operands(payload), **sizes(m, k))
    return rows.reshape(*ids.shape, k)
