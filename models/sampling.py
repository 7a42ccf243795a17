"""From logits to the next token: greedy, temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp

#: Of what is divided by; fp32 logits of any model stay finite. Greedy does not divide.
_LEAST_TEMPERATURE = 1e-30
#: Of int32; no vocabulary is larger.
_MOST = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 is greedy (the largest logit, the lowest id among equals). Below 1e-30
        it counts as 1e-30: the quotients stay finite, and only equals of the largest logit are drawn all the same.
      top_k: only the ``top_k`` most likely tokens; 0 is all. Among equals the lower id comes first.
      top_p: of those, the smallest set of most likely tokens whose probability reaches ``top_p`` (Holtzman et al.,
        2020); 1 is all. Temperature is applied first, then top-k, then top-p.

    Raises:
      TypeError: ``temperature`` or ``top_p`` is no number, or ``top_k`` no integer.
      ValueError: ``temperature`` or ``top_k`` is negative, or ``top_p`` is not in (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        kinds = {
            "temperature": (float, "a number"),
            "top_k": (operator.index, "an integer"),
            "top_p": (float, "a number"),
        }
        for name, (read, kind) in kinds.items():
            value = getattr(self, name)
            try:
                read(None if isinstance(value, str) else value)
            except TypeError:
                raise TypeError(f"{name} is {value!r}, expected {kind}") from None
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number above 0 and at most 1")

    @property
    def kind(self) -> str:
        """What must be compiled: ``"greedy"``, ``"all"`` (no filter, no sort) or ``"filtered"``."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "all"

    def values(self) -> dict[str, jax.Array]:
        """The numbers, as arrays: another temperature is no other program."""
        return {
            "temperature": jnp.float32(max(self.temperature, _LEAST_TEMPERATURE)),
            "top_k": jnp.int32(min(self.top_k, _MOST)),
            "top_p": jnp.float32(self.top_p),
        }


GREEDY = Sampling()


def sample(logits: jax.Array, key: jax.Array, step: jax.Array, kind: str, values: dict[str, jax.Array]) -> jax.Array:
    """One token a row: fp32 ``logits[B, V]`` to int32 ``[B]``.

    A row's draw depends on ``key``, its index and ``step`` only, so that neither the other rows nor where a loop was
    interrupted change it.

    Args:
      logits: fp32 ``[B, V]``.
      key: a typed PRNG key.
      step: int32 ``[]``, number of tokens generated before.
      kind, values: of a ``Sampling``.
    """
    if kind == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)
    scaled = logits / values["temperature"]
    if kind == "all":
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    order, kept = keep_likely(scaled, values["top_k"], values["top_p"])
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Top-k, then top-p.

    Returns:
      Token ids from most to least likely, int32 ``[B, V]``, and their logits, ``-inf`` where filtered out.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    limit = jnp.where(top_k > 0, top_k, logits.shape[-1])
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < limit, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # What comes before a token must not reach top_p yet; the first token always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # 1 is all: rounding of the sum must not cut the tail.
    return order, jnp.where((before < top_p) | (top_p >= 1), ranked, -jnp.inf)
