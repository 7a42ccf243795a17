"""``CompressedTensor``: a losslessly encoded weight as a JAX pytree."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import numpy as np

from jaxzip import formats

#: Axis of the logical matrix that holds output features: -1 in a Flax kernel [K, M], -2 in an embedding table [M, K].
KERNEL_AXIS = -1
TABLE_AXIS = -2


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompressedTensor:
    """An array stored in one of jaxzip's formats; it has the shape and dtype of the array that it stands for.

    Made by :func:`jaxzip.compress`; read by :func:`jaxzip.decompress`, :func:`jaxzip.matmul` (or ``x @ z``) and
    :func:`jaxzip.take`; ``z[index]`` decodes it, ``z[...]`` does not. Invariants:

    * The pytree leaves are the arrays of ``payload``, in the format's order. Values that differ between tensors of
      one shape (window start, offsets) are leaves; ``core_shape``, ``dtype``, ``format``, ``output_axis`` and
      ``layout_version`` are static, so that layers of one shape share one trace.
    * ``core_shape`` has at most two dimensions. Leading dimensions (a stack of layers, ``vmap``, ``lax.scan``) are
      dimensions of the leaves and show in ``shape``.
    * Matrix rows ``M`` (output features) are axis ``output_axis`` of the logical array and columns ``K`` the other.
    * ``raw`` keeps the array in the order in which it came; ``raw_transposed`` says that it stands for its transpose.
    * Leaves may be arrays, tracers, ``ShapeDtypeStruct``, shardings or anything else that ``jax.tree.map`` puts
      there; nothing is computed when an instance is made.
    """

    payload: Mapping[str, Any]
    core_shape: tuple[int, ...]
    dtype: np.dtype
    format: str
    output_axis: int = KERNEL_AXIS
    layout_version: int = 1
    raw_transposed: bool = False

    #: So that NumPy arrays leave ``x @ z`` to ``__rmatmul__``.
    __array_ufunc__ = None

    def tree_flatten_with_keys(self):
        names = tuple(self.payload)
        children = [(jax.tree_util.DictKey(name), self.payload[name]) for name in names]
        static = (self.core_shape, self.dtype, self.format, self.output_axis, self.layout_version, self.raw_transposed)
        return children, (names, *static)

    @classmethod
    def tree_unflatten(cls, static, leaves) -> CompressedTensor:
        names, *rest = static
        return cls(dict(zip(names, leaves)), *rest)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions of a stack; ``()`` for one matrix, and where leaves have no shape."""
        name, leaf = next(iter(self.payload.items()))
        shape = getattr(leaf, "shape", None)
        if shape is None:
            return ()
        core_ndim = len(self.core_shape) if self.format == "raw" else self._fields()[name].ndim
        return tuple(shape[: len(shape) - core_ndim])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, that of the array which was compressed."""
        return self.batch_shape + self.core_shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(M, K)``: rows (output features) and columns of one encoded matrix."""
        if len(self.core_shape) != 2:
            raise ValueError(f"a tensor of shape {self.core_shape} is no matrix")
        k, m = self.core_shape if self.output_axis == KERNEL_AXIS else self.core_shape[::-1]
        return m, k

    @property
    def nbytes(self) -> int:
        """Bytes of all payload arrays, offsets and padding included."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in self.payload.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def T(self) -> CompressedTensor:  # noqa: N802 - the array API's name
        """The transposed matrix; it shares the payload, no data moves."""
        if len(self.core_shape) != 2:
            raise ValueError(f".T needs a matrix, this tensor has shape {self.shape}")
        return dataclasses.replace(
            self,
            core_shape=self.core_shape[::-1],
            output_axis=KERNEL_AXIS if self.output_axis == TABLE_AXIS else TABLE_AXIS,
            raw_transposed=self.raw_transposed != (self.format == "raw"),
        )

    #: Indexing is no reason to iterate: every step would decode.
    __iter__ = None

    def __getitem__(self, index) -> CompressedTensor | jax.Array:
        """``z[...]``, which is how Flax NNX reads parameters, is ``z``; any other index decodes the whole array."""
        if index is Ellipsis:
            return self
        from jaxzip.ops import decompress

        return decompress(self)[index]

    def __rmatmul__(self, x) -> jax.Array:
        from jaxzip.ops import matmul

        return matmul(x, self)

    def __repr__(self) -> str:
        try:
            size = f", {self.bits_per_weight:.2f} bits/weight"
        except (AttributeError, TypeError):
            size = ""
        return f"CompressedTensor(shape={self.shape}, dtype={self.dtype}, format={self.format!r}{size})"

    def _fields(self) -> dict[str, formats.FieldSpec]:
        return formats.get(self.format).fields(*self.matrix_shape)


def _serialize_static(static) -> bytes:
    names, core_shape, dtype, *rest = static
    return json.dumps([list(names), list(core_shape), dtype.name, *rest]).encode()


def _deserialize_static(data: bytes):
    names, core_shape, dtype, *rest = json.loads(data)
    return (tuple(names), tuple(core_shape), jax.numpy.dtype(dtype), *rest)


# So that jax.export can serialise functions that take compressed tensors.
jax.export.register_pytree_node_serialization(
    CompressedTensor,
    serialized_name="jaxzip.CompressedTensor",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
)
