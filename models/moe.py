"""Mixture of experts: each token's feed-forward network is a weighted sum of a few experts of many.

tokens [N, D] ─► router ─► the k best experts of each token, their weights
      └─► rows of one expert side by side [N k, D] ─► gate, up, down by groups ─► each token's k rows, weighted sum
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxzip.models.config import DecoderConfig
from jaxzip.models.execution import DEFAULT, Execution
from jaxzip.models.fuse import raw_kernel
from jaxzip.models.layers import Linear, Stack

from jaxzip.ops.activations import gated
from jaxzip.tensor import CompressedTensor


class Experts(nnx.Module):
    """The experts' feed-forward networks as stacks, ``[E, D, F]`` and ``[E, F, D]``.

    ``fused``: gate and up are one stack ``[E, D, 2 F]``, see ``fuse_projections``.
    """

    def __init__(self, config: DecoderConfig, count: int, intermediate: int, *, fused: bool = False):
        hidden, dtype = config.hidden_size, config.dtype
        self.activation = config.activation
        if fused:
            self.gate_up_proj = Stack(count, hidden, 2 * intermediate, dtype=dtype)
        else:
            self.gate_proj = Stack(count, hidden, intermediate, dtype=dtype)
            self.up_proj = Stack(count, hidden, intermediate, dtype=dtype)
        self.down_proj = Stack(count, intermediate, hidden, dtype=dtype)

    def __call__(self, rows: jax.Array, sizes: jax.Array, *, execution: Execution) -> jax.Array:
        """``rows[R, D]``, the first ``sizes[0]`` of which are expert 0's, and so on, to ``[R, D]``."""
        if hasattr(self, "gate_up_proj"):
            gate, up = jnp.split(self.gate_up_proj(rows, sizes, execution=execution), 2, axis=-1)
        else:
            gate = self.gate_proj(rows, sizes, execution=execution)
            up = self.up_proj(rows, sizes, execution=execution)
        return self.down_proj(gated(gate, up, self.activation), sizes, execution=execution)


class MixtureOfExperts(nnx.Module):
    """Sparsely gated experts (Shazeer et al., 2017; Jiang et al., 2024): softmax over all, the best ``top_k`` of them.

    ``normalized``: a token's weights are divided by their sum.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        experts: int,
        top_k: int,
        intermediate: int,
        normalized: bool,
        fused: bool = False,
    ):
        self.top_k, self.normalized = top_k, normalized
        self.router = Linear(config.hidden_size, experts, dtype=config.dtype)
        self.experts = Experts(config, experts, intermediate, fused=fused)

    def __call__(self, x: jax.Array, residual: jax.Array | None = None, *, execution: Execution = DEFAULT) -> jax.Array:
        """``x[B, S, hidden]`` to ``[B, S, hidden]``, plus ``residual``."""
        tokens = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            chosen, weights = self.route(tokens, execution=execution)
        order, sizes = group(chosen, self.experts.down_proj.count)
        rows = self.experts(tokens[order // self.top_k], sizes, execution=execution)
        # Back to the order of the tokens: a token's sum has its experts in the order of their weights, always.
        places = jnp.arange(order.size, dtype=order.dtype)
        back = jnp.zeros_like(order).at[order].set(places, unique_indices=True)
        each = rows[back].reshape(-1, self.top_k, x.shape[-1]).astype(jnp.float32)
        parts = [each[:, i] * weights[:, i, None] for i in range(self.top_k)]
        out = functools.reduce(jnp.add, parts).astype(x.dtype).reshape(x.shape)
        return out if residual is None else residual + out

    def _router(self, execution: Execution) -> Linear:
        """The router; one too small to be compressed goes through the fused kernel where XLA's dot will not do."""
        if not execution.batch_invariant or isinstance(self.router.kernel.get_value(), CompressedTensor):
            return self.router
        raw = Linear(*self.router.kernel.get_value().shape, dtype=self.router.dtype)
        raw.kernel.set_value(raw_kernel(self.router.kernel.get_value()))
        return raw

    def route(self, tokens: jax.Array, *, execution: Execution = DEFAULT) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, int32 ``[N, top_k]``, and their weights, fp32 of the same shape."""
        logits = self._router(execution)(tokens, out_dtype="float32", execution=execution)
        shares = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        weights, chosen = jax.lax.top_k(shares / sum_in_order(shares), self.top_k)
        if self.normalized:
            weights = weights / sum_in_order(weights)
        return chosen, weights


def sum_in_order(x: jax.Array) -> jax.Array:
    """``sum(x, axis=-1, keepdims=True)``, halves added to halves: XLA's order would depend on the number of rows."""
    length = x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, (1 << (length - 1).bit_length()) - length)))
    while x.shape[-1] > 1:
        low, high = jnp.split(x, 2, axis=-1)
        x = low + high
    return x


def group(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Rows by expert, those of one expert in the order of their tokens.

    Args:
      chosen: int32 ``[N, k]``, experts of each token.

    Returns:
      int32 ``[N k]``: which of ``chosen``'s elements comes in which place, and int32 ``[experts]``: rows of each.
    """
    flat = chosen.reshape(-1)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=flat.dtype), axis=0, dtype=jnp.int32)
    return jnp.argsort(flat, stable=True).astype(jnp.int32), sizes
