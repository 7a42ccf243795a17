"""Kernels of rank 3 and more in trees of arrays: which of their axes are summed over, by their names and shapes.

A kernel is compressed as the matrix that its layer multiplies by, not as a stack of small ones:

    query/kernel            [D, N, H]       matrix [D, N H]      Flax's attention layers; also key, value, q_proj, ...
    out/kernel              [N, H, D]       matrix [N H, D]
    q_einsum/w              [N, D, H]       matrix [D, N H]      Gemma's
    kv_einsum/w             [2, K, D, H]    stack [2, D, K H]
    attn_vec_einsum/w       [N, H, D]       matrix [N H, D]
    mlp/gating_einsum(/w)   [2, F, D]       stack [2, D, F]      or [2, D, F]

Layers that are stacked have one axis more in front. Any choice is lossless; the right one lets products run fused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxzip.modules.kernel import KernelAxes

#: Names of attention's projections in Flax models: those that read the residual, and the one that writes it.
_READS = ("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "wq", "wk", "wv")
_WRITES = ("out", "o", "o_proj", "out_proj", "wo")
#: Of Gemma's einsum weights: rank, axes that are summed over, axes of a stack.
_EINSUMS = {
    "q_einsum": (3, (1,), ()),
    "kv_einsum": (4, (2,), (0,)),
    "qkv_einsum": (4, (2,), (0,)),
    "attn_vec_einsum": (3, (0, 1), ()),
}
GATING = "gating_einsum"
#: Where a tensor's metadata entry holds its KernelAxes: payload is the matrix, ``shape`` the logical shape.
MATRIX_KEY = "matrix_axes"


def names(path: Iterable[str]) -> tuple[str, ...]:
    """The names on a path; flat trees join several of them, and an NNX state ends in ``value``."""
    parts = tuple("/".join(path).split("/"))
    return parts[:-1] if parts[-1] == "value" else parts


def kernel_axes(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> dict[tuple[str, ...], KernelAxes]:
    """The axes of all kernels that are found among tensors, by path.

    Args:
      shapes: logical shapes of all tensors of a checkpoint, by path.
    """
    # Imported here: jaxzip.modules reads and writes checkpoints.
    from jaxzip.modules.kernel import KernelAxes

    by_name = {names(path): shape for path, shape in shapes.items()}
    found = {}
    for path, shape in shapes.items():
        use = _einsum_use(names(path), shape, by_name) or _attention_use(names(path), shape, by_name)
        if use is not None and min(shape) > 0:
            rank, contract, batch = use
            found[path] = KernelAxes(tuple(shape[len(shape) - rank :]), contract, batch)
    return found


def to_json(axes: KernelAxes) -> dict[str, list[int]]:
    """Axes as JSON; :func:`from_json` inverts it."""
    return {name: list(sizes) for name, sizes in dataclasses.asdict(axes).items()}


def from_json(data: Mapping[str, Any]) -> KernelAxes:
    """The inverse of :func:`to_json`.

    Raises:
      TypeError, ValueError: it does not describe axes.
    """
    from jaxzip.modules.kernel import KernelAxes

    return KernelAxes(**{name: tuple(int(size) for size in sizes) for name, sizes in data.items()})


def _einsum_use(path, shape, by_name):
    holder = path[:-1] if path[-1] == "w" else path
    if not holder:
        return None
    if holder[-1] in _EINSUMS and path[-1] == "w":
        rank, contract, batch = _EINSUMS[holder[-1]]
        return (rank, contract, batch) if len(shape) in (rank, rank + 1) else None
    if holder[-1] != GATING or len(shape) not in (3, 4):
        return None
    # [2, F, D] or, in older models, [2, D, F]: mlp/linear is [F, D].
    linear = by_name.get((*holder[:-1], "linear", *path[len(holder) :]))
    if linear is None or sorted(linear[-2:]) != sorted(shape[-2:]):
        return None
    return 3, ((2,) if linear[-2:] == shape[-2:] else (1,)), (0,)


def _attention_use(path, shape, by_name):
    """Of kernels ``[D, N, H]`` and ``[N, H, D]`` that belong together, so that stacks of matrices are told apart."""
    if len(path) < 2 or path[-1] != "kernel" or len(shape) not in (3, 4):
        return None
    siblings = {name: by_name.get((*path[:-2], name, "kernel")) for name in (*_READS, *_WRITES)}
    if path[-2] in _READS:
        if any(_belong(shape, siblings[name]) for name in _WRITES):
            return 3, (0,), ()
    elif path[-2] in _WRITES and any(_belong(siblings[name], shape) for name in _READS):
        return 3, (0, 1), ()
    return None


def _belong(reads, writes) -> bool:
    """Whether ``[D, N, H]`` (N may be fewer: heads of keys) and ``[N, H, D]`` are of one attention."""
    if reads is None or writes is None or len(reads) != len(writes) or reads[:-3] != writes[:-3]:
        return False
    (width, heads, size), (all_heads, out_size, out_width) = reads[-3:], writes[-3:]
    return (width, size) == (out_width, out_size) and heads > 0 and all_heads % heads == 0
