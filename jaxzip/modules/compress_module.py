"""``compress_module``: an NNX model in, the same model with compressed weights out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxzip.compress import compress
from jaxzip.errors import with_name
from jaxzip.modules import equation
from jaxzip.modules.embed import CompressedEmbed, TableOptions
from jaxzip.modules.kernel import CompressedKernel, KernelAxes, compress_kernel
from jaxzip.modules.nnx_layers import (
    KernelUse,
    has_hooks,
    kernel_use,
    rewritten_params,
    set_hooks,
    takes_compressed_table,
)
from jaxzip.modules.rule import KernelRule
from jaxzip.modules.variables import own_variables
from jaxzip.ops import host
from jaxzip.rules import (
    DEFAULT_RULES,
    CompressionReport,
    CompressionRule,
    TensorReport,
    dense_report,
    not_smaller,
    rule_for,
    tensor_report,
)
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor

#: Stands in place of a KernelUse for tables of embeddings.
TABLE = "table"


def compress_module(
    model: nnx.Module,
    rules: Sequence[CompressionRule] = DEFAULT_RULES,
    *,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> nnx.Module:
    """A copy of ``model`` whose layers hold compressed weights and multiply with them; ``model`` stays as it is.

    ``nnx.Linear``, ``LinearGeneral`` and ``Einsum`` (and layers made of them: ``MultiHeadAttention``, ``LoRALinear``)
    get a :class:`CompressedKernel` in their ``nnx.Param`` and our ``dot_general``, ``einsum_op`` and ``promote_dtype``
    hooks; an ``nnx.Embed`` is replaced by a :class:`CompressedEmbed`. Parameters of other modules, of subclasses with a
    ``__call__`` of their own among them, stay dense, unless a :class:`KernelRule` names them. What ``nnx.WeightNorm``
    and ``nnx.SpectralNorm`` rewrite stays dense, too. Weights of every rank keep their logical shape, and stacks of
    layers made with ``nnx.vmap`` stay stacks (those whose axis is not the first stay dense, if shapes tell: N layers of
    N x N do not). The result splits, merges, scans and trains as any NNX model (compressed weights are frozen).

    Args:
      model: with bf16 parameters; others stay as they are.
      rules: the first whose ``module_path`` matches a parameter's '/'-joined path decides; ``output_axis`` is not
        looked at, since layers know it.
      implementation, batch_invariant: of every product, see :func:`jaxzip.matmul`.

    Raises:
      TypeError: ``model`` is no NNX module or is traced, or a rule's format does not take a parameter's dtype.
    """
    return compress_with_report(model, rules, implementation=implementation, batch_invariant=batch_invariant)[0]


def compress_with_report(
    model: nnx.Module,
    rules: Sequence[CompressionRule] = DEFAULT_RULES,
    *,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> tuple[nnx.Module, CompressionReport]:
    """:func:`compress_module`, and the report: every parameter, its size, and why it stayed dense if it did."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"compress_module: expected an nnx.Module, got {type(model).__name__}")
    rows = []

    def convert(name: str, variable: nnx.Variable, use: KernelUse | str | None) -> Any:
        value = variable.get_value()
        rule = rule_for(name, value.shape, value.dtype, rules)
        if isinstance(rule, str):
            rows.append(dense_report(name, value, rule))
            return None
        if isinstance(rule, KernelRule) and rule.einsum is not None:
            use = KernelUse(rule.kernel_ndim, *equation.kernel_axes(rule.einsum))
        try:
            z, note = compress_for(use, value, rule.format)
        except (TypeError, ValueError) as error:
            raise with_name(name, error) from error
        rows.append(dense_report(name, value, note) if z is None else compressed_report(name, z))
        return z

    new = replace_parameters(model, convert, implementation=implementation, batch_invariant=batch_invariant)
    names = [row.path for row in rows]
    used = {next((rule for rule in rules if rule.matches(name)), None) for name in names}
    return new, CompressionReport(tuple(rows), tuple(rule for rule in rules if rule not in used))


def replace_parameters(
    model: nnx.Module,
    convert: Any,
    *,
    compressed_too: bool = False,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> nnx.Module:
    """A copy of ``model`` with what ``convert`` makes of its parameters.

    Args:
      model: its arrays are shared, its variables are not.
      convert: ``convert(name, variable, use)`` is called once for each ``nnx.Param`` with how its layer uses it (a
        KernelUse, ``TABLE``, or the reason why it must stay dense); it returns the compressed value, or ``None`` to
        leave the variable. It may change the variable itself.
      compressed_too: whether ``convert`` is called for parameters that are compressed already; else they stay.
      implementation, batch_invariant: see :func:`compress_module`.
    """
    graphdef, state = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))  # variables of its own, the same arrays
    uses = _uses(new)
    for name, variable in own_variables(new, nnx.Param):
        if compressed_too or not _is_compressed(variable):
            value = convert(name, variable, uses.get(id(variable), "no layer of Flax with hooks holds it"))
            if value is not None:
                variable.set_value(value)
    for _, layer in nnx.iter_modules(new):
        if has_hooks(layer) and _is_compressed(layer.kernel):
            set_hooks(layer, implementation=implementation, batch_invariant=batch_invariant)
    return _with_compressed_tables(new, TableOptions(implementation, batch_invariant))


