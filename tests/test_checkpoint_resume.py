"""Interrupted conversions: killed with SIGKILL at many points, then run again; the result is always the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint_cases as cases
import pytest

import jaxzip
from jaxzip import checkpoint
from jaxzip.checkpoint import layout

#: Kills its own process, as ``kill -9`` does, when the named function has been called so many times.
CHILD = """
import importlib, os, signal, sys
module, name, when, operation, src, dst = sys.argv[1:]
from jaxzip import checkpoint
target = importlib.import_module(module)
writer = getattr(target, "PartialCheckpoint", None)
owner = writer if hasattr(writer, name) else target
real, count = getattr(owner, name), [0]
def dying(*args, **kwargs):
    count[0] += 1
    if count[0] == int(when):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(owner, name, dying)
getattr(checkpoint, operation)(src, dst)
"""

#: Before and after arrays of a tensor, before the journal, around the metadata, and around the final rename.
POINTS = [
    ("jaxzip.checkpoint.array_store", "write_arrays", 1),
    ("jaxzip.checkpoint.array_store", "write_arrays", 4),
    ("jaxzip.checkpoint.partial", "_append", 5),
    ("jaxzip.checkpoint.partial", "write_tree", 1),
    ("jaxzip.checkpoint.partial", "write_file", 1),
    ("os", "rename", 1),
    ("shutil", "rmtree", 2),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    cases.save_files(folder / "src", cases.nested_tree())
    checkpoint.convert(folder / "src", folder / "whole")
    checkpoint.restore(folder / "whole", folder / "plain")
    return folder


def run_and_die(point, operation, src, dst):
    module, name, when = point
    child = subprocess.run(
        [sys.executable, "-c", CHILD, module, name, str(when), operation, src, dst],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[1]}-{p[2]}")
def test_convert_killed_and_run_again(source, tmp_path, point):
    src, dst = source / "src", tmp_path / "dst"
    before = cases.tree_digest(src)
    run_and_die(point, "convert", src, dst)
    assert dst.exists() == (point[1] == "rmtree")
    calls = []
    report = checkpoint.convert(src, dst, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == report.original_bytes and len(report.tensors) > 5
    assert cases.content_digest(dst) == cases.content_digest(source / "whole")
    assert [f.name for f in tmp_path.iterdir()] == ["dst"]
    assert cases.tree_digest(src) == before


def test_restore_killed_and_run_again(source, tmp_path):
    run_and_die(("jaxzip.checkpoint.array_store", "write_arrays", 5), "restore", source / "whole", tmp_path / "back")
    checkpoint.restore(source / "whole", tmp_path / "back")
    assert cases.content_digest(tmp_path / "back") == cases.content_digest(source / "plain")


def interrupted(source: Path, tmp_path: Path) -> Path:
    """A partial conversion with 5 tensors done; returns its destination."""
    run_and_die(("jaxzip.checkpoint.array_store", "write_arrays", 6), "convert", source / "src", tmp_path / "dst")
    return tmp_path / "dst"


def first_call(src, dst, **options):
    calls = []
    checkpoint.convert(src, dst, progress=lambda *call: calls.append(call), **options)
    return calls[0]


def test_complete_tensors_are_not_done_again(source, tmp_path):
    dst = interrupted(source, tmp_path)
    done, total, _ = first_call(source / "src", dst)
    assert 0 < done < total


def test_a_torn_journal_line_is_left_out(source, tmp_path):
    dst = interrupted(source, tmp_path)
    journal = tmp_path / f"dst{layout.PARTIAL_SUFFIX}" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    os.truncate(journal, journal.stat().st_size - 20)
    expected = sum(json.loads(line)["original_bytes"] for line in lines[1:-1])
    assert first_call(source / "src", dst)[0] == expected
    assert cases.content_digest(dst) == cases.content_digest(source / "whole")


def test_a_damaged_journal_starts_anew(source, tmp_path):
    dst = interrupted(source, tmp_path)
    (tmp_path / f"dst{layout.PARTIAL_SUFFIX}" / "journal.jsonl").write_bytes(b"{not json}\n")
    assert first_call(source / "src", dst)[0] == 0


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"null\n", b'{"path": [1]}\n'])
def test_a_journal_with_a_foreign_line_starts_anew(source, tmp_path, line):
    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(source / "src", tmp_path / "dst", progress=interrupt_after_a_tensor)
    journal = tmp_path / f"dst{layout.PARTIAL_SUFFIX}" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + line)
    assert first_call(source / "src", tmp_path / "dst")[0] == 0
    assert cases.content_digest(tmp_path / "dst") == cases.content_digest(source / "whole")


def test_other_rules_start_anew(source, tmp_path):
    dst = interrupted(source, tmp_path)
    assert first_call(source / "src", dst, rules=[jaxzip.CompressionRule(format="raw")])[0] == 0
    assert checkpoint.inspect(dst)["total"]["formats"] == {"raw": len(checkpoint.inspect(dst)["tensors"])}


def test_resume_false_starts_anew(source, tmp_path):
    assert first_call(source / "src", interrupted(source, tmp_path), resume=False)[0] == 0


def test_a_deletion_that_was_interrupted_leaves_nothing_to_go_on_with(source, tmp_path, monkeypatch):
    dst = interrupted(source, tmp_path)
    real = shutil.rmtree

    def interrupted_rmtree(path, *args, **kwargs):
        real(next(Path(path).rglob("zarr.json")).parent)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted_rmtree)
        checkpoint.convert(source / "src", dst, resume=False)
    assert first_call(source / "src", dst)[0] == 0
    assert checkpoint.verify(source / "src", dst)


def test_a_changed_source_starts_anew(source, tmp_path):
    src = tmp_path / "src"
    cases.save_files(src, cases.nested_tree())
    run_and_die(("jaxzip.checkpoint.array_store", "write_arrays", 6), "convert", src, tmp_path / "dst")
    file = next(src.rglob("0"))
    os.utime(file, ns=(1, 1))
    assert first_call(src, tmp_path / "dst")[0] == 0
    assert checkpoint.verify(src, tmp_path / "dst")


def test_a_changed_configuration_starts_anew(source, tmp_path):
    cases.write_llama(tmp_path / "hf")
    config = (tmp_path / "hf" / "config.json").read_bytes()
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(tmp_path / "hf", tmp_path / "dst", progress=interrupt_after_a_tensor)
    (tmp_path / "hf" / "config.json").write_bytes(config)
    assert first_call(tmp_path / "hf", tmp_path / "dst")[0] == 0
    checkpoint.convert(tmp_path / "hf", tmp_path / "whole")
    assert cases.content_digest(tmp_path / "dst") == cases.content_digest(tmp_path / "whole")


def interrupt_after_a_tensor(done, *_):
    if done > 0:
        raise KeyboardInterrupt


MEASURE = """
import resource, sys
import jaxzip.checkpoint as checkpoint
from jaxzip.ops import registry
registry.load_backends()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
checkpoint.convert(*sys.argv[1:])
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    pytest.importorskip("jaxzip.ffi", reason="the NumPy encoder is a reference and needs more memory")
    tensors = {f"w{i}": cases.gaussian_weights((4096, 4096), seed=i) for i in range(6)}
    cases.write_safetensors(tmp_path / "w.safetensors", tensors)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "w.safetensors", tmp_path / "dst"], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 3 * tensors["w0"].nbytes + (100 << 20)
