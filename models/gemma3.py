"""``Gemma3`` (Gemma Team, 2025), its text model: Gemma 2 with norms of queries and keys, two kinds of rotary positions.

Five layers with a window and short wavelengths come before each that sees all tokens; scores have no cap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxzip.models.config import FULL, SLIDING, Rope
from jaxzip.models.gemma2 import Gemma2, Gemma2Config
from jaxzip.models.hf_values import mapping, number


@dataclasses.dataclass(frozen=True)
class Gemma3Config(Gemma2Config):
    """The text model of a Gemma 3, also of one that sees images (``model_type: gemma3``).

    Attributes:
      rope_theta, rope_scaling: of layers that see all tokens.
      local_rope_theta: of layers with a window.
    """

    attn_softcap: float | None = None
    final_softcap: float | None = None
    local_rope_theta: float = 10000.0

    model_type: ClassVar[str] = "gemma3_text"
    qk_norm: ClassVar[bool] = True
    pattern: ClassVar[int] = 6
    #: The 4B model's config.json leaves out all of these.
    hf_defaults = {
        **Gemma2Config.hf_defaults, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "max_position_embeddings": 131072, "vocab_size": 262208,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip

    def rope(self, layer: int) -> Rope:
        return Rope(self.local_rope_theta, None) if self.slides(layer) else super().rope(layer)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]):
        if hf.get("model_type") == "gemma3":  # with an image encoder beside it
            own = {name: hf[name] for name in ("eos_token_id", "bos_token_id", "dtype", "torch_dtype") if name in hf}
            hf = {**own, **mapping(hf, "text_config"), "model_type": cls.model_type}
        return super().from_hf(hf)

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        rope, local = mapping(hf, "rope_parameters"), number(hf, "rope_local_base_freq")
        if FULL in rope:  # transformers 5: by kind of layer
            where = "config: rope_parameters."
            local = number(mapping(rope, SLIDING, where=where), "rope_theta", local, where=f"{where}{SLIDING}.")
            hf = {**hf, "rope_parameters": rope[FULL]}
        return {**super().fields_from_hf(hf), "local_rope_theta": local}


class Gemma3(Gemma2):
    """A Gemma 3 text model; see ``Decoder``."""

    config_class = Gemma3Config