def compress_for(
    use: KernelUse | str | None, w: Any, format: str, *, on_host: bool = False
) -> tuple[CompressedKernel | CompressedTensor | None, str]:
    """``w`` compressed for a use and "", or ``None`` and the reason why it stays dense."""
    if use == TABLE:
        z = matrix = compress(w, format=format, output_axis=TABLE_AXIS, on_host=on_host)
    elif isinstance(use, str):
        return None, use
    else:
        note = use.misfit(w.shape)
        if note is not None:
            return None, note
        stack = w.ndim - use.ndim
        z = compress_kernel(w, use.contract, batch=use.batch, stack_ndim=stack, format=format, on_host=on_host)
        matrix = z.matrix
    return (None, not_smaller(matrix)) if matrix.format == "raw" else (z, "")


def compress_again(
    z: CompressedTensor, axes: KernelAxes | None, use: KernelUse | str
) -> CompressedKernel | CompressedTensor | None:
    """A tensor from a checkpoint for a use: as it is if that serves, else encoded anew; ``None``: it must be dense.

    Args:
      z: with leaves on the host.
      axes: of the kernel whose matrix ``z`` is; ``None``: ``z`` has the logical shape.
    """
    shape = z.shape if axes is None else CompressedKernel(z, axes).shape
    if isinstance(use, KernelUse) and use.misfit(shape):
        return None
    if axes is not None:
        # A module that says nothing of its own may have had a KernelRule when the model was saved.
        if not isinstance(use, KernelUse) or (use.contract, use.batch) == (axes.contract, axes.batch):
            return CompressedKernel(z, axes)
    elif use == TABLE and z.output_axis == TABLE_AXIS:
        return z
    elif use == KernelUse(2, (0,)) and z.output_axis == KERNEL_AXIS:
        return CompressedKernel(z, KernelAxes(z.core_shape, (0,)))
    return compress_for(use, logical_array(z, axes), z.format, on_host=True)[0]


def logical_array(value: CompressedTensor | np.ndarray, axes: KernelAxes | None) -> np.ndarray:
    """The dense array of a tensor from a checkpoint, in its logical shape, on the host."""
    array = host.dense(value) if isinstance(value, CompressedTensor) else value
    return array if axes is None else axes.from_matrix(array)


def is_compressed(path: Sequence[Any], variable: Any) -> bool:
    """An NNX filter, of compressed parameters: ``wrt=nnx.All(nnx.Param, nnx.Not(is_compressed))`` trains the others."""
    return _is_compressed(variable)


def _is_compressed(variable: Any) -> bool:
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    return isinstance(value, CompressedKernel | CompressedTensor)


def _uses(model: nnx.Module) -> dict[int, KernelUse | str]:
    """How each parameter (by id) is used; one that several layers hold must be used alike by all of them."""
    uses: dict[int, KernelUse | str] = {}
    for _, layer in nnx.iter_modules(model):
        table = takes_compressed_table(layer)
        if table:
            held, use = layer.embedding, TABLE if table is True else table
        else:
            held, use = getattr(layer, "kernel", None), kernel_use(layer)
        if use is not None and isinstance(held, nnx.Variable):
            same = uses.setdefault(id(held), use) == use
            if not same:
                uses[id(held)] = "layers that use it in different ways share it"
    for _, layer in nnx.iter_modules(model):
        uses.update({id(held): f"nnx.{type(layer).__name__} rewrites it" for held in rewritten_params(layer)})
    return uses


def _with_compressed_tables(model: nnx.Module, options: TableOptions) -> nnx.Module:
    """``model`` with a CompressedEmbed of ``options`` in place of each Embed whose table is compressed."""

    def takes(node):
        return type(node) in (nnx.Embed, CompressedEmbed) and _is_compressed(node.embedding)

    if not any(takes(module) for _, module in nnx.iter_modules(model)):
        return model
    return nnx.recursive_map(lambda path, node: CompressedEmbed(node, options) if takes(node) else node, model)


def compressed_report(name: str, z: CompressedKernel | CompressedTensor) -> TensorReport:
    """The report row of a compressed parameter, under its logical shape."""
    matrix = z.matrix if isinstance(z, CompressedKernel) else z
    return dataclasses.replace(tensor_report(name, matrix), shape=z.shape)


def transcode_module(model: nnx.Module, format: str) -> nnx.Module:
    """A copy of ``model`` whose compressed weights have another format: ``"raw"`` gives the dense control.

    See :func:`jaxzip.transcode`. The layers and their hooks stay, so that the same operations run.
    """
    from jaxzip.ops.transcode import transcode

    graphdef, state = nnx.split(model)
    compressed = lambda leaf: isinstance(leaf, CompressedTensor)  # noqa: E731
    state = jax.tree.map(lambda z: transcode(z, format) if compressed(z) else z, state, is_leaf=compressed)
    return nnx.merge(graphdef, state)
