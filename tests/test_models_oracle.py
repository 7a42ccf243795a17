"""All families against Hugging Face transformers: logits and greedy tokens of small random models.

Its numbers are in tests/data/oracle, so that torch is not needed; where it is installed, new models are made.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from jaxzip.models import UnsupportedConfigError, config_from_hf, fuse_projections, generate, load_model
from jaxzip.models.loading import read_model
from typer.testing import CliRunner

import jaxzip
from jaxzip.checkpoint import convert, open_checkpoint, restore, verify
from jaxzip.cli import app
from jaxzip.errors import CorruptDataError
from jaxzip.tensor import CompressedTensor
from jaxzip.testing import bits

HERE = pathlib.Path(__file__).parent / "data" / "oracle"
make = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("oracle_make", HERE / "make.py"))
spec.loader.exec_module(make)
TOLERANCE = 1e-4


@functools.cache
def _converted_to(family: str, directory: pathlib.Path) -> pathlib.Path:
    convert(HERE / family, directory / family)
    return directory / family


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The compressed checkpoint of a family."""
    directory = tmp_path_factory.mktemp("oracle")
    return lambda family: _converted_to(family, directory)


def load(path, **options):
    return read_model(open_checkpoint(path), path, **options)


def check(model, expected):
    found = jax.jit(lambda model, tokens: model(tokens))(model, jnp.array([make.PROMPTS[0]]))[0]
    assert np.abs(np.asarray(found) - expected["logits"]).max() < TOLERANCE
    tokens = generate(model, make.PROMPTS, max_new_tokens=make.NEW_TOKENS, eos=()).tokens
    for i, row in enumerate(tokens):
        assert row.tolist() == expected[f"tokens_{i}"].tolist()


@pytest.mark.parametrize("family", make.FAMILIES)
def test_logits_and_tokens_are_those_of_transformers(family, converted):
    expected = np.load(HERE / family / "expected.npz")
    check(load(converted(family), dtype="float32"), expected)


def test_half_precision_is_near(converted):
    """Weights and activations in fp16, as the configuration says."""
    model = load(converted("llama"))
    assert model.config.dtype == "float16"
    found = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.array([make.PROMPTS[0]]))[0])
    expected = np.load(HERE / "llama" / "expected.npz")["logits"]
    assert 0 < np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_every_family_has_its_numbers():
    from jaxzip.models import FAMILIES

    assert set(FAMILIES) == {*make.FAMILIES, "gemma3"}  # which is gemma3_text with an image encoder beside it
    for family in make.FAMILIES:
        expected = np.load(HERE / family / "expected.npz")
        assert expected["margin"] >= make.LEAST_MARGIN and len(expected["tokens_0"]) == make.NEW_TOKENS == 64


@pytest.mark.parametrize("family", make.FAMILIES)
def test_the_checkpoint_holds_every_bit_and_gives_the_files_back(family, converted, tmp_path):
    path = converted(family)
    entries = open_checkpoint(path).tensors
    assert {"embedder/embedding", "layers/1/attn/q_proj/kernel", "final_norm/scale"} <= set(entries)
    assert any(entry["format"] != "raw" for entry in entries.values())
    assert verify(HERE / family, path).identical
    restore(path, tmp_path / "back", format="safetensors")
    files = sorted(file.name for file in (HERE / family).iterdir() if file.name != "expected.npz")
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == files
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (HERE / family / name).read_bytes(), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_compressed_as_stacks(family, converted):
    entry = open_checkpoint(converted(family)).entry("layers/0/mlp/experts/up_proj/kernel")
    assert entry["shape"] == ([4, 64, 96] if family == "mixtral" else [6, 64, 64])
    assert entry["format"] == "tca-tbe" and len(entry["source_names"]) == entry["shape"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "fuse"), [("qwen2", True), ("qwen3_moe", True)])
def test_compressed_weights_give_the_tokens_of_dense_ones(family, fuse, converted):
    """In the dtype of the weights; qwen2 has biases, qwen3_moe experts, which are fused as well."""
    models = [load(converted(family), fuse=fuse, implementation="xla", transform=f) for f in (None, dense)]
    compressed = [any(map(is_encoded, jax.tree.leaves(model.to_params(), is_leaf=is_encoded))) for model in models]
    assert compressed == [True, False]
    found = [generate(model, make.PROMPTS, max_new_tokens=64, eos=(), return_logits=True) for model in models]
    assert np.array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].logits, found[1].logits, rtol=0, atol=1e-5)


def is_encoded(leaf) -> bool:
    return isinstance(leaf, CompressedTensor)


def dense(tree):
    return jax.tree.map(lambda w: jaxzip.decompress(w) if is_encoded(w) else w, tree, is_leaf=is_encoded)


def test_lane_planar_experts_are_fused_without_decoding_them(converted):
    tree = open_checkpoint(converted("mixtral")).load_tree(format="lane-planar", on_host=True)
    experts = fuse_projections(tree)["layers"]["0"]["mlp"]["experts"]
    parts = [dense(jax.tree.map(jnp.asarray, tree["layers"]["0"]["mlp"]["experts"][n]["kernel"])) for n in PARTS]
    fused = experts["gate_up_proj"]["kernel"]
    assert fused.shape == (4, 64, 192) and set(experts) == {"gate_up_proj", "down_proj"}
    whole = dense(jax.tree.map(jnp.asarray, fused))
    assert np.array_equal(bits(whole), bits(jnp.concatenate(parts, axis=2)))


