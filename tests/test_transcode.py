"""``transcode`` and ``load(format=)``: the arrays that compressing the dense tensor gives; what ``auto`` chooses."""

import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner
from weights import named_weights

import jaxzip
from jaxzip import checkpoint, formats
from jaxzip.cli import app
from jaxzip.compress import best_format, encode_as
from jaxzip.formats import auto
from jaxzip.ops import host
from jaxzip.testing import BF16, bits, gaussian_weights

WEIGHTS = named_weights()
FORMATS = ("tca-tbe", "lane-planar", "raw")


def assert_same_tensor(a, b):
    assert (a.shape, a.dtype, a.format, a.output_axis) == (b.shape, b.dtype, b.format, b.output_axis)
    assert list(a.payload) == list(b.payload)
    for name in b.payload:
        x, y = np.asarray(a.payload[name]), np.asarray(b.payload[name])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_payloads_are_those_of_the_encoder(name, implementation):
    matrix = bits(WEIGHTS[name]).T
    m, k = matrix.shape
    payloads = {f: host.encode(matrix, f) for f in FORMATS[:2]}
    for source, target in (FORMATS[:2], FORMATS[1::-1]):
        found = host.transcode(payloads[source], source, target, m, k, implementation=implementation)
        for field, array in payloads[target].items():
            assert (found[field].dtype, found[field].shape) == (array.dtype, array.shape)
            assert found[field].tobytes() == array.tobytes(), (source, target, field)


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("output_axis", [-1, -2])
@pytest.mark.parametrize("shape", [(320, 256), (2, 3, 180, 250)])
def test_equals_compressing_the_dense_tensor(source, target, output_axis, shape):
    w = gaussian_weights(shape)
    z = jaxzip.compress(w, format=source, output_axis=output_axis)
    assert z.format == source
    assert_same_tensor(jaxzip.transcode(z, target), jaxzip.compress(w, format=target, output_axis=output_axis))


@pytest.mark.parametrize("name", ["all NaN", "all zeros", "gaussian 3x5", "uniform exponents", "bimodal"])
@pytest.mark.parametrize("direction", [FORMATS[:2], FORMATS[1::-1]])
def test_what_would_not_shrink_becomes_raw(name, direction):
    source, target = direction
    w = WEIGHTS[name]
    z = encode_as(w, source, -1)
    found = jaxzip.transcode(z, target)
    assert_same_tensor(found, jaxzip.compress(w, format=target))
    assert np.array_equal(bits(jaxzip.decompress(found)), bits(w))


def test_same_format_comes_back_as_it_is():
    z = jaxzip.compress(gaussian_weights((128, 256)))
    assert jaxzip.transcode(z, "tca-tbe").payload["full"] is z.payload["full"]
    assert isinstance(jaxzip.transcode(z, "lane-planar", on_host=True).payload["blocks"], np.ndarray)


def test_transposed_tensors_keep_their_meaning():
    w = gaussian_weights((128, 256))
    for source in FORMATS:
        for target in FORMATS:
            z = jaxzip.transcode(jaxzip.compress(w, format=source).T, target)
            assert z.shape == (256, 128)
            assert np.array_equal(bits(jaxzip.decompress(z)), bits(w.T))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jaxzip.transcode(np.ones(3), "raw"), TypeError, "CompressedTensor"),
        (lambda: jaxzip.transcode(jaxzip.compress(gaussian_weights((64, 64))), "zip"), ValueError, "lane-planar"),
        (lambda: jaxzip.transcode(jaxzip.compress(np.ones((64, 64), np.float32)), "tca-tbe"), TypeError, "float32"),
        (
            lambda: jax.jit(lambda z: jaxzip.transcode(z, "raw"))(jaxzip.compress(gaussian_weights((256, 256)))),
            TypeError,
            "traced",
        ),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_what_has_no_format_stays_raw_with_auto():
    for w in (np.ones((64, 64), np.float64), np.ones((64, 64), np.int8), np.ones(5000, BF16)):
        assert jaxzip.transcode(jaxzip.compress(w, on_host=True), on_host=True).format == "raw"


# --- Checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return {
        "layers": {"0": {"mlp": {"kernel": gaussian_weights((256, 384))}, "norm": {"scale": np.ones(256, np.float32)}}},
        "embedder": {"embedding": gaussian_weights((512, 128))},
        "stack": gaussian_weights((2, 192, 256)),
        "tiny": gaussian_weights((8, 8)),
    }


@pytest.fixture(scope="module", params=["auto", "lane-planar"])
def converted(request, params, tmp_path_factory):
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("ckpt")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "src", params)
    rules = [
        jaxzip.CompressionRule(r".*embedding", format=request.param, output_axis=-2),
        jaxzip.CompressionRule(format=request.param),
    ]
    report = checkpoint.convert(folder / "src", folder / "dst", rules=rules)
    expected = "tca-tbe" if request.param == "auto" else request.param
    assert {r.format for r in report.tensors if r.format != "raw"} == {expected}
    return folder, expected


def test_checkpoint_round_trip(converted, params):
    folder, stored = converted
    assert checkpoint.verify(folder / "src", folder / "dst")
    assert checkpoint.verify_checksums(folder / "dst")
    rows = {row["path"]: row for row in checkpoint.inspect(folder / "dst")["tensors"]}
    assert rows["stack"]["format"] == stored and rows["stack"]["coverage"] > 0.9 and rows["tiny"]["format"] == "raw"
    loaded = checkpoint.open_checkpoint(folder / "dst").load_tree()
    for (path, w), z in zip(
        jax.tree_util.tree_flatten_with_path(params)[0],
        jax.tree.leaves(loaded, is_leaf=lambda leaf: isinstance(leaf, jaxzip.CompressedTensor)),
        strict=True,
    ):
        dense = jaxzip.decompress(z) if isinstance(z, jaxzip.CompressedTensor) else z
        assert np.array_equal(bits(dense), bits(w)), path
    restored = folder / "restored"
    if not restored.exists():
        checkpoint.restore(folder / "dst", restored)
        assert checkpoint.verify(restored, folder / "dst")


