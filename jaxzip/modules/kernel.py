"""``CompressedKernel``: a compressed weight of any rank, kept as a matrix inside and of its own shape outside."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxzip.compress import AUTO, check_array, compress
from jaxzip.ops import decompress
from jaxzip.tensor import CompressedTensor


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """What the axes of a kernel of logical shape ``shape`` are for.

        shape (D, N, H), contract (0,)        query projection     matrix [D, N*H]
        shape (N, H, D), contract (0, 1)      output projection    matrix [N*H, D]
        shape (N, D, H), contract (1,)        the same as einsum   matrix [D, N*H]
        shape (E, D, F), batch (0,), contract (1,)                 stack  [E, D, F]

    Attributes:
      shape: logical shape, leading axes of a stack of layers left out.
      contract: axes that are summed over with the activations', ascending.
      batch: axes that are axes of the activations, too, and stay; in the order in which they come out.
    """

    shape: tuple[int, ...]
    contract: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self):
        named = (*self.contract, *self.batch)
        if len(set(named)) != len(named) or any(not 0 <= axis < len(self.shape) for axis in named):
            raise ValueError(
                f"contract axes {self.contract} and batch axes {self.batch} do not fit a kernel of shape {self.shape}: "
                "each must be one of its axes, named once and counted from 0"
            )
        if not self.contract or not self.output:
            raise ValueError(
                f"a kernel of shape {self.shape} with contract axes {self.contract} and batch axes {self.batch} is no "
                "matrix: it needs an axis that is summed over and one that is not"
            )

    @property
    def output(self) -> tuple[int, ...]:
        """The axes of output features: all others, in their order."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in (*self.contract, *self.batch))

    @property
    def order(self) -> tuple[int, ...]:
        """The logical axes in the order in which they are stored."""
        return (*self.batch, *self.contract, *self.output)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """``(*batch, K, M)``: the stored shape."""
        sizes = [[self.shape[axis] for axis in axes] for axes in (self.batch, self.contract, self.output)]
        return (*sizes[0], math.prod(sizes[1]), math.prod(sizes[2]))

    def to_matrix(self, w: Any) -> Any:
        """``w[*stack, *shape]`` as ``[*stack, *batch, K, M]``."""
        stack = w.shape[: w.ndim - len(self.shape)]
        order = [len(stack) + axis for axis in self.order]
        return w.transpose(*range(len(stack)), *order).reshape(*stack, *self.matrix_shape)

    def from_matrix(self, matrix: Any) -> Any:
        """The inverse of :meth:`to_matrix`."""
        stack = matrix.shape[: matrix.ndim - len(self.matrix_shape)]
        stored = matrix.reshape(*stack, *(self.shape[axis] for axis in self.order))
        inverse = [len(stack) + axis for axis in np.argsort(self.order).tolist()]
        return stored.transpose(*range(len(stack)), *inverse)


class Decoding:
    """Operators and views, for what stands for an array: they take the decoded array, of ``__jax_array__``.

    Comparisons with ``==`` are left out: they would be by value.
    """

    #: So that NumPy arrays leave operators to this class.
    __array_ufunc__ = None

    @property
    def T(self) -> jax.Array:  # noqa: N802 - the array API's name
        return self.__jax_array__().T

    def transpose(self, *axes) -> jax.Array:
        return self.__jax_array__().transpose(*axes)

    def reshape(self, *shape) -> jax.Array:
        return self.__jax_array__().reshape(*shape)


