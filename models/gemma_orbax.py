"""Parameters of a Gemma as its released Orbax checkpoints have them, in the tree of ``jaxzip.models``.

A kernel that ``jaxzip convert`` stored as a matrix is the model's own: it is passed on as it is encoded.

    layer_3/attn/q_einsum/w        [N, D, H]       layers/3/attn/q_proj/kernel        [D, N H]
    layer_3/attn/kv_einsum/w       [2, K, D, H]    k_proj and v_proj
    layer_3/attn/attn_vec_einsum/w [N, H, D]       o_proj
    layer_3/mlp/gating_einsum      [2, F, D]       mlp/gate_proj and up_proj          [D, F]
    layer_3/mlp/linear             [F, D]          mlp/down_proj
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

import jaxzip
from jaxzip.checkpoint import gemma_names
from jaxzip.modules.kernel import CompressedKernel, KernelAxes
from jaxzip.ops import host

_NORMS = {
    "pre_attention_norm/scale": ("input_norm",),
    "post_attention_norm/scale": ("post_attn_norm",),
    "pre_ffw_norm/scale": ("pre_mlp_norm",),
    "post_ffw_norm/scale": ("post_mlp_norm",),
    "attn/_query_norm/scale": ("attn", "q_norm"),
    "attn/_key_norm/scale": ("attn", "k_norm"),
}
#: The kernels that an einsum weight holds, and its axes: those that are summed over, and that of a stack.
_EINSUMS = {
    "attn/q_einsum/w": ((("attn", "q_proj"),), (1,), ()),
    "attn/kv_einsum/w": ((("attn", "k_proj"), ("attn", "v_proj")), (2,), (0,)),
    "attn/qkv_einsum/w": ((("attn", "q_proj"), ("attn", "k_proj"), ("attn", "v_proj")), (2,), (0,)),
    "attn/attn_vec_einsum/w": ((("attn", "o_proj"),), (0, 1), ()),
    "mlp/gating_einsum": ((("mlp", "gate_proj"), ("mlp", "up_proj")), (2,), (0,)),
}


def is_gemma_tree(tree: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's tree has Gemma's own names."""
    return gemma_names.is_gemma(path for path, _ in _leaves(tree))


def params_from_gemma(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of ``jaxzip.models`` of a Gemma's parameters; what is no language model's is left out."""
    found = {gemma_names.key(path): value for path, value in _leaves(tree)}
    params: dict[str, Any] = {
        "embedder": {"embedding": found[gemma_names.EMBEDDING]},
        "final_norm": {"scale": found["final_norm/scale"]},
        "layers": {str(i): {} for i in range(gemma_names.layers(found))},
    }
    for name, value in found.items():
        match = re.fullmatch(r"layer_(\d+)/(.+)", name)
        if match is None:
            continue
        layer, part = params["layers"][match[1]], match[2]
        if part in _NORMS:
            _put(layer, (*_NORMS[part], "scale"), value)
        elif part == "mlp/linear":
            _put(layer, ("mlp", "down_proj", "kernel"), value)
        elif part in _EINSUMS:
            paths, contract, batch = _EINSUMS[part]
            linear = found[f"layer_{match[1]}/mlp/linear"]
            if part == "mlp/gating_einsum" and tuple(value.shape[-2:]) != tuple(linear.shape):
                contract = (1,)  # [2, D, F], as older models have it
            matrix = _matrix(value, KernelAxes(tuple(value.shape), contract, batch))
            for i, path in enumerate(paths):
                kernel = jax.tree.map(lambda leaf: leaf[i, ...], matrix) if batch else matrix  # noqa: B023
                _put(layer, (*path, "kernel"), kernel)
        else:
            _put(layer, tuple(part.split("/")), value)
    return params


def _matrix(value: Any, axes: KernelAxes) -> Any:
    """``value`` as the matrix, or the stack, that ``axes`` describe; encoded again if it was stored as another one."""
    if not isinstance(value, jaxzip.CompressedTensor | CompressedKernel):
        return axes.to_matrix(value)
    if isinstance(value, CompressedKernel):
        if value.axes == axes:
            return value.matrix
        array = value.axes.from_matrix(host.dense(jax.tree.map(np.asarray, value.matrix)))
        encoded = value.matrix
    else:
        array, encoded = host.dense(jax.tree.map(np.asarray, value)), value
    on_host = all(isinstance(leaf, np.ndarray) for leaf in encoded.payload.values())
    return jaxzip.compress(np.ascontiguousarray(axes.to_matrix(array)), format=encoded.format, on_host=on_host)


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, str(name)))
        else:
            yield (*prefix, str(name)), value


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
