"""``Llama``: the Llama architecture (Touvron et al., 2023) in Flax NNX, on dense or compressed weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.attention import Attention
from jaxzip.models.cache import KVCache
from jaxzip.models.config import LlamaConfig
from jaxzip.models.execution import DEFAULT, Execution
from jaxzip.models.fuse import is_fused
from jaxzip.models.layers import Embedding, Linear, RMSNorm
from jaxzip.models.params import assign, collect
from jaxzip.models.rope import rotation


class MLP(nnx.Module):
    """SwiGLU feed-forward network (Shazeer, 2020); ``fused``: gate and up are one weight, see ``fuse_projections``."""

    def __init__(self, config: LlamaConfig, *, fused: bool = False):
        hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, config.dtype
        if fused:
            self.gate_up_proj = Linear(hidden, 2 * intermediate, dtype=dtype)
        else:
            self.gate_proj = Linear(hidden, intermediate, dtype=dtype)
            self.up_proj = Linear(hidden, intermediate, dtype=dtype)
        self.down_proj = Linear(intermediate, hidden, dtype=dtype)

    def __call__(self, x: jax.Array, residual: jax.Array, *, execution: Execution = DEFAULT) -> jax.Array:
        """``x[B, S, hidden]`` to ``[B, S, hidden]``, plus ``residual``."""
        if hasattr(self, "gate_up_proj"):
            gate, up = jnp.split(self.gate_up_proj(x, execution=execution), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, execution=execution), self.up_proj(x, execution=execution)
        # In fp32, rounded once.
        hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return self.down_proj(hidden.astype(x.dtype), residual=residual, execution=execution)


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: LlamaConfig, *, fused: bool = False):
        norm = {"eps": config.rms_norm_eps, "dtype": config.dtype}
        self.input_norm = RMSNorm(config.hidden_size, **norm)
        self.attn = Attention(config, fused=fused)
        self.post_attn_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, fused=fused)

    def __call__(self, x, rotation, keys, values, start, end, *, execution=DEFAULT):
        """As ``Attention.__call__``, without ``residual``."""
        x, keys, values = self.attn(
            self.input_norm(x, execution=execution), x, rotation, keys, values, start, end, execution=execution
        )
        return self.mlp(self.post_attn_norm(x, execution=execution), x, execution=execution), keys, values


@functools.partial(jax.jit, static_argnames="execution")
def run_block(block: Block, x, rotation, keys, values, start, end, *, execution: Execution):
    """A layer. Those whose weights have the same shapes share one trace: deep models are lowered quickly."""
    return block(x, rotation, keys, values, start, end, execution=execution)


class Llama(nnx.Module):
    """A Llama model; parameters are named ``layers/0/attn/q_proj/kernel``, ``embedder/embedding``, ...

    ``Llama(config)`` holds shapes only and allocates nothing; :meth:`from_params` makes one that runs. Layers are
    separate weights and the loop over them is unrolled: a custom call would copy slices of a stack.

    Attributes:
      config: a ``LlamaConfig``.
      implementation: see ``Execution``.
      fused: layers have the weights ``attn/qkv_proj`` and ``mlp/gate_up_proj`` in place of their parts.
    """

    def __init__(self, config: LlamaConfig, *, implementation: str | None = None, fused: bool = False):
        self.config = config
        self.implementation = implementation
        self.embedder = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        self.layers = nnx.List([Block(config, fused=fused) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=config.dtype)

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any], *, implementation: str | None = None) -> Llama:
        """A model on ``params``, which are used as they are: nothing is copied or cast.

        Args:
          config: sizes; every parameter is checked against them.
          params: nested dicts with string keys (``params["layers"]["0"]["attn"]["q_proj"]["kernel"]``) of floating
            arrays or CompressedTensors. NumPy arrays are moved to the default device. A tied model has no
            ``lm_head``. Projections may be fused, see :func:`jaxzip.models.fuse_projections`.
          implementation: see the class.

        Raises:
          ValueError: parameters are missing, unknown or of another shape, or a compressed table has the wrong
            ``output_axis``; names all of them.
          TypeError: a leaf is neither a floating-point array nor a CompressedTensor.
        """
        model = cls(config, implementation=implementation, fused=is_fused(params))
        assign(model, params)
        return model

    def to_params(self) -> dict[str, Any]:
        """The tree that :meth:`from_params` takes; shares the arrays. ``Llama(config)`` gives shapes and dtypes."""
        return collect(self)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits after every token of unpadded rows: int32 ``tokens[B, S]`` to fp32 ``[B, S, vocab_size]``."""
        batch, length = tokens.shape
        hidden, _ = self.hidden(tokens, KVCache.empty(self.config, jnp.zeros(batch, jnp.int32), length))
        return self.logits(hidden)

    def hidden(self, tokens: jax.Array, cache: KVCache, *, batch_invariant: bool = False) -> tuple[jax.Array, KVCache]:
        """Appends int32 ``tokens[B, S]`` to ``cache`` (which must have room).

        Returns:
          Hidden states ``[B, S, hidden_size]`` before the final norm, and the cache with ``end`` moved on by ``S``.
        """
        length, execution = tokens.shape[1], Execution(self.implementation, batch_invariant)
        angles = rotation(self.config, cache.positions(length))
        with jax.named_scope("embedder"):
            x = self.embedder(tokens, execution=execution)
        all_keys, all_values = [], []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layers/{i}"):
                x, keys, values = run_block(
                    layer, x, angles, cache.keys[i], cache.values[i], cache.start, cache.end, execution=execution
                )
            all_keys.append(keys)
            all_values.append(values)
        cache = dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values), end=cache.end + length)
        return x, cache

    def logits(self, hidden: jax.Array, *, batch_invariant: bool = False) -> jax.Array:
        """Hidden states ``[..., hidden_size]`` to fp32 ``[..., vocab_size]``."""
        execution = Execution(self.implementation, batch_invariant)
        with jax.named_scope("lm_head"):
            x = self.final_norm(hidden, execution=execution)
            if self.config.tie_word_embeddings:
                return self.embedder.attend(x, execution=execution)
            return self.lm_head(x, out_dtype="float32", execution=execution)
