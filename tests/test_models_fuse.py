"""Fused projections: the bits of the parts side by side, without decoding where a format allows it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import Llama, LlamaConfig, fuse_projections, generate, load_model, random_params
from jaxzip.models.fuse import concatenate_outputs, concatenate_stacks, is_fused, raw_kernel
from test_cli import converted, source  # noqa: F401 - fixtures

import jaxzip
from jaxzip.ops import host
from jaxzip.testing import bits, gaussian_weights

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    max_position_embeddings=128, dtype="bfloat16",
)  # fmt: skip


def hard_weights(shape, seed, share):
    """Gaussian weights with a scale for each output; a share has any exponent, so that blocks overflow."""
    rng = np.random.default_rng(seed)
    w = np.asarray(gaussian_weights(shape, seed=seed)).copy()
    pattern = w.view(np.uint16)
    pattern[w != 0] -= np.broadcast_to(rng.integers(0, 6, shape[1]) << 7, shape)[w != 0].astype(np.uint16)
    if share:
        wild = rng.random(shape) < share
        wild[:64, :64] |= rng.random((64, 64)) < 0.05  # a block of more escapes than it has room for
        pattern[wild] = rng.integers(70 << 7, 180 << 7, wild.sum(), dtype=np.uint16)
    return w


def side_by_side(widths, shares, format, on_host):
    parts = [hard_weights((520, m), i, share) for i, (m, share) in enumerate(zip(widths, shares))]
    encoded = [jaxzip.compress(w, format=format, on_host=on_host) for w in parts]
    return np.concatenate(parts, axis=1), encoded


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("widths", [(192, 64, 128), (64, 122), (250, 64)])
def test_fused_lane_planar_weights_have_the_bits_of_their_parts(widths, on_host):
    whole, parts = side_by_side(
        widths, (0.003, 0.0, 0.003) if len(widths) == 3 else (0.003, 0.003), "lane-planar", on_host
    )
    assert np.count_nonzero(parts[0].payload["overflow"]) and np.count_nonzero(parts[-1].payload["overflow"])
    assert len(widths) == 2 or len({p.payload["blocks"].shape[-1] for p in parts}) > 1
    fused = concatenate_outputs(parts)
    assert fused.format == "lane-planar" and fused.shape == whole.shape
    assert all(isinstance(leaf, np.ndarray) == on_host for leaf in fused.payload.values())
    payload = host.matrix(fused, ())
    for implementation in ("reference", "ffi"):
        host.validate(payload, "lane-planar", *fused.matrix_shape, implementation=implementation)
    assert np.array_equal(bits(jaxzip.decompress(jax.tree.map(jnp.asarray, fused))), bits(whole))
    x = jax.random.normal(jax.random.key(0), (5, 520), jnp.bfloat16)
    each = jnp.concatenate([jaxzip.matmul(x, p, implementation="ffi") for p in parts], axis=1)
    assert np.array_equal(bits(jaxzip.matmul(x, fused, implementation="ffi")), bits(each))


def test_parts_are_left_alone():
    _, parts = side_by_side((64, 64), (0.02, 0.02), "lane-planar", True)
    before = [{name: a.copy() for name, a in p.payload.items()} for p in parts]
    concatenate_outputs(parts)
    for payload, part in zip(before, parts):
        assert all(np.array_equal(payload[name], part.payload[name]) for name in payload)


@pytest.mark.parametrize(
    "formats", [("tca-tbe", "tca-tbe"), ("raw", "raw"), ("lane-planar", "raw"), ("raw", "tca-tbe")]
)
def test_other_formats(formats):
    parts = [hard_weights((512, m), m, 0.001) for m in (64, 128)]
    encoded = [jaxzip.compress(w, format=f, on_host=True) for w, f in zip(parts, formats)]
    fused = concatenate_outputs(encoded)
    assert fused.format == next((f for f in formats if f != "raw"), "raw")
    assert np.array_equal(bits(jaxzip.decompress(jax.tree.map(jnp.asarray, fused))), bits(np.concatenate(parts, 1)))


FUSIONS = {
    "kernels": concatenate_outputs,
    "raw": lambda parts: concatenate_outputs(list(map(raw_kernel, parts))).payload["values"],
    "stacks": concatenate_stacks,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_dense_parts_keep_every_bit_pattern(fusion, dtype):
    patterns = np.arange(65536, dtype=np.uint16)
    shape = (2, 128, 256) if fusion == "stacks" else (256, 256)
    parts = [patterns.reshape(shape), patterns[::-1].reshape(shape)]
    if dtype == "float32":
        parts = [(p.astype(np.uint32) << 16) | p for p in parts]
    fused = FUSIONS[fusion]([jnp.asarray(p.view(jnp.dtype(dtype))) for p in parts])
    assert fused.dtype == dtype
    assert np.array_equal(np.asarray(fused).view(parts[0].dtype), np.concatenate(parts, axis=-1))


def test_raw_transposed_parts():
    parts = [hard_weights((512, m), m, 0.0) for m in (64, 128)]
    encoded = [jaxzip.compress(w.T, format="raw", output_axis=-2, on_host=True).T for w in parts]
    assert np.array_equal(bits(concatenate_outputs(encoded).payload["values"]), bits(np.concatenate(parts, 1)))


def test_what_cannot_be_fused():
    w = gaussian_weights((64, 64))
    with pytest.raises(ValueError, match="of one K"):
        concatenate_outputs([w, gaussian_weights((128, 64))])
    with pytest.raises(ValueError, match="table"):
        concatenate_outputs([jaxzip.compress(w, format="lane-planar", output_axis=-2)] * 2)


def compressed(params, format):
    rules = (
        jaxzip.CompressionRule(r"(.*/)?embedding", format, output_axis=-2, min_size=1),
        jaxzip.CompressionRule(r".*", format, min_size=1),
    )
    return jaxzip.compress_params(params, rules)[0]


@pytest.mark.parametrize("format", ["dense", "lane-planar", "tca-tbe"])
def test_a_fused_model_gives_the_logits_of_the_unfused_one(format):
    params = random_params(CONFIG)
    params = params if format == "dense" else compressed(params, format)
    fused = fuse_projections(params)
    assert is_fused(fused) and not is_fused(params)
    again = fuse_projections(fused)
    assert jax.tree.structure(again) == jax.tree.structure(fused)
    assert set(fused["layers"]["0"]["attn"]) == {"qkv_proj", "o_proj"}
    assert set(params["layers"]["0"]["attn"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    one, other = (Llama.from_params(CONFIG, p) for p in (params, fused))
    tokens = [[5, 17, 3, 88], [1, 2]]
    a, b = (generate(m, tokens, max_new_tokens=9, return_logits=True) for m in (one, other))
    assert a.sequences() == b.sequences()
    if format != "dense":  # the fused kernels' sums do not depend on the number of outputs
        assert np.array_equal(bits(a.logits), bits(b.logits))
    assert jax.tree.structure(other.to_params()) == jax.tree.structure(fused)


@pytest.mark.parametrize("format", [None, "lane-planar"])
def test_loading_a_checkpoint_fused(converted, format):  # noqa: F811
    (fused, _), (plain, _) = (load_model(converted, format=format, fuse=fuse) for fuse in (True, False))
    assert is_fused(fused.to_params()) and not is_fused(plain.to_params())
    a, b = (generate(m, [[3, 4, 5]], max_new_tokens=6, return_logits=True) for m in (fused, plain))
    assert np.array_equal(bits(a.logits), bits(b.logits))
    assert not is_fused(load_model(converted)[0].to_params())  # on a CPU nothing is gained


def test_fused_parameters_are_checked():
    fused = fuse_projections(random_params(CONFIG))
    del fused["layers"]["1"]["mlp"]["gate_up_proj"]
    with pytest.raises(ValueError, match="layers/1/mlp/gate_up_proj/kernel is missing"):
        Llama.from_params(CONFIG, fused)


def test_layers_of_one_shape_share_one_trace():
    config = dataclasses.replace(CONFIG, num_layers=8, vocab_size=101)
    params = fuse_projections(compressed(random_params(config), "lane-planar"))
    shapes = [tuple(leaf.shape for leaf in jax.tree.leaves(layer)) for layer in params["layers"].values()]
    assert len(set(shapes)) < len(shapes)  # blocks have one of five widths, all else is equal
    # A block's trace is one function of the module, called by every layer of its signature.
    text = jax.jit(Llama.__call__).lower(Llama.from_params(config, params), jnp.zeros((2, 7), jnp.int32)).as_text()
    assert len(re.findall(r"call @run_block", text)) == len(shapes)
    assert len(re.findall(r"func private @run_block", text)) == len(set(shapes))
