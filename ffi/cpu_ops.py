"""Typed wrappers around the FFI handlers, for code that is being traced by JAX.

They check nothing that the handlers check again; public checking belongs to `jaxzip.ops`. Every operand may carry
leading batch dimensions through `jax.vmap`, which handlers broadcast without copying the payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.ffi.libraries import register

PAYLOAD_FIELDS = (
    "start_exp",
    "bitmap1",
    "bitmap2",
    "bitmap3",
    "sign_mantissa",
    "full",
    "tile_offsets",
    "band_offsets",
)

Payload = Mapping[str, jax.Array]


def call(name: str, shape: tuple[int, ...], dtype: jnp.dtype, *operands: jax.Array, **attributes) -> jax.Array:
    """The custom call `name` with one result."""
    return call_with_workspace(name, [jax.ShapeDtypeStruct(shape, dtype)], *operands, **attributes)


def call_with_workspace(
    name: str, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes
) -> jax.Array:
    """The first result of the custom call `name`; XLA allocates the others, which are scratch."""
    register()
    operands, varying = _same_manual_axes(operands)
    result = jax.ffi.ffi_call(name, list(results), vmap_method="expand_dims")(*operands, **attributes)[0]
    # ffi_call takes the result to be the same on every device, whatever its operands are.
    return jax.lax.pcast(result, varying, to="varying") if varying else result


def _same_manual_axes(operands):
    """Inside `jax.shard_map`, marks operands as varying over the mesh axes that any of them varies over."""
    types = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(t.varying for t in types))
    cast = [
        jax.lax.pcast(o, tuple(sorted(varying - t.varying)), to="varying") if varying - t.varying else o
        for o, t in zip(operands, types)
    ]
    return cast, tuple(sorted(varying))


def sizes(m: int, k: int) -> dict[str, np.int64]:
    return {"m": np.int64(m), "k": np.int64(k)}


def _operands(payload: Payload) -> list[jax.Array]:
    return [payload[name] for name in PAYLOAD_FIELDS]


def decompress(payload: Payload, m: int, k: int, transposed: bool = True) -> jax.Array:
    """Decodes a TCA-TBE payload.

    Args:
      payload: the arrays of one weight [M, K], by the names in `PAYLOAD_FIELDS`.
      m: logical rows of the weight (output features).
      k: logical columns (input features).
      transposed: whether to return a Flax kernel [K, M] instead of [M, K].

    Returns:
      bfloat16 [K, M] or [M, K].

    Raises:
      jax.errors.JaxRuntimeError: at run time, when shapes do not fit m and k or the payload is corrupt.
    """
    shape = (k, m) if transposed else (m, k)
    return call(
        "jaxzip_tca_tbe_decompress",
        shape,
        jnp.bfloat16,
        *_operands(payload),
        **sizes(m, k),
        transposed=bool(transposed),
    )


def matmul(x: jax.Array, payload: Payload, m: int, k: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x @ W.T for a compressed W [M, K], decoded a band at a time in cache.

    Accumulates in float32 in an order that depends on neither N nor the number of threads, and rounds once.

    Args:
      x: [..., K], bfloat16 or float32.
      payload: as in `decompress`.
      m: logical rows of the weight.
      k: logical columns of the weight.
      out_dtype: bfloat16 or float32; that of x when None.

    Returns:
      [..., M] of `out_dtype`.
    """
    return _matmul("jaxzip_tca_tbe_matmul", x, _operands(payload), m, k, out_dtype)


def raw_matmul(x: jax.Array, w: jax.Array, rows_first: bool = False, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """The same tile loop over a dense bfloat16 weight: equal to `matmul` bit for bit, so it serves as its control.

    Args:
      x: [..., K], bfloat16 or float32.
      w: bfloat16 [K, M], or [M, K] when `rows_first`.
      rows_first: see `w`.
      out_dtype: bfloat16 or float32; that of x when None.

    Returns:
      [..., M] of `out_dtype`.
    """
    m, k = w.shape if rows_first else w.shape[::-1]
    return _matmul("jaxzip_raw_matmul", x, [w], m, k, out_dtype, rows_first=bool(rows_first))


def _matmul(name, x, weight, m, k, out_dtype, **attributes):
    rows = x.reshape(-1, k)
    y = call(name, (rows.shape[0], m), out_dtype or x.dtype, rows, *weight, **sizes(m, k), **attributes)
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
    rows = call("jaxzip_tca_tbe_take", (flat.shape[0], k), jnp.bfloat16, flat, *_operands(payload), **sizes(m, k))
    return rows.reshape(*ids.shape, k)