PARTS = ("gate_proj", "up_proj")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_windows_and_caps_matter_here(family, converted):
    """Or the comparison with transformers would not show that they are computed."""
    model, tokens = load(converted(family), dtype="float32"), jnp.array([make.PROMPTS[0]])
    changes = [{"sliding_window": None}]
    if family == "gemma2":
        changes += [{"attn_softcap": None}, {"final_softcap": None}, {"query_pre_attn_scalar": 16}]
    if family == "gemma3_text":
        changes += [{"local_rope_theta": 10000.0}, {"rope_scaling": None}]
    for change in changes:
        other = type(model).from_params(dataclasses.replace(model.config, **change), model.to_params())
        assert np.abs(np.asarray(other(tokens)) - np.asarray(model(tokens))).max() > 10 * TOLERANCE, change


def test_the_command_line_needs_no_flags(tmp_path):
    source = tmp_path / "qwen3"
    shutil.copytree(HERE / "qwen3", source)
    vocabulary = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (source / "tokenizer.json").write_text(tokenizer.to_str())
    (source / "generation_config.json").write_text('{"eos_token_id": [95, 94]}')
    run = lambda *args: CliRunner().invoke(app, [str(a) for a in args])  # noqa: E731
    assert run("convert", source, tmp_path / "out").exit_code == 0
    prompt = " ".join(f"w{i}" for i in make.PROMPTS[0])
    result = run("generate", tmp_path / "out", "--prompt", prompt, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    expected = np.load(HERE / "qwen3" / "expected.npz")["tokens_0"][:8]
    assert result.stdout.split() == [f"w{i}" for i in expected]
    model, _ = load_model(tmp_path / "out")
    assert model.config.eos_token_ids == (95, 94)


def assert_same_model(a, b):
    assert type(a) is type(b) and a.config == b.config
    a, b = a.to_params(), b.to_params()
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_head_beside_a_tied_embedding_is_not_needed(tmp_path, converted):
    tensors = safetensors.numpy.load_file(HERE / "qwen3" / "model.safetensors")
    (tmp_path / "source").mkdir()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "source" / "model.safetensors")
    shutil.copy(HERE / "qwen3" / "config.json", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    assert "lm_head/kernel" in open_checkpoint(tmp_path / "out").tensors
    assert_same_model(load(tmp_path / "out"), load(converted("qwen3")))


def test_a_language_model_beside_an_image_encoder(tmp_path, converted):
    tensors = safetensors.numpy.load_file(HERE / "gemma3_text" / "model.safetensors")
    for i, prefix in enumerate(("language_model.model.", "model.language_model.")):
        source = tmp_path / str(i)
        source.mkdir()
        renamed = {name.replace("model.", prefix, 1): w for name, w in tensors.items()}
        renamed["vision_tower.encoder.weight"] = np.zeros((4, 4), np.float32)
        safetensors.numpy.save_file(renamed, source / "model.safetensors")
        text = json.loads((HERE / "gemma3_text" / "config.json").read_text())
        config = {"model_type": "gemma3", "text_config": text, "dtype": "bfloat16"}
        (source / "config.json").write_text(json.dumps(config))
        convert(source, tmp_path / f"out{i}")
        assert "vision_tower/encoder/weight" in open_checkpoint(tmp_path / f"out{i}").tensors
        assert_same_model(load(tmp_path / f"out{i}"), load(converted("gemma3_text")))


def test_a_damaged_generation_config_is_named(tmp_path):
    shutil.copytree(HERE / "mistral", tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": {}}')
    convert(tmp_path / "source", tmp_path / "out")
    with pytest.raises(UnsupportedConfigError, match="generation_config.json: eos_token_id is {}"):
        load(tmp_path / "out")


def test_an_unknown_family_is_named(tmp_path):
    shutil.copytree(HERE / "mistral", tmp_path / "source")
    config = json.loads((HERE / "mistral" / "config.json").read_text())
    changed = {**config, "model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(changed))
    convert(tmp_path / "source", tmp_path / "out")
    with pytest.raises(UnsupportedConfigError, match="'mamba'.*MambaForCausalLM.*llama, mistral, qwen2") as error:
        load(tmp_path / "out")
    assert all(family in str(error.value) for family in make.FAMILIES)
    by_architecture = {**config, "model_type": "my_mistral"}
    assert config_from_hf(by_architecture) == config_from_hf(config)


def test_a_missing_expert_is_named(tmp_path):
    tensors = safetensors.numpy.load_file(HERE / "mixtral" / "model.safetensors")
    name = next(name for name in tensors if ".layers.1." in name and ".experts.2." in name)
    del tensors[name]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(HERE / "mixtral" / "config.json", tmp_path)
    with pytest.raises(CorruptDataError, match="layers/1/mlp/experts/.*expert 2 of 4 is missing"):
        convert(tmp_path, tmp_path.parent / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", make.FAMILIES)
def test_new_models_against_the_installed_transformers(family, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, expected = make.model_with_margin(family, seed=1000)
    make.save(model, family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    check(load(tmp_path / "out", dtype="float32"), expected)
