"""The table of measurements: what is recorded is what runs; nothing is timed in a trace; a bad table does no harm."""

import concurrent.futures
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import jaxzip
from jaxzip import formats, tuning
from jaxzip.errors import CacheDirectoryError
from jaxzip.ops import measured

K, M = 128, 192


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv(measured.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.delenv(measured.SWITCH, raising=False)
    measured.forget()  # programs of another test's table have the same number else


@pytest.fixture(scope="module")
def weight():
    return jaxzip.compress(0.02 * jax.random.normal(jax.random.key(0), (K, M), jnp.bfloat16))


def kind():
    return measured.device_kind("cpu")


def implementation_of(z, rows, **options):
    """What a program traced now runs: the CPU's fused kernel is a custom call of this name, a decode is another."""
    x = jnp.ones((rows, K), jnp.bfloat16)
    text = jax.jit(lambda x, z: jaxzip.matmul(x, z, **options)).lower(x, z).as_text()
    return "ffi" if "_matmul" in text.replace("jaxzip.matmul", "") and "matmul" in custom_calls(text) else "decompress"


def custom_calls(text):
    return " ".join(line for line in text.splitlines() if "custom_call" in line)


def test_measures_and_records_every_implementation(weight):
    seen = []
    (one, many) = tuning.tune(weight, (1, 33), repeats=1, cold_bytes=1, progress=seen.append)
    assert (one.rows, many.rows) == (1, 64) == tuple(seen)
    assert set(one.us) >= {"ffi", "decompress"} and min(one.us.values()) > 0
    assert "xla" not in one.us and "pallas" not in one.us  # the same as decompress; interpreted
    assert 0.98 * one.us[one.fastest] <= min(one.us.values())
    recorded = json.loads(tuning.cache_file().read_text())["devices"][kind()]
    assert recorded[measured.key(weight.format, M, K, 1)] == {name: round(us, 3) for name, us in one.us.items()}


@pytest.mark.parametrize("fastest", ["ffi", "decompress"])
def test_the_fastest_measured_runs(weight, fastest):
    slowest = {"ffi": "decompress", "decompress": "ffi"}[fastest]
    x = jax.random.normal(jax.random.key(1), (5, K), jnp.bfloat16)
    before = jaxzip.matmul(x, weight)  # traced with an empty table
    measured.record(kind(), weight.format, M, K, 5, {fastest: 1.0, slowest: 2.0})
    assert implementation_of(weight, 5) == fastest
    assert implementation_of(weight, 8) == fastest  # the same power of two
    assert implementation_of(weight, 9) == "ffi"  # another: the rule
    after = jaxzip.matmul(x, weight)
    named = jaxzip.matmul(x, weight, implementation=fastest)
    assert np.array_equal(after.view(jnp.uint16), named.view(jnp.uint16))
    np.testing.assert_allclose(after.astype(np.float32), before.astype(np.float32), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("share, runs", [(0.99, "ffi"), (0.97, "decompress")])
def test_a_tie_leaves_the_preferred_one(weight, share, runs):
    us = {"ffi": 10.0, "decompress": 10.0 * share}
    measured.record(kind(), weight.format, M, K, 5, us)
    assert implementation_of(weight, 5) == runs
    assert tuning.Measurement(kind(), weight.format, M, K, 5, us).fastest == runs


def test_what_is_asked_for_goes_before_what_was_measured(weight):
    measured.record(kind(), weight.format, M, K, 4, {"decompress": 1.0, "ffi": 2.0})
    assert implementation_of(weight, 4, implementation="ffi") == "ffi"
    assert implementation_of(weight, 4, batch_invariant=True) == "ffi"  # XLA's dot is not


def test_can_be_turned_off(weight, monkeypatch):
    measured.record(kind(), weight.format, M, K, 4, {"decompress": 1.0, "ffi": 2.0})
    assert implementation_of(weight, 4) == "decompress"
    with tuning.disabled():
        assert implementation_of(weight, 4) == "ffi"
    assert implementation_of(weight, 4) == "decompress"
    monkeypatch.setenv(measured.SWITCH, "off")
    assert implementation_of(weight, 4) == "ffi"


def test_an_unknown_or_unusable_name_in_the_table_is_passed_over(weight):
    measured.record(kind(), weight.format, M, K, 4, {"gone": 1.0, "decompress": 5.0, "ffi": 9.0})
    assert implementation_of(weight, 4) == "decompress"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 100_000, '{"version": 3, "devices": {}}', '{"version": 1, "devices": {"a": {"b": {"ffi": -1}}}}'],
)
def test_a_damaged_table_is_ignored_with_a_warning_and_replaced(weight, content):
    path = tuning.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match="tuning.json"):
        assert measured.times(kind(), weight.format, M, K, 1) is None
    with pytest.warns(RuntimeWarning, match="ignored"):
        measured.record(kind(), weight.format, M, K, 1, {"ffi": 1.0})
    assert measured.times(kind(), weight.format, M, K, 1) == {"ffi": 1.0}


def test_records_of_others_stay(weight):
    measured.record("another device", weight.format, M, K, 1, {"ffi": 1.0})
    measured.record(kind(), weight.format, M, K, 1, {"ffi": 2.0})
    measured.record(kind(), weight.format, M, K, 2, {"ffi": 3.0})
    assert measured.times("another device", weight.format, M, K, 1) == {"ffi": 1.0}
    assert measured.times(kind(), weight.format, M, K, 1) == {"ffi": 2.0}
    assert {path.name for path in tuning.cache_file().parent.iterdir()} == {"tuning.json", "tuning.lock"}


