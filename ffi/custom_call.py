"""Custom calls in traced programs: batch dimensions, axes of `jax.shard_map`, workspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.ffi.libraries import register

from jaxzip.ops.manual_axes import varying, varying_alike, varying_over

Payload = Mapping[str, jax.Array]


def call(name: str, shape: tuple[int, ...], dtype: jnp.dtype, *operands: jax.Array, **attributes) -> jax.Array:
    """The custom call `name` with one result."""
    return call_with_workspace(name, [jax.ShapeDtypeStruct(shape, dtype)], *operands, **attributes)


def call_with_workspace(
    name: str, results: Sequence[jax.ShapeDtypeStruct], *operands: jax.Array, **attributes
) -> jax.Array:
    """The first result of the custom call `name`; XLA allocates the others, which are scratch."""
    return call_with_results(name, results, *operands, **attributes)[0]


def call_with_results(
    name: str,
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: jax.Array,
    vmap_method: str = "expand_dims",
    in_place: Mapping[int, int] | None = None,
    **attributes,
) -> list[jax.Array]:
    """All results of the custom call `name`; handlers that take no batch dimensions need another `vmap_method`.

    `in_place`: operands that the call updates, and which results they become.
    """
    register()
    operands = varying_alike(operands)
    call = jax.ffi.ffi_call(name, list(results), vmap_method=vmap_method, input_output_aliases=dict(in_place or {}))
    # ffi_call takes results to be the same on every device, whatever its operands are.
    return varying_over(varying(operands), list(call(*operands, **attributes)))


def sizes(m: int, k: int) -> dict[str, np.int64]:
    return {"m": np.int64(m), "k": np.int64(k)}
