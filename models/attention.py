"""Causal grouped-query attention over the KV cache."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models import decode_attention
from jaxzip.models.config import LlamaConfig
from jaxzip.models.execution import DEFAULT, Execution, gpu_is_here, with_gradient_of
from jaxzip.models.layers import Linear
from jaxzip.models.rope import rotate

#: Queries are taken in blocks of this many, so that scores need [B, H, QUERY_BLOCK, T] and not [B, H, S, T].
QUERY_BLOCK = 256


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions.

    ``fused``: queries, keys and values come from one weight ``qkv_proj``, see ``jaxzip.models.fuse``.
    """

    def __init__(self, config: LlamaConfig, *, fused: bool = False):
        self.config = config
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        if fused:
            self.qkv_proj = Linear(hidden, width + 2 * kv_width, dtype=config.dtype)
        else:
            self.q_proj = Linear(hidden, width, dtype=config.dtype)
            self.k_proj = Linear(hidden, kv_width, dtype=config.dtype)
            self.v_proj = Linear(hidden, kv_width, dtype=config.dtype)
        self.o_proj = Linear(width, hidden, dtype=config.dtype)

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        end: jax.Array,
        *,
        execution: Execution = DEFAULT,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Appends ``S`` tokens to the cache of one layer and attends to all that it holds.

        Args:
          x: ``[B, S, hidden]``.
          residual: ``[B, S, hidden]``, added to the output.
          rotation: cosines and sines of the new tokens, ``[B, S, head_dim // 2]``.
          keys, values: the layer's cache ``[B, num_kv_heads, T, head_dim]``.
          start, end: as in ``KVCache``, before the new tokens.
          execution: of the projections.

        Returns:
          The output ``[B, S, hidden]`` and the updated keys and values.
        """
        config = self.config
        if hasattr(self, "qkv_proj"):
            qkv = self.qkv_proj(x, execution=execution)
        else:
            parts = (self.q_proj, self.k_proj, self.v_proj)
            qkv = jnp.concatenate([part(x, execution=execution) for part in parts], axis=-1)
        xla = functools.partial(_append_and_attend, num_heads=config.num_heads)
        operands = (qkv, *rotation, keys, values, start, end)
        single = x.shape[1] == 1
        has_kernel = decode_attention.supported(config.head_dim, config.dtype) and gpu_is_here()
        if has_kernel and (single or execution.batch_invariant):
            if single:
                kernel = functools.partial(_kernel_for_one, batch_invariant=execution.batch_invariant)
            else:
                kernel = functools.partial(_kernel_for_each, num_heads=config.num_heads)
            kernel = with_gradient_of(xla, kernel)
            out, keys, values = jax.lax.platform_dependent(*operands, cuda=kernel, default=xla)
        else:
            out, keys, values = xla(*operands)
        return self.o_proj(out, residual=residual, execution=execution), keys, values


def _append_and_attend(qkv, cos, sin, keys, values, start, end, *, num_heads):
    """``[B, S, (H + 2 KVH) * D]`` to ``[B, S, H * D]`` and the updated cache."""
    q, k, v = _heads(qkv, num_heads, keys)
    keys, values = _append(rotate(k, cos, sin), v, keys, values, end)
    out = attend(rotate(q, cos, sin), keys, values, start, end)
    return out.reshape(*qkv.shape[:2], -1), keys, values


def _heads(qkv, num_heads, keys):
    """Queries, keys and values, each ``[B, S, heads, D]``."""
    split = qkv.reshape(*qkv.shape[:2], -1, keys.shape[-1])
    return jnp.split(split, [num_heads, num_heads + keys.shape[1]], axis=2)


def _append(k, v, keys, values, end):
    keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(1, 2), (0, 0, end, 0))
    return keys, jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2), (0, 0, end, 0))


def _kernel_for_one(qkv, cos, sin, keys, values, start, end, *, batch_invariant=False, interpret=False):
    options = {"append": True, "batch_invariant": batch_invariant, "interpret": interpret}
    out, keys, values = decode_attention.decode_attention(
        qkv[:, 0], cos[:, 0], sin[:, 0], keys, values, start, end[None], **options
    )
    return out[:, None], keys, values


def _kernel_for_each(qkv, cos, sin, keys, values, start, end, *, num_heads, interpret=False):
    """Every query for itself, in the order of sums that decoding has, whatever the batch and the padding."""
    batch, _, _ = qkv.shape
    _, k, v = _heads(qkv, num_heads, keys)
    keys, values = _append(rotate(k, cos, sin), v, keys, values, end)

    def block(_, first, count):
        rows = [jax.lax.dynamic_slice_in_dim(a, first, count, 1).reshape(-1, a.shape[-1]) for a in (qkv, cos, sin)]
        own = end + first + jnp.arange(count, dtype=jnp.int32)
        options = {"append": False, "batch_invariant": True, "interpret": interpret}
        out, *_ = decode_attention.decode_attention(*rows, keys, values, start, own, **options)
        return out.reshape(batch, count, -1)

    return _in_blocks(block, qkv[..., : num_heads * keys.shape[-1]]), keys, values


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
    grouped = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[-1])

    def block(queries, first, _):
        return _attend_block(queries, keys, values, start, end + first)

    return _in_blocks(block, grouped).reshape(q.shape)


def _in_blocks(block, queries):
    """``block(queries[:, first:first + count], first, count)`` for all of ``queries[B, S, ...]``, in their shape.

    Results take the queries' place. With new memory for them, XLA sets that of all layers to zero at once, before the
    first.
    """
    length = queries.shape[1]
    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return block(queries, 0, length)

    def step(i, out):
        first = i * QUERY_BLOCK
        found = block(jax.lax.dynamic_slice_in_dim(out, first, QUERY_BLOCK, 1), first, QUERY_BLOCK)
        return jax.lax.dynamic_update_slice_in_dim(out, found, first, 1)

    return jax.lax.fori_loop(0, length // QUERY_BLOCK, step, queries)


def _attend_block(q, keys, values, start, first):
    with jax.named_scope("attend"):
        scores = _einsum("bskgd,bktd->bkgst", q, keys, jnp.float32)
        scores = scores / math.sqrt(q.shape[-1])
        slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
        own = first + jnp.arange(q.shape[1], dtype=jnp.int32)
        seen = (slots[None, None, :] >= start[:, None, None]) & (slots[None, None, :] <= own[None, :, None])
        # Finite, not -inf: a query in the padding sees nothing, and NaN there would reach the cache of later layers.
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return _einsum("bkgst,bktd->bskgd", weights, values, q.dtype)


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """Products with fp32 accumulation, rounded once to ``dtype``."""

    def narrow(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=dtype)

    def wide(a, b):
        # XLA's CPU backend has no batched 16-bit dot with an fp32 result.
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32)).astype(dtype)

    return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)
