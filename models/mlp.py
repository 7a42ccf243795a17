"""The gated feed-forward network."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import DEFAULT, Execution
from jaxzip.models.layers import Linear

from jaxzip.ops.activations import gated
from jaxzip.ops.gated_matmul import available, gated_matmul
from jaxzip.tensor import CompressedTensor


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
            act = self._gated(x, execution)
        else:
            gate, up = self.gate_proj(x, execution=execution), self.up_proj(x, execution=execution)
            act = gated(gate, up, self.activation)
        return self.down_proj(act, residual=residual, execution=execution)

    def _gated(self, x: jax.Array, execution: Execution) -> jax.Array:
        """Of the fused weight: one product with its gate where a GPU has a kernel for that many rows."""

        def apart(x):
            return gated(*jnp.split(self.gate_up_proj(x, execution=execution), 2, axis=-1), self.activation)

        def as_one(x):
            rows = x.reshape(-1, x.shape[-1])
            act = gated_matmul(rows, weight, self.activation, implementation=execution.implementation)
            return act.reshape(*x.shape[:-1], -1)

        weight = self.gate_up_proj.kernel.get_value()
        if execution.batch_invariant or not isinstance(weight, CompressedTensor) or hasattr(self.gate_up_proj, "bias"):
            return apart(x)
        rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
        if not available(rows, weight, self.activation, execution.implementation):
            return apart(x)
        return jax.lax.platform_dependent(x, cuda=as_one, default=apart)
