"""Which class a configuration is for: the families that ``jaxzip.models`` computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxzip.models.config import DecoderConfig, UnsupportedConfigError
from jaxzip.models.decoder import Decoder
from jaxzip.models.gemma2 import Gemma2
from jaxzip.models.gemma3 import Gemma3
from jaxzip.models.llama import Llama
from jaxzip.models.mistral import Mistral
from jaxzip.models.mixtral import Mixtral
from jaxzip.models.qwen2 import Qwen2
from jaxzip.models.qwen3 import Qwen3
from jaxzip.models.qwen3_moe import Qwen3Moe

from jaxzip.checkpoint import hf_names

#: By ``model_type`` of Hugging Face's config.json.
FAMILIES: dict[str, type[Decoder]] = {
    **{cls.config_class.model_type: cls for cls in (Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3, Mixtral, Qwen3Moe)},
    "gemma3": Gemma3,
}


def family_of(config: DecoderConfig) -> type[Decoder]:
    """The model's class for a configuration.

    Raises:
      UnsupportedConfigError: it is no family's configuration.
    """
    for family in FAMILIES.values():
        if type(config) is family.config_class:
            return family
    raise UnsupportedConfigError(f"{type(config).__name__} is no family's configuration; there are {_known()}")


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that a Hugging Face ``config.json`` (as a dict) describes, of whatever family.

    Raises:
      UnsupportedConfigError: the family is not one of FAMILIES, or see :meth:`DecoderConfig.from_hf`.
    """
    try:
        model_type = hf_names.model_type(hf)
    except ValueError as error:
        raise UnsupportedConfigError(f"config: {error}") from None
    if model_type not in FAMILIES:
        raise UnsupportedConfigError(
            f"config: model_type is {hf.get('model_type')!r} (architectures {hf.get('architectures')}); "
            f"jaxzip.models computes {_known()}"
        )
    return FAMILIES[model_type].config_class.from_hf({**hf, "model_type": model_type})


def _known() -> str:
    return ", ".join(FAMILIES)
