"""Names of a model's tensors: in Hugging Face files, in GGUF files (Llama), and in the tree of ``jaxzip.models``.

model.layers.3.self_attn.q_proj.weight               layers/3/attn/q_proj/kernel
model.layers.3.mlp.experts.7.up_proj.weight          layers/3/mlp/experts/up_proj/kernel, matrix 7 of the stack
model.layers.3.block_sparse_moe.experts.7.w3.weight  the same (Mixtral)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxzip.tensor import TABLE_AXIS

#: Families whose tensors have these names, by ``model_type``, and what ``architectures`` calls their models.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)")
#: A language model beside an image encoder.
_LANGUAGE_MODEL = re.compile(r"^(language_model\.(?=model\.|lm_head\.)|model\.language_model\.)")
_PARTS = {
    **{f"self_attn.{name}": ("attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{f"mlp.{name}": ("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")},
    "mlp.gate": ("mlp", "router"),
    "block_sparse_moe.gate": ("mlp", "router"),
    "input_layernorm": ("input_norm",),
    "post_attention_layernorm": ("post_attn_norm",),
    "pre_feedforward_layernorm": ("pre_mlp_norm",),
    "post_feedforward_layernorm": ("post_mlp_norm",),
}
_EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT_PARTS |= {name: name for name in _EXPERT_PARTS.values()}
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


class Place(NamedTuple):
    """Where a tensor goes: a path in the model's tree, and which matrix of the stack there, if there is one."""

    path: tuple[str, ...]
    expert: int | None = None


def model_type(hf_config: Mapping[str, Any]) -> str | None:
    """The family of a Hugging Face config by its ``model_type``, or its ``architectures``; ``None`` if it has none.

    Raises:
      ValueError: these are no names; says the key, its value and what was expected.
    """
    named, models = hf_config.get("model_type"), hf_config.get("architectures")
    if not isinstance(named, str | None):
        raise ValueError(f"model_type is {named!r}, expected a string")
    if named in MODEL_TYPES or not models:
        return named
    if not isinstance(models, list | tuple):
        raise ValueError(f"architectures is {models!r}, expected a list of strings")
    return next((t for t, name in MODEL_TYPES.items() if name in models), named)


def place(hf_name: str) -> Place | None:
    """The place of a Hugging Face tensor, or ``None`` if no family has such a tensor."""
    prefix = _LANGUAGE_MODEL.match(hf_name)
    if prefix:
        rest = hf_name[prefix.end() :]
        hf_name = rest if prefix[0].startswith("language") else f"model.{rest}"
    if hf_name in _TOP:
        return Place(_TOP[hf_name])
    match = _LAYER.fullmatch(hf_name)
    if match is None:
        return None
    expert = _EXPERT.fullmatch(match[2])
    if expert and expert[2] in _EXPERT_PARTS and match[3] == "weight":
        return Place(("layers", match[1], "mlp", "experts", _EXPERT_PARTS[expert[2]], "kernel"), int(expert[1]))
    if match[2] not in _PARTS:
        return None
    part = _PARTS[match[2]]
    leaf = "bias" if match[3] == "bias" else "scale" if part[-1].endswith("norm") else "kernel"
    return Place(("layers", match[1], *part, leaf))


def tree_path(hf_name: str) -> tuple[str, ...] | None:
    """Path in the model's tree of a Hugging Face tensor that is no expert's, or ``None``."""
    found = place(hf_name)
    return None if found is None or found.expert is not None else found.path


def hf_name(gguf_name: str) -> str | None:
    """Hugging Face name of a GGUF tensor, or ``None`` if a Llama has no such tensor."""
    if gguf_name in _GGUF_TOP:
        return _GGUF_TOP[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _GGUF_PARTS:
        return None
    return f"model.layers.{match[1]}.{_GGUF_PARTS[match[2]]}.{match[3]}"


def output_axis(path: tuple[str, ...]) -> int | None:
    """The axis of output features of a model's tensor where rules have no say: an embedding's rows are looked up."""
    return TABLE_AXIS if path[-1] == "embedding" else None


def is_kernel(path: tuple[str, ...]) -> bool:
    """Whether the file holds the transpose: PyTorch's ``[M, K]`` for a kernel ``[K, M]``."""
    return path[-1] == "kernel"
