"""``memory_plan``: the device memory that generation needs, from sizes alone.

weights                    as stored, or dense
KV cache                   2 x layers x [batch, kv heads, slots, head_dim], slots in buckets as ``generate`` has them
working memory             of prefill, where it is largest: activations of one layer, scores of one block of queries (if
                           cuDNN does not attend), and the largest weight decoded to bf16, where prompts do not
                           multiply by encoded weights: lane-planar's do up to PREFILL_ROWS rows (FUSED_ROWS an expert)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxzip.models.attention import QUERY_BLOCK
from jaxzip.models.batching import bucket
from jaxzip.models.config import DecoderConfig
from jaxzip.models.generate import LOOK_EVERY
from jaxzip.models.layers import FUSED_ROWS, PREFILL_ROWS
from jaxzip.models.prefill_attention import MAX_HEAD_DIM_HOPPER

from jaxzip.ops.gated_matmul import fills_gpu

#: What CUDA, its libraries and loaded programs take beside JAX's arrays, about.
RUNTIME_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes of device memory, by what they are for."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """Peak of JAX's arrays; the device also holds some RUNTIME_BYTES of CUDA's own."""
        return self.weights + self.cache + self.working

    def fits(self, memory: int) -> bool:
        """Whether a device with ``memory`` bytes can run it."""
        return self.total + RUNTIME_BYTES <= memory


def memory_plan(
    config: DecoderConfig, weight_bytes: int, batch: int, prompt: int, new_tokens: int, *, format: str | None
) -> MemoryPlan:
    """What ``generate`` needs for ``batch`` prompts of ``prompt`` tokens and ``new_tokens`` more each.

    Args:
      weight_bytes: of all parameters, in the format in which they are on the device.
      format: of compressed weights, ``None`` of dense ones.
    """
    itemsize = jnp.dtype(config.dtype).itemsize
    width, slots = cache_slots(prompt, new_tokens)
    heads = config.num_kv_heads * config.head_dim
    cache = 2 * config.num_layers * batch * heads * slots * itemsize
    rows = batch * width
    hidden, (experts, chosen, intermediate) = config.hidden_size, config.expert_sizes
    few = rows * chosen <= FUSED_ROWS * experts if experts > 1 else rows <= PREFILL_ROWS
    fused = format == "lane-planar" and few
    # Of the MLP: gate and up, their product, and what is as wide as the model; of each of a token's experts.
    mlp = chosen * 3 * intermediate + (2 * chosen + 2) * hidden
    if fused and experts == 1:
        # Fused products leave the residual of the latter; one with its gate has neither gate nor up.
        mlp = intermediate + 2 * hidden if fills_gpu(rows, 2 * intermediate) else 3 * intermediate + hidden
    peaks = [rows * mlp * itemsize]
    if config.attn_softcap is None and config.head_dim <= MAX_HEAD_DIM_HOPPER:
        # Of attention: queries, keys and values as they come, queries or what cuDNN finds as it has them, the residual.
        peaks.append(rows * (2 * config.num_heads * config.head_dim + 2 * heads + hidden) * itemsize)
    else:
        # Scores and probabilities of one block of queries.
        peaks.append(batch * config.num_heads * min(width, QUERY_BLOCK) * slots * (4 + itemsize))
    if format is not None and not fused:
        # While gate and up are multiplied, their weight is there decoded, that of all experts at once.
        activations = rows * (chosen * (2 * intermediate + hidden) + 4 * hidden)
        peaks.append((activations + 2 * experts * hidden * intermediate) * itemsize)
    working = max(peaks) + batch * config.vocab_size * 4
    return MemoryPlan(weight_bytes, cache, working)


def cache_slots(prompt: int, new_tokens: int) -> tuple[int, int]:
    """Slots of a prompt, and of prompt and new tokens, of one sequence on a GPU."""
    width = bucket(prompt)
    return width, width + bucket(new_tokens) + LOOK_EVERY - 1


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, 0 if 1 does not; ``fits`` of a number implies that of any lower."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
