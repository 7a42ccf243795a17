"""Checkpoints of fp16, fp32 and fp8 tensors: convert, verify, load and restore bit for bit; sizes by dtype."""

import json

import checkpoint_cases as cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from typer.testing import CliRunner

import jaxzip
from jaxzip import checkpoint
from jaxzip.cli import app
from jaxzip.errors import CheckpointError, CorruptDataError
from jaxzip.testing import BF16, gaussian_weights

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
FORMATS = {
    "brain": "tca-tbe",
    "half": "split-fp16",
    "single": "split-fp32",
    "was_bf16": "split-fp32",
    "stack": "split-fp32",
    "e4m3": "window-fp8-e4m3fn",
    "e5m2": "window-fp8-e5m2",
    "noise": "raw",
    "every_fp16": "raw",
    "bias": "raw",
    "double": "raw",
    "count": "raw",
}


def gaussian(dtype, shape, seed=0, sigma=0.02):
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * sigma).astype(dtype)


def nans(dtype, shape, seed=0):
    """Gaussian weights with NaN payloads of both signs, infinities and subnormals sprinkled in."""
    w = gaussian(dtype, shape, seed, sigma=1)
    word = np.dtype(f"u{dtype.itemsize}")
    rng = np.random.default_rng(seed)
    bits = w.view(word)
    where = rng.random(shape) < 0.003
    bits[where] = rng.integers(0, 1 << 8 * dtype.itemsize, where.sum(), dtype=np.uint64).astype(word)
    return bits.view(dtype)


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return {
        "brain": gaussian_weights((128, 192)),
        "half": nans(np.dtype(np.float16), (192, 256)),
        "single": nans(np.dtype(np.float32), (192, 256)),
        "was_bf16": gaussian_weights((128, 192)).astype(np.float32),
        # One matrix has low bits and one has none.
        "stack": np.stack([gaussian(np.float32, (128, 192)), gaussian_weights((128, 192)).astype(np.float32)]),
        "e4m3": nans(E4M3, (192, 256)),
        "e5m2": nans(E5M2, (192, 256)),
        "noise": rng.integers(0, 256, (64, 128), dtype=np.uint8).view(E4M3),
        "every_fp16": rng.permutation(1 << 16).astype(np.uint16).reshape(256, 256).view(np.float16),
        "bias": np.ones(8192, np.float16),
        "double": np.ones((64, 128), np.float64),
        "count": np.arange(8192, dtype=np.int32).reshape(64, 128),
    }


@pytest.fixture(scope="module")
def converted(tree, tmp_path_factory):
    """A source of Orbax arrays, the checkpoint and its report."""
    folder = tmp_path_factory.mktemp("dtypes")
    cases.save_pytree(folder / "src", tree)
    report = checkpoint.convert(folder / "src", folder / "dst")
    return folder / "src", folder / "dst", report


def dense(tree):
    is_compressed = lambda z: isinstance(z, jaxzip.CompressedTensor)  # noqa: E731
    return jax.tree.map(lambda z: jaxzip.decompress(z) if is_compressed(z) else z, tree, is_leaf=is_compressed)


def test_every_leaf_has_the_format_of_its_dtype_and_keeps_its_bits(converted, tree):
    src, dst, report = converted
    assert {row.path: row.format for row in report.tensors} == FORMATS
    assert checkpoint.verify(src, dst) and checkpoint.verify_checksums(dst)
    opened = checkpoint.open_checkpoint(dst)
    cases.assert_same_tree(tree, dense(opened.load_tree(on_host=True, verify=True)))
    for name in FORMATS:
        value = opened.load(name)
        assert isinstance(value, jaxzip.CompressedTensor) == (FORMATS[name] != "raw")


def test_restore_gives_the_source_back(converted, tree, tmp_path):
    src, dst, _ = converted
    checkpoint.restore(dst, tmp_path / "back")
    assert checkpoint.verify(tmp_path / "back", dst)
    cases.assert_same_tree(tree, ocp.PyTreeCheckpointer().restore(tmp_path / "back"))


def test_plain_orbax_opens_it_also_where_there_are_no_low_bits(converted):
    _, dst, _ = converted
    stored = ocp.PyTreeCheckpointer().restore(dst)
    opened = checkpoint.open_checkpoint(dst)
    assert stored["was_bf16"]["low"].size == 0
    for name in ("half", "was_bf16", "e4m3"):
        z = opened.load(name)
        assert set(stored[name]) == set(z.payload)
        for field, array in z.payload.items():
            np.testing.assert_array_equal(stored[name][field], array)


def test_loading_in_another_format_is_for_bf16(converted):
    opened = checkpoint.open_checkpoint(converted[1])
    for format in ("lane-planar", "auto"):
        loaded = opened.load_tree(format=format, on_host=True)
        found = {name: getattr(value, "format", "raw") for name, value in loaded.items()}
        assert found == FORMATS | ({"brain": "lane-planar"} if format == "lane-planar" else {})
    assert opened.load("half", format="raw").format == "raw"


