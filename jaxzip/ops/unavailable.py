"""A value that cannot be lowered: it stands in a program for what a platform lacks, and says why if compiled there."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxzip.ops.manual_axes import varying_over

_unavailable_p = Primitive("jaxzip_unavailable")
_unavailable_p.multiple_results = True


def unavailable(shapes: Any, message: str) -> Any:
    """Arrays of the pytree ``shapes`` in a traced program; compiling it raises NotImplementedError(message)."""
    leaves, structure = jax.tree.flatten(shapes)
    avals = tuple(jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)
    values = _unavailable_p.bind(avals=avals, message=message)
    varied = [varying_over(_axes(leaf), value) for leaf, value in zip(leaves, values)]
    return jax.tree.unflatten(structure, varied)


def _axes(shape: jax.ShapeDtypeStruct) -> frozenset[str]:
    return shape.manual_axis_type.varying if shape.manual_axis_type else frozenset()


@_unavailable_p.def_abstract_eval
def _avals(*, avals, message):
    return list(avals)


def _lower(context, *, avals, message):
    raise NotImplementedError(message)


mlir.register_lowering(_unavailable_p, _lower)
