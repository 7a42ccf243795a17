"""``KVCache``: keys and values of all layers in static shapes, so that every decode step is one program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxzip.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention remembers of ``B`` sequences, in ``T`` slots each.

    All rows fill the same slots, so that a step is one contiguous update; a prompt shorter than the longest is padded
    on the left, and ``start`` says where the row begins:

        slot       0   1   2   3   4   5
        row 0      a   b   c   d   e   .      start = 0
        row 1      -   -   a   b   c   .      start = 2, position of slot 4 is 2
                                       └ end = 5

    Attributes:
      keys, values: one array a layer, ``[B, num_kv_heads, T, head_dim]`` in the config's dtype; keys are rotated.
      start: int32 ``[B]``, first slot of each row that holds a token.
      end: int32 ``[]``, number of slots filled.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    start: jax.Array
    end: jax.Array

    @classmethod
    def empty(cls, config: DecoderConfig, start: jax.Array, slots: int) -> KVCache:
        """A cache of zeros with ``slots`` slots a row; ``start`` is int32 ``[B]``."""
        shape = (start.shape[0], config.num_kv_heads, slots, config.head_dim)
        # Arrays of their own: buffers that are donated must not be shared.
        keys = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
        values = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
        return cls(keys, values, start, jnp.zeros((), jnp.int32))

    def positions(self, length: int) -> jax.Array:
        """Positions of the next ``length`` tokens of each row: int32 ``[B, length]``; 0 in the padding."""
        slots = self.end + jnp.arange(length, dtype=jnp.int32)
        return jnp.maximum(slots[None, :] - self.start[:, None], 0)
