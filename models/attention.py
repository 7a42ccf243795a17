"""Causal grouped-query attention over the KV cache."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models import decode_attention, prefill_attention
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import DEFAULT, Execution, gpu_is_here, with_gradient_of
from jaxzip.models.layers import Linear, norm, softcap

from jaxzip.ops.rows import rms_normed, rotate

#: Queries are taken in blocks of this many, so that scores need [B, H, QUERY_BLOCK, T] and not [B, H, S, T].
QUERY_BLOCK = 256


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions.

    What a family adds comes from its configuration: biases, norms of queries and keys, a window, a cap on scores.
    ``fused``: queries, keys and values come from one weight ``qkv_proj``, see ``jaxzip.models.fuse``.
    """

    def __init__(self, config: DecoderConfig, layer: int = 0, *, fused: bool = False):
        self.config, self.window = config, config.window(layer)
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        options = {"dtype": config.dtype, "use_bias": config.qkv_bias}
        if fused:
            self.qkv_proj = Linear(hidden, width + 2 * kv_width, **options)
        else:
            self.q_proj = Linear(hidden, width, **options)
            self.k_proj = Linear(hidden, kv_width, **options)
            self.v_proj = Linear(hidden, kv_width, **options)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm(config, config.head_dim), norm(config, config.head_dim)
        self.o_proj = Linear(width, hidden, dtype=config.dtype)

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        rotation: tuple[jax.Array, jax.Array],
        keys: jax.Array,
        values: jax.Array,
        start: jax.Array,
        end: jax.Array | None,
        *,
        execution: Execution = DEFAULT,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Appends ``S`` tokens to the cache of one layer and attends to all that it holds.

        Args:
          x: ``[B, S, hidden]``.
          residual: ``[B, S, hidden]``, added to the output, or ``None``.
          rotation: cosines and sines of the new tokens, ``[B, S, head_dim // 2]``.
          keys, values: the layer's cache ``[B, num_kv_heads, T, head_dim]``.
          start, end: as in ``KVCache``, before the new tokens; ``end`` is ``None`` where these are the first.
          execution: of the projections.

        Returns:
          The output ``[B, S, hidden]`` and the updated keys and values.
        """
        qkv = self.project(x, execution=execution)
        out, keys, values = self.append_and_attend(qkv, rotation, keys, values, start, end, execution=execution)
        return self.o_proj(out, residual=residual, execution=execution), keys, values

    def project(self, x: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """``x[B, S, hidden]`` to the heads' queries, then keys, then values, ``[B, S, (H + 2 KVH) * head_dim]``."""
        if hasattr(self, "qkv_proj"):
            return self.qkv_proj(x, execution=execution)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        return jnp.concatenate([part(x, execution=execution) for part in parts], axis=-1)

    def norm_heads(self, qkv: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """``qkv`` with each head's queries and keys behind their norms, in families that have these."""
        if not self.config.qk_norm:
            return qkv
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        split = qkv.reshape(*qkv.shape[:-1], heads + 2 * kv_heads, self.config.head_dim)
        q, k, v = jnp.split(split, [heads, heads + kv_heads], axis=-2)
        normed = [self.q_norm(q, execution=execution), self.k_norm(k, execution=execution), v]
        return jnp.concatenate(normed, axis=-2).reshape(qkv.shape)

    def append_and_attend(
        self, qkv, rotation, keys, values, start, end, *, execution: Execution = DEFAULT
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All between ``project`` and ``o_proj``: ``[B, S, H * head_dim]`` and the updated keys and values."""
        config = self.config
        scores = {"divisor": config.query_divisor, "window": self.window, "cap": config.attn_softcap}
        xla = functools.partial(_append_and_attend, num_heads=config.num_heads, **scores)
        first, end = end is None, jnp.int32(0) if end is None else end
        operands = (*rotation, keys, values, start, end)
        has_kernel = decode_attention.supported(config.head_dim, config.dtype) and gpu_is_here()
        if has_kernel and qkv.shape[1] == 1:
            scales, head_norm = self.head_norm()
            kernel = functools.partial(
                _kernel_for_one, batch_invariant=execution.batch_invariant, head_norm=head_norm, **scores
            )
            xla = functools.partial(xla, head_norm=head_norm)
            kernel = with_gradient_of(xla, kernel)
            return jax.lax.platform_dependent(qkv, *operands, *scales, cuda=kernel, default=xla)
        qkv = self.norm_heads(qkv, execution=execution)
        if has_kernel and execution.batch_invariant:
            kernel = functools.partial(_kernel_for_each, num_heads=config.num_heads, **scores)
        elif execution.batch_invariant and gpu_is_here():
            raise NotImplementedError(
                f"batch_invariant: the attention kernel lacks head_dim={config.head_dim}, dtype={config.dtype}, and "
                "XLA's sums depend on the batch's longest sequence"
            )
        elif first and prefill_attention.supported(config.head_dim, config.dtype, config.attn_softcap):
            kernel = functools.partial(
                _kernel_for_prompts, num_heads=config.num_heads, divisor=config.query_divisor, window=self.window
            )
        else:
            return xla(qkv, *operands)
        return jax.lax.platform_dependent(qkv, *operands, cuda=with_gradient_of(xla, kernel), default=xla)

    def head_norm(self) -> tuple[tuple[jax.Array, ...], decode_attention.HeadNorm | None]:
        """Scales of queries' and keys' norm, and the norm; in families without none."""
        if not self.config.qk_norm:
            return (), None
        scales = self.q_norm.scale.get_value(), self.k_norm.scale.get_value()
        return scales, decode_attention.HeadNorm(self.q_norm.eps, self.q_norm.offset)


def _append_and_attend(
    qkv, cos, sin, keys, values, start, end, *scales, num_heads, divisor=None, window=None, cap=None, head_norm=None
):
    """``[B, S, (H + 2 KVH) * D]`` to ``[B, S, H * D]`` and the updated cache."""
    q, k, v = _heads(qkv, num_heads, keys)
    if head_norm:
        q, k = (rms_normed(x, scale, head_norm.eps, head_norm.offset) for x, scale in zip((q, k), scales, strict=True))
    keys, values = _append(rotate(k, cos, sin), v, keys, values, end)
    out = attend(rotate(q, cos, sin), keys, values, start, end, divisor=divisor, window=window, cap=cap)
    return out.reshape(*qkv.shape[:2], -1), keys, values


def _heads(qkv, num_heads, keys):
    """Queries, keys and values, each ``[B, S, heads, D]``."""
    split = qkv.reshape(*qkv.shape[:2], -1, keys.shape[-1])
    return jnp.split(split, [num_heads, num_heads + keys.shape[1]], axis=2)


def _append(k, v, keys, values, end):
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), end, 2)
    return keys, jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), end, 2)


def _kernel_for_one(qkv, cos, sin, keys, values, start, end, *scales, **options):
    out, keys, values = decode_attention.decode_attention(
        qkv[:, 0], cos[:, 0], sin[:, 0], keys, values, start, end[None], *scales, append=True, **options
    )
    return out[:, None], keys, values


def _kernel_for_each(qkv, cos, sin, keys, values, start, end, *, num_heads, interpret=False, **scores):
    """Every query for itself, in the order of sums that decoding has, whatever the batch and the padding."""
    batch, _, _ = qkv.shape
    _, k, v = _heads(qkv, num_heads, keys)
    keys, values = _append(rotate(k, cos, sin), v, keys, values, end)

    def block(_, first, count):
        rows = [jax.lax.dynamic_slice_in_dim(a, first, count, 1).reshape(-1, a.shape[-1]) for a in (qkv, cos, sin)]
        own = end + first + jnp.arange(count, dtype=jnp.int32)
        options = {"append": False, "batch_invariant": True, "interpret": interpret, **scores}
        out, *_ = decode_attention.decode_attention(*rows, keys, values, start, own, **options)
        return out.reshape(batch, count, -1)

    return _in_blocks(block, qkv[..., : num_heads * keys.shape[-1]]), keys, values


def _kernel_for_prompts(qkv, cos, sin, keys, values, start, end, *, num_heads, **options):
    """The first tokens of all rows, so that nothing is in the cache before them."""
    q, k, v = _heads(qkv, num_heads, keys)
    # Read from the cache: otherwise XLA may fill it last, and keep ``qkv`` of all layers until then.
    keys, values = jax.lax.optimization_barrier(_append(rotate(k, cos, sin), v, keys, values, end))
    k, v = (cached[:, :, : qkv.shape[1]].swapaxes(1, 2) for cached in (keys, values))
    out = prefill_attention.prefill_attention(rotate(q, cos, sin), k, v, start, **options)
    return out.reshape(*qkv.shape[:2], -1), keys, values


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    end: jax.Array,
    *,
    divisor: float | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Softmax attention of queries in slots ``end + [0, S)`` to slots ``start[b] <= t <= own slot``.

    Scores, softmax and sums are fp32.

    Args:
      q: ``[B, S, H, head_dim]``; head ``h`` reads KV head ``h // (H // KVH)``.
      keys, values: ``[B, KVH, T, head_dim]``.
      start: int32 ``[B]``.
      end: int32 ``[]``, slot of the first query.
      divisor: of the scores, by default ``sqrt(head_dim)``.
      window: only the last ``window`` slots up to the own one are seen.
      cap: of the scores, see ``softcap``.

    Returns:
      ``[B, S, H, head_dim]`` in ``q.dtype``. Queries in the padding (slot below ``start``) give finite nonsense.
    """
    grouped = q.reshape(*q.shape[:2], keys.shape[1], -1, q.shape[-1])
    divisor = math.sqrt(q.shape[-1]) if divisor is None else divisor

    def block(queries, first, _):
        return _attend_block(queries, keys, values, start, end + first, divisor, window, cap)

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


def _attend_block(q, keys, values, start, first, divisor, window, cap):
    with jax.named_scope("attend"):
        scores = _einsum("bskgd,bktd->bkgst", q, keys, jnp.float32)
        scores = softcap(scores / divisor, cap)
        slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
        own = first + jnp.arange(q.shape[1], dtype=jnp.int32)
        seen = (slots[None, None, :] >= start[:, None, None]) & (slots[None, None, :] <= own[None, :, None])
        if window is not None:
            seen &= slots[None, None, :] > own[None, :, None] - window
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
