"""``CompressedEmbed``: ``nnx.Embed`` with a compressed table; a lookup decodes the rows that it needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxzip.modules.kernel import holds
from jaxzip.ops import decompress, matmul, take
from jaxzip.tensor import CompressedTensor


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """Implementations of ``take`` and ``matmul``; see :func:`jaxzip.matmul`."""

    implementation: str | None = None
    batch_invariant: bool = False


def lookup(table: CompressedTensor, ids: jax.Array, dtype: Any, out_sharding: Any = None) -> jax.Array:
    """``ids.shape + (D,)``: what Flax's Embed gives for the decoded ``table[V, D]``, cast to ``dtype``.

    With ``out_sharding`` the whole table is decoded first.

    Raises:
      ValueError: ``ids`` are not integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"Embed: ids have dtype {ids.dtype}, expected integers")
    if table.shape[0] == 1:  # as Flax has it: whatever the id
        return jnp.broadcast_to(decompress(table).astype(dtype), (*ids.shape, table.shape[1]))
    if out_sharding is not None:  # as Flax has it
        sharded = jax.sharding.auto_axes(lambda w, ids: jnp.take(w, ids, axis=0), out_sharding=out_sharding)
        return sharded(decompress(table).astype(dtype), ids)
    return take(table, ids).astype(dtype)


def attend(
    table: CompressedTensor, query: jax.Array, dtype: Any, options: TableOptions, out_sharding: Any = None
) -> jax.Array:
    """``query[..., D]`` times the transposed ``table[V, D]``, in ``dtype``; decoded first with ``out_sharding``."""
    query = query.astype(dtype)
    if out_sharding is not None or not holds(dtype, table.dtype):  # the cast changes the weight
        return jnp.dot(query, decompress(table).astype(dtype).T, out_sharding=out_sharding)
    return matmul(query, table.T, out_dtype=dtype, **dataclasses.asdict(options))


class CompressedEmbed(nnx.Embed):
    """Takes the place of an ``nnx.Embed``; ``embedding`` is an ``nnx.Param`` of a CompressedTensor ``[V, D]``.

    With an array in it, which ``restore_module`` puts there if the checkpoint has one, it is an ``nnx.Embed``.

    Args:
      layer: the layer to stand for; its parameter object is shared, so that tied layers stay tied.
      options: see :class:`TableOptions`.
    """

    def __init__(self, layer: nnx.Embed, options: TableOptions = TableOptions()):
        self.embedding = layer.embedding
        self.num_embeddings = layer.num_embeddings
        self.features = layer.features
        self.dtype = layer.dtype
        self.param_dtype = layer.param_dtype
        self.promote_dtype = layer.promote_dtype
        self.options = options

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """See ``nnx.Embed``."""
        table = self.embedding.get_value()
        if not isinstance(table, CompressedTensor):
            return super().__call__(inputs, out_sharding)
        return lookup(table, inputs, self.dtype, out_sharding)

    def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
        """See ``nnx.Embed.attend``."""
        table = self.embedding.get_value()
        if not isinstance(table, CompressedTensor):
            return super().attend(query, out_sharding)
        return attend(table, query, self.dtype, self.options, out_sharding)
