"""Attention of single queries on a GPU: rotary positions, the new slot of the cache and softmax in one kernel.

A sequence's slots are cut into chunks from its own first slot on; a program takes one chunk of one KV head, a second
kernel puts the chunks' sums together, in order:

    slot      start                                  end
    row b     | chunk 0   | chunk 1   | chunk 2   |  -   -        program (b, kv head, chunk) -> max, sum, values [G, D]
                                                                   program (b, head) -> output [D]

So a row's result depends neither on the other rows, nor on the padding before it, nor on the cache's length.
It is written for Pallas' Triton backend; where a JAX has none, ``supported`` is false and XLA computes attention.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without this backend
    plt = None

#: Slots that one program attends to.
CHUNK = 128
#: Chunks whose sums are put together at a time.
GATHER = 16
#: Least number of rows of a matrix product on Tensor Cores.
_MIN_ROWS = 16
_DTYPES = (jnp.bfloat16, jnp.float16)


def supported(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take this head size and dtype; they run on CUDA devices only."""
    return plt is not None and head_dim >= 32 and head_dim & (head_dim - 1) == 0 and jnp.dtype(dtype) in _DTYPES


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    own: jax.Array,
    *,
    append: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends with one query a row to the row's slots of the cache, the query's own slot included.

    Args:
      qkv: projections before rotation, ``[N, (H + 2 KVH) * D]``: the heads' queries, then keys, then values.
      cos, sin: fp32 ``[N, D // 2]``.
      keys, values: the cache ``[B, KVH, T, D]``; ``N`` is a multiple of ``B``, and consecutive rows share a sequence.
      start: int32 ``[B]``, the sequence's first slot.
      own: int32 ``[N // B]``, the slot of each of a sequence's queries.
      append: ``N == B``, and the new keys and values go into the cache first. Otherwise they are there already.
      interpret: run on any device, slowly.

    Returns:
      The output ``[N, H * D]`` in ``qkv.dtype``, and the cache, updated in place if it is donated.
    """
    rows, (batch, kv_heads, slots, head_dim) = qkv.shape[0], keys.shape
    group = qkv.shape[1] // head_dim // kv_heads - 2
    chunks = pl.cdiv(slots, CHUNK)
    shapes = {"group": group, "kv_heads": kv_heads, "queries": rows // batch}
    operands = (start, own, qkv, cos, sin, keys, values)
    partial = [
        jax.ShapeDtypeStruct((rows, kv_heads, chunks, group, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, kv_heads, group, chunks), jnp.float32),
        jax.ShapeDtypeStruct((rows, kv_heads, group, chunks), jnp.float32),
    ]
    cache = [jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2 if append else []
    sums, largest, total, *updated = pl.pallas_call(
        functools.partial(_attend_chunk, append=append, **shapes),
        grid=(chunks, kv_heads, rows),
        out_shape=(*partial, *cache),
        input_output_aliases={5: 3, 6: 4} if append else {},
        interpret=interpret,
        **_compiler(interpret, num_warps=4),
        name="decode_attention",
    )(*operands)
    out = pl.pallas_call(
        functools.partial(_gather_chunks, **shapes),
        grid=(group, kv_heads, rows),
        out_shape=jax.ShapeDtypeStruct((rows, kv_heads, group, head_dim), qkv.dtype),
        interpret=interpret,
        **_compiler(interpret, num_warps=2),
        name="gather_attention",
    )(start, own, sums, largest, total)
    return out.reshape(rows, -1), *(updated or (keys, values))


def _compiler(interpret: bool, num_warps: int) -> dict:
    return {} if interpret else {"compiler_params": plt.CompilerParams(num_warps=num_warps, num_stages=1)}


def _slots(start_ref, own_ref, queries):
    """The sequence of this program's row, its first slot and the row's own."""
    row = pl.program_id(2)
    return row, row // queries, start_ref[row // queries], own_ref[row % queries]


def _attend_chunk(
    start_ref, own_ref, qkv_ref, cos_ref, sin_ref, keys_ref, values_ref, sums_ref, largest_ref, total_ref, *cache,
    append, group, kv_heads, queries,
):  # fmt: skip
    chunk, head = pl.program_id(0), pl.program_id(1)
    row, sequence, start, own = _slots(start_ref, own_ref, queries)
    first = start + chunk * CHUNK

    @pl.when(first <= own)
    def _():
        head_dim = keys_ref.shape[-1]
        half = head_dim // 2
        slot = first + jnp.arange(CHUNK, dtype=jnp.int32)
        stored = slot < own if append else slot <= own
        window = (sequence, head, pl.ds(first, CHUNK))
        low, high = pl.ds(0, half), pl.ds(half, half)
        key_low = _load(keys_ref, (*window, low), stored[:, None])
        key_high = _load(keys_ref, (*window, high), stored[:, None])
        value = _load(values_ref, (*window, pl.ds(0, head_dim)), stored[:, None])
        cos, sin = cos_ref[row], sin_ref[row]

        def rotated(at, inside):
            low, high = (_load(qkv_ref, (row, where), inside).astype(jnp.float32) for where in (at, at + half))
            return (low * cos - high * sin).astype(value.dtype), (high * cos + low * sin).astype(value.dtype)

        rows = max(_MIN_ROWS, pl.next_power_of_2(group))
        each, feature = jnp.arange(rows, dtype=jnp.int32), jnp.arange(half, dtype=jnp.int32)
        query = (head * group + each)[:, None] * head_dim + feature[None, :]
        query_low, query_high = rotated(query, jnp.broadcast_to((each < group)[:, None], query.shape))
        if append:
            new = (kv_heads * group + head) * head_dim
            new_low, new_high = rotated(new + feature, feature >= 0)
            new_value = qkv_ref[row, pl.ds(new + kv_heads * head_dim, head_dim)]
            is_new = (slot == own)[:, None]
            key_low = jnp.where(is_new, new_low[None, :], key_low)
            key_high = jnp.where(is_new, new_high[None, :], key_high)
            value = jnp.where(is_new, new_value[None, :], value)

            @pl.when(own < first + CHUNK)
            def _():
                new_keys_ref, new_values_ref = cache
                new_keys_ref[sequence, head, own, low] = new_low
                new_keys_ref[sequence, head, own, high] = new_high
                new_values_ref[sequence, head, own, :] = new_value

        scores = _dot(query_low, key_low, trans_b=True) + _dot(query_high, key_high, trans_b=True)
        scores = jnp.where((slot <= own)[None, :], scores / math.sqrt(head_dim), -jnp.inf)
        largest = jnp.max(scores, axis=1)
        weights = jnp.exp(scores - largest[:, None])
        inside, members = each < group, pl.ds(0, rows)
        sums = _dot(weights.astype(value.dtype), value)
        _store(sums_ref, (row, head, chunk, members, pl.ds(0, head_dim)), sums, inside[:, None])
        _store(largest_ref, (row, head, members, chunk), largest, inside)
        _store(total_ref, (row, head, members, chunk), jnp.sum(weights, axis=1), inside)


def _gather_chunks(start_ref, own_ref, sums_ref, largest_ref, total_ref, out_ref, *, group, kv_heads, queries):
    member, head = pl.program_id(0), pl.program_id(1)
    row, _, start, own = _slots(start_ref, own_ref, queries)
    used = (own - start) // CHUNK + 1
    head_dim = out_ref.shape[-1]

    def add(i, carry):
        before, total, sums = carry
        first = i * GATHER
        inside = first + jnp.arange(GATHER, dtype=jnp.int32) < used
        at = (row, head, member, pl.ds(first, GATHER))
        each = _load(largest_ref, at, inside, -jnp.inf)
        largest = jnp.maximum(before, jnp.max(each))
        share = jnp.exp(each - largest)
        found = _load(sums_ref, (row, head, pl.ds(first, GATHER), member, pl.ds(0, head_dim)), inside[:, None])
        kept = jnp.exp(before - largest)
        total = total * kept + jnp.sum(share * _load(total_ref, at, inside))
        return largest, total, sums * kept + jnp.sum(share[:, None] * found, axis=0)

    begin = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.zeros(head_dim, jnp.float32))
    _, total, sums = jax.lax.fori_loop(0, pl.cdiv(used, GATHER), add, begin)
    out_ref[row, head, member, :] = (sums / total).astype(out_ref.dtype)


def _load(ref, at, mask, other=0):
    return plt.load(ref.at[at], mask=mask, other=other)


def _store(ref, at, value, mask):
    plt.store(ref.at[at], value, mask=mask)


def _dot(a, b, trans_b=False):
    return plt.dot(a, b, trans_b=trans_b).astype(jnp.float32)
