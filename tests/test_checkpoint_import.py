"""Importers: Hugging Face safetensors and GGUF into the model's tree, and safetensors out again byte for byte."""

import filecmp
import json

import checkpoint_cases as cases
import gguf
import numpy as np
import pytest

import jaxzip
from jaxzip import checkpoint
from jaxzip.checkpoint import gguf_source
from jaxzip.errors import CheckpointError
from jaxzip.tensor import CompressedTensor

HEADS, KV_HEADS = 4, 2


def dense(tree, *path):
    for key in path:
        tree = tree[key]
    return np.asarray(jaxzip.decompress(tree) if isinstance(tree, CompressedTensor) else tree)


def assert_is_llama(tree, tensors, *, tied):
    """``tree`` is the model's tree, its kernels the transposes of PyTorch's."""
    attention, mlp = tree["layers"]["1"]["attn"], tree["layers"]["1"]["mlp"]
    prefix = "model.layers.1."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        np.testing.assert_array_equal(
            cases.bits(dense(attention, name, "kernel")), cases.bits(tensors[f"{prefix}self_attn.{name}.weight"]).T
        )
    for name in ("gate_proj", "up_proj", "down_proj"):
        np.testing.assert_array_equal(
            cases.bits(dense(mlp, name, "kernel")), cases.bits(tensors[f"{prefix}mlp.{name}.weight"]).T
        )
    for ours, theirs in (("input_norm", "input_layernorm"), ("post_attn_norm", "post_attention_layernorm")):
        np.testing.assert_array_equal(
            cases.bits(dense(tree["layers"]["1"], ours, "scale")), cases.bits(tensors[f"{prefix}{theirs}.weight"])
        )
    np.testing.assert_array_equal(
        cases.bits(dense(tree, "embedder", "embedding")), cases.bits(tensors["model.embed_tokens.weight"])
    )
    np.testing.assert_array_equal(
        cases.bits(dense(tree, "final_norm", "scale")), cases.bits(tensors["model.norm.weight"])
    )
    assert ("lm_head" in tree) != tied
    assert set(tree) <= {"embedder", "layers", "final_norm", "lm_head"}


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_llama(tmp_path, tied):
    src, dst, back = tmp_path / "hf", tmp_path / "dst", tmp_path / "back"
    tensors = cases.write_llama(src, tied=tied)
    before = cases.tree_digest(src)
    rules = [jaxzip.CompressionRule(r".*embedding", output_axis=-2, min_size=1), jaxzip.CompressionRule(min_size=1)]
    checkpoint.convert(src, dst, rules=rules)
    assert checkpoint.verify(src, dst) and checkpoint.verify_checksums(dst)
    opened = checkpoint.open_checkpoint(dst)
    assert_is_llama(opened.load_tree(on_host=True), tensors, tied=tied)
    assert opened.hf_config == cases.CONFIG | {"tie_word_embeddings": tied}
    assert opened.extra_file("tokenizer.json") == (src / "tokenizer.json").read_bytes()
    assert opened.extra_file("merges.txt") is None
    checkpoint.restore(dst, back, format="safetensors")
    names = sorted(f.name for f in src.iterdir())
    assert sorted(f.name for f in back.iterdir()) == names
    assert filecmp.cmpfiles(src, back, names, shallow=False)[0] == names
    assert cases.tree_digest(src) == before
    checkpoint.restore(dst, tmp_path / "tree")
    assert_is_llama(checkpoint_tree(tmp_path / "tree"), tensors, tied=tied)
    checkpoint.convert(tmp_path / "tree", tmp_path / "again")
    again = checkpoint.open_checkpoint(tmp_path / "again")
    assert again.hf_config == opened.hf_config and again.extra_file("tokenizer.json") == opened.extra_file(
        "tokenizer.json"
    )


def checkpoint_tree(path):
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(path)


