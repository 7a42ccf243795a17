"""The ``jaxzip`` command on a small Llama: every command, its output, and exit codes of failures."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from checkpoint_cases import flip_bit, tree_digest, write_safetensors
from jaxzip.models import LlamaConfig, random_params
from tokenizers import models as token_models
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from jaxzip.cli import app, main

WORDS = ("<unk>", "a", "b", "c", "sky", "blue", "is", "the")
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def hf_tensors(params) -> dict[str, np.ndarray]:
    """The model's parameters under Hugging Face's names, weights [M, K]."""
    tensors = {
        "model.embed_tokens.weight": params["embedder"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    names = {"input_norm": "input_layernorm", "post_attn_norm": "post_attention_layernorm"}
    for i, layer in params["layers"].items():
        for ours, theirs in names.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = layer[ours]["scale"]
        for block, name in (("attn", "self_attn"), ("mlp", "mlp")):
            for projection, leaf in layer[block].items():
                tensors[f"model.layers.{i}.{name}.{projection}.weight"] = np.ascontiguousarray(leaf["kernel"].T)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("hf") / "tiny-llama"
    path.mkdir()
    write_safetensors(path / "model.safetensors", hf_tensors(random_params(LlamaConfig.from_hf(HF_CONFIG))))
    (path / "config.json").write_text(json.dumps(HF_CONFIG))
    vocabulary = {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), 64)}
    tokenizer = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> pathlib.Path:
    dst = tmp_path_factory.mktemp("ckpt") / "tiny-jaxzip"
    result = run("convert", source, dst)
    assert result.exit_code == 0, result.output
    assert "compressed at" in result.stdout and str(dst) in result.stdout
    return dst


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def command(*args) -> subprocess.CompletedProcess:
    """The installed program: exit codes and what goes to standard error."""
    program = pathlib.Path(sys.executable).parent / "jaxzip"
    return subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("convert", "inspect", "verify", "restore", "generate", "demo"):
        assert name in result.output
        assert run(name, "--help").exit_code == 0


def test_convert_leaves_the_source_alone(source, tmp_path):
    before = tree_digest(source)
    assert run("convert", source, tmp_path / "dst").exit_code == 0
    assert tree_digest(source) == before


def test_inspect_table_and_json(converted):
    table = run("inspect", converted)
    assert table.exit_code == 0 and "bits per weight" in table.stdout
    cells = {line.split()[0]: line.split()[1:] for line in table.stdout.splitlines()}
    assert cells["layers/0/mlp/up_proj/kernel"][:3] == ["64x128", "bfloat16", "tca-tbe"]  # though a pipe has 80 columns
    data = json.loads(run("inspect", converted, "--json").stdout)
    rows = {row["path"]: row for row in data["tensors"]}
    assert rows["layers/0/mlp/up_proj/kernel"]["format"] == "tca-tbe"
    assert rows["layers/0/mlp/up_proj/kernel"]["shape"] == [64, 128]
    assert rows["final_norm/scale"]["format"] == "raw"
    assert data["total"]["stored_bytes"] < data["total"]["original_bytes"]


def test_verify(source, converted):
    result = run("verify", source, converted)
    assert result.exit_code == 0 and "identical" in result.stdout
    assert json.loads(run("verify", source, converted, "--json").stdout)["identical"] is True


def test_brackets_in_names_and_paths_are_printed(tmp_path):
    src, dst, back = tmp_path / "in [bold]", tmp_path / "out [v1] :+1: sp", tmp_path / "back [v1]"
    src.mkdir()
    write_safetensors(src / "model.safetensors", {"w[red]": np.ones((64, 64), np.float32)})
    assert f"wrote {dst}" in run("convert", src, dst).stdout
    assert f"wrote {back}" in run("restore", dst, back).stdout
    assert "w[red]" in run("inspect", dst).stdout
    write_safetensors(src / "model.safetensors", {"w[red]": np.zeros((64, 64), np.float32)})
    assert "w[red][0, 0]" in run("verify", src, dst).stdout


def test_verify_names_the_first_difference(source, converted, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tensors = hf_tensors(random_params(LlamaConfig.from_hf(HF_CONFIG)))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint16)[3, 5] ^= 1
    write_safetensors(other / "model.safetensors", tensors)
    (other / "config.json").write_text(json.dumps(HF_CONFIG))
    result = run("verify", other, converted)
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout and "layers/1/mlp/up_proj/kernel[5, 3]" in result.stdout


def test_restore_both_ways(source, converted, tmp_path):
    assert run("restore", converted, tmp_path / "orbax").exit_code == 0
    assert run("restore", converted, tmp_path / "hf", "--format", "safetensors").exit_code == 0
    original = (source / "model.safetensors").read_bytes()
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == original


def test_generate_streams_the_same_text_for_the_same_seed(converted):
    greedy = run("generate", converted, "--prompt", "the sky is", "--max-new-tokens", 6)
    assert greedy.exit_code == 0, greedy.output
    assert len(greedy.stdout.split()) == 6
    sampled = [
        run("generate", converted, "--prompt", "the sky is", "--max-new-tokens", 6, "--temperature", 3, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0].stdout == sampled[1].stdout != sampled[2].stdout
    assert greedy.stdout != sampled[0].stdout


def test_rules_on_the_command_line(source, tmp_path):
    result = run("convert", source, tmp_path / "dst", "--rule", ".*mlp.*=raw", "--rule", "nothing=auto")
    assert result.exit_code == 0 and "nothing=auto matched no tensor" in result.stderr
    rows = {r["path"]: r for r in json.loads(run("inspect", tmp_path / "dst", "--json").stdout)["tensors"]}
    assert rows["layers/0/mlp/up_proj/kernel"]["format"] == "raw"
    assert rows["embedder/embedding"]["format"] == "tca-tbe"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("convert", "{missing}", "{new}"), ["missing", "does not exist"]),
        (("convert", "{source}", "{converted}"), ["exist"]),
        (("convert", "{converted}", "{new}"), ["already compressed"]),
        (("convert", "{source}", "{new}", "--rule", "x"), ["PATTERN=FORMAT"]),
        (("convert", "{source}", "{new}", "--rule", "x=zip"), ["zip", "tca-tbe"]),
        (("convert", "{source}", "{new}", "--rule", ".*=split-fp16"), ["embedding", "split-fp16", "bfloat16"]),
        (("convert", "{source}", "{new}", "--cast", "int4"), ["int4", "bfloat16"]),
        (("inspect", "{source}"), ["no compressed checkpoint"]),
        (("verify", "{source}", "{missing}"), ["missing", "does not exist"]),
        (("restore", "{converted}", "{new}", "--format", "zip"), ["zip"]),
        (("generate", "{converted}", "--prompt", "sky", "--max-new-tokens", "100"), ["100", "32"]),
        (("generate", "{converted}", "--prompt", "sky", "--implementation", "magic"), ["magic", "xla"]),
        (("generate", "{converted}", "--prompt", "sky", "--top-p", "2"), ["top_p", "2"]),
        (("generate", "{converted}", "--prompt", "sky", "--chat"), ["chat"]),
    ],
)
def test_failures_are_one_line_and_exit_code_1(source, converted, tmp_path, monkeypatch, capsys, args, words):
    """By the program's entry point, in this process: what it does not turn into an exit code is raised here."""
    places = {"source": source, "converted": converted, "missing": tmp_path / "missing", "new": tmp_path / "new"}
    monkeypatch.setattr(sys, "argv", ["jaxzip", *(arg.format(**places) for arg in args)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "error:" in error
    for word in words:
        assert word in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--top-k", "--seed"])
def test_numbers_that_do_not_fit_are_refused(converted, option):
    result = run("generate", converted, "--prompt", "sky", option, 10**22)
    assert result.exit_code == 2 and option in result.stderr


def test_a_corrupt_checkpoint_is_refused(source, tmp_path):
    assert run("convert", source, tmp_path / "dst").exit_code == 0
    files = [f for f in (tmp_path / "dst").rglob("*") if f.is_file() and "up_proj.kernel.sign_mantissa" in str(f)]
    chunk = max(files, key=lambda f: f.stat().st_size)
    flip_bit(chunk, chunk.stat().st_size // 2)
    result = command("verify", source, tmp_path / "dst")
    assert result.returncode == 1 and "error:" in result.stderr and "up_proj" in result.stderr
    assert "Traceback" not in result.stderr
