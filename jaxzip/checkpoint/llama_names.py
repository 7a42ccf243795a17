"""Names of a Llama model's tensors: in Hugging Face files, in GGUF files, and in the tree of ``jaxzip.models``."""

from __future__ import annotations

import re

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    **{f"self_attn.{name}": ("attn", name) for name in _ATTENTION},
    **{f"mlp.{name}": ("mlp", name) for name in _MLP},
    "input_layernorm": ("input_norm",),
    "post_attention_layernorm": ("post_attn_norm",),
}
_TOP = {
    "model.embed_tokens.weight": ("embedder", "embedding"),
    "model.norm.weight": ("final_norm", "scale"),
    "lm_head.weight": ("lm_head", "kernel"),
}
_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tree_path(hf_name: str) -> tuple[str, ...] | None:
    """Path in the model's tree of a Hugging Face tensor, or ``None`` if a Llama has no such tensor."""
    if hf_name in _TOP:
        return _TOP[hf_name]
    match = _LAYER.fullmatch(hf_name)
    if match is None or match[2] not in _PARTS:
        return None
    part = _PARTS[match[2]]
    leaf = "bias" if match[3] == "bias" else "scale" if part[-1].endswith("norm") else "kernel"
    return ("layers", match[1], *part, leaf)


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, or ``None`` if a Llama has no such tensor."""
    if gguf_name in _GGUF_TOP:
        return _GGUF_TOP[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _GGUF_PARTS:
        return None
    return f"model.layers.{match[1]}.{_GGUF_PARTS[match[2]]}.{match[3]}"


def is_kernel(path: tuple[str, ...]) -> bool:
    """Whether the file holds the transpose: PyTorch's ``[M, K]`` for a kernel ``[K, M]``."""
    return path[-1] == "kernel"