def test_unknown_architecture_keeps_names_and_rows(tmp_path):
    tensors = {
        "encoder.layer.0.dense.weight": cases.gaussian_weights((128, 64)),
        "encoder.layer.0.dense.bias": np.ones(128, np.float32),
        "position_ids": np.arange(7, dtype=np.int64)[None],
    }
    cases.write_safetensors(tmp_path / "model.safetensors", tensors)
    checkpoint.convert(tmp_path / "model.safetensors", tmp_path / "dst")
    opened = checkpoint.open_checkpoint(tmp_path / "dst")
    z = opened.load("encoder/layer/0/dense/weight")
    assert z.output_axis == -2 and z.shape == (128, 64) and z.format == "tca-tbe"
    np.testing.assert_array_equal(cases.bits(jaxzip.decompress(z)), cases.bits(tensors["encoder.layer.0.dense.weight"]))
    assert opened.hf_config is None and "own names" in opened.metadata["source"]["notes"][0]
    assert opened.load("position_ids").dtype == np.int64
    checkpoint.restore(tmp_path / "dst", tmp_path / "back", format="safetensors")
    assert filecmp.cmp(tmp_path / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_tensor_whose_name_goes_on_after_anothers(tmp_path, kind, backwards):
    tensors = {"a.weight": cases.gaussian_weights((128, 64)).astype(np.float32), "a.weight.absmax": np.ones(3, "f4"),
               "a.weight.absmax.scale": np.zeros(2, "f4"), "a.bias": np.ones(2, "f4")}  # fmt: skip
    src = tmp_path / f"m.{kind}"
    in_order = dict(reversed(tensors.items())) if backwards else tensors
    if kind == "safetensors":
        cases.write_safetensors(src, in_order)
    else:
        writer = gguf.GGUFWriter(src, "foo")
        for name, array in in_order.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    checkpoint.convert(src, tmp_path / "dst")
    assert checkpoint.verify(src, tmp_path / "dst")
    tree = checkpoint.open_checkpoint(tmp_path / "dst").load_tree()
    assert set(tree) == {"a", "a.weight.absmax", "a.weight.absmax.scale"} and set(tree["a"]) == {"weight", "bias"}
    checkpoint.restore(tmp_path / "dst", tmp_path / "tree")
    back = checkpoint_tree(tmp_path / "tree")
    np.testing.assert_array_equal(back["a"]["weight"], tensors["a.weight"])
    np.testing.assert_array_equal(back["a.weight.absmax"], tensors["a.weight.absmax"])


def test_a_tensor_of_no_model_below_one_of_the_model(tmp_path):
    tensors = cases.write_llama(tmp_path / "hf")
    with_more = {"layers": np.ones(2, np.float32), "embedder.embedding.absmax": np.ones(2, np.float32)}
    cases.write_safetensors(tmp_path / "hf" / "model-00002-of-00002.safetensors", tensors | with_more)
    (tmp_path / "hf" / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="'layers/.*' is below 'layers', which is a tensor"):
        checkpoint.convert(tmp_path / "hf", tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]
    paths = {info.path for info in checkpoint.open_source(tmp_path / "hf").tensors()}
    assert ("embedder", "embedding") in paths and ("embedder.embedding.absmax",) in paths


def test_tensors_without_elements_are_carried_over(tmp_path):
    tensors = {"w": cases.gaussian_weights((128, 128)), "none": np.zeros((0, 5), cases.BF16)}
    cases.write_safetensors(tmp_path / "w.safetensors", tensors)
    rules = [jaxzip.CompressionRule(format="tca-tbe", min_size=0)]
    report = checkpoint.convert(tmp_path / "w.safetensors", tmp_path / "dst", rules=rules)
    assert {row.path: (row.format, row.note) for row in report.tensors}["none"] == ("raw", "no elements")
    assert checkpoint.verify(tmp_path / "w.safetensors", tmp_path / "dst")
    checkpoint.restore(tmp_path / "dst", tmp_path / "back", format="safetensors")
    assert filecmp.cmp(tmp_path / "w.safetensors", tmp_path / "back" / "w.safetensors", shallow=False)


def test_rounded_weights_do_not_pass_for_the_original_files(tmp_path):
    cases.write_safetensors(tmp_path / "w.safetensors", {"w": np.ones((64, 128), np.float32)})
    checkpoint.convert(tmp_path / "w.safetensors", tmp_path / "dst", cast="bfloat16")
    with pytest.raises(CheckpointError, match="rounded weights"):
        checkpoint.restore(tmp_path / "dst", tmp_path / "back", format="safetensors")


def permute(array, heads):
    """What llama.cpp does to q and k when it writes GGUF."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, tensors, *, quantised, kv_heads=KV_HEADS, add=lambda writer: None):
    """A GGUF file of a Hugging Face Llama, matrices in Q8_0 or bf16; ``add`` puts more into it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(160)
    add(writer)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in tensors.items():
        stem = name.removesuffix(".weight")
        if stem in top:
            target = top[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{parts[part]}"
        if target.endswith(("attn_q", "attn_k")):
            array = permute(array, HEADS if target.endswith("q") else KV_HEADS)
        if array.ndim == 1:
            writer.add_tensor(f"{target}.weight", array.astype(np.float32))
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(f"{target}.weight", gguf.quants.quantize(array.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_of_bf16_weights_is_the_hugging_face_model(tmp_path, tied):
    tensors = cases.llama_tensors(tied=tied)
    write_gguf(tmp_path / "m.gguf", tensors, quantised=False)
    checkpoint.convert(tmp_path / "m.gguf", tmp_path / "dst")
    assert checkpoint.verify(tmp_path / "m.gguf", tmp_path / "dst") and checkpoint.verify_checksums(tmp_path / "dst")
    opened = checkpoint.open_checkpoint(tmp_path / "dst")
    assert_is_llama(opened.load_tree(on_host=True), tensors, tied=tied)
    assert opened.entry("final_norm/scale")["derived"] == "F32 vectors rounded to bf16"
    assert "derived" not in opened.entry("embedder/embedding")
    config = opened.hf_config
    assert (
        config["tie_word_embeddings"] is tied and config["rms_norm_eps"] == 1e-5 and config["num_key_value_heads"] == 2
    )
    assert config["head_dim"] == 16 and config["vocab_size"] == 160 and config["num_hidden_layers"] == 2


def test_gguf_of_quantised_weights_is_decoded_and_says_so(tmp_path):
    tensors = cases.llama_tensors()
    write_gguf(tmp_path / "m.gguf", tensors, quantised=True)
    checkpoint.convert(tmp_path / "m.gguf", tmp_path / "dst")
    assert checkpoint.verify(tmp_path / "m.gguf", tmp_path / "dst")
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(array.astype(np.float32), kind), kind).astype(cases.BF16)
        if array.ndim == 2
        else array
        for name, array in tensors.items()
    }
    opened = checkpoint.open_checkpoint(tmp_path / "dst")
    assert_is_llama(opened.load_tree(on_host=True), rounded, tied=False)
    assert opened.entry("layers/0/attn/q_proj/kernel")["derived"] == "dequantised from Q8_0, rounded to bf16"
    assert "dequantised from Q8_0, rounded to bf16" in opened.metadata["source"]["notes"]


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_rule_for_everything_leaves_an_embedding_a_table(tmp_path, kind):
    tensors = cases.llama_tensors()
    if kind == "hf":
        cases.write_llama(tmp_path / "hf")
    else:
        write_gguf(tmp_path / "gguf", tensors, quantised=False)
    checkpoint.convert(tmp_path / kind, tmp_path / "dst", rules=[jaxzip.CompressionRule(format="lane-planar")])
    opened = checkpoint.open_checkpoint(tmp_path / "dst")
    z = opened.load("embedder/embedding")
    assert (z.format, z.output_axis) == ("lane-planar", -2) and opened.load("lm_head/kernel").output_axis == -1
    np.testing.assert_array_equal(cases.bits(jaxzip.decompress(z)), cases.bits(tensors["model.embed_tokens.weight"]))


def test_gguf_with_a_number_for_each_layer(tmp_path):
    tensors = cases.llama_tensors()
    write_gguf(tmp_path / "same.gguf", tensors, quantised=False, kv_heads=[KV_HEADS, KV_HEADS])
    checkpoint.convert(tmp_path / "same.gguf", tmp_path / "dst")
    assert checkpoint.open_checkpoint(tmp_path / "dst").hf_config["num_key_value_heads"] == KV_HEADS
    write_gguf(tmp_path / "other.gguf", tensors, quantised=False, kv_heads=[KV_HEADS, 1])
    with pytest.raises(CheckpointError, match=r"head_count_kv \[2, 1\], expected a positive integer"):
        checkpoint.convert(tmp_path / "other.gguf", tmp_path / "new")


def test_gguf_with_experts_is_no_llama(tmp_path):
    write_gguf(
        tmp_path / "m.gguf", cases.llama_tensors(), quantised=False, add=lambda writer: writer.add_expert_count(8)
    )
    checkpoint.convert(tmp_path / "m.gguf", tmp_path / "dst")
    opened = checkpoint.open_checkpoint(tmp_path / "dst")
    assert opened.hf_config is None and "blk/0/attn_q/weight" in opened.tensors


def test_gguf_takes_the_tokenizer_beside_it_where_its_own_cannot_be_expressed(tmp_path):
    def sentencepiece(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<s>", "a"])

    write_gguf(tmp_path / "m.gguf", cases.llama_tensors(), quantised=False, add=sentencepiece)
    checkpoint.convert(tmp_path / "m.gguf", tmp_path / "without")
    (note,) = (n for n in checkpoint.inspect(tmp_path / "without")["notes"] if "tokenizer" in n)
    assert "'llama'" in note and note.endswith("put the model's beside the file and convert it again")
    (tmp_path / "tokenizer.json").write_text("{}")
    checkpoint.convert(tmp_path / "m.gguf", tmp_path / "with")
    assert checkpoint.open_checkpoint(tmp_path / "with").extra_file("tokenizer.json") == b"{}"


def test_gguf_truncated(tmp_path):
    write_gguf(tmp_path / "m.gguf", cases.llama_tensors(), quantised=True)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: len(data) - 4000])
    with pytest.raises(jaxzip.CorruptDataError, match="m.gguf"):
        checkpoint.convert(tmp_path / "m.gguf", tmp_path / "dst")
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]


def test_unpermute_undoes_permute():
    w = np.arange(64 * 3).reshape(64, 3)
    np.testing.assert_array_equal(gguf_source.unpermute_rows(permute(w, 4), 4), w)


def test_directories_with_names_of_files_are_passed_by(tmp_path):
    cases.write_llama(tmp_path / "hf")
    (tmp_path / "hf" / "other.safetensors").mkdir()
    checkpoint.convert(tmp_path / "hf", tmp_path / "dst")
    assert checkpoint.verify(tmp_path / "hf", tmp_path / "dst")
    (tmp_path / "only" / "a.gguf").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="only: unknown format"):
        checkpoint.convert(tmp_path / "only", tmp_path / "new")


def test_index_that_names_files_elsewhere(tmp_path):
    cases.write_llama(tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(jaxzip.CorruptDataError, match="outside the directory"):
        checkpoint.convert(tmp_path / "hf", tmp_path / "dst")