def test_sizes_by_dtype_are_honest(converted, tree):
    _, dst, report = converted
    info = checkpoint.inspect(dst)
    sizes = info["dtypes"]
    for dtype in {str(w.dtype) for w in tree.values()}:
        leaves = [w for w in tree.values() if str(w.dtype) == dtype]
        rows = [row for row in report.tensors if row.dtype == dtype]
        assert sizes[dtype]["tensors"] == len(leaves)
        assert sizes[dtype]["original_bytes"] == sum(w.nbytes for w in leaves)
        assert sizes[dtype]["stored_bytes"] == sum(row.stored_bytes for row in rows)
    assert sum(size["stored_bytes"] for size in sizes.values()) == info["total"]["stored_bytes"]
    assert sizes["int32"]["ratio"] == 1 and sizes["int32"]["compressed"] == 0
    rows = {row["path"]: row for row in info["tensors"]}
    assert "hardly shrinks" in rows["half"]["note"] and "hardly shrinks" in rows["e4m3"]["note"]
    assert "hardly" not in rows["was_bf16"]["note"] and "decoded before" in rows["was_bf16"]["note"]
    assert "smaller" in rows["noise"]["note"] and "dtype float64" in rows["double"]["note"]
    assert rows["e5m2"]["bits_per_weight"] < 6.5 < 7 < rows["e4m3"]["bits_per_weight"] < 7.5
    for name, format in FORMATS.items():
        if format != "raw":
            assert rows[name]["coverage"] > 0.9 and rows[name]["window"]["start_exp"] is not None
            z = checkpoint.open_checkpoint(dst).load(name)
            assert rows[name]["stored_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(z))


def test_command_line_with_a_format_of_bf16(converted, tmp_path):
    src, _, _ = converted

    def run(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.stdout

    run("convert", src, tmp_path / "dst", "--format", "lane-planar")
    data = json.loads(run("inspect", tmp_path / "dst", "--json"))
    assert {row["path"]: row["format"] for row in data["tensors"]} == FORMATS | {"brain": "lane-planar"}
    text = run("inspect", tmp_path / "dst")
    for dtype, size in data["dtypes"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {dtype}:"))
        assert f"{size['compressed']} of {size['tensors']} tensors" in line and f"{100 * size['ratio']:.1f}%" in line
    assert "identical" in run("verify", src, tmp_path / "dst")
    run("restore", tmp_path / "dst", tmp_path / "back")
    assert checkpoint.verify(tmp_path / "back", tmp_path / "dst")


def test_safetensors_come_back_byte_for_byte(tree, tmp_path):
    names = [name for name in tree if tree[name].dtype != np.int32]
    safetensors.numpy.save_file({name: tree[name] for name in names}, tmp_path / "w.safetensors")
    report = checkpoint.convert(tmp_path / "w.safetensors", tmp_path / "dst")
    found = {row.path: row.format for row in report.tensors}
    assert found == {name: FORMATS[name] for name in names}
    assert checkpoint.verify(tmp_path / "w.safetensors", tmp_path / "dst")
    assert checkpoint.open_checkpoint(tmp_path / "dst").load("half").output_axis == -2
    checkpoint.restore(tmp_path / "dst", tmp_path / "back", format="safetensors")
    assert (tmp_path / "back" / "w.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_a_cast_rounds_fp32_and_leaves_the_narrower_ones(tree, tmp_path):
    cases.save_pytree(tmp_path / "src", {name: tree[name] for name in ("was_bf16", "half", "e5m2")})
    report = checkpoint.convert(tmp_path / "src", tmp_path / "dst", cast="bfloat16")
    rows = {row.path: row for row in report.tensors}
    assert (rows["was_bf16"].dtype, rows["was_bf16"].format) == ("bfloat16", "tca-tbe")
    assert rows["half"].format == "split-fp16" and rows["e5m2"].format == "window-fp8-e5m2"
    back = jaxzip.decompress(checkpoint.open_checkpoint(tmp_path / "dst").load("was_bf16"))
    np.testing.assert_array_equal(cases.bits(back), cases.bits(tree["was_bf16"].astype(BF16)))


@pytest.mark.parametrize(
    ("name", "field"),
    [("half", "low"), ("single", "low"), ("half", "bitmap1"), ("e4m3", "escapes"), ("e5m2", "fields")],
)
def test_damage_is_found(tree, tmp_path, name, field):
    cases.save_pytree(tmp_path / "src", {name: tree[name]})
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    chunk = next(
        file for file in (tmp_path / "dst" / f"{name}.{field}").rglob("*") if file.is_file() and file.name == "0"
    )
    cases.flip_bit(chunk)
    with pytest.raises(CorruptDataError, match=name):
        checkpoint.open_checkpoint(tmp_path / "dst").load(name)
    with pytest.raises((CorruptDataError, CheckpointError), match=name):
        checkpoint.verify_checksums(tmp_path / "dst")


def test_exported_programs_take_them(tree):
    """The static part of a tensor survives jax.export's serialisation, dtype by dtype."""
    for name in ("half", "was_bf16", "e4m3", "e5m2"):
        z = jaxzip.compress(tree[name])
        f = jax.jit(lambda z: jaxzip.decompress(z, implementation="xla"))
        exported = jax.export.export(f)(z)
        again = jax.export.deserialize(exported.serialize())
        np.testing.assert_array_equal(cases.bits(again.call(z)), cases.bits(tree[name]))


def test_weights_load_to_the_device_and_multiply(converted, tree):
    loaded = checkpoint.open_checkpoint(converted[1]).load_tree()
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.float32)
    y = jaxzip.matmul(x, loaded["was_bf16"])
    np.testing.assert_allclose(y, x @ jnp.asarray(tree["was_bf16"]), rtol=1e-5, atol=1e-6)
