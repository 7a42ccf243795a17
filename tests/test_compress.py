"""``compress`` and ``compress_params``: what is chosen, what is reported, what is refused."""

import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxzip
from jaxzip import formats
from jaxzip.testing import all_bit_patterns, bits, gaussian_weights

COMPRESS = importlib.import_module("jaxzip.compress")  # the module, whose name a function has too


def test_compress_reports_its_size_and_keeps_the_bits():
    w = gaussian_weights((512, 1024))
    z = jaxzip.compress(w)
    assert (z.shape, z.dtype, z.format) == ((512, 1024), w.dtype, "tca-tbe")
    assert z.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(z))
    assert 11.2 < z.bits_per_weight < 11.5
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


def test_accepts_device_arrays_and_any_strides():
    w = gaussian_weights((256, 384))
    reference = jax.tree.leaves(jaxzip.compress(w))
    for same in (jnp.asarray(w), np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2]):
        for a, b in zip(jax.tree.leaves(jaxzip.compress(same)), reference, strict=True):
            assert np.array_equal(a, b)


def test_table_and_kernel_are_one_payload():
    w = gaussian_weights((256, 384))
    kernel, table = jaxzip.compress(w), jaxzip.compress(np.ascontiguousarray(w.T), output_axis=-2)
    for a, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(table), strict=True):
        assert np.array_equal(a, b)
    assert table.T.shape == kernel.shape and table.T.output_axis == kernel.output_axis


def test_what_does_not_shrink_is_raw():
    for w in (all_bit_patterns(), gaussian_weights((3, 5)), np.ones((128, 128), np.int32), gaussian_weights((4096,))):
        z = jaxzip.compress(w)
        assert z.format == "raw" and z.shape == w.shape and z.nbytes == w.nbytes
        assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


def test_layers_of_one_shape_share_a_trace():
    w = gaussian_weights((512, 512))
    a, b = jaxzip.compress(w), jaxzip.compress((w.astype(np.float32) * 16).astype(w.dtype))
    f = jax.jit(jaxzip.decompress)
    f(a), f(b)
    assert f._cache_size() == 1
    assert int(a.payload["start_exp"]) + 4 == int(b.payload["start_exp"])


def test_few_lengths_serve_many_tensors():
    """Twelve layers of one shape and different scales: coverage of Gaussians spans 0.8%, a bucket is 0.2%."""
    layers = [gaussian_weights((1024, 512), sigma=0.01 * 1.1**seed, seed=seed) for seed in range(12)]
    lengths = {tuple(leaf.shape for leaf in jax.tree.leaves(jaxzip.compress(w))) for w in layers}
    assert len(lengths) <= 5
    padded = jaxzip.compress(layers[0]).nbytes
    exact = sum(a.nbytes for a in formats.get("tca-tbe").encode(bits(layers[0]).T).values())
    assert 8 * (padded - exact) / layers[0].size < 0.1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(64, 64), (130, 70), (512, 320)])
def test_buckets_hold_their_payload(share, shape):
    w = bits(gaussian_weights(shape)).copy()
    w[np.random.default_rng(0).random(shape) < share] = 0
    fmt = formats.get("tca-tbe")
    payload = fmt.encode(w)
    lengths = fmt.bucket_lengths(payload, *shape)
    assert all(payload[name].shape[0] <= length for name, length in lengths.items())
    assert all(lengths.values())


def float64_on_host():
    return jaxzip.compress(np.array([[1 / 3, 5.0]]), on_host=True)


