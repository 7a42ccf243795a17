"""``Qwen3`` (Yang et al., 2025): a Llama whose queries and keys go through a norm, head by head; no biases."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxzip.models.llama import Llama
from jaxzip.models.qwen2 import Qwen2Config


@dataclasses.dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """A dense Qwen 3 model; windows are as in Qwen 2."""

    model_type: ClassVar[str] = "qwen3"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True
    hf_defaults = {**Qwen2Config.hf_defaults, "head_dim": 128}


class Qwen3(Llama):
    """A dense Qwen 3 model; see ``Decoder``."""

    config_class = Qwen3Config
