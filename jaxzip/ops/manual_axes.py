"""What `jax.shard_map` wants to know of operands and results: over which mesh axes they vary."""

from __future__ import annotations

from typing import Any

import jax


def varying(operands: Any) -> frozenset[str]:
    """The axes that any of the arrays in a pytree varies over; none outside of `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))


def varying_over(axes: frozenset[str], operands: Any) -> Any:
    """The same pytree, its arrays made to vary over ``axes`` as well."""

    def one(leaf):
        missing = tuple(sorted(axes - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(one, operands)


def varying_alike(operands: Any) -> Any:
    """The same pytree, each array made to vary over every axis that one of them varies over.

    For operations with a gradient of their own it must be done before: then the cotangent of an operand that was the
    same everywhere is summed over the axes on the way back, as JAX does for its own operations.
    """
    return varying_over(varying(operands), operands)


def result_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operand: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a result that varies as `operand` does."""
    if not varying(operand):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)