def test_records_of_many_threads_all_stay(weight):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda m: measured.record(kind(), weight.format, m, K, 1, {"ffi": 1.0}), range(1, 33)))
    assert len(json.loads(tuning.cache_file().read_text())["devices"][kind()]) == 32


def test_a_directory_that_cannot_be_written_is_refused_before_measuring(weight, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(measured.DIRECTORY, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tuning, "_measure", None)
    with pytest.raises(CacheDirectoryError, match="file/cache.*cannot be written.*JAXZIP_CACHE_DIR"):
        tuning.tune(weight, (1,))


def test_a_failed_write_leaves_the_table_as_it_was(weight, monkeypatch):
    def fail(*_):
        raise OSError("no")

    measured.record(kind(), weight.format, M, K, 1, {"ffi": 1.0})
    with monkeypatch.context() as patch, pytest.raises(CacheDirectoryError, match="no.*JAXZIP_CACHE_DIR"):
        patch.setattr(os, "replace", fail)
        measured.record(kind(), weight.format, M, K, 2, {"ffi": 1.0})
    assert {path.name for path in tuning.cache_file().parent.iterdir()} == {"tuning.json", "tuning.lock"}
    assert measured.times(kind(), weight.format, M, K, 1) and not measured.times(kind(), weight.format, M, K, 2)


def test_without_a_home_directory_only_recording_fails(weight, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in (measured.DIRECTORY, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", home)
    measured.forget()
    assert implementation_of(weight, 4) == "ffi"
    with pytest.raises(CacheDirectoryError, match="home directory.*JAXZIP_CACHE_DIR"):
        measured.record(kind(), weight.format, M, K, 1, {"ffi": 1.0})


def test_shipped_measurements_come_after_the_users(weight, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    name = measured.key(weight.format, M, K, 1)
    table = {"version": 1, "devices": {kind(): {name: {"decompress": 1.0, "ffi": 2.0}}}}
    (shipped / "here.json").write_text(json.dumps(table))
    monkeypatch.setattr(measured, "SHIPPED", shipped)
    measured._shipped_layer.cache_clear()
    try:
        assert implementation_of(weight, 1) == "decompress"
        measured.record(kind(), weight.format, M, K, 1, {"ffi": 1.0, "decompress": 3.0})
        assert implementation_of(weight, 1) == "ffi"
    finally:
        measured._shipped_layer.cache_clear()


def test_measurements_of_another_version_of_a_format_are_not_used(weight, monkeypatch):
    measured.record(kind(), weight.format, M, K, 1, {"ffi": 2.0, "decompress": 1.0})
    assert implementation_of(weight, 1) == "decompress"
    monkeypatch.setattr(type(formats.get(weight.format)), "version", 99)
    assert measured.times(kind(), weight.format, M, K, 1) is None


def test_the_shipped_tables_are_readable():
    for path in measured.SHIPPED.glob("*.json"):
        assert measured._read(pathlib.Path(path))


def test_never_times_inside_a_trace(weight):
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda z: tuning.tune(z, (1,)))(weight)
    with pytest.raises(TypeError, match="CompressedTensor"):
        tuning.tune(jnp.ones((3, 4)))
    with pytest.raises(TypeError, match="matrix"):
        tuning.tune(weight.T)
    assert not tuning.cache_file().exists()


def test_programs_for_timing_keep_every_product(weight):
    """XLA would drop products that nobody reads and merge those that look alike."""
    rounds, trips = 3, 2
    other = jaxzip.compress(2 * jaxzip.decompress(weight), format=weight.format)
    x = jnp.ones((2, K), jnp.bfloat16)
    multiply = functools.partial(jaxzip.matmul, implementation="ffi")
    compiled = tuning.products(multiply, rounds, trips).lower(x, [weight, other]).compile()
    calls = custom_calls(compiled.as_text().replace("custom-call", "custom_call"))
    assert calls.count("_matmul") >= rounds * 2
    result = compiled(x, [weight, other])
    for _ in range(rounds * trips):
        corners = jnp.stack([multiply(x, w)[0, 0] for w in (weight, other)]).astype(jnp.float32)
        x = x.at[0, 0].set(jnp.clip(corners.mean(), -1, 1).astype(x.dtype))
    assert np.array_equal(result.view(jnp.uint16), x.view(jnp.uint16))


def test_command(weight, tmp_path):
    from jaxzip.checkpoint import convert
    from jaxzip.cli import app

    path = tmp_path / "model"
    save_file(
        {"kernel": np.asarray(jaxzip.decompress(weight)), "norm": np.ones(8, jnp.bfloat16)}, tmp_path / "a.safetensors"
    )
    convert(tmp_path / "a.safetensors", path)
    result = CliRunner().invoke(app, ["tune", str(path), "--rows", "1,4", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(f["m"], f["k"], f["rows"]) for f in found] == [
        (K, M, 1),
        (K, M, 4),
    ]  # an array that no rule names is [M, K]
    assert measured.times(kind(), weight.format, K, M, 4) is not None
    for rows in ("none", "9" * 20):
        result = CliRunner().invoke(app, ["tune", str(path), "--rows", rows])
        assert isinstance(result.exception, ValueError) and "1,8,32" in str(result.exception)
