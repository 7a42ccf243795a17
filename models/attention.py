"""Causal grouped-query attention over the KV cache."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.config import LlamaConfig
from jaxzip.models.layers import Linear
from jaxzip.models.rope import rotate

#: Queries are taken in blocks of this many, so that scores need [B, H, QUERY_BLOCK, T] and not [B, H, S, T].
QUERY_BLOCK = 256


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions."""

    def __init__(self, config: LlamaConfig):
        self.config = config
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, width, dtype=config.dtype)
        self.k_proj = Linear(hidden, kv_width, dtype=config.dtype)
        self.v_proj = Linear(hidden, kv_width, dtype=config.dtype)
        self.o_proj = Linear(width, hidden, dtype=config.dtype)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        end: jax.Array,
        *,
        implementation: str | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Appends ``S`` tokens to the cache of one layer and attends to all that it holds.

        Args:
          x: ``[B, S, hidden]``.
          rotation: cosines and sines of the new tokens, ``[B, S, head_dim // 2]``.
          keys, values: the layer's cache ``[B, num_kv_heads, T, head_dim]``.
          start, end: as in ``KVCache``, before the new tokens.
          implementation: of the projections' matmul.

        Returns:
          The output ``[B, S, hidden]`` and the updated keys and values.
        """
        batch, length, _ = x.shape

        def heads(projection: Linear) -> jax.Array:
            return projection(x, implementation=implementation).reshape(batch, length, -1, self.config.head_dim)

        q, k, v = rotate(heads(self.q_proj), *rotation), rotate(heads(self.k_proj), *rotation), heads(self.v_proj)
        keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(1, 2), (0, 0, end, 0))
        values = jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2), (0, 0, end, 0))
        out = attend(q, keys, values, start, end)
        return self.o_proj(out.reshape(batch, length, -1), implementation=implementation), keys, values


def attend(q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Softmax attention of queries in slots ``end + [0, S)`` to slots ``start[b] <= t <= own slot``.

    Scores, softmax and sums are fp32.

    Args:
      q: ``[B, S, H, head_dim]``; head ``h`` reads KV head ``h // (H // KVH)``.
      keys, values: ``[B, KVH, T, head_dim]``.
      start: int32 ``[B]``.
      end: int32 ``[]``, slot of the first query.

    Returns:
      ``[B, S, H, head_dim]`` in ``q.dtype``. Queries in the padding (slot below ``start``) give finite nonsense.
    """
    batch, length, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, length, keys.shape[1], -1, head_dim)

    def block(queries, first):
        return _attend_block(queries, keys, values, start, first)

    if length > QUERY_BLOCK and length % QUERY_BLOCK == 0:
        count = length // QUERY_BLOCK
        blocks = grouped.reshape(batch, count, QUERY_BLOCK, *grouped.shape[2:]).swapaxes(0, 1)
        firsts = end + QUERY_BLOCK * jnp.arange(count, dtype=jnp.int32)
        out = jax.lax.map(lambda args: block(*args), (blocks, firsts)).swapaxes(0, 1)
    else:
        out = block(grouped, end)
    return out.reshape(batch, length, num_heads, head_dim)


def _attend_block(q, keys, values, start, first):
    with jax.named_scope("attend"):
        scores = _einsum("bskgd,bktd->bkgst", q, keys)
        scores = scores / math.sqrt(q.shape[-1])
        slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
        own = first + jnp.arange(q.shape[1], dtype=jnp.int32)
        seen = (slots[None, None, :] >= start[:, None, None]) & (slots[None, None, :] <= own[None, :, None])
        # Finite, not -inf: a query in the padding sees nothing, and NaN there would reach the cache of later layers.
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return _einsum("bkgst,bktd->bskgd", weights, values).astype(q.dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Products with fp32 accumulation and an fp32 result."""

    def narrow(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def wide(a, b):
        # XLA's CPU backend has no batched 16-bit dot with an fp32 result.
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))

    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)
