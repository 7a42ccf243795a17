"""Low-rank adapters (LoRA, Hu et al., 2021) on a frozen, compressed base."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxzip.modules.nnx_layers import not_stacked_first


class Adapted(nnx.Module):
    """``base(x) + scale * (x @ lora_a) @ lora_b``; ``lora_a`` and ``lora_b`` are ``nnx.LoRAParam``.

    ``lora_b`` begins at zero: an untrained adapter adds zero, so that results are equal to the base's. Their bits are
    the same but for zeros, which may change sign (-0 + 0 is +0).

    Args:
      base: an ``nnx.Linear``, or an ``nnx.LinearGeneral`` over the last axes of its input, dense or compressed; a stack
        of layers along the first axes, as ``nnx.vmap`` makes it, gets a stack of adapters.
      rank: inner dimension of the adapter.
      alpha: ``scale`` is ``alpha / rank``; default: 1.
      param_dtype: of the adapter, which computes in it.
      rngs: ``params`` draws ``lora_a``.

    Raises:
      TypeError: ``base`` is another layer, has batch axes or axes that are not the last ones, or is a stack along other
        axes than the first.
      ValueError: ``rank`` is not positive.
    """

    def __init__(
        self,
        base: nnx.Linear | nnx.LinearGeneral,
        rank: int,
        *,
        alpha: float | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        reason = not_adaptable(base)
        if reason is not None:
            raise TypeError(f"Adapted: {reason}")
        if rank < 1:
            raise ValueError(f"Adapted: rank is {rank}, expected 1 or more")
        self.base = base
        self.in_features = _features(base.in_features)
        self.out_features = _features(base.out_features)
        self.scale = 1.0 if alpha is None else alpha / rank
        k, m = math.prod(self.in_features), math.prod(self.out_features)
        shape = base.kernel.shape
        stack = shape[: len(shape) - len(self.in_features) - len(self.out_features)]
        self.lora_a = nnx.LoRAParam(jax.random.normal(rngs.params(), (*stack, k, rank), param_dtype) * k**-0.5)
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, m), param_dtype))

    def __call__(self, x: jax.Array, out_sharding=None) -> jax.Array:
        """``x[..., *in_features]`` to ``[..., *out_features]`` in the base's dtype."""
        y = self.base(x, out_sharding=out_sharding)
        lead = x.shape[: x.ndim - len(self.in_features)]
        a, b = self.lora_a[...], self.lora_b[...]
        update = x.reshape(*lead, a.shape[0]).astype(a.dtype) @ a @ b
        return (y + self.scale * update.reshape(y.shape)).astype(y.dtype)


def add_adapters(
    model: nnx.Module,
    rank: int,
    module_path: str = ".*",
    *,
    alpha: float | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of ``model`` with an :class:`Adapted` around each layer whose '/'-joined path matches ``module_path``.

    Only the adapters are to be trained: ``nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)`` and
    ``nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))``. The copy shares the model's variables, so the
    base is in memory once.

    Args:
      model: usually from :func:`jaxzip.compress_module`.
      rank, alpha, param_dtype, rngs: see :class:`Adapted`.
      module_path: regular expression (``re.fullmatch``) over layers' paths, ``r".*attention/(query|value)"`` for
        instance; layers that cannot have an adapter are passed by.

    Raises:
      ValueError: no layer that matches can have an adapter.
    """
    pattern, found, passed = re.compile(module_path), [], []

    def wrap(path: Sequence, node):
        name = "/".join(map(str, path))
        if not isinstance(node, nnx.Module) or not pattern.fullmatch(name):
            return node
        reason = not_adaptable(node)
        if reason is not None:
            passed.append(f"{name}: {reason}")
            return node
        found.append(name)
        return Adapted(node, rank, alpha=alpha, param_dtype=param_dtype, rngs=rngs)

    adapted = nnx.recursive_map(wrap, model)
    if not found:
        seen = "; ".join(passed[:5]) or "no module has such a path"
        raise ValueError(f"add_adapters: {module_path!r} names no nnx.Linear or nnx.LinearGeneral ({seen})")
    return adapted


def not_adaptable(layer: nnx.Module) -> str | None:
    """Why ``layer`` cannot have an adapter."""
    if not isinstance(layer, nnx.Linear | nnx.LinearGeneral):
        return f"{type(layer).__name__} is neither an nnx.Linear nor an nnx.LinearGeneral"
    if isinstance(layer, nnx.LinearGeneral):
        last = tuple(range(-len(layer.axis), 0))
        if layer.batch_axis or tuple(sorted(layer.axis)) != last:
            return f"it is over axes {layer.axis} with batch axes {dict(layer.batch_axis)}, not over the last axes"
    shape, own = layer.kernel.shape, (*_features(layer.in_features), *_features(layer.out_features))
    return not_stacked_first(shape, len(shape) - len(own), own)


def _features(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
