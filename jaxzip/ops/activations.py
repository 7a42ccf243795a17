"""Activations of gated feed-forward networks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

#: Of the gate, by the names that configurations have.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """``activation(gate) * up`` in fp32, rounded once to their dtype."""
    return (ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
