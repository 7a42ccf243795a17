"""``Llama``: the Llama architecture (Touvron et al., 2023) in Flax NNX, on dense or compressed weights."""

from __future__ import annotations

from flax import nnx
from jaxzip.models.attention import Attention
from jaxzip.models.config import DecoderConfig, LlamaConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.execution import DEFAULT
from jaxzip.models.layers import norm
from jaxzip.models.mlp import MLP


class Block(nnx.Module):
    """One layer: attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: DecoderConfig, layer: int = 0, *, fused: bool = False):
        self.input_norm = norm(config)
        self.attn = Attention(config, layer, fused=fused)
        self.post_attn_norm = norm(config)
        self.mlp = self.feed_forward(config, layer, fused=fused)

    @staticmethod
    def feed_forward(config: DecoderConfig, layer: int, *, fused: bool) -> nnx.Module:
        """What comes after attention; families with experts have others."""
        return MLP(config, fused=fused)

    def __call__(self, x, rotation, keys, values, start, end, *, execution=DEFAULT):
        """As ``Attention.__call__``, without ``residual``."""
        x, keys, values = self.attn(
            self.input_norm(x, execution=execution), x, rotation, keys, values, start, end, execution=execution
        )
        return self.mlp(self.post_attn_norm(x, execution=execution), x, execution=execution), keys, values


class Llama(Decoder):
    """A Llama 2 or 3 model; see ``Decoder``."""

    config_class = LlamaConfig
    block = Block
