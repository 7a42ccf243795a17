"""``save_module`` and ``restore_module``: an NNX model with compressed weights as a compressed Orbax checkpoint."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxzip.checkpoint import Checkpoint, layout, open_checkpoint
from jaxzip.checkpoint.checksum import checksum
from jaxzip.checkpoint.convert import _entry, stored_leaves
from jaxzip.checkpoint.partial import PartialCheckpoint
from jaxzip.checkpoint.source import TensorInfo, dict_leaf
from jaxzip.compress import AUTO
from jaxzip.errors import CheckpointError, with_name
from jaxzip.modules.compress_module import compress_again, compress_for, logical_array, replace_parameters
from jaxzip.modules.kernel import CompressedKernel, KernelAxes
from jaxzip.modules.nnx_layers import KernelUse
from jaxzip.modules.variables import own_variables
from jaxzip.ops import host
from jaxzip.rules import DEFAULT_RULES, CompressionRule, rule_for
from jaxzip.tensor import CompressedTensor
from jaxzip.x64 import is_cut, to_device

#: Key of a tensor's metadata entry: the axes of a kernel whose matrix is stored.
AXES_KEY = "kernel_axes"
#: What the metadata of a checkpoint that save_module wrote says of its source.
SOURCE_KIND = "module"
#: What a variable may hold in place of an array, and how Orbax calls such leaves.
Number = bool | int | float | complex
_NUMBER_TYPE = "scalar"


def save_module(model: nnx.Module, path: str | Path) -> None:
    """Writes the variables of ``model``, compressed or not, to a compressed checkpoint at ``path``.

    The checkpoint is one of ``jaxzip convert``'s kind: ``jaxzip inspect`` lists it, :func:`restore_module` and
    ``jaxzip.checkpoint.open_checkpoint`` read it. Weights are written as they are encoded; a kernel of rank 3 or more
    is stored as its matrix, with its own shape in the metadata. State of random number generators is left out.
    ``path`` appears in one step, complete, or not at all.

    Raises:
      CheckpointError: ``path`` exists or cannot be written.
      TypeError: ``model`` is neither an NNX module nor its state, or a variable holds something else than an array, a
        number or a compressed weight (a typed PRNG key, ``None``, a string); names it.
    """
    # Imported here: jaxzip.__init__ offers this module's functions, and holds the version.
    from jaxzip import __version__

    if not isinstance(model, nnx.Module | nnx.State):
        raise TypeError(f"save_module: expected an nnx.Module, got {type(model).__name__}")
    plan = {"operation": "save_module", "run": uuid.uuid4().hex}
    entries = []
    with PartialCheckpoint(Path(path).absolute(), plan, resume=False) as partial:
        try:
            for name, variable in own_variables(model, nnx.Not(nnx.RngState)):
                entries.append(_add(name, variable.get_value(), partial))
            document = {
                "layout_version": layout.LAYOUT_VERSION,
                "library_version": __version__,
                "source": _source(model, entries),
                "source_custom_metadata": None,
                "hf_config": None,
                "extra_files": {},
                "tensors": [{**entry, "path": list(entry["path"])} for entry in entries],
                "other_leaves": [],
            }
            leaves = [leaf for entry in entries for leaf in stored_leaves(entry)]
            partial.finish(leaves, layout.custom_metadata(document), {})
        except BaseException:
            partial.discard()  # no later run goes on with it
            raise


def _add(name: str, value: Any, partial: PartialCheckpoint) -> dict[str, Any]:
    """Writes one variable's value; its entry."""
    axes = None
    if isinstance(value, CompressedKernel):
        value, axes = value.matrix, value.axes
    try:
        compressed = isinstance(value, CompressedTensor) and value.format != "raw"
        z = jax.tree.map(np.asarray, value) if compressed else None
        array = host.dense(z) if compressed else _plain(value)
    except (TypeError, ValueError) as error:
        raise with_name(name, error) from error
    leaf = dict_leaf(name.split("/"))
    if isinstance(value, Number):
        leaf = dataclasses.replace(leaf, value_type=_NUMBER_TYPE)
    info = TensorInfo(leaf, tuple(array.shape), np.dtype(array.dtype))
    entry = _entry(info, z, "" if compressed else "as the model had it", checksum(array))
    if axes is not None:
        entry[AXES_KEY] = dataclasses.asdict(axes)
    partial.add(info.leaf, dict(z.payload) if compressed else {"": array}, entry)
    return entry


