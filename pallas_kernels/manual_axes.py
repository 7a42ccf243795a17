"""What `jax.shard_map` wants to know of a kernel: over which mesh axes its operands and its result vary."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def _axes(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


def varying_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """The operands, made to vary over every axis that one of them varies over."""
    every = frozenset().union(*map(_axes, operands))
    return [
        jax.lax.pcast(operand, tuple(sorted(every - _axes(operand))), to="varying")
        if every - _axes(operand)
        else operand
        for operand in operands
    ]


def result_like(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operand: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a result that varies as `operand` does."""
    if not _axes(operand):
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)


def vary_as(result: jax.Array, operand: jax.Array) -> jax.Array:
    """A result that jax takes to be the same everywhere, as one that varies as `operand` does."""
    missing = tuple(sorted(_axes(operand) - _axes(result)))
    return jax.lax.pcast(result, missing, to="varying") if missing else result
