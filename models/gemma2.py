"""``Gemma2`` (Gemma Team, 2024): norms before and after each part, every other layer a window, capped scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxzip.models.attention import Attention
from jaxzip.models.config import FULL, SLIDING, SlidingConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.execution import DEFAULT
from jaxzip.models.hf_values import number, whole
from jaxzip.models.layers import norm
from jaxzip.models.mlp import MLP


@dataclasses.dataclass(frozen=True)
class Gemma2Config(SlidingConfig):
    """A Gemma 2 model.

    Attributes:
      query_pre_attn_scalar: attention's scores are divided by its square root.
      attn_softcap, final_softcap: of attention's scores and of the logits; ``None``: no cap.
    """

    query_pre_attn_scalar: float = 256
    attn_softcap: float | None = 50.0
    final_softcap: float | None = 30.0

    model_type: ClassVar[str] = "gemma2"
    norm_offset: ClassVar[float] = 1.0
    activation: ClassVar[str] = "gelu_tanh"
    #: Of this many layers the last sees all tokens.
    pattern: ClassVar[int] = 2
    hf_defaults = {
        "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "bos_token_id": 2, "eos_token_id": 1,
        "max_position_embeddings": 8192,
    }  # fmt: skip

    @property
    def query_divisor(self) -> float:
        return math.sqrt(self.query_pre_attn_scalar)

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size)

    @classmethod
    def hf_accepted(cls):
        why = "only causal attention is supported"
        return *super().hf_accepted(), ("use_bidirectional_attention", (None, False), why)

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields, pattern = super().fields_from_hf(hf), whole(hf, "sliding_window_pattern", cls.pattern)
        types = (SLIDING if (i + 1) % pattern else FULL for i in range(fields["num_layers"]))
        return {
            **fields,
            "layer_types": fields["layer_types"] or tuple(types),
            "query_pre_attn_scalar": number(hf, "query_pre_attn_scalar"),
            "attn_softcap": number(hf, "attn_logit_softcapping", None),
            "final_softcap": number(hf, "final_logit_softcapping", None),
        }


class GemmaBlock(nnx.Module):
    """One layer: attention and MLP, each between two norms and added to the residual."""

    def __init__(self, config: Gemma2Config, layer: int = 0, *, fused: bool = False):
        self.input_norm = norm(config)
        self.attn = Attention(config, layer, fused=fused)
        self.post_attn_norm = norm(config)
        self.pre_mlp_norm = norm(config)
        self.mlp = MLP(config, fused=fused)
        self.post_mlp_norm = norm(config)

    def __call__(self, x, rotation, keys, values, start, end, *, execution=DEFAULT):
        """As ``Attention.__call__``, without ``residual``."""
        normed = self.input_norm(x, execution=execution)
        out, keys, values = self.attn(normed, None, rotation, keys, values, start, end, execution=execution)
        x = x + self.post_attn_norm(out, execution=execution)
        out = self.mlp(self.pre_mlp_norm(x, execution=execution), execution=execution)
        return x + self.post_mlp_norm(out, execution=execution), keys, values


class Gemma2(Decoder):
    """A Gemma 2 model; see ``Decoder``."""

    config_class = Gemma2Config
    block = GemmaBlock