def test_command_line(converted, tmp_path):
    folder, _ = converted

    def run(*args):
        return CliRunner().invoke(app, [str(arg) for arg in args])

    options = ("--format", "lane-planar", "--rule", "stack=tca-tbe", "--rule", "nothing=raw")
    result = run("convert", folder / "src", tmp_path / "dst", *options)
    assert result.exit_code == 0, result.output
    rows = {row["path"]: row["format"] for row in checkpoint.inspect(tmp_path / "dst")["tensors"]}
    assert rows["embedder/embedding"] == rows["layers/0/mlp/kernel"] == "lane-planar" and rows["stack"] == "tca-tbe"
    assert "lane-planar" in run("inspect", tmp_path / "dst").stdout
    assert "identical" in run("verify", folder / "src", tmp_path / "dst").stdout
    assert run("restore", tmp_path / "dst", tmp_path / "back").exit_code == 0
    assert checkpoint.verify(tmp_path / "back", tmp_path / "dst")
    assert run("convert", folder / "src", tmp_path / "other", "--format", "zip").exit_code == 1


@pytest.mark.parametrize("format", FORMATS)
def test_load_in_another_format(converted, params, format):
    folder, _ = converted
    opened = checkpoint.open_checkpoint(folder / "dst")
    z = opened.load("stack", format=format, verify=True)
    assert_same_tensor(z, jaxzip.compress(params["stack"], format=format, on_host=True))
    assert all(isinstance(leaf, np.ndarray) for leaf in z.payload.values())
    assert isinstance(opened.load("tiny", format=format), np.ndarray)
    tree = opened.load_tree(format=format)
    assert tree["embedder"]["embedding"].format == tree["layers"]["0"]["mlp"]["kernel"].format == format
    assert_same_tensor(
        tree["embedder"]["embedding"],
        jaxzip.compress(params["embedder"]["embedding"], format=format, output_axis=-2),
    )


def test_load_auto_follows_the_sharding(converted, preferences):
    folder, stored = converted
    opened = checkpoint.open_checkpoint(folder / "dst")
    assert opened.load_tree(format="auto")["stack"].format == stored
    auto.prefer("lane-planar", platform="cpu")
    for sharding in (None, jax.sharding.SingleDeviceSharding(jax.devices()[1]), lambda name: None):
        assert opened.load_tree(format="auto", sharding=sharding)["stack"].format == "lane-planar"
    assert opened.load_tree()["stack"].format == stored
    with pytest.raises(ValueError, match="zip"):
        opened.load("stack", format="zip")


# --- What "auto" means -----------------------------------------------------------------------------------------


@pytest.fixture
def preferences(monkeypatch):
    best_format(np.float32)  # backends have said theirs
    monkeypatch.setattr(auto, "_preferences", [])


def gpu(capability, platform="gpu"):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


def test_auto_chooses_by_device(preferences):
    auto.prefer("lane-planar", platform="cuda", compute_capability=(9, 0))
    assert auto.choose(BF16, gpu("9.0")) == "lane-planar"
    assert auto.choose(BF16, gpu("9.0", "cuda")) == "lane-planar"
    for other in (gpu("8.9"), gpu("10.0"), gpu("gfx90a"), gpu("9.0", "tpu"), jax.devices("cpu")[0]):
        assert auto.choose(BF16, other) == "tca-tbe"
    for dtype, own in ((np.float32, "split-fp32"), (np.float16, "split-fp16"), (np.int8, "raw"), (np.float64, "raw")):
        assert auto.choose(dtype, gpu("9.0")) == auto.choose(dtype, gpu("8.0")) == auto.for_storage(dtype) == own
    assert auto.for_storage(ml_dtypes.bfloat16) == "tca-tbe"


def test_the_last_preference_wins(preferences):
    auto.prefer("lane-planar", platform="cuda")
    auto.prefer("raw", platform="cuda", compute_capability=(8, 0))
    auto.prefer("lane-planar", platform="cuda")
    assert auto.choose(BF16, gpu("8.0")) == "lane-planar"


def test_compress_follows_the_default_device_but_storage_does_not(preferences):
    w = gaussian_weights((128, 256))
    assert jaxzip.compress(w).format == "tca-tbe"
    auto.prefer("lane-planar", platform="cpu")
    assert jaxzip.compress(w).format == "lane-planar"
    assert jaxzip.compress_params({"kernel": w})[0]["kernel"].format == "lane-planar"
    assert jaxzip.compress(w, on_host=True).format == "tca-tbe"
    assert jaxzip.transcode(jaxzip.compress(w, on_host=True)).format == "lane-planar"
    with jax.default_device(jax.devices()[2]):
        assert auto.default_device() == jax.devices()[2]
        assert jaxzip.compress(w).format == "lane-planar"
    assert {"tca-tbe", "lane-planar", "raw"} <= set(formats.names())


def test_multiplying_with_either_format_gives_the_same_bits():
    w, x = gaussian_weights((256, 192)), jnp.ones((3, 256), jnp.bfloat16)
    z = jaxzip.compress(w)
    assert np.array_equal(bits(x @ z), bits(x @ jaxzip.transcode(z, "lane-planar")))
