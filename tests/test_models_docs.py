"""The pages on models run: Python block by block in one namespace, and commands, beside checkpoints of small models."""

import json
import re
import shlex
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import tokenizers
from test_models_gemma_orbax import flat, released
from test_models_oracle import HERE
from typer.testing import CliRunner

from jaxzip.cli import app

DOCS = Path(__file__).parents[1] / "docs"


def write_tokenizer(directory: Path) -> None:
    words = ["<unk>", "the", "sky", "is", *(f"w{i}" for i in range(4, 96))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(words, range(96))), unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (directory / "tokenizer.json").write_text(tokenizer.to_str())


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with what the pages start from."""
    monkeypatch.chdir(tmp_path)
    ocp.PyTreeCheckpointer().save(tmp_path / "gemma3-1b", flat(released("gemma3_text")))
    for name, family in (("gemma3-1b", "gemma3_text"), ("qwen2.5-0.5b", "qwen2")):
        (tmp_path / name).mkdir(exist_ok=True)
        weights = ["*.safetensors", "*.index.json"] if family == "qwen2" else []
        for pattern in ["config.json", *weights]:
            for file in (HERE / family).glob(pattern):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        write_tokenizer(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("page", ["convert_gemma_orbax.md", "load_in_my_loop.md"])
def test_the_page_runs(page, models, capsys):
    text = (DOCS / page).read_text()
    blocks = re.finditer(r"^```(python|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    namespace, commands = {"__name__": page}, []
    for block in blocks:
        if block[1] == "sh":
            for line in block[2].splitlines():
                program, *arguments = shlex.split(line)
                result = CliRunner().invoke(app, arguments)
                assert program == "jaxzip" and result.exit_code == 0, (line, result.output)
                commands.append((arguments[0], result.stdout))
        else:
            lines = "\n" * (text[: block.start()].count("\n") + 1)  # so that an error shows the page's own line
            exec(compile(lines + block[2], str(DOCS / page), "exec"), namespace)
    printed = capsys.readouterr().out.split()
    if page == "convert_gemma_orbax.md":
        assert [name for name, _ in commands] == ["convert", "verify", "generate"]
        assert "identical" in commands[1][1]
        assert printed == commands[2][1].split() and len(printed) == 8  # the same text
    else:
        from jaxzip.models import generate

        found = generate(namespace["model"], [[1, 2, 3]], max_new_tokens=8, eos=()).tokens[0].tolist()
        assert found == [int(token[0]) for token in namespace["tokens"]]
        assert printed == namespace["tokenizer"].decode(found).split()
        assert namespace["y"].shape == (4, json.loads((HERE / "qwen2" / "config.json").read_text())["hidden_size"])