def test_64_bits_stay_64_bits():
    z = float64_on_host()
    assert z.dtype == np.float64 and z.payload["values"].tolist() == [[1 / 3, 5.0]]
    assert jaxzip.transcode(z, on_host=True).payload["values"].dtype == np.float64
    with jax.enable_x64(True):
        assert jaxzip.decompress(jaxzip.compress(np.array([2**40 + 1, 5]))).tolist() == [2**40 + 1, 5]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jaxzip.compress(gaussian_weights((64, 64)), format="gzip"), ValueError, "gzip.*tca-tbe"),
        (lambda: jaxzip.compress(np.ones((64, 64), np.int32), format="tca-tbe"), TypeError, "int32.*raw"),
        (lambda: jaxzip.compress(gaussian_weights((64,)), format="tca-tbe"), ValueError, "matrices"),
        (lambda: jaxzip.compress(gaussian_weights((0, 64)), format="tca-tbe"), ValueError, "no elements"),
        (lambda: jaxzip.compress(gaussian_weights((64, 64)), output_axis=0), ValueError, "output_axis"),
        (lambda: jaxzip.compress([1.0]), TypeError, "list"),
        (lambda: jaxzip.compress(jax.random.key(0)), TypeError, r"key<fry>.*jax\.random\.key_data"),
        (lambda: jax.jit(jaxzip.compress)(gaussian_weights((64, 64))), TypeError, "traced"),
        (lambda: jaxzip.CompressionRule(format="gzip"), ValueError, "gzip"),
        (lambda: jaxzip.CompressionRule(output_axis=5), ValueError, "CompressionRule: output_axis is 5, expected -1"),
        (lambda: jaxzip.compress(np.array([2**40 + 1, 5])), TypeError, "int64.*int32.*jax_enable_x64.*on_host"),
        (lambda: jaxzip.decompress(float64_on_host()), TypeError, "float64.*float32.*jax_enable_x64"),
        (lambda: jaxzip.transcode(float64_on_host()), TypeError, "float64.*float32.*on_host"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def _params():
    return {
        "embedder": {"embedding": gaussian_weights((300, 128))},
        "layers": [{"mlp": {"kernel": gaussian_weights((128, 256))}, "norm": {"scale": np.ones(128, np.float32)}}],
        "half": np.ones((128, 64), np.float16),
        "step": np.int32(3),
    }


def test_default_rules_compress_what_can_be_and_say_why_not():
    params = _params()
    tree, report = jaxzip.compress_params(params)
    rows = {row.path: row for row in report.tensors}
    assert tree["embedder"]["embedding"].output_axis == -2
    assert tree["layers"][0]["mlp"]["kernel"].output_axis == -1
    assert tree["layers"][0]["norm"]["scale"] is params["layers"][0]["norm"]["scale"]
    assert rows["layers/0/mlp/kernel"].format == "tca-tbe" and rows["layers/0/mlp/kernel"].coverage > 0.9
    assert "rank" in rows["layers/0/norm/scale"].note
    assert rows["half"].format == "split-fp16" and "float16" in rows["half"].note
    assert report.original_bytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(params))
    assert report.stored_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert report.unused_rules == ()
    for key in ("embedder/embedding", "layers/0/mlp/kernel"):
        assert key in str(report)


def test_first_rule_wins_and_unused_rules_are_reported():
    rules = [
        jaxzip.CompressionRule(r".*mlp.*", format="raw"),
        jaxzip.CompressionRule(r".*kernel"),
        jaxzip.CompressionRule(r"nothing"),
    ]
    tree, report = jaxzip.compress_params(_params(), rules)
    assert not isinstance(tree["layers"][0]["mlp"]["kernel"], jaxzip.CompressedTensor)
    assert report.unused_rules == tuple(rules[1:])
    assert "matched nothing" in str(report)


def test_a_rule_that_cannot_be_followed_names_the_leaf():
    params, rule = {"a": {"kernel": np.ones((64, 64), np.float32)}}, jaxzip.CompressionRule(format="split-fp16")
    with pytest.raises(TypeError, match="a/kernel.*split-fp16.*float32"):
        jaxzip.compress_params(params, [rule])
    with pytest.raises(TypeError, match="kernel: .* compress outside of jit"):
        jax.jit(jaxzip.compress_params)({"kernel": gaussian_weights((64, 64))})


def test_typed_prng_keys_stay_as_they_are():
    params = {"rng": jax.random.key(0), "w": gaussian_weights((64, 128))}
    tree, report = jaxzip.compress_params(params)
    rows = {row.path: row for row in report.tensors}
    assert tree["rng"] is params["rng"] and tree["w"].format == "tca-tbe"
    assert rows["rng"].dtype == "key<fry>" and rows["rng"].original_bytes == 8


def test_an_empty_tensor_has_no_bits():
    z = jaxzip.compress(np.ones((0, 4), np.float32))
    assert z.bits_per_weight == 0 and "0.00 bits" in repr(z)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_numpy_multiplies_by_a_compressed_tensor(dtype):
    x, z = np.ones((2, 64), dtype), jaxzip.compress(gaussian_weights((64, 128)))
    assert np.array_equal(bits(x @ z), bits(jaxzip.matmul(x, z)))


def test_rules_match_the_whole_path():
    assert not jaxzip.CompressionRule("mlp").matches("layers/0/mlp/kernel")


def test_nnx_state_compresses_in_place_of_its_parameters():
    from flax import nnx

    model = nnx.Linear(256, 128, param_dtype=ml_dtypes.bfloat16, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    tree, report = jaxzip.compress_params(state)
    assert "kernel" in {row.path for row in report.tensors}
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jaxzip.CompressedTensor))
    assert any(isinstance(leaf, jaxzip.CompressedTensor) for leaf in leaves)


def test_a_weight_whose_device_encodes_does_not_go_to_the_host(monkeypatch):
    w = jnp.asarray(gaussian_weights((100, 70)))
    expected = jaxzip.compress(w, format="lane-planar")
    monkeypatch.setattr(COMPRESS, "_device_encodes", lambda *_: True)
    monkeypatch.setattr(COMPRESS, "encode_as", None)
    found = jaxzip.compress(w, format="lane-planar")
    for name, leaf in expected.payload.items():
        assert np.array_equal(found.payload[name], leaf)
    assert jaxzip.compress(jnp.ones((64, 1), jnp.bfloat16), format="lane-planar").format == "raw"  # not smaller
