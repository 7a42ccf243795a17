"""``fuse_projections``: queries, keys and values as one weight, gate and up as one, without decoding them.

A layer then launches four matrix products instead of seven, and the larger ones run nearer to the memory's speed.
Lane-planar weights are rows of 64x64 blocks and each row of the matrix has its own shift, so weights with whole
row blocks stand one below the other; only block numbers and the places of overflow entries move on:

    q_proj  blocks [Rq, C, W]   overflow (block, entry) ...     qkv_proj  blocks [Rq + Rk + Rv, C, max W]
    k_proj  blocks [Rk, C, W']  overflow ...               ->             overflow of q, k + Rq C, v + (Rq + Rk) C
    v_proj  blocks [Rv, C, W"]  overflow ...

What cannot be put together so (a window for each tensor, rows that do not fill their blocks) is encoded again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxzip
from jaxzip import formats
from jaxzip.errors import JaxzipError
from jaxzip.formats import lane_planar
from jaxzip.ops import host
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

#: Name of the fused weight and of its parts, in the order of its outputs, by block of a layer.
GROUPS = {
    "attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def is_fused(params: Mapping[str, Any]) -> bool:
    """Whether a model's parameters have fused projections."""
    layer = next(iter(params.get("layers", {}).values()), {})
    return any(name in layer.get(block, {}) for block, (name, _) in GROUPS.items())


