"""Typed wrappers around the FFI handlers of each format, for code that is being traced by JAX.

They check nothing that the handlers check again; public checking belongs to `jaxzip.ops`. Every operand may carry
leading batch dimensions through `jax.vmap`, which handlers broadcast without copying the payload.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxzip.ffi.custom_call import Payload, call, sizes

from jaxzip.tensor import KERNEL_AXIS, CompressedTensor


@dataclasses.dataclass(frozen=True)
class FormatOps:
    """The custom calls of one format.

    Attributes:
      prefix: of the targets' names.
      fields: names of the payload's arrays, in the order in which handlers take them.
    """

    prefix: str
    fields: tuple[str, ...]

    def operands(self, payload: Payload) -> list[jax.Array]:
        return [payload[name] for name in self.fields]

    def decompress(self, payload: Payload, m: int, k: int, transposed: bool = True) -> jax.Array:
        """Decodes a payload; on CPU and CUDA.

        Args:
          payload: the arrays of one weight [M, K], by the names in `fields`.
          m: logical rows of the weight (output features).
          k: logical columns (input features).
          transposed: whether to return a Flax kernel [K, M] instead of [M, K].

        Returns:
          bfloat16 [K, M] or [M, K].

        Raises:
          jax.errors.JaxRuntimeError: at run time, when shapes do not fit m and k, or (on CPU) a count or index in the
            payload would lead out of an array.
        """
        shape = (k, m) if transposed else (m, k)
        options = {**sizes(m, k), "transposed": bool(transposed)}
        return call(f"{self.prefix}_decompress", shape, jnp.bfloat16, *self.operands(payload), **options)

    def matmul(self, x: jax.Array, payload: Payload, m: int, k: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x @ W.T for a compressed W [M, K], decoded a band at a time in cache; on CPU.

        Accumulates in float32 in an order that depends on neither N nor the number of threads nor the format, and
        rounds once.

        Args:
          x: [..., K], bfloat16 or float32.
          payload: as in `decompress`.
          m: logical rows of the weight.
          k: logical columns of the weight.
          out_dtype: bfloat16 or float32; that of x when None.

        Returns:
          [..., M] of `out_dtype`.
        """
        return _matmul(f"{self.prefix}_matmul", x, self.operands(payload), m, k, out_dtype)

    def take(self, ids: jax.Array, payload: Payload, m: int, k: int) -> jax.Array:
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
        shape = (flat.shape[0], k)
        rows = call(f"{self.prefix}_take", shape, jnp.bfloat16, flat, *self.operands(payload), **sizes(m, k))
        return rows.reshape(*ids.shape, k)


TCA_TBE = FormatOps(
    "jaxzip_tca_tbe",
    ("start_exp", "bitmap1", "bitmap2", "bitmap3", "sign_mantissa", "full", "tile_offsets", "band_offsets"),
)
LANE_PLANAR = FormatOps("jaxzip_lane_planar", ("shift", "blocks", "overflow"))
#: By the names in `jaxzip.formats`.
BY_FORMAT = {"tca-tbe": TCA_TBE, "lane-planar": LANE_PLANAR}


def decompress(z: CompressedTensor) -> jax.Array:
    """The dense array of a tensor or a stack in one of `BY_FORMAT`'s formats."""
    m, k = z.matrix_shape
    one = functools.partial(BY_FORMAT[z.format].decompress, m=m, k=k, transposed=z.output_axis == KERNEL_AXIS)
    for _ in z.batch_shape:
        one = jax.vmap(one)
    return one(dict(z.payload))


def take(table: CompressedTensor, ids: jax.Array) -> jax.Array:
    """Rows `ids` of a table [M, K] in one of `BY_FORMAT`'s formats."""
    return BY_FORMAT[table.format].take(ids, table.payload, *table.matrix_shape)


def raw_matmul(x: jax.Array, w: jax.Array, rows_first: bool = False, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """The tile loop of `FormatOps.matmul` over a dense bfloat16 weight, equal to it bit for bit: its control; on CPU.

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
