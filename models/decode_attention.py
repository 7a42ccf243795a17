"""Attention of single queries on a GPU: rotary positions, the new slot of the cache and softmax in one kernel.

A sequence's slots are cut into chunks from its own first slot on; a program takes one chunk of one KV head, a second
kernel puts the chunks' sums together, in order:

    slot      start                                  end
    row b     | chunk 0   | chunk 1   | chunk 2   |  -   -        program (b, kv head, chunk) -> max, sum, values [G, D]
                                                                   program (b, head) -> output [D]

With chunks of one length a row's result depends neither on the other rows, nor on the padding before it, nor on the
cache's length. Where there are rows enough, chunks are longer, and a single one needs no second kernel.
It is written for Pallas' Triton backend; where a JAX has none, ``supported`` is false and XLA computes attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without this backend
    plt = None

#: Slots of a chunk and stages of its pipeline, by the least number of rows times KV heads: where there are programs
#: enough, sequences need not be cut short. Best of those tried on an H200 with 640 of 775 slots filled.
CHUNKS = ((256, (1024, 2)), (32, (256, 3)), (0, (128, 3)))
FIXED = (128, 3)
#: What CUDA allows as the third size of a grid.
MAX_ROWS = 65535
#: Elements of keys that a program has in one step of its loop; stages of these fit an H200's shared memory.
BLOCK_ELEMENTS = 64 * 128
#: Slots of such a block at most.
MOST_SLOTS = 64
#: Chunks whose sums are put together at a time.
GATHER = 16
#: Stands for minus infinity where two are subtracted.
_LOW = -1e30
#: Least number of rows of a matrix product on Tensor Cores.
_MIN_ROWS = 16
_MAX_HEAD_DIM = 256
_DTYPES = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each head's queries and keys, see ``layers.RMSNorm``."""

    eps: float
    offset: float


