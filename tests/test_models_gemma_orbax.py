"""Gemma from the layouts of its released Orbax checkpoints, and kernels of rank 3 in converted checkpoints."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
import safetensors.numpy
from checkpoint_cases import assert_same_tree
from jaxzip.models import config_from_hf
from jaxzip.models.gemma_orbax import params_from_gemma
from test_models_oracle import HERE, check, load

import jaxzip
from jaxzip.checkpoint import (
    convert,
    format_sizes,
    gemma_names,
    inspect,
    kernel_layout,
    open_checkpoint,
    restore,
    verify,
)
from jaxzip.errors import CheckpointError, CorruptDataError
from jaxzip.modules import CompressedKernel, compress_kernel
from jaxzip.testing import bits

NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn/_query_norm": "self_attn.q_norm",
    "attn/_key_norm": "self_attn.k_norm",
}


def released(family) -> dict[str, np.ndarray]:
    """The weights of a fixture as Gemma's own code has them, by '/'-joined name without "transformer"."""
    hf = safetensors.numpy.load_file(HERE / family / "model.safetensors")
    size = json.loads((HERE / family / "config.json").read_text())["head_dim"]
    found = {"embedder/input_embedding": hf["model.embed_tokens.weight"], "final_norm/scale": hf["model.norm.weight"]}
    for i in range(3):

        def matrix(name):
            return hf[f"model.layers.{i}.{name}.weight"]  # noqa: B023

        def heads(name):  # [N H, D] to [N, D, H]
            w = matrix(f"self_attn.{name}")
            return w.reshape(-1, size, w.shape[1]).swapaxes(1, 2)

        o_proj, layer = matrix("self_attn.o_proj"), f"layer_{i}/"
        found[f"{layer}attn/q_einsum/w"] = heads("q_proj")
        found[f"{layer}attn/kv_einsum/w"] = np.stack([heads("k_proj"), heads("v_proj")])
        found[f"{layer}attn/attn_vec_einsum/w"] = o_proj.T.reshape(-1, size, o_proj.shape[0])
        found[f"{layer}mlp/gating_einsum/w"] = np.stack([matrix("mlp.gate_proj"), matrix("mlp.up_proj")])
        found[f"{layer}mlp/linear/w"] = matrix("mlp.down_proj").T
        for ours, theirs in NORMS.items():
            if f"model.layers.{i}.{theirs}.weight" in hf:
                found[f"{layer}{ours}/scale"] = matrix(theirs)
    return {name: np.ascontiguousarray(w) for name, w in found.items()}


def nested(weights):
    """Every name a key of its own, as training code saves it: MLP weights without "w", gating as [2, D, F]."""
    tree = {}
    for name, w in weights.items():
        if "/mlp/" in name:
            name = name.removesuffix("/w")
            w = np.ascontiguousarray(w.swapaxes(1, 2)) if "gating" in name else w
        node = tree
        for part in name.split("/")[:-1]:
            node = node.setdefault(part, {})
        node[name.split("/")[-1]] = w
    return {"params": tree}


def flat(weights):
    """As released: two keys, the second one "w", "scale" or "input_embedding"."""
    tree = {}
    for name, w in weights.items():
        holder, leaf = name.rsplit("/", 1)
        tree.setdefault(f"transformer/{holder}", {})[leaf] = w
    return tree


def nested_under_transformer(weights):
    tree = {}
    for name, w in weights.items():
        *parents, leaf = f"transformer/{name}".split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = w
    return tree


def saved(tree, path, family=None):
    ocp.PyTreeCheckpointer().save(path, tree)
    if family:
        shutil.copy(HERE / family / "config.json", path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [("gemma2", nested), ("gemma3_text", flat)])
def test_logits_and_tokens_are_those_of_the_hugging_face_model(layout, family, tmp_path):
    tree = layout(released(family))
    source = saved(tree, tmp_path / "source", family)
    convert(source, tmp_path / "out")
    assert verify(source, tmp_path / "out").identical
    model = load(tmp_path / "out", dtype="float32", fuse=layout is nested)
    encoded = model.to_params()["layers"]["0"]["attn"]["o_proj"]["kernel"]
    assert encoded.format != "raw" and encoded.shape == (64, 64)
    check(model, np.load(HERE / family / "expected.npz"))
    restore(tmp_path / "out", tmp_path / "back")
    assert_same_tree(tree, ocp_v1.load(tmp_path / "back"))


