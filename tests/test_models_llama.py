"""The Llama model against a NumPy fp64 reference, dense against compressed, and parameter trees in and out."""

import dataclasses

import jax
import jax.numpy as jnp
import llama_reference
import numpy as np
import pytest
from flax import nnx
from jaxzip.models import KVCache, Llama, Llama3RopeScaling, LlamaConfig, random_params
from jaxzip.models.attention import QUERY_BLOCK, attend
from jaxzip.models.rope import inverse_frequencies

import jaxzip
from jaxzip.testing import bits

TINY = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=128, dtype="float32",
)  # fmt: skip
SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
TOKENS = [5, 17, 3, 88, 41, 2, 60]


def compressed(params):
    rules = (jaxzip.CompressionRule(r"(.*/)?embedding", output_axis=-2, min_size=1), jaxzip.CompressionRule(min_size=1))
    return jaxzip.compress_params(params, rules)[0]


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "rope_scaling": SCALING}, {"num_kv_heads": 4, "head_dim": 8, "rope_theta": 5e5}],
    ids=["separate head", "tied head, scaled RoPE", "multi-head, narrow heads"],
)
def test_logits_match_the_reference(changes):
    config = dataclasses.replace(TINY, **changes)
    params = random_params(config)
    found = np.asarray(jax.jit(Llama.__call__)(Llama.from_params(config, params), jnp.array([TOKENS])))[0]
    expected = llama_reference.logits(config, params, TOKENS)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compressed_weights_give_the_dense_bits(tied, dtype):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied, dtype=dtype)
    params = random_params(config, dtype="bfloat16")
    params_z = compressed(params)
    assert params_z["embedder"]["embedding"].format != "raw"
    assert params_z["layers"]["0"]["mlp"]["up_proj"]["kernel"].format != "raw"
    run = jax.jit(Llama.__call__)
    tokens = jnp.array([TOKENS])
    dense = run(Llama.from_params(config, params), tokens)
    assert np.array_equal(bits(dense), bits(run(Llama.from_params(config, params_z, implementation="xla"), tokens)))


def test_raw_control_and_best_implementation_agree_with_dense():
    config = dataclasses.replace(TINY, tie_word_embeddings=True)
    params = random_params(config, dtype="bfloat16")
    raw = jax.tree_util.tree_map_with_path(
        lambda path, w: (
            jaxzip.compress(w, format="raw", output_axis=-2 if "embedding" in str(path) else -1) if w.ndim == 2 else w
        ),
        params,
    )
    run, tokens = jax.jit(Llama.__call__), jnp.array([TOKENS])
    dense = run(Llama.from_params(config, params), tokens)
    for tree in (raw, compressed(params)):
        np.testing.assert_allclose(run(Llama.from_params(config, tree), tokens), dense, rtol=1e-4, atol=1e-4)


def test_unknown_implementation_is_refused():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    model = Llama.from_params(config, compressed(random_params(config)), implementation="abacus")
    with pytest.raises(ValueError, match="unknown implementation 'abacus'"):
        model(jnp.array([TOKENS]))


def test_default_rules_compress_a_model_and_orient_the_table():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params_z, report = jaxzip.compress_params(random_params(config))
    paths = {row.path for row in report.tensors if row.format != "raw"}
    assert {
        "embedder/embedding",
        "lm_head/kernel",
        "layers/0/attn/q_proj/kernel",
        "layers/1/mlp/down_proj/kernel",
    } <= paths
    assert params_z["embedder"]["embedding"].output_axis == -2 and not report.unused_rules
    Llama.from_params(config, params_z)


def test_rope_scaling_by_hand():
    config = dataclasses.replace(
        TINY, head_dim=128, rope_theta=5e5, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    found = inverse_frequencies(config)
    assert np.allclose(found, llama_reference.frequencies(config), rtol=1e-6, atol=0)
    plain = 5e5 ** -(np.arange(0, 128, 2) / 128)
    assert np.allclose(found[:20], plain[:20], rtol=1e-6) and np.allclose(found[-10:], plain[-10:] / 8, rtol=1e-6)


def test_attention_in_query_blocks_is_attention():
    length, keys = 2 * QUERY_BLOCK, jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, length, 2, 4))
    k, v = (jax.random.normal(key, (2, 1, length, 4)) for key in keys[1:])
    start = jnp.array([0, 300], jnp.int32)
    whole = attend(q, k, v, start, jnp.int32(0))
    tail = attend(q[:, -7:], k, v, start, jnp.int32(length - 7))
    np.testing.assert_allclose(whole[:, -7:], tail, rtol=1e-5, atol=1e-6)
    assert np.isfinite(whole).all()  # rows in the padding as well


def test_prefill_is_hidden_on_an_empty_cache():
    model = Llama.from_params(TINY, random_params(TINY))
    tokens, start = jnp.array([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]), jnp.array([2, 0], jnp.int32)
    found = jax.jit(lambda: model.prefill(tokens, start, 9))()
    expected = jax.jit(lambda: model.hidden(tokens, KVCache.empty(TINY, start, 9)))()
    assert int(found[1].end) == 5 and found[1].keys[0].shape[2] == 9
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(bits(a), bits(b))


def test_building_allocates_nothing():
    config = dataclasses.replace(TINY, vocab_size=1 << 20, hidden_size=1 << 14)  # 64 GiB of embeddings
    leaves = jax.tree.leaves(Llama(config).to_params())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_params_are_shared_not_copied():
    params = jax.tree.map(jnp.asarray, random_params(TINY))
    model = Llama.from_params(TINY, params)
    back = model.to_params()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_nnx_transformations_take_compressed_weights():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    model = Llama.from_params(config, compressed(random_params(config)))
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    kernel = copy.layers[1].mlp.down_proj.kernel.get_value()
    assert isinstance(kernel, jaxzip.CompressedTensor) and kernel.shape == (128, 64)
    tokens = jnp.array([TOKENS])
    jitted = nnx.jit(lambda m, t: m(t))(copy, tokens)
    assert np.array_equal(bits(jitted), bits(jax.jit(lambda s: nnx.merge(graphdef, s)(tokens))(state)))
    assert jax.eval_shape(lambda s: nnx.merge(graphdef, s)(tokens), state).shape == (1, 7, 96)


def test_wrong_params_are_named():
    params = random_params(TINY)
    del params["layers"]["1"]["mlp"]["up_proj"]
    params["layers"]["0"]["attn"]["q_proj"]["kernel"] = np.zeros((64, 32), np.float32)
    params["extra"] = {"scale": np.zeros(3, np.float32)}
    with pytest.raises(ValueError) as error:
        Llama.from_params(TINY, params)
    for part in (
        "layers/1/mlp/up_proj/kernel is missing",
        "q_proj/kernel has shape (64, 32)",
        "(64, 64)",
        "extra/scale",
    ):
        assert part in str(error.value)
    with pytest.raises(TypeError, match="final_norm/scale is an array of int32"):
        Llama.from_params(TINY, {**random_params(TINY), "final_norm": {"scale": np.zeros(64, np.int32)}})


def test_table_compressed_as_a_kernel_is_refused():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(config)
    params["embedder"]["embedding"] = jaxzip.compress(params["embedder"]["embedding"])
    with pytest.raises(ValueError, match="embedder/embedding is compressed with output_axis=-1"):
        Llama.from_params(config, params)
