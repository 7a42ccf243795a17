"""``DecoderConfig``: the sizes and constants of a model, from a Hugging Face config and to plain JSON; ``LlamaConfig``.

Fields hold what a checkpoint's configuration says. What a family has in all its models (``ClassVar``), and what follows
from a layer's number, is asked for under one name by the shared parts: attention, MLP, norms, rope, the loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from jaxzip.models.hf_values import (
    UnsupportedConfigError,
    flag,
    items,
    mapping,
    number,
    or_default,
    token_id,
    token_ids,
    whole,
)

DTYPES = ("bfloat16", "float16", "float32")


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
class LinearRopeScaling:
    """Every RoPE frequency divided by ``factor`` (position interpolation; ``rope_type: linear``)."""

    factor: float


RopeScaling = Llama3RopeScaling | LinearRopeScaling


class Rope(NamedTuple):
    """The rotary embedding of a layer."""

    theta: float
    scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines a model's computation, except its weights; static and hashable.

    Attributes:
      rope_scaling: ``None``, or how frequencies are stretched.
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
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    #: ``model_type`` of Hugging Face configs.
    model_type: ClassVar[str] = ""
    #: Queries, keys and values have biases.
    qkv_bias: ClassVar[bool] = False
    #: Queries and keys of each head go through a norm before they are rotated.
    qk_norm: ClassVar[bool] = False
    #: Norms multiply by ``norm_offset + scale``.
    norm_offset: ClassVar[float] = 0.0
    #: Of the MLP's gate: ``"silu"`` or ``"gelu_tanh"``.
    activation: ClassVar[str] = "silu"
    #: Caps of attention's scores and of the logits: ``cap * tanh(x / cap)``.
    attn_softcap: ClassVar[float | None] = None
    final_softcap: ClassVar[float | None] = None
    #: What keys that a Hugging Face config lacks stand for in this family.
    hf_defaults: ClassVar[Mapping[str, Any]] = {}

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

    @property
    def query_divisor(self) -> float:
        """Attention's scores are products of queries and keys over this."""
        return math.sqrt(self.head_dim)

    @property
    def embedding_scale(self) -> float | None:
        """Embeddings are multiplied by this, rounded to their dtype, before the first layer."""
        return None

    @property
    def expert_sizes(self) -> tuple[int, int, int]:
        """Of the feed-forward network: how many there are in a layer, how many a token has, the width of one."""
        return 1, 1, self.intermediate_size

    def window(self, layer: int) -> int | None:
        """How many tokens, the own included, a query of layer ``layer`` sees; ``None``: all before it."""
        return None

    def rope(self, layer: int) -> Rope:
        """The rotary embedding of layer ``layer``."""
        return Rope(self.rope_theta, self.rope_scaling)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The configuration that a Hugging Face ``config.json`` (as a dict) describes.

        Raises:
          UnsupportedConfigError: a key is missing, or has a value of another kind or one that this implementation does
            not compute.
        """
        hf = {**cls.hf_defaults, **hf}
        for key, accepted, why in cls.hf_accepted():
            if hf.get(key) not in accepted:
                raise UnsupportedConfigError(f"config: {key} is {hf[key]!r}; {why}")
        try:
            return cls(**cls.fields_from_hf(hf))
        except KeyError as error:
            raise UnsupportedConfigError(
                f"config: key {error} is missing; is this a {cls.model_type} model's config.json?"
            ) from None

    @classmethod
    def hf_accepted(cls) -> tuple[tuple[str, tuple[Any, ...], str], ...]:
        """Keys of a Hugging Face config that change the computation, the values that are computed here, and a reason.

        Families add to these, or replace them.
        """
        return (
            ("model_type", (None, cls.model_type), f'only "{cls.model_type}" is supported'),
            *((key, (None, *_ACTIVATIONS[cls.activation]), f"only {_ACTIVATIONS[cls.activation][0]!r} is supported")
              for key in ("hidden_act", "hidden_activation")),
            ("attention_bias", (None, False), _NO_BIAS),
            ("mlp_bias", (None, False), _NO_BIAS),
            ("quantization_config", (None,), "quantised checkpoints are not supported; use the bf16 original"),
        )  # fmt: skip

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this class by the keys of a Hugging Face config; families extend it."""
        heads, hidden = whole(hf, "num_attention_heads"), whole(hf, "hidden_size")
        # transformers 5 moved everything about RoPE to `rope_parameters`.
        rope = mapping(hf, "rope_parameters") or mapping(hf, "rope_scaling")
        theta = number(hf, "rope_theta", 10000.0)
        return {
            "vocab_size": whole(hf, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": whole(hf, "intermediate_size"),
            "num_layers": whole(hf, "num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": whole(hf, "num_key_value_heads", heads),
            "head_dim": whole(hf, "head_dim", hidden // heads),
            "rope_theta": number(rope, "rope_theta", theta, where="config: rope_parameters."),
            "rope_scaling": rope_scaling_from_hf(rope),
            "rms_norm_eps": number(hf, "rms_norm_eps", 1e-6, zero=True),
            "max_position_embeddings": whole(hf, "max_position_embeddings", 2048),
            "tie_word_embeddings": flag(hf, "tie_word_embeddings", False),
            "bos_token_id": token_id(hf, "bos_token_id"),
            "eos_token_ids": token_ids(hf, "eos_token_id"),
            "dtype": str(or_default(hf.get("dtype"), or_default(hf.get("torch_dtype"), "bfloat16"))).removeprefix(
                "torch."
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON types; :meth:`from_dict` inverts it."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
          UnsupportedConfigError: ``values`` has a key that this version does not know, or lacks one.
        """
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        if unknown := set(values) - {field.name for field in dataclasses.fields(cls)}:
            raise UnsupportedConfigError(f"config: unknown keys {sorted(unknown)}; update jaxzip to read this model")
        if (scaling := values.get("rope_scaling")) is not None:
            values["rope_scaling"] = (LinearRopeScaling if set(scaling) == {"factor"} else Llama3RopeScaling)(**scaling)
        try:
            return cls(**values)
        except TypeError as error:
            raise UnsupportedConfigError(f"config: {error}") from None


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class SlidingConfig(DecoderConfig):
    """A configuration whose layers may see a window of the last tokens only.

    Attributes:
      sliding_window: how many tokens, the own included; ``None``: all.
      layer_types: ``"sliding_attention"`` or ``"full_attention"`` for each layer; empty: all slide.
    """

    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UnsupportedConfigError(f"sliding_window is {self.sliding_window}, expected a positive integer")
        if self.layer_types and (len(self.layer_types) != self.num_layers or set(self.layer_types) - {SLIDING, FULL}):
            raise UnsupportedConfigError(
                f"layer_types is {list(self.layer_types)}, expected {SLIDING!r} or {FULL!r} for each of "
                f"{self.num_layers} layers"
            )

    def slides(self, layer: int) -> bool:
        """Whether layer ``layer`` is one of those that have the window."""
        return not self.layer_types or self.layer_types[layer] == SLIDING

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.slides(layer) else None

    @classmethod
    def fields_from_hf(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super().fields_from_hf(hf),
            "sliding_window": whole(hf, "sliding_window", None, least=0),
            "layer_types": items(hf, "layer_types", str),
        }


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """A Llama 2 or 3, and what has its architecture (SmolLM2, TinyLlama, ...)."""

    model_type: ClassVar[str] = "llama"

    @classmethod
    def hf_accepted(cls):
        return *super().hf_accepted(), ("sliding_window", (None,), "sliding-window attention is not supported")


_NO_BIAS = "linear layers with bias are not supported"
#: Activations of the MLP's gate by Hugging Face's names for each.
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}


def rope_scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling that ``rope_scaling`` or ``rope_parameters`` of a Hugging Face config describe.

    Raises:
      UnsupportedConfigError: it is of a kind that is not computed here, or one of its numbers is none.
    """
    where = "config: rope_scaling."
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(number(rope, "factor", where=where))
    if kind != "llama3":
        raise UnsupportedConfigError(
            f"config: rope_scaling has type {kind!r}; only 'llama3', 'linear' and none are supported"
        )
    return Llama3RopeScaling(
        factor=number(rope, "factor", where=where),
        low_freq_factor=number(rope, "low_freq_factor", where=where),
        high_freq_factor=number(rope, "high_freq_factor", where=where),
        original_max_position_embeddings=int(number(rope, "original_max_position_embeddings", where=where)),
    )
