"""``Mistral`` (Jiang et al., 2023): a Llama whose layers see a window of the last tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxzip.models.config import SlidingConfig
from jaxzip.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class MistralConfig(SlidingConfig):
    """A Mistral model; from version 0.2 on without a window (``sliding_window=None``)."""

    model_type: ClassVar[str] = "mistral"
    hf_defaults = {"sliding_window": 4096, "num_key_value_heads": 8}


class Mistral(Llama):
    """A Mistral model; see ``Decoder``."""

    config_class = MistralConfig
