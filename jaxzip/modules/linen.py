"""Flax Linen: compressed parameters for unmodified models, and the layers' hooks.

``compress_linen`` puts a :class:`KernelBox` in place of a kernel. Flax unboxes parameters when a module asks for them
(``self.param``), so modules run with such a tree: what does not know compressed weights gets them decoded. Inside
``with fused():`` the layers of Flax multiply with them as they are. Your own modules do by a KernelRule and
``jaxzip.einsum``; so do Flax's layers that are given ``dot_general=jaxzip.dot_general,
promote_dtype=jaxzip.modules.promote_dtype_linen``, with ``uses=find_uses(...)``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxzip.errors import with_name
from jaxzip.modules import equation
from jaxzip.modules.compress_module import (
    TABLE,
    compress_again,
    compress_for,
    compressed_report,
    logical_array,
)
from jaxzip.modules.embed import TableOptions, attend, lookup
from jaxzip.modules.hooks import DotGeneral, Einsum, promote_dtype_linen
from jaxzip.modules.kernel import CompressedKernel, Decoding, Operand
from jaxzip.modules.nnx_layers import KernelUse
from jaxzip.modules.rule import KernelRule
from jaxzip.ops import decompress
from jaxzip.rules import DEFAULT_RULES, CompressionReport, CompressionRule, dense_report, path_name, rule_for
from jaxzip.tensor import CompressedTensor
from jaxzip.x64 import to_device

Uses = Mapping[str, KernelUse | str]
#: The layers of Flax that ``fused`` knows, and the wrappers that replace the parameters of what they wrap.
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed)
_REWRITERS = (nn.WeightNorm, nn.SpectralNorm)

#: Whether a Dense or DenseGeneral with our hooks is running, which takes an Operand.
_in_hooked_layer = contextvars.ContextVar("jaxzip_in_hooked_layer", default=False)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class KernelBox(nn.meta.AxisMetadata):
    """A compressed weight in a Linen parameter tree; ``self.param`` gives what :meth:`unbox` does.

    Attributes:
      value: a CompressedKernel, or the CompressedTensor of an embedding table.
      use_is_known: the reader is known to take a compressed weight, by a KernelRule or by ``uses``. Any other gets the
        decoded array, except for the layers that :func:`fused` runs.
    """

    value: CompressedKernel | CompressedTensor
    use_is_known: bool = True

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("value"), self.value),), self.use_is_known

    @classmethod
    def tree_unflatten(cls, use_is_known, children) -> KernelBox:
        return cls(children[0], use_is_known)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def unbox(self) -> Operand | TableOperand | jax.Array:
        z, known = self.value, self.use_is_known
        if isinstance(z, CompressedTensor):
            return TableOperand(z) if known else decompress(z)
        return Operand(z) if known or _in_hooked_layer.get() else z.dense()

    def replace_boxed(self, val: Any) -> Any:
        if isinstance(val, Operand | TableOperand):
            return KernelBox(val.kernel, self.use_is_known)
        return self if isinstance(val, KernelBox) else val

    def add_axis(self, index: int, params: Any) -> KernelBox:
        return self  # an axis more or less shows in the leaves

    def remove_axis(self, index: int, params: Any) -> KernelBox:
        return self


class TableOperand(Decoding):
    """An embedding table ``[V, D]`` as a module reads it: array-like, decoded by whatever does not know it.

    As with Operand, ``jnp.take`` and other functions that JAX compiles as a whole need ``jnp.asarray(table)``.
    """

    def __init__(self, kernel: CompressedTensor):
        self.kernel = kernel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    @property
    def dtype(self):
        return self.kernel.dtype

    def __getitem__(self, index) -> jax.Array:
        return self.__jax_array__()[index]

    def __jax_array__(self) -> jax.Array:
        return decompress(self.kernel)


def compress_linen(
    params: Any,
    rules: Sequence[CompressionRule] = DEFAULT_RULES,
    *,
    uses: Uses | None = None,
    on_host: bool = False,
) -> tuple[Any, CompressionReport]:
    """Compresses a Linen parameter tree; ``model.apply({"params": params}, ...)`` goes on working with the result.

    Args:
      params: nested dicts; bf16 leaves that a rule takes are compressed, others stay. CompressedTensors and
        CompressedKernels, which ``jaxzip.checkpoint.Checkpoint.load_tree`` gives, are taken as they are, or encoded
        anew for their layers.
      rules: the first that matches decides; a :class:`KernelRule` also says how a weight of your own module is used.
      uses: how the layers of Flax use their kernels, as :func:`find_uses` finds it. For other leaves (all, without it):
        those called ``embedding`` are tables, those called ``bias`` stay dense, others of rank 2 are kernels
        ``[K, M]``, those of rank 3 or more need a KernelRule to be compressed, and weights that ``nn.WeightNorm`` or
        ``nn.SpectralNorm`` rewrites need a rule that says ``"raw"``: the wrappers fail with compressed ones.
      on_host: keep the payloads in NumPy arrays.

    Returns:
      The tree with a :class:`KernelBox` in place of the compressed leaves, and the report.

    Raises:
      TypeError: a rule's format does not take a leaf's dtype, or a leaf that a rule takes is traced.
    """
    rows = []
    put = (lambda leaf: leaf) if on_host else to_device

    def load(name, leaf, rule):
        """A tensor that is compressed already, from a checkpoint."""
        leaf = jax.tree.map(np.asarray, leaf)
        matrix, axes = (leaf.matrix, leaf.axes) if isinstance(leaf, CompressedKernel) else (leaf, None)
        use = _use(name, leaf, rule, uses or {})
        z = compress_again(matrix, axes, use)
        if z is None:
            array = logical_array(matrix, axes)
            note = use.misfit(array.shape) if isinstance(use, KernelUse) else use
            rows.append(dense_report(name, array, "encoding would not be smaller" if note in (None, TABLE) else note))
            return put(array)
        rows.append(compressed_report(name, z))
        return KernelBox(jax.tree.map(put, z), _is_known(name, rule, uses or {}))

    def convert(path, leaf):
        name = path_name(path)
        if isinstance(leaf, KernelBox) or not hasattr(leaf, "dtype"):
            return leaf
        rule = rule_for(name, leaf.shape, leaf.dtype, rules)
        if isinstance(leaf, CompressedTensor | CompressedKernel):
            return load(name, leaf, rule)
        z, note = None, rule if isinstance(rule, str) else ""
        if not note:
            use = _use(name, leaf, rule, uses or {})
            try:
                z, note = compress_for(use, leaf, rule.format, on_host=on_host)
            except (TypeError, ValueError) as error:
                raise with_name(name, error) from error
        rows.append(dense_report(name, leaf, note) if z is None else compressed_report(name, z))
        return leaf if z is None else KernelBox(z, _is_known(name, rule, uses or {}))

    known = lambda leaf: isinstance(leaf, KernelBox | CompressedTensor | CompressedKernel)  # noqa: E731
    tree = jax.tree_util.tree_map_with_path(convert, params, is_leaf=known)
    used = {next((rule for rule in rules if rule.matches(row.path)), None) for row in rows}
    return tree, CompressionReport(tuple(rows), tuple(rule for rule in rules if rule not in used))


def find_uses(model: nn.Module, *args, **kwargs) -> dict[str, KernelUse | str]:
    """How the layers of Flax in ``model`` use their kernels, found by tracing ``model.init(key, *args, **kwargs)``.

    Nothing is computed: the arguments may be ``jax.ShapeDtypeStruct``.

    Returns:
      By '/'-joined path of the parameter, for ``compress_linen(..., uses=...)``.
    """
    uses: dict[str, KernelUse | str] = {}
    rewritten: dict[str, str] = {}

    def record(next_fun, call_args, call_kwargs, context):
        result = next_fun(*call_args, **call_kwargs)
        layer, name = context.module, "/".join((*context.module.path, "kernel"))
        if isinstance(layer, _REWRITERS) and context.method_name == "__call__":
            rewritten.update({name: f"nn.{type(layer).__name__} rewrites it" for name, _ in _rewritten(layer)})
        if not _has_call_of_flax(layer):
            return result
        if isinstance(layer, nn.Embed):
            uses["/".join((*layer.path, "embedding"))] = TABLE
        elif context.method_name == "__call__":
            inputs, *equation_of_call = _arguments(layer, "__call__", call_args, call_kwargs)
            use = _layer_use(layer, inputs.ndim, *equation_of_call)
            if isinstance(use, KernelUse):  # inside a scan or vmap, where the kernel is that of one layer
                kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
                use = dataclasses.replace(use, shape=tuple(kernel.shape))
            if uses.setdefault(name, use) != use:
                uses[name] = "it is used in different ways"
        return result

    def init():
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), *args, **kwargs)

    jax.eval_shape(init)
    return uses | rewritten


@contextlib.contextmanager
def fused(*, implementation: str | None = None, batch_invariant: bool = False) -> Iterator[None]:
    """Inside, Flax's Dense, DenseGeneral, Einsum and Embed multiply with compressed weights without decoding them.

    Layers with dense weights, and those with hooks or (in a subclass) a ``__call__`` of their own, run as always.
    ``nn.Dense`` and ``nn.DenseGeneral`` get our ``dot_general`` and ``promote_dtype``; the others, which have no such
    hooks, are computed here.

    Args:
      implementation, batch_invariant: of every product, see :func:`jaxzip.matmul`.

    Raises:
      TypeError: by ``nn.WeightNorm`` and ``nn.SpectralNorm``, if a weight that they rewrite is compressed.
    """
    hooks = {
        "dot_general": DotGeneral(implementation, batch_invariant),
        "promote_dtype": promote_dtype_linen,
    }

    def call(next_fun, args, kwargs, context):
        layer, method = context.module, context.method_name
        if isinstance(layer, nn.Dense | nn.DenseGeneral) and method == "__call__":
            own = layer.dot_general is not None or layer.dot_general_cls is not None
            if own or not _has_default_promotion(layer) or not _is_boxed(layer, "kernel"):
                return next_fun(*args, **kwargs)
            if not _has_call_of_flax(layer):  # which may draw random numbers or sow: a clone has no such collections
                return next_fun(*args, **kwargs)
            token = _in_hooked_layer.set(True)
            try:
                return layer.clone(parent=None, name=None, **hooks).apply(dict(layer.variables), *args, **kwargs)
            finally:
                _in_hooked_layer.reset(token)
        if isinstance(layer, nn.Einsum) and method == "__call__" and _has_default_promotion(layer):
            if _has_call_of_flax(layer) and _is_boxed(layer, "kernel"):
                return _einsum(layer, Einsum(implementation, batch_invariant), *args, **kwargs)
        if type(layer) is nn.Embed and method in ("__call__", "attend") and _has_default_promotion(layer):
            if _is_boxed(layer, "embedding"):
                table = layer.get_variable("params", "embedding").value
                options = TableOptions(implementation, batch_invariant)
                return _embed(layer, method, table, options, *_arguments(layer, method, args, kwargs))
        if isinstance(layer, _REWRITERS) and method == "__call__":
            _check_rewriter(layer)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(call):
        yield


def _einsum(layer: nn.Einsum, einsum: Callable, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
    text = (einsum_str or layer.einsum_str).replace(" ", "")
    kernel = Operand(layer.get_variable("params", "kernel").value)
    bias = nn.meta.unbox(layer.get_variable("params", "bias")) if layer.use_bias else None
    inputs, kernel, bias = promote_dtype_linen(inputs, kernel, bias, dtype=layer.dtype)
    y = einsum(text, inputs, kernel, precision=layer.precision, preferred_element_type=layer.preferred_element_type)
    return y if bias is None else y + _spread(bias, text, kernel.shape, y.ndim)


def _spread(bias: jax.Array, text: str, shape: tuple[int, ...], ndim: int) -> jax.Array:
    """A bias with the kernel's remaining axes, in the result's order, as an array that broadcasts to the result."""
    operands, _, out = text.partition("->")
    kernel = operands.partition(",")[2]
    before, _, after = out.partition("...") if "..." in out else ("", "", out)
    sizes = [[shape[kernel.index(c)] if c in kernel else 1 for c in part] for part in (before, after)]
    return bias.reshape(*sizes[0], *[1] * (ndim - len(before) - len(after)), *sizes[1])


def _embed(layer: nn.Embed, method: str, table: CompressedTensor, options: TableOptions, inputs: jax.Array):
    if method == "__call__":
        return lookup(table, inputs, layer.dtype or table.dtype)
    return attend(table, inputs, layer.dtype or jnp.promote_types(inputs.dtype, table.dtype), options)


def _arguments(layer: nn.Module, method: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """The arguments of a call of ``layer.method`` in the order of its signature, named ones too."""
    return inspect.signature(getattr(type(layer), method)).bind(layer, *args, **kwargs).args[1:]


def _is_boxed(layer: nn.Module, name: str) -> bool:
    return layer.has_variable("params", name) and isinstance(layer.get_variable("params", name), KernelBox)


def _has_call_of_flax(layer: nn.Module) -> bool:
    """Not so: modules of the user's, subclasses with a ``__call__`` of their own among them."""
    return type(layer).__call__ in [kind.__call__ for kind in _LAYERS]


