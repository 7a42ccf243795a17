"""Decoding on a GPU with a layer's kernels in chains: all from its attention up to the next layer's in one call.

    embed, norm, qkv | chain of layer 0                                          | chain of layer 1 | ... | last chain
                       attention, o, norm, gate_up, SwiGLU, down, norm, next qkv          ..., down, final norm, head

Gemma's layers have GELU in place of SwiGLU, and norms behind o and down, each one kernel with the norm that follows.
Kernels of one call overlap: each starts while the one before ends, and asks for its weights meanwhile. XLA starts a
kernel when the one before has ended, which costs some microseconds at every one of them. Where the chain's attention
does not take a layer's heads, that layer's chain starts behind ``decode_attention``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.attention import Attention
from jaxzip.models.cache import KVCache
from jaxzip.models.execution import Execution
from jaxzip.models.layers import Embedding, Linear, RMSNorm
from jaxzip.models.mlp import MLP
from jaxzip.models.rope import rotation

from jaxzip.ops import decode_layer
from jaxzip.ops.decode_chain import ChainWeights, available, decode_chain
from jaxzip.ops.decode_layer import AttentionArrays
from jaxzip.tensor import CompressedTensor

Projection = Linear | Embedding


def applies(model: nnx.Module, rows: int, execution: Execution) -> bool:
    """Whether a GPU would decode ``rows`` sequences in chains.

    It takes Llama's and Gemma's layers (no biases, a gated MLP, norms before attention and MLP or on both sides) with
    fused projections, in bfloat16, all weights compressed in one format, and a backend that has the chain.
    """
    if not execution.chain or execution.implementation not in (None, "ffi") or model.config.dtype != "bfloat16":
        return False
    layers = list(model.layers)
    if not all(_has_the_form(layer) for layer in layers):
        return False
    links = zip(layers, _following(model), strict=True)
    return all(_fits(layer, norm, projection, rows, execution) for layer, (norm, projection) in links)


def _has_the_form(layer: nnx.Module) -> bool:
    from jaxzip.models.gemma2 import GemmaBlock  # these are built on the decoder, which is built on this
    from jaxzip.models.llama import Block

    if type(layer).__call__ not in (Block.__call__, GemmaBlock.__call__) or type(layer.mlp) is not MLP:
        return False
    fused = hasattr(layer.attn, "qkv_proj") and hasattr(layer.mlp, "gate_up_proj")
    return fused and not hasattr(layer.attn.qkv_proj, "bias")


def _mlp_norm(layer: nnx.Module) -> RMSNorm:
    """The norm before the MLP."""
    return layer.pre_mlp_norm if _norms_behind(layer) else layer.post_attn_norm


def _norms_behind(layer: nnx.Module) -> tuple[RMSNorm, ...]:
    """The norms behind attention and behind the MLP, of layers that have them."""
    return (layer.post_attn_norm, layer.post_mlp_norm) if hasattr(layer, "post_mlp_norm") else ()


def _fits(layer: nnx.Module, norm: RMSNorm, projection: Projection, rows: int, execution: Execution) -> bool:
    weights = _weights(layer, norm, projection)
    if len({n.offset for n in (_mlp_norm(layer), norm, *_norms_behind(layer))}) > 1:
        return False
    if not all(isinstance(w, CompressedTensor) for w in weights.matrices):
        return False
    if execution.implementation is None and any(w.format == "raw" for w in weights.matrices):
        return False  # XLA multiplies by these
    x = [jax.ShapeDtypeStruct((rows, features), jnp.bfloat16) for features in weights.o_proj.shape]
    return available(*x, weights, **_options(layer, norm, False, execution))


def _following(model: nnx.Module) -> list[tuple[RMSNorm, Projection]]:
    """The norm and the projection behind each layer."""
    head = model.embedder if model.config.tie_word_embeddings else model.lm_head
    return [(layer.input_norm, layer.attn.qkv_proj) for layer in list(model.layers)[1:]] + [(model.final_norm, head)]


def _weights(layer: nnx.Module, norm: RMSNorm, projection: Projection) -> ChainWeights:
    kernels = [linear.kernel.get_value() for linear in (layer.attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)]
    is_table = isinstance(projection, Embedding)
    tail = projection.embedding.get_value().T if is_table else projection.kernel.get_value()
    scales = [n.scale.get_value() for n in (_mlp_norm(layer), norm, *_norms_behind(layer))]
    return ChainWeights(*kernels, tail, *scales)


def _options(layer: nnx.Module, norm: RMSNorm, is_head: bool, execution: Execution) -> dict[str, Any]:
    behind = dict(zip(("o_eps", "down_eps"), (n.eps for n in _norms_behind(layer))))
    return behind | {
        "mlp_eps": _mlp_norm(layer).eps,
        "tail_eps": norm.eps,
        "norm_offset": norm.offset,
        "activation": layer.mlp.activation,
        "out_dtype": jnp.dtype(jnp.float32 if is_head else jnp.bfloat16),
        "batch_invariant": execution.batch_invariant,
    }


def step(model: nnx.Module, x: jax.Array, cache: KVCache, execution: Execution) -> tuple[jax.Array, KVCache]:
    """One token a row through all layers and the head, where :func:`applies` says so.

    Args:
      x: embeddings ``[B, 1, hidden_size]``.
      cache: must have room.
      execution: see the class.

    Returns:
      fp32 ``[B, vocab_size]``, the head's products, and the cache with ``end`` moved on by 1. On other platforms than
      CUDA they are computed as ``Decoder.run_layers`` and ``Decoder.logits`` do.
    """
    first, positions = model.layers[0], cache.positions(1)
    ropes = [model.config.rope(i) for i in range(len(model.layers))]
    angles = {rope: rotation(model.config, rope, positions) for rope in dict.fromkeys(ropes)}
    with jax.named_scope("layers/0"):
        y = first.attn.qkv_proj(first.input_norm(x, execution=execution), execution=execution)
    all_keys, all_values = [], []
    for i, (layer, (norm, projection)) in enumerate(zip(model.layers, _following(model), strict=True)):
        with jax.named_scope(f"layers/{i}"):
            x, y, keys, values = run_link(
                layer, norm, projection, y, x, angles[ropes[i]], cache.keys[i], cache.values[i], cache.start, cache.end,
                is_head=i == len(cache.keys) - 1, execution=execution,
            )  # fmt: skip
        all_keys.append(keys)
        all_values.append(values)
    return y[:, 0], dataclasses.replace(cache, keys=tuple(all_keys), values=tuple(all_values), end=cache.end + 1)


@functools.partial(jax.jit, static_argnames=("is_head", "execution"))
def run_link(
    layer, norm, projection, qkv, x, rotation, keys, values, start, end, *, is_head: bool, execution: Execution
):
    """A layer from its attention on, and the projection behind it; those of the same shapes share one trace.

    Returns:
      The layer's result ``[B, 1, D]``, its projection ``[B, 1, M]`` and the updated keys and values.
    """
    cache = (rotation, keys, values, start, end)
    options = _options(layer, norm, is_head, execution)

    def attend(layer, qkv, cache):
        return layer.attn.append_and_attend(qkv, *cache, execution=execution)

    def behind_attention(layer, norm, projection, out, x):
        x = _rest_of_layer(layer, out, x, execution)
        h = norm(x, execution=execution)
        if isinstance(projection, Embedding):
            return x, projection.attend(h, execution=execution)
        return x, projection(h, out_dtype="float32" if is_head else None, execution=execution)

    def chain_behind_attention(layer, norm, projection, out, x):
        weights = _weights(layer, norm, projection)
        x, y = decode_chain(out[:, 0], x[:, 0], weights, **options, implementation="ffi")
        return x[:, None], y[:, None]

    def one_chain(layer, norm, projection, qkv, x, cache):
        arrays, scores = _attention(layer.attn, qkv, *cache)
        weights = _weights(layer, norm, projection)
        x, y, *cache = decode_layer.decode_layer(arrays, x[:, 0], weights, **scores, **options, implementation="ffi")
        return x[:, None], y[:, None], *cache

    def ordinary(layer, norm, projection, qkv, x, cache):
        out, *cache = attend(layer, qkv, cache)
        return *behind_attention(layer, norm, projection, out, x), *cache

    if _attention_is_the_chains(layer, norm, projection, qkv, x, cache, options):
        operands = (layer, norm, projection, qkv, x, cache)
        return jax.lax.platform_dependent(*operands, cuda=one_chain, default=ordinary)
    out, *cache = attend(layer, qkv, cache)
    operands = (layer, norm, projection, out, x)
    found = jax.lax.platform_dependent(*operands, cuda=chain_behind_attention, default=behind_attention)
    return *found, *cache


def _attention_is_the_chains(layer, norm, projection, qkv, x, cache, options) -> bool:
    if type(layer.attn) is not Attention:
        return False
    arrays, scores = _attention(layer.attn, qkv, *cache)
    return decode_layer.available(arrays, x[:, 0], _weights(layer, norm, projection), **scores, **options)


def _attention(attn: Attention, qkv, rotation, keys, values, start, end) -> tuple[AttentionArrays, dict[str, Any]]:
    """What the chain's attention reads, and its options."""
    scales, head_norm = attn.head_norm()
    options = {"divisor": attn.config.query_divisor, "window": attn.window, "cap": attn.config.attn_softcap}
    if head_norm:
        options |= {"head_norm_eps": head_norm.eps, "head_norm_offset": head_norm.offset}
    cos, sin = (angles[:, 0] for angles in rotation)
    return AttentionArrays(qkv[:, 0], cos, sin, keys, values, start, end, *scales), options


def _rest_of_layer(layer: nnx.Module, out: jax.Array, x: jax.Array, execution: Execution) -> jax.Array:
    """What comes behind attention's output ``out[B, 1, W]``, by the layer's own parts."""
    if not (behind := _norms_behind(layer)):
        x = layer.attn.o_proj(out, residual=x, execution=execution)
        return layer.mlp(_mlp_norm(layer)(x, execution=execution), x, execution=execution)
    behind_attn, behind_mlp = behind
    x = x + behind_attn(layer.attn.o_proj(out, execution=execution), execution=execution)
    return x + behind_mlp(layer.mlp(_mlp_norm(layer)(x, execution=execution), execution=execution), execution=execution)
