"""The variables of an NNX model by '/'-joined path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx


def own_variables(model: nnx.Module, filter: Any) -> Iterator[tuple[str, nnx.Variable]]:
    """``(path, variable)`` of each variable that NNX's ``filter`` takes: the model's own objects, shared ones once."""
    for path, _ in nnx.to_flat_state(nnx.state(model, filter)):
        variable = model  # found by its path: the variables of a state may be copies
        for key in path:
            # A dict's own methods are no variables: "items" and "values" are keys there.
            named = isinstance(key, str) and not isinstance(variable, dict) and hasattr(variable, key)
            variable = getattr(variable, key) if named else variable[key]
        yield "/".join(map(str, path)), variable
