"""``Qwen3Moe`` (Yang et al., 2025): a Qwen 3 whose feed-forward networks are mixtures of many small experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx
from jaxzip.models.config import DecoderConfig
from jaxzip.models.hf_values import flag, items, whole
from jaxzip.models.llama import Block, Llama
from jaxzip.models.mixtral import ExpertsConfig
from jaxzip.models.mlp import MLP
from jaxzip.models.moe import MixtureOfExperts


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig(ExpertsConfig):
    """A Qwen 3 model with experts.

    Attributes:
      intermediate_size: of layers without experts.
      expert_size: intermediate size of one expert.
      normalized_weights: the weights of a token's experts are divided by their sum.
      dense_layers: layers without experts.
    """

    expert_size: int = 768
    normalized_weights: bool = False
    dense_layers: tuple[int, ...] = ()

    model_type: ClassVar[str] = "qwen3_moe"
    qk_norm: ClassVar[bool] = True
    hf_defaults = {"sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        return self.num_experts, self.num_experts_per_token, self.expert_size

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields, step = super().fields_from_hf(hf), whole(hf, "decoder_sparse_step", 1)
        dense = items(hf, "mlp_only_layers", int)
        layers = range(fields["num_layers"])
        return {
            **fields,
            "sliding_window": fields["sliding_window"] if hf.get("use_sliding_window") else None,
            "expert_size": whole(hf, "moe_intermediate_size"),
            "normalized_weights": flag(hf, "norm_topk_prob", False),
            "dense_layers": tuple(i for i in layers if i in dense or (i + 1) % step),
        }


class Qwen3MoeBlock(Block):
    """A Llama's layer, most with experts."""

    @staticmethod
    def feed_forward(config: DecoderConfig, layer: int, *, fused: bool) -> nnx.Module:
        if layer in config.dense_layers:
            return MLP(config, fused=fused)
        return MixtureOfExperts(
            config,
            experts=config.num_experts,
            top_k=config.num_experts_per_token,
            intermediate=config.expert_size,
            normalized=config.normalized_weights,
            fused=fused,
        )


class Qwen3Moe(Llama):
    """A Qwen 3 model with experts; see ``Decoder``."""

    config_class = Qwen3MoeConfig
    block = Qwen3MoeBlock