def fuse_projections(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model with ``attn/qkv_proj`` and ``mlp/gate_up_proj`` in place of their parts.

    Leaves stay where they are, host or device. Weights of one name get overflow lists of one length, in all layers, so
    that these share traces. Biases are put together as their weights are, and so are the experts' gate and up, as
    stacks. Everything else, and a tree that is fused already, is passed on as it is.

    Args:
      params: see :meth:`jaxzip.models.Llama.from_params`. Parts of one weight have one format; others are encoded in
        the first one's.
    """
    layers = {i: _fuse_layer(layer) for i, layer in params["layers"].items()}
    holders: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in layers.values():
        for block in ("attn", "mlp", "experts"):
            for name, holder in (layer["mlp"] if block == "experts" else layer).get(block, {}).items():
                if "kernel" in holder:
                    holders.setdefault((block, name), []).append(holder)
    for alike in holders.values():
        for holder, kernel in zip(alike, same_lengths([holder["kernel"] for holder in alike])):
            holder["kernel"] = kernel
    return {**params, "layers": layers}


def _fuse_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    fused = dict(layer)
    for block, (name, parts) in GROUPS.items():
        fused[block] = _fuse_block(layer.get(block, {}), name, parts)
    if "experts" in fused["mlp"]:
        fused["mlp"]["experts"] = _fuse_block(fused["mlp"]["experts"], *GROUPS["mlp"])
    return fused


def _fuse_block(block: Mapping[str, Any], name: str, parts: Sequence[str]) -> dict[str, Any]:
    projections = {key: dict(value) for key, value in block.items()}
    if parts[0] not in projections:
        return projections
    found = [projections.pop(part) for part in parts]
    kernels = [each["kernel"] for each in found]
    whole = {"kernel": (concatenate_outputs if kernels[0].ndim == 2 else concatenate_stacks)(kernels)}
    if "bias" in found[0]:
        biases = [each["bias"] for each in found]
        whole["bias"] = _like(biases)(biases)
    return {name: whole, **projections}


def concatenate_stacks(weights: Sequence[Any]) -> Any:
    """``jnp.concatenate(weights, axis=2)`` of stacks ``[E, K, M]``, dense or compressed, bit for bit."""
    if not any(isinstance(w, CompressedTensor) for w in weights):
        return _side_by_side(weights, 2)
    if not _stand_below_each_other(weights):
        return _encoded_again(weights)
    experts = range(weights[0].shape[0])
    each = [_lane_planar([jax.tree.map(lambda leaf: leaf[i, ...], w) for w in weights]) for i in experts]  # noqa: B023
    lengths = [_lengths(z) for z in each]
    each = [_with_lengths(z, {name: max(found[name] for found in lengths) for name in lengths[0]}) for z in each]
    stacked = {name: _like([a], "stack")([z.payload[name] for z in each]) for name, a in each[0].payload.items()}
    return dataclasses.replace(each[0], payload=stacked)


def concatenate_outputs(weights: Sequence[Any]) -> Any:
    """``jnp.concatenate(weights, axis=1)`` of kernels ``[K, M]``, dense or compressed, bit for bit.

    Raises:
      ValueError: weights that are not matrices of one number of rows, or tables.
    """
    first = weights[0]
    if any(w.ndim != 2 or w.shape[0] != first.shape[0] for w in weights):
        raise ValueError(f"kernels [K, M] of one K are needed, got {[w.shape for w in weights]}")
    if not any(isinstance(w, CompressedTensor) for w in weights):
        return _side_by_side(weights, 1)
    if any(isinstance(w, CompressedTensor) and w.output_axis != KERNEL_AXIS for w in weights):
        raise ValueError("a compressed table is no kernel; take its .T")
    formats_found = {w.format if isinstance(w, CompressedTensor) else "raw" for w in weights}
    if formats_found == {"raw"}:
        return raw_kernel(_side_by_side(_arrays(weights), 1))
    if _stand_below_each_other(weights):
        return _lane_planar(weights)
    return _encoded_again(weights)


def _stand_below_each_other(weights) -> bool:
    """Whether weights are lane-planar and all but the last fill their row blocks."""
    return all(map(_is_lane_planar, weights)) and all(w.shape[-1] % lane_planar.BLOCK == 0 for w in weights[:-1])


def _arrays(weights) -> list[Any]:
    return [_values(w) if isinstance(w, CompressedTensor) else w for w in weights]


def _values(z: CompressedTensor) -> Any:
    return z.payload["values"].T if z.raw_transposed else z.payload["values"]


def raw_kernel(values: Any) -> CompressedTensor:
    """Dense kernels ``[..., K, M]`` as a tensor in the ``raw`` format, which the fused kernels take."""
    return CompressedTensor({"values": values}, tuple(values.shape[-2:]), np.dtype(values.dtype), "raw", KERNEL_AXIS)


def _side_by_side(weights, axis: int) -> Any:
    """Dense weights, concatenated as bits: where a CPU has no bf16, XLA quiets NaNs of bf16 that it concatenates."""
    dtypes = {jnp.dtype(w.dtype) for w in weights}
    if len(dtypes) > 1 or all(isinstance(w, np.ndarray) for w in weights):
        return _like(weights)(weights, axis=axis)
    (dtype,) = dtypes
    bits = [jax.lax.bitcast_convert_type(jnp.asarray(w), f"uint{8 * dtype.itemsize}") for w in weights]
    return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=axis), dtype)


def _like(arrays, function: str = "concatenate"):
    """NumPy's function on the host, JAX's elsewhere."""
    return getattr(np if all(isinstance(a, np.ndarray) for a in arrays) else jnp, function)


def _encoded_again(weights) -> CompressedTensor:
    """In the format of the first compressed part, where that is smaller."""
    found = (w.format for w in weights if isinstance(w, CompressedTensor) and w.format != "raw")
    dense = np.concatenate([host.dense(w) if isinstance(w, CompressedTensor) else np.asarray(w) for w in weights], -1)
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(list(weights)))
    return jaxzip.compress(dense, format=next(found, "raw"), on_host=on_host)


def _lane_planar(weights: Sequence[CompressedTensor]) -> CompressedTensor:
    concatenate = _like([w.payload["blocks"] for w in weights])
    width = max(w.payload["blocks"].shape[-1] for w in weights)
    blocks, overflow, before, entries = [], [], 0, 0
    for w in weights:
        listed = np.asarray(w.payload["overflow"])
        listed = listed[: 2 * np.count_nonzero(listed[0::2])].copy()  # zeros at the end are padding
        listed[0::2] += np.uint32(before)
        part = _with_width(w.payload["blocks"], width)
        blocks.append(_move_overflow(part, entries) if entries else part)
        overflow.append(listed)
        before += part.shape[0] * part.shape[1]
        entries += listed.size // 2
    if before > np.iinfo(np.uint32).max:
        raise JaxzipError(f"a fused weight of {before} blocks is more than lane-planar can number")
    payload = {
        "shift": concatenate([w.payload["shift"] for w in weights]),
        "blocks": concatenate(blocks),
        "overflow": np.concatenate(overflow),
    }
    shape = (weights[0].shape[0], sum(w.shape[1] for w in weights))
    z = CompressedTensor(payload, shape, weights[0].dtype, "lane-planar", KERNEL_AXIS, weights[0].layout_version)
    return _with_lengths(z, _lengths(z))


def _with_width(blocks, width: int):
    """Blocks of ``width`` words: room for more entries, which are there at the end of a block."""
    extra = width - blocks.shape[-1]
    return blocks if not extra else _library(blocks).pad(blocks, ((0, 0), (0, 0), (0, extra)))


def _move_overflow(blocks, entries: int):
    """Blocks that point ``entries`` further into the list of overflow entries; 0 stays 0: none."""
    word = blocks[..., lane_planar.OVERFLOW_WORD]
    moved = _library(blocks).where(word == 0, word, word + np.uint32(entries))
    if isinstance(blocks, np.ndarray):
        blocks = blocks.copy()
        blocks[..., lane_planar.OVERFLOW_WORD] = moved
        return blocks
    return blocks.at[..., lane_planar.OVERFLOW_WORD].set(moved)


def _library(array):
    return np if isinstance(array, np.ndarray) else jnp


def _lengths(z: CompressedTensor) -> dict[str, int]:
    return formats.get(z.format).bucket_lengths(z.payload, *z.matrix_shape)


def _with_lengths(z: CompressedTensor, lengths: Mapping[str, int]) -> CompressedTensor:
    payload = dict(z.payload)
    for name, length in lengths.items():
        if payload[name].shape[-1] < length:
            padding = [(0, 0)] * (payload[name].ndim - 1) + [(0, length - payload[name].shape[-1])]
            payload[name] = _library(payload[name]).pad(payload[name], padding)
    on_host = isinstance(payload["blocks"], np.ndarray)
    payload = {name: a if on_host else jnp.asarray(a) for name, a in payload.items()}
    return CompressedTensor(payload, z.core_shape, z.dtype, z.format, z.output_axis, z.layout_version)


def same_lengths(weights: Sequence[Any]) -> list[Any]:
    """The weights; lane-planar ones get overflow lists of one length, and keep their blocks' width, one of five."""
    lengths = [_lengths(w)["overflow"] for w in weights if _is_lane_planar(w)]
    common = {"overflow": max(lengths, default=0)}
    return [_with_lengths(w, common) if _is_lane_planar(w) else w for w in weights]


def _is_lane_planar(w) -> bool:
    return isinstance(w, CompressedTensor) and w.format == "lane-planar"
