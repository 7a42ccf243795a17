"""The documentation of users' modules runs: all Python of a page, block by block, in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["compress_nnx.md", "train_adapters.md"])
def test_the_page_runs(page, capsys):
    text = (DOCS / page).read_text()
    blocks = [(m.start(), m.group(1)) for m in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    assert len(blocks) >= 3
    namespace = {"__name__": page}
    for start, block in blocks:
        lines = "\n" * (text[:start].count("\n") + 1)  # so that an error shows the page's own line
        exec(compile(lines + block, str(DOCS / page), "exec"), namespace)
    if page == "compress_nnx.md":
        same = namespace["nnx"].jit(lambda model: model(namespace["ids"]))
        assert (same(namespace["restored"]) == same(namespace["small"])).all()
        assert "rule says raw" in capsys.readouterr().out
        assert namespace["logits"].shape == (1, 8, 512) and namespace["y"].shape == (1, 3, 4, 32)
