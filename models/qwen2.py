"""``Qwen2`` (Yang et al., 2024), also Qwen 1.5 and 2.5: a Llama with biases of queries, keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxzip.models.config import FULL, SLIDING, SlidingConfig
from jaxzip.models.hf_values import whole
from jaxzip.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class Qwen2Config(SlidingConfig):
    """A Qwen 2 model; with ``use_sliding_window`` layers from ``max_window_layers`` on have the window."""

    model_type: ClassVar[str] = "qwen2"
    qkv_bias: ClassVar[bool] = True
    hf_defaults = {"sliding_window": 4096, "max_window_layers": 28}

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().fields_from_hf(hf)
        if not hf.get("use_sliding_window") or fields["sliding_window"] is None:
            return {**fields, "sliding_window": None, "layer_types": ()}
        first, layers = whole(hf, "max_window_layers", least=0), range(fields["num_layers"])
        types = fields["layer_types"] or tuple(SLIDING if i >= first else FULL for i in layers)
        return {**fields, "layer_types": types}


class Qwen2(Llama):
    """A Qwen 2 model; see ``Decoder``."""

    config_class = Qwen2Config