def restore_module(
    model: nnx.Module,
    path: str | Path,
    *,
    rules: Sequence[CompressionRule] = DEFAULT_RULES,
    format: str | None = AUTO,
    seed: int = 0,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> nnx.Module:
    """A copy of ``model`` with the variables of the compressed checkpoint at ``path``; compressed ones stay so.

    The checkpoint was written by :func:`save_module`, or by ``jaxzip convert`` from an Orbax checkpoint of the model's
    state. A kernel that was converted in another layout than its layer multiplies with is encoded anew; one whose layer
    takes no compressed weights is decoded. Variables of 64 bits, which JAX would cut to 32 (unless jax_enable_x64 is
    set), get NumPy arrays.

    Args:
      model: gives the structure, dense or compressed, for instance
        ``nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))``: nothing of it is read but shapes, dtypes and, if it has
        any, the state of random number generators.
      rules: for weights that a converted checkpoint has uncompressed, because stacks of small matrices would not have
        shrunk, and that may shrink as their layers store them. What :func:`save_module` wrote comes back as it was.
      format: what compressed weights are changed to, see :meth:`jaxzip.checkpoint.Checkpoint.load`.
      seed: of the random number generators of a model without arrays.
      implementation, batch_invariant: see :func:`jaxzip.compress_module`.

    Raises:
      TypeError: ``model`` is no NNX module.
      ValueError: a variable's shape or dtype is not the one in the checkpoint.
      TensorNotFoundError: the checkpoint lacks a variable; names the nearest.
      CheckpointError, CorruptDataError: see :meth:`jaxzip.checkpoint.Checkpoint.load`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"restore_module: expected an nnx.Module, got {type(model).__name__}")
    checkpoint = open_checkpoint(path)
    saved = checkpoint.metadata["source"]["kind"] == SOURCE_KIND

    def convert(name: str, variable: nnx.Variable, use: KernelUse | str) -> Any:
        value, axes = _load(checkpoint, name, variable, format)
        if isinstance(value, Number):
            variable.set_value(value)
            return None
        if isinstance(value, CompressedTensor):
            z = compress_again(value, axes, use)
        elif saved or isinstance(rule := rule_for(name, value.shape, value.dtype, rules), str):
            z = None
        else:
            z = compress_for(use, value, rule.format)[0]
        if z is None:
            variable.set_value(to_device(logical_array(value, axes)))
            return None
        return jax.tree.map(jnp.asarray, z)

    options = {"implementation": implementation, "batch_invariant": batch_invariant}
    new = replace_parameters(model, convert, compressed_too=True, **options)
    for name, variable in own_variables(new, nnx.Not(nnx.Any(nnx.Param, nnx.RngState))):
        value, axes = _load(checkpoint, name, variable, format)
        variable.set_value(value if isinstance(value, Number) else to_device(logical_array(value, axes)))
    _seed_generators(new, seed)
    return new


def _seed_generators(model: nnx.Module, seed: int) -> None:
    """Gives generators without arrays a state, a stream of their own each."""
    for index, (_, variable) in enumerate(own_variables(model, nnx.RngState)):
        value = variable.get_value()
        if not isinstance(value, jax.ShapeDtypeStruct):
            continue
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(jax.random.key(seed), index)
            variable.set_value(jax.random.split(key, value.shape) if value.shape else key)
        else:
            variable.set_value(jnp.zeros(value.shape, value.dtype))


def _source(model: nnx.Module, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The document's description of where the weights came from, with the keys that converted checkpoints have."""
    return {
        "kind": SOURCE_KIND,
        "name": type(model).__name__,
        "files": 0,
        "bytes": sum(entry["original_bytes"] for entry in entries),
        "fingerprint": "",
        "cast": None,
        "notes": ["saved from a Flax module; kernels of rank 3 and more are stored as matrices"],
    }


def _plain(value: Any) -> np.ndarray:
    """The array of a variable that is stored as it is; raw tensors are arrays already."""
    if isinstance(value, CompressedTensor):
        return host.dense(jax.tree.map(np.asarray, value))
    if isinstance(value, jax.core.Tracer):
        raise TypeError("save_module writes files and cannot be traced; save outside of jit")
    if isinstance(value, jax.Array | np.ndarray | np.generic) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError("save_module: a typed PRNG key cannot be saved; keep jax.random.key_data(key) in the variable")
    known = isinstance(value, jax.Array | np.ndarray | np.generic | Number)
    array = np.asarray(value) if known else None
    if array is None or not (array.dtype == bool or jnp.issubdtype(array.dtype, np.number)):
        found = type(value).__name__ if array is None else f"{type(value).__name__} of {array.dtype}"
        raise TypeError(f"save_module: expected an array or a number in the variable, found {found}")
    return array


def _may_be_number(expected: Any) -> bool:
    """Whether ``nnx.eval_shape`` shows a number like this."""
    return isinstance(expected, jax.ShapeDtypeStruct) and (expected.weak_type or expected.dtype == bool)


def _load(
    checkpoint: Checkpoint, name: str, variable: nnx.Variable, format: str | None
) -> tuple[CompressedTensor | np.ndarray | Number, KernelAxes | None]:
    """A variable's value on the host, checked against the model's; a number for a variable that holds one."""
    key = next((key for key in (name, f"{name}/value") if key in checkpoint.tensors), name)
    entry = checkpoint.entry(key)
    axes = None
    if AXES_KEY in entry:
        try:
            axes = KernelAxes(**{field: tuple(sizes) for field, sizes in entry[AXES_KEY].items()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{key} in {checkpoint.path}: its kernel axes cannot be read ({error})") from None
    value, expected = checkpoint.load(key, format=format), variable.get_value()
    if isinstance(value, CompressedKernel):  # as jaxzip convert stores kernels of rank 3 and more
        value, axes = value.matrix, value.axes
    stored = value.shape
    if axes is not None:
        if stored[len(stored) - len(axes.matrix_shape) :] != axes.matrix_shape:
            raise CheckpointError(
                f"{key} in {checkpoint.path}: a kernel of axes {axes} cannot be stored as {stored}; save it again"
            )
        stored = (*stored[: len(stored) - len(axes.matrix_shape)], *axes.shape)
        if not isinstance(value, CompressedTensor):
            value, axes = axes.from_matrix(value), None
    is_number = isinstance(expected, Number)
    if entry["leaf"]["value_type"] == _NUMBER_TYPE and _may_be_number(expected):
        is_number = jax.dtypes.canonicalize_dtype(value.dtype) == expected.dtype
        expected = np.empty(expected.shape, value.dtype if is_number else expected.dtype)
    if not hasattr(expected, "dtype"):
        expected = np.asarray(expected)
    if tuple(stored) != tuple(expected.shape) or value.dtype != expected.dtype:
        advice = "build the model that the checkpoint was saved from"
        if is_cut(value.dtype):
            advice += "; nnx.eval_shape shows 64 bits as 32 unless jax_enable_x64 is set: give the model itself"
        raise ValueError(
            f"{name}: the model has {expected.dtype}{list(expected.shape)}, {checkpoint.path} has "
            f"{value.dtype}{list(stored)}; {advice}"
        )
    return value.item() if is_number else value, axes
