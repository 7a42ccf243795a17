"""The custom call of a layer's decode step, attention and the chain behind it, and what it takes; on CUDA only."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.ffi.custom_call import call_with_results
from jaxzip.ffi.decode_chain import chain_call, check_chain

from jaxzip.ops import registry
from jaxzip.ops.decode_chain import ChainWeights
from jaxzip.ops.decode_layer import OP, AttentionArrays

#: What attention's kernel takes: how many heads may share a KV head, by the features of a head; rows.
MOST_HEADS, MAX_ROWS = {64: 16, 128: 16, 256: 8}, 65535
#: Its own results, before those of the chain.
RESULTS = ("attended", "keys", "values")


def register_decode_layer(check_device, rows: int, priority: int) -> None:
    """Registers the layer; arguments as of ``register_decode_chain``."""
    check = functools.partial(_check, check_device=check_device, rows=rows)
    registry.register(OP, "ffi", _layer, check=check, platforms=("cuda",), priority=priority)


def layer_results(
    attention: AttentionArrays,
    residual: jax.Array,
    weights: ChainWeights,
    *,
    divisor: float,
    window: int | None = None,
    cap: float | None = None,
    head_norm_eps: float = 0.0,
    head_norm_offset: float = 0.0,
    **options: Any,
) -> dict[str, jax.Array]:
    """All that the kernels write, by name: :data:`RESULTS`, then as from ``chain_results``.

    Arguments are those of :func:`jaxzip.ops.decode_layer.decode_layer`. The cache is updated in place where it is not
    used any more, and copied otherwise.

    Raises:
      jax.errors.JaxRuntimeError: at run time, when shapes do not fit each other.
    """
    a, chain = attention, chain_call(residual, weights, **options)
    n, head_dim = a.keys.shape[0], a.keys.shape[3]
    results = [jax.ShapeDtypeStruct((n, a.heads * head_dim), a.qkv.dtype)]
    results += [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (a.keys, a.values)]
    scales = [jnp.zeros(0, jnp.bfloat16) if scale is None else scale for scale in (a.q_scale, a.k_scale)]
    found = call_with_results(
        "jaxzip_decode_layer",
        [*results, *chain.results],
        *a[:7],
        *scales,
        *chain.operands,
        vmap_method="sequential",
        in_place={3: 1, 4: 2},
        divisor=np.float32(divisor),
        cap=np.float32(cap or 0),
        window=np.int64(window or 0),
        head_norm_eps=np.float32(head_norm_eps),
        head_norm_offset=np.float32(head_norm_offset),
        **chain.attributes,
    )
    return dict(zip(RESULTS + chain.names, found, strict=True))


def _layer(attention, residual, weights, **options):
    found = layer_results(attention, residual, weights, **options)
    return found["x2"], found["y"], found["keys"], found["values"]


def _check(
    attention, residual, weights, *, check_device, rows, divisor, window=None, cap=None, head_norm_eps=0.0,
    head_norm_offset=0.0, **options,
) -> None:  # fmt: skip
    a = attention
    n, kv_heads, _, head_dim = a.keys.shape
    if a.heads % kv_heads or not 1 <= a.heads // kv_heads <= MOST_HEADS.get(head_dim, 0):
        most = ", ".join(f"{count} of {features} features" for features, count in MOST_HEADS.items())
        raise NotImplementedError(
            f"attention takes up to {most} for each KV head, not {a.heads} of {head_dim} for {kv_heads}"
        )
    if n > MAX_ROWS:
        raise NotImplementedError(f"attention takes up to {MAX_ROWS} rows, not {n}")
    expected = AttentionArrays(
        "bfloat16", "float32", "float32", "bfloat16", "bfloat16", "int32", "int32", *["bfloat16"] * 2
    )
    for name, dtype in expected._asdict().items():
        value = getattr(a, name)
        if value is not None and value.dtype != dtype:
            raise NotImplementedError(f"attention takes {name} in {dtype}, not {value.dtype}")
    if window is not None and window < 1 or cap is not None and cap <= 0:
        raise NotImplementedError(f"a window has 1 slot or more and a cap is positive, they are {window} and {cap}")
    attended = jax.ShapeDtypeStruct((n, a.heads * head_dim), jnp.bfloat16)
    check_chain(attended, residual, weights, check_device=check_device, rows=rows, **options)
