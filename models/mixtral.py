"""``Mixtral`` (Jiang et al., 2024): a Mistral whose feed-forward networks are mixtures of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxzip.models.config import DecoderConfig, SlidingConfig, UnsupportedConfigError
from jaxzip.models.hf_values import whole
from jaxzip.models.llama import Block, Llama
from jaxzip.models.moe import MixtureOfExperts


@dataclasses.dataclass(frozen=True)
class ExpertsConfig(SlidingConfig):
    """What configurations of models with experts share.

    Attributes:
      num_experts: of a layer.
      num_experts_per_token: how many of them compute a token.
    """

    num_experts: int = 8
    num_experts_per_token: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.num_experts, int) or not isinstance(self.num_experts_per_token, int):
            raise UnsupportedConfigError(f"{self.num_experts=} and {self.num_experts_per_token=} must be integers")
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise UnsupportedConfigError(
                f"num_experts_per_token={self.num_experts_per_token} must be between 1 and {self.num_experts=}"
            )

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        return self.num_experts, self.num_experts_per_token, self.intermediate_size

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        # Mixtral's name and Qwen's.
        experts = whole(hf, "num_local_experts", None) or whole(hf, "num_experts", None)
        chosen = whole(hf, "num_experts_per_tok")
        return {**super().fields_from_hf(hf), "num_experts": experts, "num_experts_per_token": chosen}


@dataclasses.dataclass(frozen=True)
class MixtralConfig(ExpertsConfig):
    """A Mixtral model; ``intermediate_size`` is that of one expert."""

    model_type: ClassVar[str] = "mixtral"
    hf_defaults = {"rope_theta": 1e6, "num_key_value_heads": 8}


class MixtralBlock(Block):
    """A Llama's layer with experts."""

    @staticmethod
    def feed_forward(config: DecoderConfig, layer: int, *, fused: bool) -> MixtureOfExperts:
        return MixtureOfExperts(
            config,
            experts=config.num_experts,
            top_k=config.num_experts_per_token,
            intermediate=config.intermediate_size,
            normalized=True,
            fused=fused,
        )


class Mixtral(Llama):
    """A Mixtral model; see ``Decoder``."""

    config_class = MixtralConfig
    block = MixtralBlock
