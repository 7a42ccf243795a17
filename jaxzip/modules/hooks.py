"""What Flax layers are given to multiply with compressed kernels: ``dot_general``, ``einsum``, ``promote_dtype``.

They have the signatures of ``jax.lax.dot_general``, ``jnp.einsum`` and Flax's ``promote_dtype``, and are those
functions where no weight is compressed. ``DotGeneral`` and ``Einsum`` are the first two with options; they are values
(equal, hashable), so that two models with the same options share one trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx.nn import dtypes

from jaxzip.modules.equation import parse
from jaxzip.modules.kernel import CompressedKernel, KernelAxes, Operand
from jaxzip.ops import decompress
from jaxzip.ops.matmul import ACTIVATION_DTYPES, matmul
from jaxzip.tensor import TABLE_AXIS, CompressedTensor

Dimensions = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """``jax.lax.dot_general`` whose right-hand side may be compressed; see :func:`dot_general`.

    Attributes:
      implementation, batch_invariant: see :func:`jaxzip.matmul`.
    """

    implementation: str | None = None
    batch_invariant: bool = False

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | Operand | CompressedKernel | CompressedTensor,
        dimension_numbers: Dimensions,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        _check_first("dot_general", lhs)
        rhs, fused = as_operand(rhs), None
        if isinstance(rhs, Operand) and out_sharding is None:
            fused = _matched(lhs, rhs, dimension_numbers, preferred_element_type)
        if fused is not None:
            out_dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
            with jax.named_scope("jaxzip.dot_general"):
                return self._multiply(lhs, rhs.kernel, *fused, jnp.dtype(out_dtype))
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        if out_sharding is not None:
            options["out_sharding"] = out_sharding
        return jax.lax.dot_general(jnp.asarray(lhs), jnp.asarray(rhs), dimension_numbers, **options)

    def _multiply(self, x, kernel: CompressedKernel, batch, contract, out_dtype) -> jax.Array:
        """``[*batch, *free, *output]`` of ``x``, whose axes ``batch`` and ``contract`` are in the kernel's order."""
        axes = kernel.axes
        free = [axis for axis in range(x.ndim) if axis not in (*batch, *contract)]
        sizes = [x.shape[axis] for axis in (*batch, *free)]
        x = x.transpose(*batch, *free, *contract).reshape(*sizes, axes.matrix_shape[-2])

        def one(x, z):
            options = {"implementation": self.implementation, "batch_invariant": self.batch_invariant}
            return matmul(x, z, out_dtype=out_dtype, **options)

        for _ in batch:
            one = jax.vmap(one)
        return one(x, kernel.matrix).reshape(*sizes, *(axes.shape[axis] for axis in axes.output))


def _matched(lhs, rhs: Operand, dimension_numbers: Dimensions, out_dtype) -> tuple[tuple, tuple] | None:
    """The axes of ``lhs`` in the order of the stored kernel; ``None`` where the matrix does not serve this product."""
    (x_contract, w_contract), (x_batch, w_batch) = dimension_numbers
    axes, kernel = rhs.kernel.axes, rhs.kernel
    if kernel.ndim != len(axes.shape) or not rhs.cast_is_exact:
        return None
    if lhs.dtype not in ACTIVATION_DTYPES or not jnp.issubdtype(out_dtype or lhs.dtype, jnp.floating):
        return None
    if tuple(w_batch) != axes.batch or tuple(sorted(w_contract)) != axes.contract:
        return None
    pairs = sorted(zip(w_contract, x_contract))
    for w_axis, x_axis in (*pairs, *zip(w_batch, x_batch)):
        if lhs.shape[x_axis] != axes.shape[w_axis]:
            raise ValueError(
                f"dot_general: axis {x_axis} of the input {lhs.shape} has size {lhs.shape[x_axis]}, axis {w_axis} of "
                f"the kernel {axes.shape} has {axes.shape[w_axis]}; they must be equal"
            )
    return tuple(x_batch), tuple(x_axis for _, x_axis in pairs)


