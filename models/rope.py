"""Rotary position embedding (RoPE), with Llama 3's and linear frequency scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.models.config import DecoderConfig, LinearRopeScaling, Rope


def inverse_frequencies(config: DecoderConfig, rope: Rope | None = None) -> np.ndarray:
    """Angle per position of each rotated pair: fp32 ``[head_dim // 2]``; ``rope`` is the first layer's by default.

    RoFormer (Su et al., 2021), eq. 15; the scaling is that of Llama 3.1 (see ``Llama3RopeScaling``), or linear.
    """
    theta, scaling = rope or config.rope(0)
    # On the host in fp64: the constants are rounded once, whatever the device's pow does.
    freqs = theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if isinstance(scaling, LinearRopeScaling):
        freqs = freqs / scaling.factor
    elif scaling is not None:
        turns = scaling.original_max_position_embeddings * freqs / (2 * np.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freqs = keep * freqs + (1 - keep) * freqs / scaling.factor
    return freqs.astype(np.float32)


def rotation(config: DecoderConfig, rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for int32 ``positions[B, S]``: two fp32 arrays ``[B, S, head_dim // 2]``."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(config, rope)
    return jnp.cos(angles), jnp.sin(angles)
