"""``Decoder``: what all families share: embedding, the loop over layers, the head, and parameters in and out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models import decode_chain
from jaxzip.models.cache import KVCache
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import Execution
from jaxzip.models.fuse import is_fused
from jaxzip.models.layers import Embedding, Linear, norm, softcap
from jaxzip.models.params import assign, collect
from jaxzip.models.rope import rotation


@functools.partial(jax.jit, static_argnames="execution")
def run_block(block: nnx.Module, x, rotation, keys, values, start, end, *, execution: Execution):
    """A layer. Those whose weights have the same shapes share one trace: deep models are lowered quickly."""
    return block(x, rotation, keys, values, start, end, execution=execution)


class Decoder(nnx.Module):
    """A decoder-only transformer; parameters are named ``layers/0/attn/q_proj/kernel``, ``embedder/embedding``, ...

    A family is a subclass that names its configuration and its block. ``Family(config)`` holds shapes only and
    allocates nothing; :meth:`from_params` makes one that runs. Layers are separate weights and the loop over them is
    unrolled: a custom call would copy slices of a stack.

    Attributes:
      config: a ``DecoderConfig``.
      implementation, chain: see ``Execution``.
      fused: layers have the weights ``attn/qkv_proj`` and ``mlp/gate_up_proj`` in place of their parts.
    """

    #: The family's configuration.
    config_class: ClassVar[type[DecoderConfig]] = DecoderConfig
    #: ``block(config, layer, fused=fused)`` is layer ``layer``; called as ``Block`` in ``jaxzip.models.llama`` is.
    block: ClassVar[Callable[..., nnx.Module]]

    def __init__(self, config: DecoderConfig, *, implementation: str | None = None, fused: bool = False):
        self.config = config
        self.implementation, self.chain = implementation, True
        self.embedder = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        self.layers = nnx.List([type(self).block(config, layer, fused=fused) for layer in range(config.num_layers)])
        self.final_norm = norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=config.dtype)

    @classmethod
    def from_params(
        cls, config: DecoderConfig, params: Mapping[str, Any], *, implementation: str | None = None
    ) -> Self:
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
        hidden, _ = self.prefill(tokens, jnp.zeros(batch, jnp.int32), length)
        return self.logits(hidden)

    def prefill(
        self, tokens: jax.Array, start: jax.Array, slots: int, *, batch_invariant: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Prompts ``tokens[B, S]``, row ``b`` from ``start[b]`` on, into a new cache of ``slots >= S`` slots a row.

        As :meth:`hidden` on an empty cache; on a GPU faster, since nothing is before these tokens. Before a row's
        start hidden states are finite nonsense.
        """
        execution = Execution(self.implementation, batch_invariant, self.chain)
        cache = KVCache.empty(self.config, start, slots)
        return self.run_layers(self.embed(tokens, execution), cache, execution, first=True)

    def hidden(self, tokens: jax.Array, cache: KVCache, *, batch_invariant: bool = False) -> tuple[jax.Array, KVCache]:
        """Appends int32 ``tokens[B, S]`` to ``cache`` (which must have room).

        Returns:
          Hidden states ``[B, S, hidden_size]`` before the final norm, and the cache with ``end`` moved on by ``S``.
        """
        execution = Execution(self.implementation, batch_invariant, self.chain)
        return self.run_layers(self.embed(tokens, execution), cache, execution)

    def step(self, tokens: jax.Array, cache: KVCache, *, batch_invariant: bool = False) -> tuple[jax.Array, KVCache]:
        """Appends one token of each row, int32 ``tokens[B]``, to ``cache`` (which must have room).

        Returns:
          fp32 logits ``[B, vocab_size]`` of the tokens to come, and the cache with ``end`` moved on by 1.
        """
        execution = Execution(self.implementation, batch_invariant, self.chain)
        x = self.embed(tokens[:, None], execution)
        if decode_chain.applies(self, tokens.shape[0], execution):
            found, cache = decode_chain.step(self, x, cache, execution)
            return softcap(found, self.config.final_softcap), cache
        hidden, cache = self.run_layers(x, cache, execution)
        return self.logits(hidden[:, 0], batch_invariant=batch_invariant), cache

    def embed(self, tokens: jax.Array, execution: Execution) -> jax.Array:
        """int32 ``tokens[...]`` to ``[..., hidden_size]``."""
        with jax.named_scope("embedder"):
            x = self.embedder(tokens, execution=execution)
            scale = self.config.embedding_scale
            return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def run_layers(
        self, x: jax.Array, cache: KVCache, execution: Execution, *, first: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Embeddings ``[B, S, hidden_size]`` through all layers; returns as :meth:`hidden`.

        ``first``: ``cache`` is empty.
        """
        end = None if first else cache.end
        length, positions = x.shape[1], cache.positions(x.shape[1])
        ropes = [self.config.rope(i) for i in range(len(self.layers))]
        angles = {rope: rotation(self.config, rope, positions) for rope in dict.fromkeys(ropes)}
        all_keys, all_values = [], []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layers/{i}"):
                x, keys, values = run_block(
                    layer, x, angles[ropes[i]], cache.keys[i], cache.values[i], cache.start, end,
                    execution=execution,
                )  # fmt: skip
            all_keys.append(keys)
            all_values.append(values)
        cache = dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values), end=cache.end + length)
        return x, cache

    def logits(self, hidden: jax.Array, *, batch_invariant: bool = False) -> jax.Array:
        """Hidden states ``[..., hidden_size]`` to fp32 ``[..., vocab_size]``."""
        execution = Execution(self.implementation, batch_invariant, self.chain)
        with jax.named_scope("lm_head"):
            x = self.final_norm(hidden, execution=execution)
            if self.config.tie_word_embeddings:
                found = self.embedder.attend(x, execution=execution)
            else:
                found = self.lm_head(x, out_dtype="float32", execution=execution)
            return softcap(found, self.config.final_softcap)
