"""Small checkpoints of every kind that the converter reads, and helpers to damage and compare them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

from jaxzip import checkpoint
from jaxzip.checkpoint import layout
from jaxzip.errors import JaxzipError
from jaxzip.testing import all_bit_patterns, gaussian_weights

BF16 = np.dtype(ml_dtypes.bfloat16)


def nested_tree() -> dict[str, Any]:
    """bf16, fp16, fp32, int and bool arrays, a stack, a scalar, strings, ``None``, sequences and empty dicts."""
    return {
        "layers": {
            str(i): {
                "mlp": {"kernel": jnp.asarray(gaussian_weights((128, 192), seed=i)), "bias": np.ones(192, np.float32)},
                "norm": {"scale": jnp.ones(128, jnp.bfloat16)},
            }
            for i in range(3)
        },
        "embedder": {"embedding": jnp.asarray(gaussian_weights((256, 64), seed=7))},
        "stack": jnp.asarray(gaussian_weights((2, 64, 128), seed=9)),
        "patterns": jnp.asarray(all_bit_patterns()),
        "half": np.linspace(-1, 1, 8192, dtype=np.float16).reshape(64, 128),
        "noise": np.random.default_rng(0).integers(0, 1 << 16, (64, 64), dtype=np.uint16).view(BF16),
        "list": [jnp.arange(5), (np.asarray([True, False]), None)],
        "step": 7,
        "rate": 0.5,
        "empty": {},
    }


def flat_tree() -> dict[str, Any]:
    """A tree whose keys have slashes and dots, as flattened parameter dicts do."""
    return {
        "model/layer.0/kernel": jnp.asarray(gaussian_weights((64, 128))),
        "model/layer.0/bias": np.zeros(128, np.int32),
    }


def save_standard(path: Path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_pytree(path: Path, tree) -> None:
    ocp.PyTreeCheckpointer().save(path, tree)


def save_files(path: Path, tree) -> None:
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, tree)


def save_zarr3(path: Path, tree) -> None:
    ocp.PyTreeCheckpointer(use_zarr3=True).save(path, tree)


def save_v1(path: Path, tree) -> None:
    ocp_v1.save(path, tree, custom_metadata={"author": "test"})


def save_composite(path: Path, tree) -> None:
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            path, args=ocp.args.Composite(params=ocp.args.StandardSave(tree), notes=ocp.args.JsonSave({"a": 1}))
        )


def save_manager(path: Path, tree) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"old": np.zeros(3)}))
        manager.wait_until_finished()
        manager.save(12, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


ORBAX_WRITERS = (save_standard, save_pytree, save_files, save_zarr3, save_v1, save_composite, save_manager)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}


def llama_tensors(*, tied: bool = False) -> dict[str, np.ndarray]:
    """A tiny Llama under Hugging Face's names and in PyTorch's layout."""
    h, f, kv, v = 64, 96, 32, 160
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (h, h),
            layer + "self_attn.k_proj.weight": (kv, h),
            layer + "self_attn.v_proj.weight": (kv, h),
            layer + "self_attn.o_proj.weight": (h, h),
            layer + "mlp.gate_proj.weight": (f, h),
            layer + "mlp.up_proj.weight": (f, h),
            layer + "mlp.down_proj.weight": (h, f),
            layer + "input_layernorm.weight": (h,),
            layer + "post_attention_layernorm.weight": (h,),
        }
    if not tied:
        shapes["lm_head.weight"] = (v, h)
    return {name: gaussian_weights(shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file by hand, so that the test does not depend on the reader's own library."""
    names = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "int64": "I64"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": names[str(array.dtype)], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def write_llama(path: Path, *, tied: bool = False) -> dict[str, np.ndarray]:
    """A Hugging Face directory in two shards; returns its tensors."""
    tensors = llama_tensors(tied=tied)
    path.mkdir()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, members in shards.items():
        write_safetensors(path / file, {name: tensors[name] for name in members})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return tensors


def tree_digest(path: Path) -> str:
    """Names, contents, sizes and times of everything below ``path``."""
    state = hashlib.sha256()
    for file in sorted([path, *path.rglob("*")]):
        state.update(f"{file}\0{file.stat().st_mtime_ns}\0".encode())
        if file.is_file():
            state.update(file.read_bytes())
    return state.hexdigest()


def content_digest(path: Path) -> str:
    """Names and contents below ``path``, but for Orbax's time stamps."""
    state = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        content = file.read_bytes()
        if file.name == "_CHECKPOINT_METADATA":
            content = json.dumps(json.loads(content)["custom_metadata"], sort_keys=True).encode()
        state.update(f"{file.relative_to(path)}\0".encode() + content)
    return state.hexdigest()


def flip_bit(file: Path, position: int = -9) -> None:
    """Flips one bit of one byte."""
    data = bytearray(file.read_bytes())
    data[max(position, -len(data))] ^= 4
    file.write_bytes(bytes(data))


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same_tree(left, right, path: str = "") -> None:
    """Same structure (tuples may come back as lists), same dtypes, same bits."""
    if isinstance(left, dict):
        assert isinstance(right, dict) and set(left) == set(right), path
        for key in left:
            assert_same_tree(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert isinstance(right, list | tuple) and len(left) == len(right), path
        for i, pair in enumerate(zip(left, right)):
            assert_same_tree(*pair, f"{path}/{i}")
    elif hasattr(left, "dtype"):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        np.testing.assert_array_equal(bits(left), bits(right), err_msg=path)
    else:
        assert left == right and type(left) is type(right), path


def write_two_tensors(file: Path) -> Path:
    """A safetensors file of a matrix and a vector."""
    write_safetensors(file, {"a.weight": gaussian_weights((64, 64)), "b": np.ones(3, np.float32)})
    return file


def truncate(file: Path) -> None:
    """Cuts a file in half."""
    os.truncate(file, file.stat().st_size // 2)


def fail_to_convert(src: Path, error: type, match: str) -> None:
    """Converting ``src`` raises a typed error and leaves nothing."""
    target = src.parent / "new"
    with pytest.raises(error, match=match) as caught:
        checkpoint.convert(src, target)
    assert isinstance(caught.value, JaxzipError)
    assert not target.exists() and not (src.parent / f"new{layout.PARTIAL_SUFFIX}").exists()
