"""``take``: rows of a compressed table, decoding only what is asked for (embedding lookup)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxzip.ops import explicit_axes, registry
from jaxzip.ops.decompress import decompress
from jaxzip.tensor import CompressedTensor


def take(table: CompressedTensor | jax.Array, ids: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Rows ``ids`` of ``table[M, K]``, as ``jnp.take(table, ids, axis=0)`` gives them, bit for bit.

    Args:
      table: compressed with ``output_axis=-2`` (the rows of an embedding table), or a dense matrix.
      ids: integers of any shape. Negative ids count from the end; ids outside the table give rows of NaN.
      implementation: ``"xla"``, ``"ffi"``, or ``None`` for the best one here.

    Returns:
      ``ids.shape + (K,)`` in the table's dtype.

    Raises:
      TypeError: ``ids`` are not integers, or ``table`` is neither compressed nor an array.
      ValueError: ``table`` is no matrix, or no such implementation.
    """
    if not isinstance(table, CompressedTensor | jax.Array | np.ndarray):
        raise TypeError(f"take: table must be a CompressedTensor or an array, got {type(table).__name__}")
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"take: ids have dtype {ids.dtype}, expected integers")
    if table.ndim != 2:
        raise ValueError(f"take: table has shape {table.shape}, expected a matrix")
    return _take(table, ids, implementation)


@functools.partial(jax.jit, static_argnums=2)
def _take(table, ids, implementation):
    with jax.named_scope("jaxzip.take"):
        split = P(*explicit_axes.split_of(ids))
        return explicit_axes.run(functools.partial(_take_rows, implementation), (table, ids), (P(), split), split)


def _take_rows(implementation, table, ids):
    rows = table.shape[0]
    flat = ids.reshape(-1)
    if jnp.iinfo(flat.dtype).max > jnp.iinfo(jnp.int32).max:
        flat = jnp.clip(flat, max(-rows - 1, jnp.iinfo(flat.dtype).min), rows)  # outside stays outside in 32 bits
    flat = flat.astype(jnp.int32)
    flat = jnp.where(flat < 0, flat + rows, flat)
    flat = jnp.where(flat < 0, rows, flat)  # still outside, and not to be wrapped once more
    if isinstance(table, CompressedTensor) and table.format != "raw":
        out = registry.run("take", implementation, table, flat)
    else:
        out = _take_dense(decompress(table) if isinstance(table, CompressedTensor) else table, flat)
    return out.reshape(*ids.shape, table.shape[1])


def take_xla(table: CompressedTensor, ids: jax.Array) -> jax.Array:
    """The reference: decompress the whole table, then XLA's gather."""
    return _take_dense(decompress(table, implementation=registry.XLA), ids)


def _take_dense(table: jax.Array, ids: jax.Array) -> jax.Array:
    if not jnp.issubdtype(table.dtype, jnp.floating) or table.dtype.itemsize > 4:
        return jnp.take(table, ids, axis=0, mode="fill")
    # As integers, without a select that could become one of floats: XLA's CPU backend may widen narrow floats to
    # fp32 and back, which quiets signalling NaNs and flushes subnormals. LLVM makes a select of a mask, too, if it
    # is a comparison's, and of its last columns, which its vectors do not reach, fp32: so the mask is a sign's.
    rows = table.shape[0]
    word = np.dtype(f"u{table.dtype.itemsize}")
    nan = np.asarray(jnp.nan, table.dtype).view(word)
    inside = ((ids - rows) >> 31).astype(word)[:, None]  # no id is negative
    found = jnp.take(jax.lax.bitcast_convert_type(table, word), ids, axis=0, mode="clip")
    return jax.lax.bitcast_convert_type((found & inside) | (~inside & nan), table.dtype)


registry.register("take", registry.XLA, take_xla)
