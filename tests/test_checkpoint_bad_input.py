"""Bad input: each case is a typed error that names what and where, and leaves nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import checkpoint_cases as cases
import numpy as np
import pytest
from checkpoint_cases import fail_to_convert, truncate

from jaxzip import checkpoint, formats
from jaxzip.checkpoint import layout, tree_metadata
from jaxzip.errors import (
    CheckpointError,
    CorruptDataError,
    TensorNotFoundError,
    UnsupportedVersionError,
)

KERNEL = "layers/0/mlp/kernel"
STORED = "layers.0.mlp.kernel"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    cases.save_files(folder / "src", cases.nested_tree())
    checkpoint.convert(folder / "src", folder / "dst")
    return folder


@pytest.fixture
def src(made, tmp_path):
    return Path(shutil.copytree(made / "src", tmp_path / "src"))


@pytest.fixture
def dst(made, tmp_path):
    return Path(shutil.copytree(made / "dst", tmp_path / "dst"))


@pytest.fixture
def weights(tmp_path):
    return cases.write_two_tensors(tmp_path / "w.safetensors")


def only(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def chunk(array: Path) -> Path:
    """The first chunk file of a stored array."""
    return next(f for f in sorted(array.rglob("*")) if f.is_file() and f.name not in (".zarray", "zarr.json"))


# Sources.


def test_source_that_is_not_there(tmp_path):
    fail_to_convert(tmp_path / "nothing", CheckpointError, "nothing does not exist")


def test_unknown_format(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02whatever")
    fail_to_convert(tmp_path / "weights.bin", CheckpointError, r"weights\.bin: unknown format; expected an Orbax")
    (tmp_path / "folder").mkdir()
    fail_to_convert(tmp_path / "folder", CheckpointError, "folder: unknown format")


@pytest.mark.parametrize("name", ["layers.0.mlp.bias", STORED])
def test_source_truncated(src, name):
    truncate(chunk(src / name))
    fail_to_convert(src, CorruptDataError, name)


def test_source_chunk_missing(src):
    chunk(src / STORED).unlink()
    fail_to_convert(src, CheckpointError, STORED)


def test_source_array_missing(src):
    shutil.rmtree(src / STORED)
    fail_to_convert(src, CheckpointError, STORED)


def test_source_tree_metadata_truncated(src):
    truncate(src / "_METADATA")
    fail_to_convert(src, CorruptDataError, "_METADATA is truncated")


def test_source_tree_metadata_of_another_structure(src):
    (src / "_METADATA").write_text('{"tree_metadata": {"a": {"key": 1}}}')
    fail_to_convert(src, CorruptDataError, "_METADATA is not a tree description")


OF_ANOTHER_STRUCTURE = [
    *((name, text) for name in ("_CHECKPOINT_METADATA", "array_metadatas/process_0") for text in ("[]", "null", "3")),
    *(("array_metadatas/process_0", f'{{"array_metadatas": {text}}}') for text in ("[3]", "null", '[{"a": 1}]')),
]


@pytest.mark.parametrize(("name", "content"), OF_ANOTHER_STRUCTURE)
def test_source_files_of_another_structure(src, name, content):
    (src / name).parent.mkdir(exist_ok=True)
    (src / name).write_text(content)
    fail_to_convert(src, CorruptDataError, f"{name} .*get the checkpoint again")


def test_source_tree_metadata_missing(src):
    (src / "_METADATA").unlink()
    fail_to_convert(src, CheckpointError, "_METADATA is missing")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ('{"model_type": ["llama"]}', "model_type is .'llama'., expected a string"),
        ('{"model_type": "mine", "architectures": 5}', "architectures is 5, expected a list"),
    ],
)
def test_source_configuration_damaged(src, text, words):
    (src / "config.json").write_text(text)
    fail_to_convert(src, CorruptDataError, f"{src}/config.json is truncated or corrupt .*{words}")


def test_source_database_missing(tmp_path):
    cases.save_pytree(tmp_path / "src", cases.flat_tree())
    (tmp_path / "src" / "manifest.ocdbt").unlink()
    fail_to_convert(tmp_path / "src", CheckpointError, "manifest.ocdbt is missing")


def test_source_database_corrupt(tmp_path):
    cases.save_pytree(tmp_path / "src", cases.flat_tree())
    for file in (tmp_path / "src").rglob("d/*"):
        truncate(file)
    fail_to_convert(tmp_path / "src", CorruptDataError, "model/layer.0")


def test_source_that_is_already_compressed(dst):
    fail_to_convert(dst, CheckpointError, "already compressed.*restore it first")


def test_source_that_is_unfinished(tmp_path):
    folder = tmp_path / "model.orbax-checkpoint-tmp"
    folder.mkdir()
    fail_to_convert(folder, CheckpointError, "not finished")


def test_source_with_several_trees(src):
    several = src.parent / "several"
    several.mkdir()
    shutil.copytree(src, several / "a")
    shutil.copytree(src, several / "b")
    fail_to_convert(several, CheckpointError, r"several trees \(a, b\)")


def test_names_that_leave_the_checkpoint(tmp_path):
    cases.write_safetensors(tmp_path / "evil.safetensors", {"a/../../../evil": np.ones((2, 2), np.float32)})
    fail_to_convert(tmp_path / "evil.safetensors", CheckpointError, "cannot be a name")
    assert only(tmp_path, "evil.safetensors")


@pytest.mark.parametrize("name", ["commit_success.txt", "manifest.ocdbt", "_METADATA", "_jaxzip/x"])
def test_names_of_a_checkpoints_own_files(tmp_path, name):
    cases.write_safetensors(tmp_path / "w.safetensors", {name: np.ones((2, 2), np.float32)})
    fail_to_convert(tmp_path / "w.safetensors", CheckpointError, f"'{name}', which cannot be a name")


@pytest.mark.parametrize("names", [("w", "w/c"), ("w/x/y", "w"), ("w.bitmap1/x", "w")])
def test_names_of_which_one_is_the_others_directory(tmp_path, names):
    arrays = {name: cases.gaussian_weights((128, 128)) for name in names}
    cases.write_safetensors(tmp_path / "w.safetensors", arrays)
    fail_to_convert(tmp_path / "w.safetensors", CheckpointError, "'w.*/.*' would be stored inside 'w")
    cases.save_standard(tmp_path / "tree", arrays)
    fail_to_convert(tmp_path / "tree", CheckpointError, "'w.*/.*' would be stored inside 'w")


def test_names_that_are_the_same_in_another_tree(tmp_path):
    cases.save_standard(tmp_path / "tree", {"a/b": np.arange(10.0), "a": {"b": np.arange(5.0)}})
    fail_to_convert(tmp_path / "tree", CheckpointError, r"tree: .* would both be called 'a/b'")


# Destinations.


def test_destination_exists(src, tmp_path):
    (tmp_path / "there").mkdir()
    for call in (checkpoint.convert, checkpoint.restore):
        with pytest.raises(CheckpointError, match="there exists; give another destination"):
            call(src if call is checkpoint.convert else checkpoint_of(src), tmp_path / "there")
    assert only(tmp_path / "there")


def test_destination_is_a_link_to_nothing(src, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="link exists; give another destination"):
        checkpoint.convert(src, tmp_path / "link")
    assert only(tmp_path, "link", "src")


def checkpoint_of(src: Path) -> Path:
    target = src.parent / "compressed"
    checkpoint.convert(src, target)
    return target


def test_destination_without_a_folder(src, tmp_path):
    with pytest.raises(CheckpointError, match="no/such is no directory"):
        checkpoint.convert(src, tmp_path / "no/such/place")


def test_destination_inside_the_source(src):
    before = cases.tree_digest(src)
    with pytest.raises(CheckpointError, match="inside the source"):
        checkpoint.convert(src, src / "new")
    assert cases.tree_digest(src) == before


def test_destination_locked_by_another_process(src, tmp_path):
    import fcntl

    partial = tmp_path / f"new{layout.PARTIAL_SUFFIX}"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process is writing"):
            checkpoint.convert(src, tmp_path / "new")


def test_one_process_at_a_time_writes_a_destination(weights, tmp_path):
    def convert(progress=None):
        checkpoint.convert(weights, tmp_path / "dst", progress=progress)

    def restore(progress=None):
        checkpoint.restore(tmp_path / "made", tmp_path / "dst", format="safetensors", progress=progress)

    def others(done, *_):
        if done > 0:
            for other in (convert, restore):
                with pytest.raises(CheckpointError, match="another process is writing .*dst; wait"):
                    other()

    checkpoint.convert(weights, tmp_path / "made")
    convert(others)
    assert checkpoint.verify(weights, tmp_path / "dst")
    shutil.rmtree(tmp_path / "dst")
    restore(others)
    assert (tmp_path / "dst" / weights.name).read_bytes() == weights.read_bytes()
    assert only(tmp_path, "dst", "made", weights.name)


def test_restored_files_that_cannot_be_written(weights, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.convert(weights, tmp_path / "made")
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match="disk full while writing .*dst"):
        checkpoint.restore(tmp_path / "made", tmp_path / "dst", format="safetensors")
    assert only(tmp_path, "made", weights.name)


@pytest.mark.parametrize("failing", [0, 5, 11])
def test_full_disk_then_room(src, tmp_path, monkeypatch, failing):
    from jaxzip.checkpoint import array_store

    real, calls = array_store.ts.open, iter(range(1000))

    def full(spec, *args, **kwargs):
        if spec.get("create") and next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(spec, *args, **kwargs)

    monkeypatch.setattr(array_store.ts, "open", full)
    with pytest.raises(CheckpointError, match="disk full while writing .*new.*run the same command again"):
        checkpoint.convert(src, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    checkpoint.convert(src, tmp_path / "new")
    assert checkpoint.verify(src, tmp_path / "new")
    assert only(tmp_path, "new", "src")


def test_full_disk_at_the_end(src, tmp_path, monkeypatch):
    from jaxzip.checkpoint import partial

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(partial, "write_tree", full)
        with pytest.raises(CheckpointError, match="disk full"):
            checkpoint.convert(src, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    checkpoint.convert(src, tmp_path / "new")
    assert checkpoint.verify(src, tmp_path / "new")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(src, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(CheckpointError, match="disk full"):
            checkpoint.convert(src, disk / "new")
        assert not (disk / "new").exists()
    finally:
        os.system(f"umount {disk}")


# Compressed checkpoints.


@pytest.mark.parametrize("field", ["bitmap1", "sign_mantissa", "full", "tile_offsets", "start_exp"])
@pytest.mark.parametrize("damage", [cases.flip_bit, truncate], ids=["flipped", "truncated"])
def test_payload_damaged(dst, field, damage):
    damage(chunk(dst / f"{STORED}.{field}"))
    with pytest.raises(CorruptDataError, match=f"{STORED}.{field}"):
        checkpoint.open_checkpoint(dst).load(KERNEL)
    with pytest.raises(CorruptDataError, match=field):
        checkpoint.restore(dst, dst.parent / "back")
    assert only(dst.parent, "dst")


@pytest.mark.parametrize("name", ["layers.0.mlp.bias", "step"])
def test_carried_over_array_damaged(dst, name):
    cases.flip_bit(chunk(dst / name))
    with pytest.raises(CorruptDataError, match=name):
        checkpoint.verify_checksums(dst)


@pytest.mark.parametrize("what", ["chunk", "array", "description"])
def test_payload_missing(dst, what):
    array = dst / f"{STORED}.full"
    if what == "array":
        shutil.rmtree(array)
    else:
        (chunk(array) if what == "chunk" else array / "zarr.json").unlink()
    with pytest.raises(CheckpointError, match=f"{STORED}.full"):
        checkpoint.open_checkpoint(dst).load(KERNEL)


def overwrite(dst: Path, name: str, change) -> None:
    """Rewrites a stored array with valid files: damage that no file checksum can tell."""
    from jaxzip.checkpoint import array_store

    array = array_store.read_array(dst, name)
    change(array)
    array_store.write_arrays(dst, {name: array})


@pytest.mark.parametrize("value", [1, 1 << 20, (1 << 32) - 1])
def test_offset_pointing_outside(dst, value):
    def change(offsets):
        offsets[1, 0] ^= np.uint32(value)

    overwrite(dst, f"{STORED}.tile_offsets", change)
    with pytest.raises(CorruptDataError, match=rf"{KERNEL} .*tile_offsets"):
        checkpoint.open_checkpoint(dst).load(KERNEL)


def test_wrong_bits_with_valid_files_fail_the_checksum(dst):
    def change(bytes_):
        bytes_[3] ^= 1

    overwrite(dst, f"{STORED}.sign_mantissa", change)
    opened = checkpoint.open_checkpoint(dst)
    opened.load(KERNEL)
    with pytest.raises(CorruptDataError, match=f"{KERNEL}: the decoded bits"):
        opened.load(KERNEL, verify=True)
    result = checkpoint.verify_checksums(dst)
    assert not result and KERNEL in str(result)


def edit_document(dst: Path, change, *, seal: bool = True) -> None:
    file = dst / layout.CHECKPOINT_FILE
    metadata = json.loads(file.read_text())
    change(metadata["custom_metadata"]["jaxzip"])
    if seal:
        metadata["custom_metadata"] = layout.custom_metadata(metadata["custom_metadata"]["jaxzip"])
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize("call", [checkpoint.open_checkpoint, checkpoint.inspect, checkpoint.verify_checksums])
def test_newer_layout_version(dst, call):
    edit_document(
        dst, lambda d: d.update(layout_version=layout.LAYOUT_VERSION + 1, library_version="9.9", tensors=None)
    )
    with pytest.raises(UnsupportedVersionError, match=r"layout version 3 \(written by jaxzip 9.9\).*upgrade"):
        call(dst)


def test_newer_format_version_and_unknown_format(dst):
    edit_document(dst, lambda d: [e.update(format_version=99) for e in d["tensors"] if e["format"] != "raw"])
    with pytest.raises(UnsupportedVersionError, match=f"{KERNEL}: tca-tbe version 99"):
        checkpoint.open_checkpoint(dst).load(KERNEL)
    edit_document(dst, lambda d: [e.update(format="zip-9000") for e in d["tensors"] if e["format"] != "raw"])
    with pytest.raises(CheckpointError, match=f"{KERNEL}: unknown format 'zip-9000'"):
        checkpoint.open_checkpoint(dst).load(KERNEL)


def test_format_version_that_is_too_old(dst, monkeypatch):
    monkeypatch.setattr(type(formats.get("tca-tbe")), "version", 3)
    monkeypatch.setattr(type(formats.get("tca-tbe")), "oldest_version", 2)
    with pytest.raises(UnsupportedVersionError, match=f"{KERNEL}: tca-tbe version 1, this jaxzip reads 2 to 3.*source"):
        checkpoint.open_checkpoint(dst).load(KERNEL)
    assert formats.get("lane-planar").oldest_version == 2  # the first version's bits lay elsewhere


def test_changed_metadata(dst):
    edit_document(dst, lambda d: d["tensors"][0].update(shape=[1]), seal=False)
    with pytest.raises(CorruptDataError, match="_CHECKPOINT_METADATA.*corrupt"):
        checkpoint.open_checkpoint(dst)


def test_metadata_and_arrays_that_disagree(dst):
    edit_document(dst, lambda d: [e.update(shape=[64, 192]) for e in d["tensors"] if "/".join(e["path"]) == KERNEL])
    with pytest.raises(CorruptDataError, match=f"{KERNEL} .*tca-tbe: bitmap1"):
        checkpoint.open_checkpoint(dst).load(KERNEL)


def test_a_tensor_below_another(dst):
    edit_document(dst, lambda d: d["tensors"][0].update(path=[*KERNEL.split("/"), "more"]))
    with pytest.raises(CheckpointError, match=f"'{KERNEL}/more' is below '{KERNEL}', which is a tensor"):
        checkpoint.restore(dst, dst.parent / "back")
    assert only(dst.parent, "dst")
    above, below = (tree_metadata.Leaf(path, (2,) * len(path), "np.ndarray") for path in (("a",), ("a", "b")))
    for pairs in ([(above, 1), (below, 2)], [(below, 2), (above, 1)]):
        with pytest.raises(CheckpointError, match="'a/b' is below 'a'"):
            tree_metadata.nest(pairs)


def test_metadata_truncated_or_missing(dst):
    truncate(dst / layout.CHECKPOINT_FILE)
    with pytest.raises(CorruptDataError, match="_CHECKPOINT_METADATA is truncated"):
        checkpoint.open_checkpoint(dst)
    (dst / layout.CHECKPOINT_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no _CHECKPOINT_METADATA"):
        checkpoint.open_checkpoint(dst)


def test_no_such_checkpoint(src, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not compressed by jaxzip"):
        checkpoint.open_checkpoint(src)


def test_no_such_tensor(dst):
    with pytest.raises(TensorNotFoundError, match=r"no tensor 'layers/0/mlp/kernal'; did you mean layers/0/mlp/kernel"):
        checkpoint.open_checkpoint(dst).load("layers/0/mlp/kernal")


@pytest.mark.parametrize("name", [KERNEL, "layers/0/mlp/bias"])
def test_load_in_an_unknown_format(dst, name):
    with pytest.raises(ValueError, match="zip-9000"):
        checkpoint.open_checkpoint(dst).load(name, format="zip-9000")


def test_restore_to_an_unknown_format_and_to_the_wrong_one(dst, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'pickle'"):
        checkpoint.restore(dst, tmp_path / "back", format="pickle")
    with pytest.raises(CheckpointError, match="made from orbax, not safetensors"):
        checkpoint.restore(dst, tmp_path / "back", format="safetensors")
    assert only(tmp_path, "dst")
