"""Names of a Gemma model's parameters in the released Orbax checkpoints, nested or flat, and which model it is.

transformer/layer_3/attn/q_einsum/w       flat: two keys, "transformer/layer_3/attn/q_einsum" and "w"
layer_3/mlp/linear                        as training code has it: no "transformer", MLP weights without "w"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

TABLE = "input_embedding"
EMBEDDING = f"embedder/{TABLE}"
_PREFIXES = re.compile(r"^(params/)?(transformer/)?")
_LAYER = re.compile(r"layer_(\d+)/(.+)")
#: By family and number of layers: the window, the query's divisor squared if it is not the head's size, and whether
#: frequencies of layers without a window are stretched (Gemma 3 from 4B on), and the context.
_RELEASED = {
    ("gemma2", 26): (4096, None, False, 8192),
    ("gemma2", 42): (4096, None, False, 8192),
    ("gemma2", 46): (4096, 144, False, 8192),
    ("gemma3_text", 18): (512, None, False, 32768),
    ("gemma3_text", 26): (512, None, False, 32768),
    ("gemma3_text", 34): (1024, None, True, 131072),
    ("gemma3_text", 48): (1024, None, True, 131072),
    ("gemma3_text", 62): (1024, 168, True, 131072),
}
UNKNOWN = (
    "these are a Gemma model's parameters, but not of a size that was released: to run it with jaxzip.models put its "
    "config.json beside them and convert it again"
)


def key(path: Iterable[str]) -> str:
    """A parameter's name, the same for all layouts: ``layer_3/mlp/linear``, ``layer_3/attn/q_einsum/w``."""
    name = _PREFIXES.sub("", "/".join(path))
    return name.removesuffix("/w") if re.search(r"/mlp/(linear|gating_einsum)/w$", name) else name


def is_gemma(paths: Iterable[tuple[str, ...]]) -> bool:
    """Whether a tree's leaves are those of a Gemma 2 or 3."""
    found = {key(path) for path in paths}
    return {EMBEDDING, "layer_0/attn/attn_vec_einsum/w", "layer_0/mlp/linear", "layer_0/post_ffw_norm/scale"} <= found


def layers(names: Iterable[str]) -> int:
    """Number of layers by the parameters' names."""
    return 1 + max(int(match[1]) for name in names if (match := _LAYER.match(name)))


def config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The configuration of a released model in the terms of Hugging Face's config.json; ``None`` if it is none.

    Args:
      shapes: of all parameters, by :func:`key`.
    """
    family = "gemma3_text" if "layer_0/attn/_query_norm/scale" in shapes else "gemma2"
    count = layers(shapes)
    attention, kv = shapes["layer_0/attn/attn_vec_einsum/w"], shapes.get("layer_0/attn/kv_einsum/w")
    if (family, count) not in _RELEASED or len(attention) != 3 or kv is None or len(kv) != 4:
        return None
    window, scalar, stretched, context = _RELEASED[family, count]
    heads, head_dim, hidden = attention
    found = {
        "model_type": family,
        "vocab_size": shapes[EMBEDDING][0],
        "hidden_size": hidden,
        "intermediate_size": shapes["layer_0/mlp/linear"][0],
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": kv[1],
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar or head_dim,
        "sliding_window": window,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 107 if family == "gemma2" else 106],  # the end of the text, and of a turn
    }
    if family == "gemma2":
        return found | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0}
    scaling = {"rope_type": "linear", "factor": 8.0} if stretched else None
    return found | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": scaling}
