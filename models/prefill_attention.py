"""Attention of whole prompts on a GPU by cuDNN, which neither stores scores nor computes those that are masked.

cuDNN knows prompts of different lengths only if they are padded on the right; ours are padded on the left:

    - - a b c      turned by start = 2      a b c - -      attend, and turn back
    d e f g h                  start = 0    d e f g h
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxzip.models.execution import gpu_is_here

#: What cuDNN takes on GPUs before Hopper and since.
MAX_HEAD_DIM, MAX_HEAD_DIM_HOPPER = 128, 256
_DTYPES = (jnp.bfloat16, jnp.float16)


@functools.cache
def _largest_head_dim() -> int:
    """0 where cuDNN or a GPU is missing."""
    if not gpu_is_here():
        return 0
    try:
        probe = jax.ShapeDtypeStruct((1, 16, 1, 64), jnp.bfloat16)
        jax.eval_shape(functools.partial(_attend_from_left, implementation="cudnn"), *[probe] * 3, _lengths(1))
    except (RuntimeError, NotImplementedError, ValueError):
        return 0
    hopper = all(float(d.compute_capability) >= 9.0 for d in jax.devices("cuda"))
    return MAX_HEAD_DIM_HOPPER if hopper else MAX_HEAD_DIM


def _lengths(rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows,), jnp.int32)


def supported(head_dim: int, dtype: jax.typing.DTypeLike, cap: float | None) -> bool:
    """Whether cuDNN is here and computes attention of such heads; it has no cap on scores."""
    return cap is None and head_dim % 8 == 0 and jnp.dtype(dtype) in _DTYPES and head_dim <= _largest_head_dim()


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    divisor: float | None = None,
    window: int | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """Softmax attention of each token to those of its prompt before it and to itself.

    Args:
      q: ``[B, S, H, head_dim]``, rotated; head ``h`` reads KV head ``h // (H // KVH)``.
      k, v: ``[B, S, KVH, head_dim]``; keys are rotated.
      start: int32 ``[B]``, each prompt's first token; before it is padding.
      divisor: of the scores, by default ``sqrt(head_dim)``.
      window: a token sees the last ``window`` tokens only, itself included.
      implementation: of ``jax.nn.dot_product_attention``.

    Returns:
      ``[B, S, H, head_dim]`` in ``q.dtype``; zero in the padding.
    """
    length = q.shape[1]
    slots = jnp.arange(length, dtype=jnp.int32)
    turned = [_take(x, (slots + start[:, None]) % length) for x in (q, k, v)]
    seen = None if window is None or window >= length else window
    scale = None if divisor is None else 1 / divisor
    with jax.named_scope("attend"):
        out = _attend_from_left(*turned, length - start, scale=scale, window=seen, implementation=implementation)
    out = _take(out, (slots - start[:, None]) % length)
    # Past a prompt's end cuDNN leaves what was in memory.
    return jnp.where((slots >= start[:, None])[:, :, None, None], out, 0)


def _attend_from_left(q, k, v, lengths, *, implementation, scale=None, window=None):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0), implementation=implementation,
    )  # fmt: skip


def _take(x: jax.Array, slots: jax.Array) -> jax.Array:
    """``x[b, slots[b, i]]``."""
    return jnp.take_along_axis(x, slots[:, :, None, None], axis=1, mode="promise_in_bounds")