def supported(head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take this head size and dtype; they run on CUDA devices only."""
    power_of_two = head_dim & (head_dim - 1) == 0
    return plt is not None and 32 <= head_dim <= _MAX_HEAD_DIM and power_of_two and jnp.dtype(dtype) in _DTYPES


def decode_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    own: jax.Array,
    *scales: jax.Array,
    append: bool,
    batch_invariant: bool = False,
    divisor: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    head_norm: HeadNorm | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends with one query a row to the row's slots of the cache, the query's own slot included.

    Args:
      qkv: projections before rotation, ``[N, (H + 2 KVH) * D]``: the heads' queries, then keys, then values.
      cos, sin: fp32 ``[N, D // 2]``.
      keys, values: the cache ``[B, KVH, T, D]``; ``N`` is a multiple of ``B``, and consecutive rows share a sequence.
      start: int32 ``[B]``, the sequence's first slot.
      own: int32 ``[N // B]``, the slot of each of a sequence's queries.
      batch_invariant: a row's result must not depend on the number of rows: chunks have one length.
      divisor: of the scores, by default ``sqrt(D)``.
      window: a query sees the last ``window`` slots only, its own included.
      cap: of the scores, see ``layers.softcap``.
      head_norm: with ``append``: queries and new keys stand for what this norm makes of them, before they are rotated.
      scales: of that norm, ``[D]`` each: queries' and keys'.
      append: ``N == B``, and the new keys and values go into the cache first. Otherwise they are there already.
      interpret: run on any device, slowly.

    Returns:
      The output ``[N, H * D]`` in ``qkv.dtype``, and the cache, updated in place if it is donated.

    Raises:
      ValueError: more than MAX_ROWS queries.
    """
    rows, (batch, kv_heads, slots, head_dim) = qkv.shape[0], keys.shape
    if rows > MAX_ROWS:
        raise ValueError(f"decode_attention takes up to {MAX_ROWS} queries at a time, got {rows}: use a smaller batch")
    group = qkv.shape[1] // head_dim // kv_heads - 2
    chunk, stages = FIXED if batch_invariant else next(c for least, c in CHUNKS if rows * kv_heads >= least)
    chunks = pl.cdiv(slots, chunk)
    shapes = {
        "group": group, "kv_heads": kv_heads, "queries": rows // batch, "chunk_slots": chunk, "window": window,
    }  # fmt: skip
    scores = {"divisor": math.sqrt(head_dim) if divisor is None else divisor, "cap": cap}
    out = jax.ShapeDtypeStruct((rows, kv_heads, group, head_dim), qkv.dtype)
    each = jax.ShapeDtypeStruct((rows, kv_heads, group, chunks), jnp.float32)
    sums = jax.ShapeDtypeStruct((rows, kv_heads, chunks, group, head_dim), jnp.float32)
    results = [out] if chunks == 1 else [sums, each, each]
    cache = [jax.ShapeDtypeStruct(keys.shape, keys.dtype)] * 2 if append else []
    found = pl.pallas_call(
        functools.partial(_attend_chunk, append=append, results=len(results), head_norm=head_norm, **scores, **shapes),
        grid=(chunks, kv_heads, rows),
        out_shape=(*results, *cache),
        input_output_aliases={5 + i: len(results) + i for i in range(len(cache))},
        interpret=interpret,
        **_compiler(interpret, num_warps=4, num_stages=stages),
        name="decode_attention",
    )(start, own, qkv, cos, sin, keys, values, *scales)
    results, updated = found[: len(results)], found[len(results) :]
    if chunks > 1:
        out = pl.pallas_call(
            functools.partial(_gather_chunks, **shapes),
            grid=(group, kv_heads, rows),
            out_shape=out,
            interpret=interpret,
            **_compiler(interpret, num_warps=2, num_stages=1),
            name="gather_attention",
        )(start, own, *results)
    else:
        (out,) = results
    return out.reshape(rows, -1), *(updated or (keys, values))


def _compiler(interpret: bool, **parameters: int) -> dict:
    return {} if interpret else {"compiler_params": plt.CompilerParams(**parameters)}


def _slots(start_ref, own_ref, queries, window):
    """The sequence of this program's row, the first slot that it sees and its own."""
    row = pl.program_id(2)
    start, own = start_ref[row // queries], own_ref[row % queries]
    return row, row // queries, start if window is None else jnp.maximum(start, own - (window - 1)), own


def _attend_chunk(
    start_ref, own_ref, qkv_ref, cos_ref, sin_ref, keys_ref, values_ref, *others,
    append, results, divisor, cap, head_norm, group, kv_heads, queries, chunk_slots, window,
):  # fmt: skip
    scales, others = (others[:2], others[2:]) if head_norm else ((None, None), others)
    results, cache = others[:results], others[results:]
    chunk, head = pl.program_id(0), pl.program_id(1)
    row, sequence, start, own = _slots(start_ref, own_ref, queries, window)
    first = start + chunk * chunk_slots

    head_dim, dtype = keys_ref.shape[-1], keys_ref.dtype
    block = min(MOST_SLOTS, BLOCK_ELEMENTS // head_dim)
    half, rows = head_dim // 2, max(_MIN_ROWS, pl.next_power_of_2(group))
    each, feature = jnp.arange(rows, dtype=jnp.int32), jnp.arange(head_dim, dtype=jnp.int32)
    whole, members, inside = pl.ds(0, head_dim), pl.ds(0, rows), each < group
    of_heads = jnp.broadcast_to(inside[:, None], (rows, head_dim))

    if len(results) == 1:

        @pl.when(first > own)
        def _():  # a query in the padding
            _store(results[0], (row, head, members, whole), jnp.zeros((rows, head_dim), dtype), of_heads)

    @pl.when(first <= own)
    def _():
        cos = _load(cos_ref, (row, feature % half), feature >= 0)
        sin = _load(sin_ref, (row, feature % half), feature >= 0) * jnp.where(feature < half, -1.0, 1.0)

        def rotated(at, inside, scale_ref):
            opposite = (feature + half) % head_dim
            this = _wide(_load(qkv_ref, (row, at + feature), inside))
            other = _wide(_load(qkv_ref, (row, at + opposite), inside))
            if head_norm:
                inverse_rms = jax.lax.rsqrt(jnp.sum(this * this, axis=-1) / head_dim + head_norm.eps)
                inverse_rms = inverse_rms[:, None] if this.ndim == 2 else inverse_rms

                def normed(x, features):
                    scale = _wide(_load(scale_ref, (features,), features >= 0))
                    factor = scale + head_norm.offset if head_norm.offset else scale
                    return _wide((x * inverse_rms * factor).astype(dtype))

                this, other = normed(this, feature), normed(other, opposite)
            return (this * cos + other * sin).astype(dtype)

        def scored(products):
            scores = products / divisor
            return scores if cap is None else cap * jnp.tanh(scores / cap)

        query = rotated((head * group + each)[:, None] * head_dim, of_heads, scales[0])
        if append:
            new = (kv_heads * group + head) * head_dim
            new_key = rotated(new, feature >= 0, scales[1])
            new_value = qkv_ref[row, pl.ds(new + kv_heads * head_dim, head_dim)]
        last = own if append else own + 1
        used = jnp.minimum(last - first, chunk_slots)

        def add(i, carry):
            before, total, sums = carry
            at = first + i * block
            stored = at + jnp.arange(block, dtype=jnp.int32) < last
            window = (sequence, head, pl.ds(at, block), whole)
            key = _load(keys_ref, window, stored[:, None])
            value = _load(values_ref, window, stored[:, None])
            scores = jnp.where(stored[None, :], scored(_dot(query, key, trans_b=True)), -jnp.inf)
            largest = jnp.maximum(before, jnp.max(scores, axis=1))
            kept, weights = jnp.exp(before - largest), jnp.exp(scores - largest[:, None])
            sums = sums * kept[:, None] + _dot(weights.astype(dtype), value)
            return largest, total * kept + jnp.sum(weights, axis=1), sums

        begin = (
            jnp.full(rows, _LOW, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((rows, head_dim), jnp.float32),
        )
        largest, total, sums = jax.lax.fori_loop(0, pl.cdiv(used, block), add, begin)
        if append:
            is_here = own < first + chunk_slots
            # The slot that this step fills: one more score, and its value times its weight.
            score = scored(jnp.sum(_wide(query) * _wide(new_key)[None, :], axis=1))
            score = jnp.where(is_here, score, _LOW)
            before, largest = largest, jnp.maximum(largest, score)
            kept, weight = jnp.exp(before - largest), jnp.exp(score - largest)
            total = total * kept + weight
            sums = sums * kept[:, None] + _wide(weight.astype(dtype))[:, None] * _wide(new_value)[None, :]

            @pl.when(is_here)
            def _():
                new_keys_ref, new_values_ref = cache
                new_keys_ref[sequence, head, own, :] = new_key
                new_values_ref[sequence, head, own, :] = new_value

        if len(results) == 1:  # the only chunk
            out = (sums / total[:, None]).astype(dtype)
            _store(results[0], (row, head, members, whole), out, inside[:, None])
        else:
            sums_ref, largest_ref, total_ref = results
            _store(sums_ref, (row, head, chunk, members, whole), sums, inside[:, None])
            _store(largest_ref, (row, head, members, chunk), largest, inside)
            _store(total_ref, (row, head, members, chunk), total, inside)


def _gather_chunks(
    start_ref, own_ref, sums_ref, largest_ref, total_ref, out_ref, *, group, kv_heads, queries, chunk_slots, window
):
    member, head = pl.program_id(0), pl.program_id(1)
    row, _, start, own = _slots(start_ref, own_ref, queries, window)
    used = (own - start) // chunk_slots + 1
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
    # A query in the padding has no chunk; NaN from there would spread.
    out_ref[row, head, member, :] = jnp.where(used > 0, sums / total, 0).astype(out_ref.dtype)


def _wide(x):
    return x.astype(jnp.float32)


def _load(ref, at, mask, other=0):
    return plt.load(ref.at[at], mask=mask, other=other)


def _store(ref, at, value, mask):
    plt.store(ref.at[at], value, mask=mask)


def _dot(a, b, trans_b=False):
    return plt.dot(a, b, trans_b=trans_b).astype(jnp.float32)