@dataclasses.dataclass(frozen=True)
class Einsum:
    """``jnp.einsum`` of an input and a kernel that may be compressed; see :func:`einsum`.

    Attributes:
      implementation, batch_invariant: see :func:`jaxzip.matmul`.
    """

    implementation: str | None = None
    batch_invariant: bool = False

    def __call__(
        self,
        equation: str,
        x: jax.Array,
        w: jax.Array | Operand | CompressedKernel | CompressedTensor,
        *,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        _check_first("einsum", x)
        w = as_operand(w)
        parsed = parse(equation, x.ndim, w.ndim) if isinstance(w, Operand) else None
        if parsed is not None and out_sharding is None and w.cast_is_exact:
            common = jnp.promote_types(x.dtype, w.dtype)
            operands = x.astype(common), w.astype(common), parsed.dimension_numbers
            if _matched(*operands, preferred_element_type) is not None:
                multiply = DotGeneral(self.implementation, self.batch_invariant)
                return multiply(*operands, precision, preferred_element_type).transpose(parsed.output_order)
        options = {"precision": precision, "preferred_element_type": preferred_element_type}
        if out_sharding is not None:
            options["out_sharding"] = out_sharding
        return jnp.einsum(equation, jnp.asarray(x), jnp.asarray(w), **options)


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array | Operand | CompressedKernel | CompressedTensor,
    dimension_numbers: Dimensions,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """``jax.lax.dot_general`` that multiplies with a compressed ``rhs`` as it is; any Flax layer's ``dot_general``.

    A compressed weight is multiplied by :func:`jaxzip.matmul` (fp32 accumulation whatever ``precision`` says, one
    rounding). It is decoded first, and XLA multiplies, where the encoded matrix does not serve: it was stored for the
    contraction of other axes, the layer computes in a dtype that does not hold the weight's values (bf16 weights in
    fp16), the input is neither bf16, fp16 nor fp32, or ``out_sharding`` is given.

    Raises:
      ValueError: sizes of contracted or batch axes differ.
      TypeError: ``lhs`` is compressed.
    """
    return DotGeneral()(lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding)


def einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array | Operand | CompressedKernel | CompressedTensor,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """``jnp.einsum(equation, x, w)`` that multiplies with a compressed ``w`` as it is.

    Decodes first where :func:`dot_general` does, and for equations that are no product of matrices: an index twice in
    one operand, or one that is only in one operand and not in the result.

    Raises:
      ValueError: the equation does not fit the operands.
      TypeError: ``x`` is compressed.
    """
    options = {"precision": precision, "preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
    return Einsum()(equation, x, w, **options)


def promote_dtype(args: tuple, /, *, dtype: Any = None, inexact: bool = True) -> tuple:
    """Flax NNX's ``promote_dtype`` that leaves compressed kernels encoded and notes what they are to be cast to."""
    args = tuple(map(as_operand, args))
    like = [jnp.zeros((), a.dtype) if isinstance(a, Operand) else a for a in args]
    dtype = dtypes.canonicalize_dtype(*like, dtype=dtype, inexact=inexact)
    return tuple(_cast(a, dtype) for a in args)


def promote_dtype_linen(*args, dtype: Any = None, inexact: bool = True) -> list:
    """Flax Linen's ``promote_dtype``: :func:`promote_dtype` with the arguments one by one."""
    return list(promote_dtype(args, dtype=dtype, inexact=inexact))


def as_operand(w: Any) -> Any:
    """An Operand of a compressed weight; anything else as it is.

    Leading dimensions of a CompressedTensor are batch axes: ``"ebk,ekm->ebm"`` runs on the stack as it is.
    """
    if isinstance(w, CompressedTensor):
        lead = len(w.batch_shape)
        if w.ndim < 2:
            return decompress(w)
        table = w.output_axis == TABLE_AXIS
        axes = KernelAxes(w.shape, (lead + 1 if table else lead,), tuple(range(lead)))
        w = CompressedKernel(w.T if table else w, axes)
    return Operand(w) if isinstance(w, CompressedKernel) else w


def _check_first(op: str, x: Any) -> None:
    if isinstance(x, CompressedTensor):
        raise TypeError(f"{op}: the first operand is a CompressedTensor; the weight comes second, the input first")


def _cast(a, dtype):
    if a is None:
        return None
    return a.astype(dtype) if isinstance(a, Operand) else jnp.asarray(a, dtype)