def _rewritten(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of the parameters that a wrapper, one of ``_REWRITERS``, replaces by arrays of its own."""
    inner, parts = layer.layer_instance, getattr(layer, "variable_filter", None)
    boxed = lambda leaf: isinstance(leaf, KernelBox)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner.variables.get("params", {}), is_leaf=boxed):
        if not parts or any(part in f"{inner.name}/{path_name(path)}" for part in parts):
            yield "/".join((*inner.path, path_name(path))), leaf


def _check_rewriter(layer: nn.Module) -> None:
    """Refuses compressed weights in a wrapper that computes with the leaves of the tree."""
    for name, leaf in _rewritten(layer):
        if isinstance(leaf, KernelBox):
            raise TypeError(
                f"{name}: nn.{type(layer).__name__} rewrites this parameter, so that it cannot be compressed; "
                "compress_linen(params, uses=find_uses(model, *inputs)) leaves it dense"
            )


def _has_default_promotion(layer: nn.Module) -> bool:
    default = next(field.default for field in dataclasses.fields(layer) if field.name == "promote_dtype")
    return layer.promote_dtype is default


def _layer_use(layer: nn.Module, ndim: int, einsum_str: str | None = None) -> KernelUse | str:
    if isinstance(layer, nn.Dense):
        return KernelUse(2, (0,))
    if isinstance(layer, nn.Einsum):
        text = einsum_str or layer.einsum_str or ""
        axes = equation.kernel_axes(text)
        return (
            f"its equation {text!r} is no product of matrices" if axes is None else KernelUse(len(layer.shape), *axes)
        )
    axis, batch, features = (
        (value,) if isinstance(value, int) else tuple(value) for value in (layer.axis, layer.batch_dims, layer.features)
    )
    contract = tuple(range(len(batch), len(batch) + len(axis)))
    return KernelUse(len(batch) + len(axis) + len(features), contract, tuple(range(len(batch))))


def _is_known(name: str, rule: CompressionRule | str, uses: Uses) -> bool:
    """Whether a weight's reader is a layer of Flax or, as its KernelRule says, ``jaxzip.einsum``.

    Without ``uses``, tables are taken for those of ``nn.Embed``, which reads them before it is known what for.
    """
    if isinstance(rule, KernelRule) and rule.einsum is not None:
        return True
    return name in uses or (not uses and name.rpartition("/")[2] == "embedding")


def _use(name: str, leaf: Any, rule: CompressionRule | str, uses: Uses) -> KernelUse | str:
    if isinstance(rule, KernelRule) and rule.einsum is not None:
        return KernelUse(rule.kernel_ndim, *equation.kernel_axes(rule.einsum))
    if name in uses:
        return uses[name]
    if name.rpartition("/")[2] == "embedding":
        return TABLE
    if name.rpartition("/")[2] == "bias":
        return "it is a bias, which layers add"
    if leaf.ndim == 2:
        return KernelUse(2, (0,))
    return "how it is used is not known: give uses=find_uses(model, *inputs), or a KernelRule with its equation"
