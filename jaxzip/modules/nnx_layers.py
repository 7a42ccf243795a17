"""The NNX layers that take compressed weights: which axes of their kernels are contracted, and their hooks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from flax import nnx

from jaxzip.modules import equation
from jaxzip.modules.embed import CompressedEmbed
from jaxzip.modules.hooks import DotGeneral, Einsum, promote_dtype
from jaxzip.modules.variables import own_variables

#: The layers whose ``__call__`` reads its kernel through the hooks.
_HOOKED = (nnx.LinearGeneral, nnx.Linear, nnx.Einsum, nnx.LoRALinear)


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """How a layer uses its parameter ``kernel``: the rank that it is written for, and see ``KernelAxes``.

    ``shape`` is the kernel's in one layer, where the layer knows it: it tells which axes of a stack are the layers',
    unless it is the same either way (N layers of N x N).
    """

    ndim: int
    contract: tuple[int, ...]
    batch: tuple[int, ...] = ()
    shape: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a parameter of this ``shape`` cannot be compressed for the use."""
        stack = len(shape) - self.ndim
        if stack < 0:
            return f"it has rank {len(shape)}, its layer or rule says {self.ndim}"
        return not_stacked_first(shape, stack, self.shape)


def not_stacked_first(shape: tuple[int, ...], stack: int, own: tuple[int, ...] | None) -> str | None:
    """Why a parameter of ``shape`` is no stack, along its first axes, of layers whose own shape is ``own``."""
    if own is None or not stack or tuple(shape[stack:]) == own:
        return None
    return f"its stack axis is not the first: it has shape {tuple(shape)}, one layer's is {own}"


def kernel_use(layer: nnx.Module) -> KernelUse | str | None:
    """How ``layer`` uses its kernel; the reason why it cannot be compressed; ``None`` if it has no hooks at all."""
    use = _use_of_class(layer)
    if isinstance(use, KernelUse) and type(layer).__call__ not in [kind.__call__ for kind in _HOOKED]:
        return f"{type(layer).__name__} has a __call__ of its own: a KernelRule with its equation compresses the kernel"
    return use


def has_hooks(layer: nnx.Module) -> bool:
    """Whether :func:`set_hooks` may be called; a subclass's own ``__call__`` may use the hooks or not."""
    return isinstance(_use_of_class(layer), KernelUse)


def rewritten_params(layer: nnx.Module) -> Iterator[nnx.Variable]:
    """The parameters that ``layer``, a wrapper such as ``nnx.WeightNorm``, replaces by arrays of its own."""
    if isinstance(layer, nnx.WeightNorm | nnx.SpectralNorm):
        taken = nnx.All(nnx.Param, getattr(layer, "variable_filter", ...))
        yield from (variable for _, variable in own_variables(layer.layer_instance, taken))


def _use_of_class(layer: nnx.Module) -> KernelUse | str | None:
    """How Flax's own class of layer uses its kernel, see :func:`kernel_use`."""
    if isinstance(layer, nnx.LinearGeneral):
        batch, inputs = len(layer.batch_axis), len(layer.in_features)
        shape = (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
        use = KernelUse(len(shape), tuple(range(batch, batch + inputs)), tuple(range(batch)), shape)
        if layer.dot_general_cls is not None:
            return "the layer has a dot_general_cls of its own"
    elif isinstance(layer, nnx.Linear):
        use = KernelUse(2, (0,), shape=(layer.in_features, layer.out_features))
    elif isinstance(layer, nnx.Einsum):
        axes = None if layer.einsum_str is None else equation.kernel_axes(layer.einsum_str)
        if axes is None:
            return f"its equation {layer.einsum_str!r} is not known to be a product of matrices"
        use = KernelUse(len(layer.kernel_shape), *axes, shape=tuple(layer.kernel_shape))
    else:
        return None
    return _foreign_hook(layer) or use


def set_hooks(layer: nnx.Module, *, implementation: str | None, batch_invariant: bool) -> None:
    """Gives ``layer`` (one that :func:`has_hooks`) the hooks that multiply with compressed kernels."""
    if isinstance(layer, nnx.Einsum):
        layer.einsum_op = Einsum(implementation, batch_invariant)
    else:
        layer.dot_general = DotGeneral(implementation, batch_invariant)
    layer.promote_dtype = promote_dtype


def _foreign_hook(layer: nnx.Module) -> str | None:
    """Why the layer's hooks are not ours to set: a user has put something else there."""
    for name in ("einsum_op",) if isinstance(layer, nnx.Einsum) else ("dot_general",):
        if getattr(layer, name) not in (None, _default(layer, name)) and not _is_ours(getattr(layer, name)):
            return f"the layer has a {name} of its own"
    if layer.promote_dtype not in (_default(layer, "promote_dtype"), promote_dtype):
        return "the layer has a promote_dtype of its own"
    return None


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, DotGeneral | Einsum)


def _default(layer: nnx.Module, argument: str) -> Any:
    """What Flax's own layer has for a constructor argument by default."""
    kinds = (nnx.LinearGeneral, nnx.Linear, nnx.Einsum, nnx.Embed)
    kind = next(kind for kind in kinds if isinstance(layer, kind))
    default = inspect.signature(kind.__init__).parameters[argument].default
    if argument == "dot_general" and default is None:
        default = inspect.signature(nnx.Linear.__init__).parameters[argument].default
    return default


def takes_compressed_table(layer: nnx.Module) -> bool | str:
    """Whether ``layer`` is an ``nnx.Embed`` to be replaced by ``CompressedEmbed`` (or is one already), or why not."""
    if not isinstance(layer, nnx.Embed):
        return False
    if type(layer) not in (nnx.Embed, CompressedEmbed):
        return f"{type(layer).__name__} is a subclass of nnx.Embed, whose lookup has no hook"
    if layer.promote_dtype != _default(layer, "promote_dtype"):
        return "the layer has a promote_dtype of its own"
    shape = layer.embedding.shape
    return not_stacked_first(shape, len(shape) - 2, (layer.num_embeddings, layer.features)) or True
