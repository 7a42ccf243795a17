"""The gated feed-forward network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import DEFAULT, Execution
from jaxzip.models.layers import Linear

from jaxzip.ops.activations import gated


class MLP(nnx.Module):
    """Gated feed-forward network (Shazeer, 2020): SwiGLU, or GeGLU with Gemma's activation.

    ``fused``: gate and up are one weight, see ``fuse_projections``.
    """

    def __init__(self, config: DecoderConfig, *, fused: bool = False):
        hidden, intermediate, dtype = config.hidden_size, config.intermediate_size, config.dtype
        self.activation = config.activation
        if fused:
            self.gate_up_proj = Linear(hidden, 2 * intermediate, dtype=dtype)
        else:
            self.gate_proj = Linear(hidden, intermediate, dtype=dtype)
            self.up_proj = Linear(hidden, intermediate, dtype=dtype)
        self.down_proj = Linear(intermediate, hidden, dtype=dtype)

    def __call__(self, x: jax.Array, residual: jax.Array | None = None, *, execution: Execution = DEFAULT) -> jax.Array:
        """``x[B, S, hidden]`` to ``[B, S, hidden]``, plus ``residual``."""
        if hasattr(self, "gate_up_proj"):
            gate, up = jnp.split(self.gate_up_proj(x, execution=execution), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x, execution=execution), self.up_proj(x, execution=execution)
        return self.down_proj(gated(gate, up, self.activation), residual=residual, execution=execution)
