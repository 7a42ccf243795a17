"""Meshes with Explicit axes, such as ``jax.make_mesh`` makes: how operations are split over them.

There an array's type says how it is split, and each of JAX's operations derives its result's type from that. A custom
call does not: so every operation here states which dimensions of its operands and of its result go together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P


def split_of(array: jax.Array) -> tuple:
    """The Explicit axes over which each dimension is split: names, tuples of names, or ``None``."""
    spec = jax.typeof(array).sharding.spec
    return (*spec, *(None,) * (array.ndim - len(spec)))


def run(f: Callable[..., jax.Array], operands: Sequence[Any], splits: Sequence[P], result: P) -> jax.Array:
    """``f(*operands)``, whose result becomes split as ``result`` says.

    Each device calls ``f`` with its parts of the operands (pytrees) as ``splits`` say, and has then its part of the
    result. What else an operand is split over is gathered before. Where ``splits`` name no axis, all devices compute
    the whole result. Without Explicit axes this is just ``f(*operands)``.
    """
    mesh = _mesh(operands)
    if mesh is None:
        return f(*operands)
    parallel = {name for split in splits for dim in split for name in ((dim,) if isinstance(dim, str) else dim or ())}
    if parallel:
        # No names are all axes, except those that vmap runs along. XLA's CPU compiler aborts on sums of bfloat16 over
        # some of the axes only, as gradients of what is the same everywhere are.
        names = parallel if mesh.manual_axes else set()
        f = jax.shard_map(f, in_specs=tuple(splits), out_specs=result, axis_names=names)
    alike = jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, result))
    return alike(*operands)


def _mesh(operands) -> AbstractMesh | None:
    """The mesh of the operands, or else of the context, if it has Explicit axes."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    return next((mesh for mesh in [*meshes, jax.sharding.get_abstract_mesh()] if mesh.explicit_axes), None)
