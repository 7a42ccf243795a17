"""A whole model on a Hopper GPU: the bits of ``raw`` weights, whatever the batch; no copies; the memory planned."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import made_of_shape, weight_shapes
from jaxzip.models import GREEDY, Llama, LlamaConfig, fuse_projections, generate, memory_plan, random_params
from jaxzip.models.attention import _append_and_attend, _kernel_for_each, _kernel_for_one
from jaxzip.models.decode_attention import FIXED

import jaxzip
from jaxzip.testing import bits

internals = importlib.import_module("jaxzip.models.generate")
CHUNK = FIXED[0]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_hopper"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=256, intermediate_size=640, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=32,
    max_position_embeddings=1024, dtype="bfloat16",
)  # fmt: skip
TOKENS = [[5, 17, 3, 88, 41, 2, 60], [400, 1, 2, 3, 4, 5, 6]]


def compressed(params, format):
    def compress(path, w):
        axis = -2 if "embedding" in jax.tree_util.keystr(path) else -1
        return jaxzip.compress(w, format=format, output_axis=axis) if w.ndim == 2 else w

    return jax.tree_util.tree_map_with_path(compress, params)


def model(config, params, format, fused=False, implementation="ffi"):
    tree = compressed(params, format)
    return Llama.from_params(config, fuse_projections(tree) if fused else tree, implementation=implementation)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_tokens_equal_those_of_the_raw_control(tied, fused):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = random_params(config)
    encoded, raw = (model(config, params, format, fused) for format in ("lane-planar", "raw"))
    assert encoded.to_params()["layers"]["0"]["mlp"]["down_proj"]["kernel"].format == "lane-planar"
    run = jax.jit(Llama.__call__)
    logits = run(encoded, jnp.array(TOKENS))
    assert np.isfinite(np.asarray(logits, np.float32)).all()
    assert np.asarray(logits).tobytes() == np.asarray(run(raw, jnp.array(TOKENS))).tobytes()
    options = {"max_new_tokens": 24, "return_logits": True}
    one, control, again = (generate(m, TOKENS, **options) for m in (encoded, raw, encoded))
    assert one.sequences() == control.sequences()
    assert one.logits.tobytes() == control.logits.tobytes() == again.logits.tobytes()


@pytest.mark.parametrize("batch", [2, 5, 17, 64])
def test_tokens_do_not_depend_on_the_batch(batch):
    encoded = model(CONFIG, random_params(CONFIG), "lane-planar", fused=True)
    rng = np.random.default_rng(batch)
    prompts = [rng.integers(0, 500, length).tolist() for length in rng.integers(1, 150, batch)]
    options = {"max_new_tokens": 40, "return_logits": True, "batch_invariant": True}
    together = generate(encoded, prompts, **options)
    for row in (0, batch // 2, batch - 1):
        alone = generate(encoded, [prompts[row]], **options)
        assert alone.sequences()[0] == together.sequences()[row]
        assert alone.logits[0].tobytes() == together.logits[row].tobytes()


def attention_case(length):
    batch, heads, kv_heads, head_dim, slots = 3, 10, 2, 128, 2 * CHUNK + 57
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    angles = jax.random.normal(keys[0], (batch, length, head_dim // 2))
    cache = [draw(key, batch, kv_heads, slots, head_dim) for key in keys[1:3]]
    qkv = draw(keys[3], batch, length, (heads + 2 * kv_heads) * head_dim)
    return (qkv, jnp.cos(angles), jnp.sin(angles), *cache, jnp.array([0, 130, 60], jnp.int32)), heads


@pytest.mark.parametrize(("length", "end"), [(1, 130), (1, 2 * CHUNK + 56), (40, 150)])
def test_attention_kernel(length, end):
    arguments, heads = attention_case(length)
    kernel = _kernel_for_one if length == 1 else lambda *a: _kernel_for_each(*a, num_heads=heads)
    out, keys, values = jax.jit(kernel)(*arguments, jnp.int32(end))
    expected, *cache = jax.jit(lambda *a: _append_and_attend(*a, num_heads=heads))(*arguments, jnp.int32(end))
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.02)
    assert np.array_equal(bits(values), bits(cache[1]))
    np.testing.assert_allclose(np.asarray(keys, np.float32), np.asarray(cache[0], np.float32), rtol=0.01, atol=1e-5)


def test_no_weight_is_copied_and_the_cache_is_updated_in_place():
    encoded = model(CONFIG, random_params(CONFIG), "lane-planar", fused=True)
    setup = internals._Setup.of(encoded, TOKENS, 16, GREEDY, None, None, 0)
    run = internals._start(setup.static, False, setup.weights, setup.inputs)
    program = internals._advance.lower(
        setup.static, setup.weights, setup.inputs, run, np.int32(9), setup.static.look_every
    ).compile()
    assert made_of_shape(program.as_text(), weight_shapes(setup.weights)) == []
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= sum(leaf.nbytes for leaf in (*run.cache.keys, *run.cache.values))
    assert analysis.temp_size_in_bytes < 1 << 20


def test_prefill_decodes_weights_into_one_scratch():
    config = dataclasses.replace(CONFIG, hidden_size=1024, intermediate_size=4096, num_heads=8, head_dim=128)

    def temporary(layers):
        deep = dataclasses.replace(config, num_layers=layers)
        encoded = model(deep, random_params(deep), "lane-planar", fused=True, implementation=None)
        setup = internals._Setup.of(encoded, [list(range(400))], 16, GREEDY, None, None, 0)
        return internals._start.lower(setup.static, False, setup.weights, setup.inputs).compile().memory_analysis()

    few, many = (temporary(layers).temp_size_in_bytes for layers in (2, 6))
    assert many < 1.2 * few


def test_peak_memory_is_the_planned():
    config = dataclasses.replace(
        CONFIG, hidden_size=2048, intermediate_size=8192, num_heads=16, head_dim=128, num_layers=4, vocab_size=32000
    )
    encoded = model(config, random_params(config), "lane-planar", fused=True, implementation=None)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(encoded.to_params()))
    setup = internals._Setup.of(encoded, [list(range(500))] * 8, 64, GREEDY, None, None, 0)
    a = internals._generate.lower(setup.static, False, setup.weights, setup.inputs).compile().memory_analysis()
    used = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes + a.temp_size_in_bytes
    planned = memory_plan(config, weights, 8, 500, 64, format="lane-planar").total
    assert abs(planned / used - 1) < 0.05
