"""Models for ``bench/generate.py``: the shapes of released ones, with synthetic weights, dense and encoded."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import synthetic
from jaxzip.models import Gemma3Config, LlamaConfig, Qwen3Config, family_of, fuse_projections
from jaxzip.models.config import DecoderConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.memory_plan import memory_plan

import jaxzip
from jaxzip.tensor import CompressedTensor

_COMMON = {"num_kv_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 5e5}
MODELS = {
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, **_COMMON
    ),
    "llama-3.1-70b": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, **_COMMON
    ),
    "qwen3-14b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_layers=40, num_heads=40, num_kv_heads=8,
        head_dim=128, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6,
    ),
    "gemma-3-12b": Gemma3Config(
        vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_layers=48, num_heads=16, num_kv_heads=8,
        head_dim=256, max_position_embeddings=131072, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        sliding_window=1024, layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 8,
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
        max_position_embeddings=4096,
    ),
}  # fmt: skip
NOTES = {"llama-3.1-70b": "as many layers as fit dense"}
#: Share of the device's memory that a dense model may take.
ROOM = 0.93


def with_layers(config: DecoderConfig, layers: int) -> DecoderConfig:
    """The same model with fewer layers."""
    types = {"layer_types": config.layer_types[:layers]} if hasattr(config, "layer_types") else {}
    return dataclasses.replace(config, num_layers=layers, **types)


def dense_layer(config: DecoderConfig, kind: str) -> dict:
    """Parameters of the first layer and of what is there once, dense, on the device, by the model's names."""
    leaves, treedef = jax.tree.flatten(family_of(config)(with_layers(config, 1)).to_params())

    def draw(numbered):
        seed, leaf = numbered
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return synthetic.weights(kind, leaf.shape, seed=seed)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # most of the time goes into compiling a program a shape
        return jax.tree.unflatten(treedef, list(pool.map(draw, enumerate(leaves))))


def encode(params: dict, format: str) -> dict:
    """Encodes matrices, several at a time on the host's cores."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)

    def one(item):
        path, leaf = item
        if leaf.ndim < 2:
            return leaf
        axis = -2 if "embedding" in jax.tree_util.keystr(path) else -1
        return jaxzip.compress(np.asarray(leaf), format=format, output_axis=axis, on_host=True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return jax.tree.unflatten(treedef, list(pool.map(one, paths)))


def whole_model(config: DecoderConfig, params: dict, chain: bool) -> Decoder:
    """A model of ``config.num_layers`` layers, each with a copy of the first one's weights."""
    fused = jax.tree.map(jnp.asarray, fuse_projections(params))
    first = fused["layers"]["0"]
    layers = {str(i): jax.tree.map(jnp.copy, first) for i in range(1, config.num_layers)}
    model = family_of(config).from_params(config, {**fused, "layers": {"0": first, **layers}})
    model.chain = chain
    return model


def weight_bytes(model: Decoder) -> tuple[int, int]:
    """Bytes of all weights, and of those that a decode step reads: all but the embedding, of which it reads rows."""
    params = model.to_params()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    unread = 0 if model.config.tie_word_embeddings else size(params["embedder"])
    return size(params), size(params) - unread


def format_of(model: Decoder) -> str | None:
    """Of its compressed weights, if it has any."""
    leaves = jax.tree.leaves(model.to_params(), is_leaf=lambda leaf: isinstance(leaf, CompressedTensor))
    return next((leaf.format for leaf in leaves if isinstance(leaf, CompressedTensor)), None)


def layers_that_fit(config: DecoderConfig, batch: int, prompt: int, new: int, memory: int) -> int:
    """Most layers of which the dense model and its cache fit."""
    for layers in range(config.num_layers, 0, -1):
        smaller = with_layers(config, layers)
        leaves = jax.tree.leaves(family_of(config)(smaller).to_params())
        weights = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        if memory_plan(smaller, weights, batch, prompt, new, format=None).total <= ROOM * memory:
            return layers
    raise SystemExit("not one layer fits")