@pytest.mark.parametrize("layout", [flat, nested])
def test_encoded_kernels_are_the_models_own(layout, tmp_path):
    """Nothing is encoded again: what ``convert`` stored as matrices is what the model multiplies by."""
    convert(saved(layout(released("gemma2")), tmp_path / "source"), tmp_path / "out")
    tree = open_checkpoint(tmp_path / "out").load_tree(on_host=True)
    layer = params_from_gemma(tree)["layers"]["1"]
    found = {gemma_names.key(name.split("/")): value for name, value in by_name(tree)}
    for part, path in (("attn/q_einsum/w", ("attn", "q_proj")), ("attn/attn_vec_einsum/w", ("attn", "o_proj"))):
        assert layer[path[0]][path[1]]["kernel"] is found[f"layer_1/{part}"].matrix
    assert layer["mlp"]["down_proj"]["kernel"] is found["layer_1/mlp/linear"]
    gating = found["layer_1/mlp/gating_einsum"].matrix
    for i, name in enumerate(("gate_proj", "up_proj")):
        kernel = layer["mlp"][name]["kernel"]
        assert kernel.shape == (64, 96) and kernel.format == gating.format != "raw"
        for field, array in kernel.payload.items():
            assert np.shares_memory(array, gating.payload[field]) and np.array_equal(array, gating.payload[field][i])


def by_name(tree):
    for path, value in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_encoded)[0]:
        yield "/".join(key.key for key in path), value


def is_encoded(leaf):
    return isinstance(leaf, CompressedKernel | jaxzip.CompressedTensor)


def test_kernels_in_other_layouts_are_encoded_again():
    """As stacks of small matrices, which older versions wrote, or along other axes."""
    weights = released("gemma2")
    want = params_from_gemma(flat(weights))
    tree = flat(weights)
    query, gating = (tree[f"transformer/layer_0/{part}"] for part in ("attn/q_einsum", "mlp/gating_einsum"))
    query["w"] = jaxzip.compress(query["w"], format="tca-tbe", on_host=True)
    gating["w"] = compress_kernel(gating["w"], (1,), batch=(0,), format="lane-planar", on_host=True)
    layer = params_from_gemma(tree)["layers"]["0"]
    for block, name in (("attn", "q_proj"), ("mlp", "gate_proj"), ("mlp", "up_proj")):
        found, expected = layer[block][name]["kernel"], want["layers"]["0"][block][name]["kernel"]
        assert found.shape == expected.shape
        found = jaxzip.decompress(jax.tree.map(jax.numpy.asarray, found))
        assert np.array_equal(bits(found), bits(expected))


def test_all_layouts_are_understood():
    weights = released("gemma3_text")
    for layout in (flat, nested, nested_under_transformer):
        paths = [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(layout(weights))[0]]
        assert gemma_names.is_gemma(paths)
        assert {gemma_names.key(path) for path in paths} == {gemma_names.key((name,)) for name in weights}


def shapes(layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, *, qk_norm):
    found = {
        "embedder/input_embedding": (vocab, hidden),
        "layer_0/attn/attn_vec_einsum/w": (heads, head_dim, hidden),
        "layer_0/attn/kv_einsum/w": (2, kv_heads, hidden, head_dim),
        "layer_0/mlp/linear": (intermediate, hidden),
        f"layer_{layers - 1}/mlp/linear": (intermediate, hidden),
    }
    return found | ({"layer_0/attn/_query_norm/scale": (head_dim,)} if qk_norm else {})


@pytest.mark.parametrize(
    ("sizes", "qk_norm", "expected"),
    [
        ((26, 2304, 9216, 8, 4, 256, 256128), False, (256, 4096, 1, None)),
        ((42, 3584, 14336, 16, 8, 256, 256128), False, (256, 4096, 1, None)),
        ((46, 4608, 36864, 32, 16, 128, 256128), False, (144, 4096, 1, None)),
        ((26, 1152, 6912, 4, 1, 256, 262144), True, (256, 512, 5, None)),
        ((34, 2560, 10240, 8, 4, 256, 262144), True, (256, 1024, 5, 8.0)),
        ((62, 5376, 21504, 32, 16, 128, 262144), True, (168, 1024, 5, 8.0)),
    ],
)
def test_released_sizes_need_no_configuration(sizes, qk_norm, expected):
    config = config_from_hf(gemma_names.config(shapes(*sizes, qk_norm=qk_norm)))
    found = (config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads)
    assert (*found, config.head_dim, config.vocab_size) == sizes
    scalar, window, local_layers, factor = expected
    assert config.query_pre_attn_scalar == scalar and config.sliding_window == window and config.tie_word_embeddings
    assert [config.window(i) for i in range(6)] == [
        None if (i + 1) % (local_layers + 1) == 0 else window for i in range(6)
    ]
    assert (config.attn_softcap, config.final_softcap) == ((None, None) if qk_norm else (50.0, 30.0))
    assert (
        config.rope(5) == ((1e6, config.rope_scaling) if qk_norm else (10000.0, None)) and config.rope(0)[0] == 10000.0
    )
    assert (config.rope_scaling.factor if config.rope_scaling else None) == factor