def _operator(name: str):
    def operator(self, *others):
        return getattr(self.__jax_array__(), name)(*others)

    operator.__name__ = name
    return operator


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
    for _prefix in ("", "r"):
        setattr(Decoding, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in ("neg", "pos", "abs", "lt", "le", "gt", "ge"):
    setattr(Decoding, f"__{_name}__", _operator(f"__{_name}__"))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class CompressedKernel(Decoding):
    """A compressed kernel as a layer holds it: what ``nnx.Param`` has in place of the array.

    A pytree whose only child is ``matrix``; ``axes`` is static. ``kernel[...]``, which is how Flax layers read their
    parameters, is an :class:`Operand`; other indices, operators and ``.T`` decode. As with ``CompressedTensor``, leaves
    may be anything.

    Attributes:
      matrix: shape ``[*stack, *batch, K, M]``.
      axes: what the axes of the logical shape are for.
    """

    matrix: CompressedTensor
    axes: KernelAxes

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("matrix"), self.matrix),), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children) -> CompressedKernel:
        return cls(children[0], axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: that of the array which was compressed."""
        stored = self.matrix.shape
        return (*stored[: len(stored) - len(self.axes.matrix_shape)], *self.axes.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all payload arrays."""
        return self.matrix.nbytes

    def dense(self) -> jax.Array:
        """The array that was compressed, bit for bit; jittable."""
        return self.axes.from_matrix(decompress(self.matrix))

    def __getitem__(self, index) -> Operand | jax.Array:
        return Operand(self) if index is Ellipsis else self.dense()[index]

    def __jax_array__(self) -> jax.Array:
        return self.dense()


def _serialize_axes(axes: KernelAxes) -> bytes:
    return json.dumps(dataclasses.asdict(axes)).encode()


def _deserialize_axes(data: bytes) -> KernelAxes:
    return KernelAxes(**{name: tuple(sizes) for name, sizes in json.loads(data).items()})


# So that jax.export can serialise functions that take compressed kernels.
jax.export.register_pytree_node_serialization(
    CompressedKernel,
    serialized_name="jaxzip.CompressedKernel",
    serialize_auxdata=_serialize_axes,
    deserialize_auxdata=_deserialize_axes,
)


class Operand(Decoding):
    """A compressed kernel on its way from a parameter to an operation: an array-like that decodes only if it must.

    No pytree: it stands for one array. ``jaxzip.dot_general`` and ``jaxzip.einsum`` multiply with the encoded matrix;
    ``jnp.einsum``, ``jnp.asarray``, operators, indices and ``.T`` decode it. Functions that JAX compiles as a whole
    (``jnp.dot``, ``jnp.matmul``, ``jnp.take``) and ``lax.dot_general`` take no such object and raise JAX's error: give
    them ``jnp.asarray(w)``. ``dtype`` is the one that the layer computes in, to which the weight is cast on the way.
    """

    def __init__(self, kernel: CompressedKernel, dtype: Any = None):
        self.kernel = kernel
        self.dtype = jnp.dtype(kernel.dtype if dtype is None else dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def cast_is_exact(self) -> bool:
        """Whether every value of the weight is one of ``dtype``, so that the cast may be left out."""
        return holds(self.dtype, self.kernel.dtype)

    def astype(self, dtype: Any) -> Operand:
        """The same weight cast to ``dtype``, later."""
        if not self.cast_is_exact:
            raise TypeError(
                f"a kernel of {self.kernel.dtype} that was cast to {self.dtype} cannot be cast to {dtype} as well; "
                "decode it first: jnp.asarray(kernel)"
            )
        return Operand(self.kernel, dtype)

    def __getitem__(self, index) -> Operand | jax.Array:
        return self if index is Ellipsis else self.__jax_array__()[index]

    def __jax_array__(self) -> jax.Array:
        return self.kernel.dense().astype(self.dtype)

    def __repr__(self) -> str:
        return f"Operand(shape={self.shape}, dtype={self.dtype}, of={self.kernel.matrix!r})"


def holds(wide: Any, narrow: Any) -> bool:
    """Whether floating-point dtype ``wide`` has every value of ``narrow``."""
    if not (jnp.issubdtype(wide, jnp.floating) and jnp.issubdtype(narrow, jnp.floating)):
        return jnp.dtype(wide) == jnp.dtype(narrow)
    w, n = jnp.finfo(wide), jnp.finfo(narrow)
    return w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp - w.nmant <= n.minexp - n.nmant


def compress_kernel(
    w: jax.Array | np.ndarray,
    contract: Sequence[int],
    *,
    batch: Sequence[int] = (),
    stack_ndim: int = 0,
    format: str = AUTO,
    on_host: bool = False,
) -> CompressedKernel:
    """Compresses a kernel of any rank losslessly.

    Args:
      w: ``[*stack, *shape]``; bf16, or any dtype with ``format="raw"``.
      contract: the axes of ``shape`` that are summed over when activations are multiplied with it.
      batch: the axes of ``shape`` that the activations have, too, and that stay.
      stack_ndim: how many leading axes are a stack of layers.
      format, on_host: see :func:`jaxzip.compress`.

    Raises:
      TypeError: ``w`` is a tracer or no array, or ``format`` does not take its dtype; see also
        :func:`jaxzip.compress`.
      ValueError: the axes do not fit the shape; see also :func:`jaxzip.compress`.
    """
    check_array(w, "compress_kernel")
    axes = KernelAxes(tuple(w.shape[stack_ndim:]), tuple(sorted(contract)), tuple(batch))
    # On the host and by bits: XLA's CPU backend may quiet NaNs of 16-bit floats that it moves.
    matrix = compress(np.ascontiguousarray(axes.to_matrix(np.asarray(w))), format=format, on_host=on_host)
    return CompressedKernel(matrix, axes)
