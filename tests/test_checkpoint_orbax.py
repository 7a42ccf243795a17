"""Orbax checkpoints in and out: every layout of Orbax, any leaf, and the result opens with plain Orbax."""

import os
import stat

import checkpoint_cases as cases
import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest

import jaxzip
from jaxzip import checkpoint
from jaxzip.tensor import CompressedTensor


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A v1 checkpoint and its compressed form."""
    folder = tmp_path_factory.mktemp("nested")
    cases.save_v1(folder / "src", cases.nested_tree())
    report = checkpoint.convert(folder / "src", folder / "dst")
    return folder / "src", folder / "dst", report


@pytest.mark.parametrize("save", cases.ORBAX_WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("tree", [cases.nested_tree, cases.flat_tree], ids=["nested", "flat"])
def test_round_trip_of_every_orbax_layout(save, tree, tmp_path):
    src, dst, back = tmp_path / "src", tmp_path / "dst", tmp_path / "back"
    save(src, tree())
    before = cases.tree_digest(src)
    checkpoint.convert(src, dst)
    result = checkpoint.verify(src, dst)
    assert result, result
    assert checkpoint.verify_checksums(dst)
    checkpoint.restore(dst, back)
    cases.assert_same_tree(tree(), ocp_v1.load(back))
    cases.assert_same_tree(tree(), ocp.PyTreeCheckpointer().restore(back))
    assert cases.tree_digest(src) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "dst", "src"]


@pytest.mark.parametrize("save", cases.ORBAX_WRITERS, ids=lambda f: f.__name__)
def test_paths_may_go_up(save, tmp_path, monkeypatch):
    save(tmp_path / "src", cases.flat_tree())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    checkpoint.convert("../src", "../dst")
    assert checkpoint.verify("../src", "../dst")
    assert checkpoint.verify_checksums("../dst")
    checkpoint.restore("../dst", "../here/../back")
    cases.assert_same_tree(cases.flat_tree(), ocp_v1.load(tmp_path / "back"))


def test_strings_and_custom_metadata_come_back(tmp_path):
    tree = {"name": "hello", "w": cases.gaussian_weights((64, 64)), "nothing": None}
    cases.save_v1(tmp_path / "src", tree)
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    checkpoint.restore(tmp_path / "dst", tmp_path / "back")
    cases.assert_same_tree(tree, ocp_v1.load(tmp_path / "back"))
    assert ocp_v1.metadata(tmp_path / "back").custom_metadata == {"author": "test"}


def test_leaves_of_64_bits_are_loaded_as_they_are(tmp_path):
    tree = {"ids": np.array([2**40 + 1, 5]), "third": np.array([[1 / 3, 5.0]])}
    cases.save_v1(tmp_path / "src", tree)
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    cases.assert_same_tree(tree, checkpoint.open_checkpoint(tmp_path / "dst").load_tree())


def test_a_sharded_checkpoint_is_read_on_one_host(tmp_path):
    w = cases.gaussian_weights((256, 128))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    sharded = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b")))
    cases.save_v1(tmp_path / "src", {"w": sharded})
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    assert checkpoint.verify(tmp_path / "src", tmp_path / "dst")
    np.testing.assert_array_equal(
        cases.bits(jaxzip.decompress(checkpoint.open_checkpoint(tmp_path / "dst").load("w"))), cases.bits(w)
    )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_random_keys_come_back(tmp_path):
    tree = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4), 3), "w": np.ones(3, np.float32)}
    cases.save_v1(tmp_path / "src", tree)
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    assert checkpoint.verify(tmp_path / "src", tmp_path / "dst")
    checkpoint.restore(tmp_path / "dst", tmp_path / "back")
    original, back = (checkpoint.open_source(tmp_path / name).tensors()[0].leaf for name in ("src", "back"))
    assert original.extension and original == back
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    for path in (tmp_path / "dst", tmp_path / "back"):
        for found in (ocp_v1.load(path), ocp.PyTreeCheckpointer().restore(path), ocp_v1.load(path, target)):
            for name in ("key", "keys"):
                assert found[name].dtype == tree[name].dtype
                np.testing.assert_array_equal(jax.random.key_data(found[name]), jax.random.key_data(tree[name]))


def test_report_names_what_was_compressed_and_why_not(nested):
    _, _, report = nested
    rows = {row.path: row for row in report.tensors}
    assert rows["layers/0/mlp/kernel"].format == rows["stack"].format == "tca-tbe"
    assert rows["noise"].format == "raw" and "smaller" in rows["noise"].note
    assert "rank" in rows["layers/0/mlp/bias"].note and "int" in rows["list/0"].note
    assert report.stored_bytes < report.original_bytes


def test_tree_loads_with_compressed_tensors(nested):
    _, dst, _ = nested
    tree = checkpoint.open_checkpoint(dst).load_tree()
    kernel = tree["layers"]["1"]["mlp"]["kernel"]
    assert isinstance(kernel, CompressedTensor) and kernel.shape == (128, 192)
    dense = jax.tree.map(
        lambda z: jaxzip.decompress(z) if isinstance(z, CompressedTensor) else z,
        tree,
        is_leaf=lambda z: isinstance(z, CompressedTensor),
    )
    cases.assert_same_tree(cases.nested_tree(), dense)
    assert tree["embedder"]["embedding"].output_axis == -2


def test_tree_loads_to_a_sharding_and_to_the_host(nested):
    _, dst, _ = nested
    opened = checkpoint.open_checkpoint(dst)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert opened.load_tree(sharding=sharding)["stack"].payload["bitmap1"].sharding == sharding
    assert opened.load_tree(sharding=lambda name: sharding)["half"].payload["low"].sharding == sharding
    assert type(opened.load_tree(on_host=True)["stack"].payload["bitmap1"]) is np.ndarray


@pytest.mark.parametrize("load", [ocp_v1.load, lambda path: ocp.PyTreeCheckpointer().restore(path)], ids=["v1", "v0"])
def test_plain_orbax_opens_the_compressed_checkpoint(nested, load):
    _, dst, _ = nested
    tree = load(dst)
    z = checkpoint.open_checkpoint(dst).load("layers/0/mlp/kernel")
    stored = tree["layers"]["0"]["mlp"]["kernel"]
    assert set(stored) == set(z.payload)
    for name, array in z.payload.items():
        np.testing.assert_array_equal(stored[name], array)
    # What the first version's readers can read stays theirs.
    assert ocp_v1.metadata(dst).custom_metadata["jaxzip"]["layout_version"] == 1 < checkpoint.LAYOUT_VERSION


def test_metadata_has_what_arrays_cannot_say(nested):
    _, dst, _ = nested
    entry = checkpoint.open_checkpoint(dst).entry("layers/0/mlp/kernel")
    assert entry["shape"] == [128, 192] and entry["dtype"] == "bfloat16" and entry["output_axis"] == -1
    assert entry["checksum"]["algorithm"] == "sha256" and entry["window"]["start_exp"] > 0
    info = checkpoint.inspect(dst)
    row = next(row for row in info["tensors"] if row["path"] == "layers/0/mlp/kernel")
    assert 10 < row["bits_per_weight"] < 16 and row["coverage"] > 0.9 and row["escapes"] > 0
    assert info["total"]["stored_bytes"] < info["total"]["original_bytes"]
    assert info["source"]["kind"] == "orbax" and info["source"]["fingerprint"]


def test_rules_decide_and_unused_rules_are_reported(tmp_path):
    cases.save_pytree(tmp_path / "src", cases.nested_tree())
    rules = (
        jaxzip.CompressionRule(r"stack", format="raw"),
        jaxzip.CompressionRule(r"nowhere"),
        jaxzip.CompressionRule(),
    )
    report = checkpoint.convert(tmp_path / "src", tmp_path / "dst", rules=rules)
    assert {row.path: row.format for row in report.tensors}["stack"] == "raw"
    assert report.unused_rules == (rules[1],)


def test_a_rule_that_cannot_be_followed_names_the_tensor(tmp_path):
    cases.save_pytree(tmp_path / "src", cases.nested_tree())
    with pytest.raises(TypeError, match="embedding.*split-fp16.*bfloat16"):
        checkpoint.convert(tmp_path / "src", tmp_path / "dst", rules=[jaxzip.CompressionRule(format="split-fp16")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_cast_rounds_and_is_recorded(tmp_path):
    w = np.random.default_rng(0).standard_normal((64, 128), np.float32)
    cases.save_pytree(tmp_path / "src", {"w": w})
    checkpoint.convert(tmp_path / "src", tmp_path / "dst", cast="bfloat16")
    assert checkpoint.verify(tmp_path / "src", tmp_path / "dst")
    z = checkpoint.open_checkpoint(tmp_path / "dst").load("w")
    np.testing.assert_array_equal(cases.bits(jaxzip.decompress(z)), cases.bits(w.astype(cases.BF16)))
    row = checkpoint.inspect(tmp_path / "dst")["tensors"][0]
    assert "rounded" in row["derived"]


def test_a_read_only_source_is_enough(tmp_path):
    src = tmp_path / "src"
    cases.save_pytree(src, cases.nested_tree())
    for path in [src, *src.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = cases.tree_digest(src)
    try:
        checkpoint.convert(src, tmp_path / "dst")
        assert checkpoint.verify(src, tmp_path / "dst")
        assert cases.tree_digest(src) == before
    finally:
        for path in [src, *src.rglob("*")]:
            os.chmod(path, path.stat().st_mode | stat.S_IWUSR)


def test_progress_counts_every_byte(tmp_path):
    cases.save_pytree(tmp_path / "src", cases.nested_tree())
    calls = []
    report = checkpoint.convert(tmp_path / "src", tmp_path / "dst", progress=lambda *call: calls.append(call))
    assert calls[0] == (0, report.original_bytes, "") and calls[-1][:2] == (report.original_bytes,) * 2
    assert [name for _, _, name in calls[1:]] == [row.path for row in report.tensors]


def test_verify_names_the_first_difference(tmp_path):
    tree = {"w": cases.gaussian_weights((128, 192))}
    cases.save_pytree(tmp_path / "src", tree)
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    other = tree["w"].copy()
    other.view(np.uint16)[5, 17] ^= 1
    cases.save_pytree(tmp_path / "other", {"w": other})
    result = checkpoint.verify(tmp_path / "other", tmp_path / "dst")
    have, want = int(other.view(np.uint16)[5, 17]), int(tree["w"].view(np.uint16)[5, 17])
    assert not result and f"w[5, 17]: {have:#06x} in the source, {want:#06x} in the checkpoint" in str(result)


def test_jaxzip_writes_large_arrays_in_several_chunks(tmp_path, monkeypatch):
    from jaxzip.checkpoint import array_store

    assert array_store.chunk_shape((128256, 4096), 2) == [4096, 4096]
    assert array_store.chunk_shape((3, 1 << 30), 1) == [1, 1 << 25]
    monkeypatch.setattr(array_store.chunk_shape, "__defaults__", (1000,))
    tree = {"w": cases.gaussian_weights((128, 192)), "f": np.arange(5000, dtype=np.float32)}
    cases.save_pytree(tmp_path / "src", tree)
    checkpoint.convert(tmp_path / "src", tmp_path / "dst")
    assert len(list((tmp_path / "dst" / "f" / "c").iterdir())) == 20
    assert checkpoint.verify(tmp_path / "src", tmp_path / "dst")
    cases.assert_same_tree(tree["f"], ocp.PyTreeCheckpointer().restore(tmp_path / "dst")["f"])