def test_an_unknown_size_says_what_to_do(tmp_path):
    convert(saved(flat(released("gemma2")), tmp_path / "source"), tmp_path / "out")
    assert "config.json" in str(open_checkpoint(tmp_path / "out").metadata["source"]["notes"])
    with pytest.raises(CheckpointError, match="no model configuration"):
        load(tmp_path / "out")


def kernels():
    """Attention of Flax's layers, one of a scanned stack; ``w`` is no layer's that is known."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.standard_normal(shape) / 16).astype(ml_dtypes.bfloat16)

    return {
        "attention": {
            "query": {"kernel": draw(128, 4, 64)},
            "key": {"kernel": draw(128, 2, 64)},
            "out": {"kernel": draw(4, 64, 128)},
        },
        "scanned": {"q_proj": {"kernel": draw(3, 128, 4, 64)}, "o_proj": {"kernel": draw(3, 4, 64, 128)}},
        "stack": {"query": {"kernel": draw(3, 128, 256)}, "out": {"kernel": draw(3, 256, 128)}},
        "attn": {"kv_einsum": {"w": draw(2, 2, 128, 64)}},
        "other": {"w": draw(64, 96, 64)},
    }


def test_kernels_of_rank_3_are_stored_as_matrices(tmp_path):
    tree = kernels()
    convert(saved(tree, tmp_path / "source"), tmp_path / "out")
    checkpoint, expected = open_checkpoint(tmp_path / "out"), {
        "attention/query/kernel": (128, 256), "attention/key/kernel": (128, 128), "attention/out/kernel": (256, 128),
        "scanned/q_proj/kernel": (3, 128, 256), "scanned/o_proj/kernel": (3, 256, 128),
        "attn/kv_einsum/w": (2, 128, 128),
    }  # fmt: skip
    assert checkpoint.metadata["layout_version"] == 2
    for name, entry in checkpoint.tensors.items():
        node = tree
        for part in name.split("/"):
            node = node[part]
        assert tuple(entry["shape"]) == node.shape  # as it was, outside
        value = checkpoint.load(name, verify=True)
        if name in expected:
            assert isinstance(value, CompressedKernel) and value.matrix.shape == expected[name]
            assert value.shape == node.shape and np.array_equal(bits(value.dense()), bits(node))
        else:
            assert isinstance(value, jaxzip.CompressedTensor) and value.shape == node.shape
    ratio = {row["path"]: row["stored_bytes"] / row["original_bytes"] for row in inspect(tmp_path / "out")["tensors"]}
    assert max(ratio[name] for name in expected) < 0.85
    sizes = format_sizes.format_sizes(checkpoint)
    assert sizes["as stored"] < sizes["dense"] and sizes["lane-planar"] <= sizes["dense"]
    for format in ("lane-planar", "raw"):
        again = checkpoint.load("attention/query/kernel", format=format)
        x = jax.random.normal(jax.random.key(0), (3, 128), jax.numpy.bfloat16)
        y = jaxzip.einsum("td,dnh->tnh", x, jax.tree.map(jax.numpy.asarray, again)[...])
        expected_y = np.einsum("td,dnh->tnh", np.asarray(x, np.float32), np.asarray(again.dense(), np.float32))
        np.testing.assert_allclose(np.asarray(y, np.float32), expected_y, rtol=0.01, atol=0.01)
        assert again.matrix.format == format
        assert np.array_equal(bits(again.dense()), bits(tree["attention"]["query"]["kernel"]))
    assert verify(tmp_path / "source", tmp_path / "out").identical
    restore(tmp_path / "out", tmp_path / "back")
    assert_same_tree(tree, ocp_v1.load(tmp_path / "back"))


@pytest.mark.parametrize(
    "axes", [{"shape": [128, 4, 16], "contract": [0]}, {"shape": [96], "contract": [0]}, {"no": [1]}, 7]
)
def test_damaged_axes_are_found(axes, tmp_path):
    convert(saved(kernels(), tmp_path / "source"), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    checkpoint.entry("attention/query/kernel")[kernel_layout.MATRIX_KEY] = axes
    with pytest.raises(CorruptDataError, match="attention/query/kernel.*axes"):
        checkpoint.load("attention/query/kernel")
