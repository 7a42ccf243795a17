"""A model's parameters as plain nested dicts with string keys, which is what checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxzip.tensor import TABLE_AXIS, CompressedTensor


def variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Param]]:
    """``('/'-joined path, Param)`` of every parameter."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        yield "/".join(map(str, path)), variable


def collect(model: nnx.Module) -> dict[str, Any]:
    """The values of all parameters in nested dicts; nothing is copied."""
    tree: dict[str, Any] = {}
    for path, variable in variables(model):
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = variable.get_value()
    return tree


def assign(model: nnx.Module, params: Mapping[str, Any]) -> None:
    """Puts ``params`` in place of the model's values, after checking names, shapes and dtypes of all of them."""
    given, problems, state = dict(_flatten(params)), [], nnx.state(model, nnx.Param)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    for path, variable in flat.items():
        if path not in given:
            problems.append(f"{path} is missing")
        else:
            problems += _shape_problems(path, given[path], variable.get_value().shape)
    problems += [f"{path} is unknown" for path in given if path not in flat]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"the parameters do not fit the model's config: {shown}")
    for path, variable in flat.items():
        value = given[path]
        # A NumPy leaf would be copied to the device by every call.
        variable.set_value(jax.tree.map(_on_device, value))
    nnx.update(model, state)


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}/")
        else:
            yield path, value


def _shape_problems(path: str, value: Any, expected: tuple[int, ...]) -> list[str]:
    is_array = isinstance(value, CompressedTensor | jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(value.dtype, jnp.floating):
        found = f"an array of {value.dtype}" if is_array else type(value).__name__
        raise TypeError(f"{path} is {found}, expected a floating-point array or a CompressedTensor")
    if value.shape != expected:
        return [f"{path} has shape {value.shape}, the config says {expected}"]
    is_table = isinstance(value, CompressedTensor) and path.endswith("embedding")
    if is_table and value.format != "raw" and value.output_axis != TABLE_AXIS:
        return [f"{path} is compressed with output_axis={value.output_axis}, an embedding table needs {TABLE_AXIS}"]
    return []
