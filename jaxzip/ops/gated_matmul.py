"""``gated_matmul``: activations times the fused weight of a gate and of what it is for, and the gate applied."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxzip.ops import explicit_axes, registry
from jaxzip.ops.activations import ACTIVATIONS, gated
from jaxzip.ops.manual_axes import varying_alike
from jaxzip.ops.matmul import matmul
from jaxzip.tensor import CompressedTensor

OP = "gated_matmul"
#: Of the kernel for many rows on an H200: rows of x and columns of w of a unit of its work, the units that it computes
#: at once, and the share of them that there should be for it to be faster than a product that is split otherwise.
_UNIT_ROWS, _UNIT_COLUMNS, _UNITS_AT_ONCE, _LEAST_SHARE = 256, 256, 66, 0.9


def gated_matmul(x: jax.Array, w: CompressedTensor, activation: str, *, implementation: str | None = None) -> jax.Array:
    """``activation(x @ w[:, :F]) * (x @ w[:, F:])``, both products rounded to ``x.dtype`` before.

    Fused implementations never write the products. Differentiable in ``x``; the gradient multiplies again.

    Args:
      x: bf16 ``[N, K]``.
      w: compressed ``[K, 2 F]``, columns of the gate first.
      activation: of the gate: ``"silu"`` or ``"gelu_tanh"``.
      implementation: as in :func:`jaxzip.matmul`.

    Returns:
      ``[N, F]`` in ``x.dtype``.

    Raises:
      ValueError: ``activation`` is not known, ``w`` has no two halves, or as :func:`jaxzip.matmul`.
      NotImplementedError: as :func:`jaxzip.matmul`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if w.ndim != 2 or w.shape[1] % 2:
        raise ValueError(
            f"{OP}: w has shape {w.shape}, expected a matrix [K, 2 F] of a gate's columns and as many more"
        )
    if x.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"{OP}: x has shape {x.shape}, expected [N, K={w.shape[0]}] for w {w.shape}")
    with jax.named_scope("jaxzip.gated_matmul"):
        product = lambda *operands: _gated_matmul(activation, implementation, *varying_alike(operands))  # noqa: E731
        rows = P(explicit_axes.split_of(x)[0])
        return explicit_axes.run(product, (x, w), (rows, P()), rows)


def available(x: jax.Array, w: CompressedTensor, activation: str, implementation: str | None = None) -> bool:
    """Whether a GPU would compute :func:`gated_matmul` of these as one product."""
    names = registry.candidates(OP, "cuda", x, w, activation=activation)
    return (names[0] if implementation is None else implementation) in set(names) - {registry.XLA}


def fills_gpu(rows: int, columns: int) -> bool:
    """Whether a kernel that does both at once is worth it for so many rows of x and columns of w, on a GPU."""
    last = rows % _UNIT_ROWS
    if rows <= _UNIT_ROWS or 0 < last <= _UNIT_ROWS // 2:
        return False
    units = -(-rows // _UNIT_ROWS) * -(-columns // _UNIT_COLUMNS)
    return units >= _LEAST_SHARE * -(-units // _UNITS_AT_ONCE) * _UNITS_AT_ONCE


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_matmul(activation, implementation, x, w):
    return registry.run(OP, implementation, x, w, activation=activation)


def _forward(activation, implementation, x, w):
    return _gated_matmul(activation, implementation, x, w), (x, w)


def _backward(activation, implementation, residuals, g):
    x, w = residuals
    (to_x,) = jax.vjp(lambda x: product_and_gate(x, w, activation=activation), x)[1](g)
    return to_x, None


_gated_matmul.defvjp(_forward, _backward)


def product_and_gate(x: jax.Array, w: CompressedTensor, *, activation: str) -> jax.Array:
    """The reference: the best product, then XLA."""
    return gated(*jnp.split(matmul(x, w, out_dtype=x.dtype), 2, axis=-1), activation)


registry.register(OP, registry.XLA, product_and_gate)
