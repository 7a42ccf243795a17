"""``LlamaConfig``: the sizes and constants of a Llama model, from a Hugging Face config and to plain JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxzip.errors import JaxzipError

DTYPES = ("bfloat16", "float16", "float32")


class UnsupportedConfigError(JaxzipError, ValueError):
    """A model configuration asks for something that this implementation does not compute, or contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of low RoPE frequencies (``rope_type: llama3``).

    Wavelengths above ``original_max_position_embeddings / low_freq_factor`` are divided by ``factor``, those below
    ``original_max_position_embeddings / high_freq_factor`` stay, and between the two the frequency is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UnsupportedConfigError(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that determines a Llama model's computation, except its weights; static and hashable.

    Attributes:
      rope_scaling: ``None``, or Llama 3's scaling.
      eos_token_ids: any of them ends a sequence.
      dtype: dtype of activations and KV cache: ``"bfloat16"``, ``"float16"`` or ``"float32"``. Norms, softmax and
        every accumulation are fp32 in any case.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UnsupportedConfigError(f"{name} is {value!r}, expected a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedConfigError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedConfigError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.dtype not in DTYPES:
            raise UnsupportedConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """The configuration that a Hugging Face ``config.json`` (as a dict) describes.

        Raises:
          UnsupportedConfigError: a key is missing, or has a value that this implementation does not compute.
        """
        for key, accepted, why in _HF_ACCEPTED:
            if hf.get(key) not in accepted:
                raise UnsupportedConfigError(f"config: {key} is {hf[key]!r}; {why}")
        try:
            heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
            # transformers 5 moved everything about RoPE to `rope_parameters`.
            rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
            eos = hf.get("eos_token_id")
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hidden,
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=_or(hf.get("num_key_value_heads"), heads),
                head_dim=_or(hf.get("head_dim"), hidden // heads),
                rope_theta=float(_or(rope.get("rope_theta"), _or(hf.get("rope_theta"), 10000.0))),
                rope_scaling=_rope_scaling_from_hf(rope),
                rms_norm_eps=float(_or(hf.get("rms_norm_eps"), 1e-6)),
                max_position_embeddings=_or(hf.get("max_position_embeddings"), 2048),
                tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
                bos_token_id=hf.get("bos_token_id"),
                eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,),
                dtype=str(_or(hf.get("dtype"), _or(hf.get("torch_dtype"), "bfloat16"))).removeprefix("torch."),
            )
        except KeyError as error:
            raise UnsupportedConfigError(f"config: key {error} is missing; is this a Llama's config.json?") from None

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types; :meth:`from_dict` inverts it."""
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LlamaConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
          UnsupportedConfigError: ``values`` has a key that this version does not know, or lacks one.
        """
        values = dict(values)
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise UnsupportedConfigError(f"config: unknown keys {sorted(unknown)}; update jaxzip to read this model")
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = Llama3RopeScaling(**values["rope_scaling"])
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise UnsupportedConfigError(f"config: {error}") from None


_NO_BIAS = "linear layers with bias are not supported"
#: Keys of a Hugging Face config that change the computation, with the values that are computed here.
_HF_ACCEPTED = (
    ("model_type", (None, "llama"), 'only "llama" is supported'),
    ("hidden_act", (None, "silu", "swish"), 'only "silu" is supported'),
    ("attention_bias", (None, False), _NO_BIAS),
    ("mlp_bias", (None, False), _NO_BIAS),
    ("sliding_window", (None,), "sliding-window attention is not supported"),
    ("quantization_config", (None,), "quantised checkpoints are not supported; use the bf16 original"),
)


def _or(value, default):
    return default if value is None else value


def _rope_scaling_from_hf(rope: Mapping[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedConfigError(f"config: rope_scaling has type {kind!r}; only 'llama3' and none are supported")
    return Llama3RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )
