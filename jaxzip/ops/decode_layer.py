"""``decode_layer``: ``decode_chain`` with the attention before it: a layer's decode step from its projections on."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzip.ops import registry
from jaxzip.ops.decode_chain import ChainWeights, check_chain, decode_chain
from jaxzip.ops.rows import rms_normed, rotate

OP = "decode_layer"


class AttentionArrays(NamedTuple):
    """What attention of one new token a sequence reads; ``H`` heads of ``D`` features share ``KVH`` KV heads.

    Attributes:
      qkv: bfloat16 ``[N, (H + 2 KVH) * D]``, the new tokens' projections: the heads' queries, then keys, then values.
      cos, sin: fp32 ``[N, D // 2]``, of the new tokens' positions.
      keys, values: the cache, bfloat16 ``[N, KVH, T, D]``; keys are rotated.
      start: int32 ``[N]``, each sequence's first slot.
      own: int32 ``[]``, the slot of the new tokens.
      q_scale, k_scale: ``[D]``, of the norms of each head's queries and keys, or ``None``: there are none.
    """

    qkv: jax.Array
    cos: jax.Array
    sin: jax.Array
    keys: jax.Array
    values: jax.Array
    start: jax.Array
    own: jax.Array
    q_scale: jax.Array | None = None
    k_scale: jax.Array | None = None

    @property
    def heads(self) -> int:
        """``H``."""
        return self.qkv.shape[1] // self.keys.shape[3] - 2 * self.keys.shape[1]


def decode_layer(
    attention: AttentionArrays,
    residual: jax.Array,
    weights: ChainWeights,
    *,
    divisor: float,
    out_dtype: jax.typing.DTypeLike,
    window: int | None = None,
    cap: float | None = None,
    head_norm_eps: float = 0.0,
    head_norm_offset: float = 0.0,
    activation: str = "silu",
    batch_invariant: bool = False,
    implementation: str | None = None,
    **norms: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Attention over the cache and the new token, the rest of the layer, and the next one's first product.

    Queries and new keys go through their norms, where there are scales, and are rotated, each rounded once; new keys
    and values become slot ``own`` of the cache. Row ``b`` sees the slots ``start[b]`` to ``own``; what others hold has
    no effect. The rest is :func:`jaxzip.ops.decode_chain.decode_chain` of attention's output. Not differentiable by its
    CUDA implementation, which updates the cache in place if it is donated.

    Args:
      attention: see the class. Head ``h`` reads KV head ``h // (H // KVH)``.
      residual: bfloat16 ``[N, hidden]``.
      weights: as for ``decode_chain``; ``W`` is ``H * D``.
      divisor: of the scores.
      window: a query sees the last ``window`` slots only, its own included.
      cap: scores become ``cap * tanh(score / cap)``.
      head_norm_eps, head_norm_offset: of the norms of queries and keys.
      out_dtype, activation: as for ``decode_chain``.
      batch_invariant: as in :func:`jaxzip.matmul`; the order of attention's sums then depends on the number of a row's
        own slots only, neither on other rows, nor on ``start``, nor on ``T``.
      implementation: as in :func:`jaxzip.matmul`.
      norms: ``mlp_eps``, ``tail_eps``, ``o_eps``, ``down_eps`` and ``norm_offset`` of ``decode_chain``.

    Returns:
      ``x2[N, hidden]`` and ``y[N, M]`` as from ``decode_chain``, and the updated keys and values.

    Raises:
      ValueError: arrays do not fit each other, only one of ``q_scale`` and ``k_scale`` is there; also as
        ``decode_chain``.
      NotImplementedError: as :func:`jaxzip.matmul`.
    """
    _check_shapes(attention, residual, weights)
    check_chain(OP, weights, activation)
    options = {"divisor": float(divisor), "window": window, "cap": cap}
    options |= {"head_norm_eps": head_norm_eps, "head_norm_offset": head_norm_offset, **norms}
    options |= {"out_dtype": jnp.dtype(out_dtype), "activation": activation, "batch_invariant": bool(batch_invariant)}
    with jax.named_scope("jaxzip.decode_layer"):
        return registry.run(OP, implementation, attention, residual, weights, **options)


def available(attention: AttentionArrays, residual: jax.Array, weights: ChainWeights, **options) -> bool:
    """Whether a GPU would run the layer as one chain, given the arguments of :func:`decode_layer`."""
    return registry.candidates(OP, "cuda", attention, residual, weights, **options)[0] != registry.XLA


def _check_shapes(attention: AttentionArrays, residual: jax.Array, weights: ChainWeights) -> None:
    a = attention
    if a.keys.ndim != 4 or a.qkv.ndim != 2:
        raise ValueError(
            f"{OP}: keys are {a.keys.shape}, expected [N, KVH, T, D]; qkv is {a.qkv.shape}, expected [N, *]"
        )
    n, kv_heads, _, head_dim = a.keys.shape
    if a.heads < 1 or a.heads % kv_heads or a.qkv.shape[1] % head_dim:
        raise ValueError(
            f"{OP}: qkv has {a.qkv.shape[1]} columns, expected those of a multiple of {kv_heads} heads, and of "
            f"{kv_heads} heads of keys and of values, {head_dim} each"
        )
    expected = {
        "qkv": (n, a.qkv.shape[1]), "cos": (n, head_dim // 2), "sin": (n, head_dim // 2), "values": a.keys.shape,
        "start": (n,), "own": (), "q_scale": (head_dim,), "k_scale": (head_dim,),
    }  # fmt: skip
    for name, shape in expected.items():
        value = getattr(a, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{OP}: {name} has shape {value.shape}, expected {shape}")
    if (a.q_scale is None) != (a.k_scale is None):
        raise ValueError(f"{OP}: pass both of q_scale and k_scale, or neither")
    if residual.shape[0] != n:
        raise ValueError(f"{OP}: residual has {residual.shape[0]} rows, expected {n}, those of qkv")
    if weights.o_proj.shape[0] != a.heads * head_dim:
        raise ValueError(
            f"{OP}: o_proj takes {weights.o_proj.shape[0]} columns, attention gives {a.heads} heads of {head_dim}"
        )


def _one_by_one(attention, residual, weights, *, divisor, window, cap, head_norm_eps, head_norm_offset, **options):
    """The reference: attention by XLA, then the chain's reference."""
    norm = {"eps": head_norm_eps, "offset": head_norm_offset}
    attended, keys, values = _append_and_attend(attention, divisor, window, cap, norm)
    x, y = decode_chain(attended, residual, weights, **options, implementation=registry.XLA)
    return x, y, keys, values


def _append_and_attend(a: AttentionArrays, divisor, window, cap, norm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[N, H * D]`` and the updated cache; scores, softmax and sums in fp32."""
    n, kv_heads, slots, head_dim = a.keys.shape
    split = a.qkv.reshape(n, -1, head_dim)
    q, k, v = jnp.split(split, [a.heads, a.heads + kv_heads], axis=1)
    if a.q_scale is not None:
        q, k = rms_normed(q, a.q_scale, **norm), rms_normed(k, a.k_scale, **norm)
    q, k = rotate(q, a.cos, a.sin), rotate(k, a.cos, a.sin)
    keys = jax.lax.dynamic_update_slice_in_dim(a.keys, k[:, :, None], a.own, 2)
    values = jax.lax.dynamic_update_slice_in_dim(a.values, v[:, :, None], a.own, 2)

    slot = jnp.arange(slots, dtype=jnp.int32)
    seen = (slot >= a.start[:, None]) & (slot <= a.own)
    if window is not None:
        seen &= slot > a.own - window
    grouped = q.reshape(n, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgd,bktd->bkgt", _wide(grouped), _wide(keys)) / divisor
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    # Finite, not -inf: a row that sees nothing must give no NaN.
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    # What is not seen may be NaN, which a share of zero does not take away.
    visible = jnp.where(seen[:, None, :, None], values, 0)
    out = jnp.einsum("bkgt,bktd->bkgd", _wide(shares), _wide(visible)).astype(a.qkv.dtype)
    return out.reshape(n, -1), keys, values


def _wide(x):
    return x.astype(jnp.float32)


registry.register(OP, registry.XLA, _one_by_one)
