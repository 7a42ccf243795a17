"""Generation: greedy against the reference, ragged batches, end of sequence, sampling, streaming, recompilation."""

import dataclasses
import functools
import importlib
import re
import time
import types

import jax
import jax.numpy as jnp
import llama_reference
import numpy as np
import pytest
from flax import nnx
from hlo import made_of_shape, weight_shapes
from jaxzip.models import (
    GREEDY,
    Llama,
    LlamaConfig,
    Mixtral,
    MixtralConfig,
    Sampling,
    fuse_projections,
    generate,
    random_params,
    stream,
)
from jaxzip.models.batching import bucket
from jaxzip.models.sampling import keep_likely, sample

import jaxzip
from jaxzip.errors import PromptError

internals = importlib.import_module("jaxzip.models.generate")

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=128, tie_word_embeddings=True, dtype="float32",
)  # fmt: skip
PROMPTS = [[5, 17, 3], [88, 41, 2, 60, 7, 7, 1, 90, 33], [12]]
HOT = Sampling(temperature=1.5)
LANE_PLANAR = (
    jaxzip.CompressionRule(".*embedding", "lane-planar", output_axis=-2, min_size=1),
    jaxzip.CompressionRule(".*", "lane-planar", min_size=1),
)


def slow(*parameters):
    return pytest.param(*parameters, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def model(params):
    return Llama.from_params(CONFIG, params)


@pytest.fixture(scope="module")
def batch(model):
    return generate(model, PROMPTS, max_new_tokens=32, return_logits=True)


def test_greedy_matches_the_reference_over_32_steps(params, batch):
    expected = [llama_reference.greedy(CONFIG, params, prompt, 32) for prompt in PROMPTS]
    assert batch.sequences() == expected
    assert batch.tokens.dtype == np.int32 and batch.lengths.tolist() == [32] * 3


def test_decoding_with_the_cache_matches_the_full_forward(model, batch):
    whole = np.asarray(jax.jit(Llama.__call__)(model, jnp.array([PROMPTS[1] + batch.tokens[1].tolist()])))[0]
    before = len(PROMPTS[1]) - 1
    np.testing.assert_allclose(batch.logits[1], whole[before : before + 32], rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_the_others(model, batch):
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], max_new_tokens=32, return_logits=True)
        np.testing.assert_allclose(alone.logits[0], batch.logits[i], rtol=1e-4, atol=1e-4)
        assert alone.sequences()[0] == batch.sequences()[i]


@pytest.mark.parametrize(
    ("dtype", "tied", "vocabulary"), [("bfloat16", True, 96), ("bfloat16", False, 256), slow("float32", True, 96)]
)
def test_compressed_model_gives_the_dense_tokens_and_logits(dtype, tied, vocabulary):
    config = dataclasses.replace(CONFIG, dtype=dtype, tie_word_embeddings=tied, vocab_size=vocabulary)
    params = random_params(config, dtype="bfloat16")
    params_z, _ = jaxzip.compress_params(params)
    run = lambda p: generate(  # noqa: E731
        Llama.from_params(config, p, implementation="xla"), PROMPTS, max_new_tokens=12, return_logits=True
    )
    dense, packed = run(params), run(params_z)
    assert np.array_equal(dense.tokens, packed.tokens)
    assert np.array_equal(dense.logits.view(np.uint32), packed.logits.view(np.uint32))


def test_end_of_sequence_stops_a_row_and_pads_it(model, batch):
    ends = int(batch.tokens[0, 3])
    out = generate(model, PROMPTS, max_new_tokens=32, eos=[ends, 95], pad=-1)
    for row, (found, unbroken) in enumerate(zip(out.sequences(), batch.sequences(), strict=True)):
        stop = next((i + 1 for i, token in enumerate(unbroken) if token in (ends, 95)), 32)
        assert found == unbroken[:stop] and out.lengths[row] == stop
        assert (out.tokens[row, stop:] == -1).all()
    assert out.lengths[0] <= 4


def test_the_loop_ends_when_every_row_has_ended(model, batch):
    setup = internals._Setup.of(model, PROMPTS, 32, GREEDY, None, batch.tokens[:, 1].tolist(), 0)
    run = internals._generate(setup.static, False, setup.weights, setup.inputs)
    assert int(run.step) == 2 or int(run.step) == max(run.lengths)
    assert int(run.step) < 32 and bool(run.done.all())


@pytest.mark.parametrize("eos", [(), (3, 17)])
def test_looking_rarely_whether_all_rows_have_ended_changes_nothing(model, batch, monkeypatch, eos):
    ends = [int(batch.tokens[row, 5 + 3 * row]) for row in range(3)] if eos else []
    options = {"max_new_tokens": 30, "eos": ends, "pad": -1, "return_logits": True}
    often = generate(model, PROMPTS, **options)
    setup = internals._Setup.of(model, PROMPTS, 30, GREEDY, None, ends, -1)
    static = dataclasses.replace(setup.static, look_every=8, capacity=setup.static.capacity + 7)
    run = internals._generate(static, True, setup.weights, setup.inputs)
    assert int(run.step) % 8 == 1
    assert np.asarray(run.lengths).tolist() == often.lengths.tolist()
    assert np.array_equal(np.asarray(run.tokens)[:, :30], often.tokens)
    for row, length in enumerate(often.lengths):
        np.testing.assert_allclose(run.logits[row, :length], often.logits[row, :length], rtol=1e-5, atol=1e-5)


def test_a_gpu_is_looked_at_rarely(model, monkeypatch):
    monkeypatch.setattr(internals, "default_device", lambda: types.SimpleNamespace(platform="gpu"))
    setup = internals._Setup.of(model, PROMPTS, 16, GREEDY, None, (), 0)
    assert setup.static.look_every == internals.LOOK_EVERY > 1
    # A last look just before the limit is followed by that many steps.
    assert setup.static.capacity >= 15 + internals.LOOK_EVERY


@pytest.mark.parametrize("format", ["lane-planar", "tca-tbe"])
def test_batch_invariant_generation(format):
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
    config = dataclasses.replace(CONFIG, dtype="bfloat16", **sizes)
    rules = [dataclasses.replace(rule, format=format) for rule in LANE_PLANAR]
    params, _ = jaxzip.compress_params(random_params(config), rules)
    model = Llama.from_params(config, params)
    options = {"max_new_tokens": 8, "batch_invariant": True}
    together = generate(model, PROMPTS, **options).sequences()
    assert together == [generate(model, [prompt], **options).sequences()[0] for prompt in PROMPTS]
    assert list(stream(model, PROMPTS[1], **options)) == together[1]


def test_batch_invariance_needs_compressed_weights(params):
    model = Llama.from_params(dataclasses.replace(CONFIG, dtype="bfloat16"), random_params(CONFIG, dtype="bfloat16"))
    message = r"embedder/embedding and 14 more are dense, .* not batch invariant; compress all weights"
    with pytest.raises(NotImplementedError, match=message):
        generate(model, PROMPTS, max_new_tokens=2, batch_invariant=True)


def test_batch_invariant_generation_takes_a_dense_router():
    sizes = {"dtype": "bfloat16", "num_layers": 1, "num_experts": 4, "num_kv_heads": 4, "head_dim": 32}
    config = MixtralConfig(**{**dataclasses.asdict(CONFIG), **sizes})
    params, _ = jaxzip.compress_params(random_params(config), LANE_PLANAR)
    router = params["layers"]["0"]["mlp"]["router"]
    assert isinstance(router["kernel"], np.ndarray)  # too small to shrink
    model = Mixtral.from_params(config, params)
    options = {"max_new_tokens": 4, "batch_invariant": True}
    together = generate(model, PROMPTS, **options).sequences()
    assert together[1:2] == generate(model, PROMPTS[1:2], **options).sequences()


def test_no_weight_is_copied(monkeypatch):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", vocab_size=192)
    params = fuse_projections(jaxzip.compress_params(random_params(config), LANE_PLANAR)[0])
    setup = internals._Setup.of(Llama.from_params(config, params), PROMPTS, 8, GREEDY, None, None, 0)
    shapes = weight_shapes(setup.weights)
    assert len(shapes) >= 3
    run = internals._start(setup.static, False, setup.weights, setup.inputs)
    program = internals._advance.lower(setup.static, setup.weights, setup.inputs, run, np.int32(4)).compile()
    assert made_of_shape(program.as_text(), shapes) == []
    copying = jax.jit(lambda w: jax.tree.map(lambda a: a + 1, w)).lower(setup.weights).compile()
    assert made_of_shape(copying.as_text(), shapes)  # the search finds what it looks for


@pytest.mark.slow
def test_eighty_layers_are_traced_as_one_and_compile_in_three_minutes():
    config = dataclasses.replace(CONFIG, num_layers=80, hidden_size=128, intermediate_size=256, dtype="bfloat16")
    one = random_params(dataclasses.replace(config, num_layers=1))
    packed = fuse_projections(jaxzip.compress_params(one, LANE_PLANAR)[0])
    params = {**packed, "layers": {str(i): packed["layers"]["0"] for i in range(80)}}
    setup = internals._Setup.of(Llama.from_params(config, params), PROMPTS, 8, GREEDY, None, None, 0)
    run = jax.eval_shape(lambda w, i: internals._prefill(setup.static, False, w, i), setup.weights, setup.inputs)
    start = time.perf_counter()
    lowered = internals._advance.lower(setup.static, setup.weights, setup.inputs, run, np.int32(4))
    text = lowered.as_text()
    calls, traces = (re.findall(rf"{what} @(run_block|run_link)", text) for what in ("call", "func private"))
    # Where CUDA's chains are built in, a link goes on to the next layer's projection, and the last one to the head.
    assert len(calls) == 80 and traces in (["run_block"], ["run_link"] * 2)
    lowered.compile()
    assert time.perf_counter() - start < 180


def test_eos_defaults_to_the_config(params, batch):
    config = dataclasses.replace(CONFIG, eos_token_ids=(int(batch.tokens[2, 0]),))
    model = Llama.from_params(config, params)
    assert generate(model, [PROMPTS[2]], max_new_tokens=8).sequences() == [[int(batch.tokens[2, 0])]]
    assert generate(model, [PROMPTS[2]], max_new_tokens=8, eos=()).lengths[0] == 8


@pytest.mark.parametrize("sampling", [GREEDY, slow(Sampling(0.8, top_k=10, top_p=0.9))], ids=["greedy", "filtered"])
def test_streaming_gives_the_tokens_of_generate(model, sampling):
    options = {"max_new_tokens": 11, "sampling": sampling, "key": jax.random.key(3)}
    whole = generate(model, [PROMPTS[0]], **options).sequences()[0]
    assert list(stream(model, PROMPTS[0], chunk=4, **options)) == whole


def test_streaming_stops_at_the_end_of_sequence(model):
    whole = generate(model, [PROMPTS[0]], max_new_tokens=11).sequences()[0]
    assert list(stream(model, PROMPTS[0], max_new_tokens=11, eos=[whole[5]])) == whole[: whole.index(whole[5]) + 1]


@pytest.mark.parametrize("context", [lambda: jax.enable_x64(True), lambda: jax.numpy_dtype_promotion("strict")])
def test_other_settings_of_jax_change_nothing(model, context):
    options = {"max_new_tokens": 4, "return_logits": True}
    found = [(r.tokens, r.lengths, r.logits) for r in [generate(model, PROMPTS[:1], **options)]]
    with context():
        found += [(r.tokens, r.lengths, r.logits) for r in [generate(model, PROMPTS[:1], **options)]]
        streamed = list(stream(model, PROMPTS[0], max_new_tokens=4))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))
    assert streamed == found[0][0][0].tolist()


def test_sampling_depends_on_key_row_and_step_only(model):
    run = lambda prompts, seed: generate(  # noqa: E731
        model, prompts, max_new_tokens=16, sampling=HOT, key=jax.random.key(seed)
    ).sequences()
    both = run([PROMPTS[0], PROMPTS[0]], 0)
    assert both == run([PROMPTS[0], PROMPTS[0]], 0)
    assert both[0] == run([PROMPTS[0]], 0)[0]
    assert both[0] != both[1] and both != run([PROMPTS[0], PROMPTS[0]], 1)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.3), (0, 0.95), (20, 0.7), (500, 1e-6)])
def test_filters_match_numpy(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2
    logits[1, :10] = 3.0  # ties: lower ids come first
    order, kept = (np.asarray(a) for a in keep_likely(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p)))
    for row in range(4):
        by_rank = sorted(range(50), key=lambda i: (-logits[row, i], i))[: top_k or None]
        weights = np.exp(logits[row, by_rank].astype(np.float64))
        weights, expected, total = weights / weights.sum(), [], 0.0
        for token, weight in zip(by_rank, weights, strict=True):
            expected.append(token)
            total += weight
            if total >= top_p and top_p < 1:
                break
        assert order[row, np.isfinite(kept[row])].tolist() == expected


def test_filtered_sampling_follows_the_distribution():
    logits = jnp.tile(jnp.log(jnp.array([0.1, 0.5, 0.3, 0.1])), (4000, 1))
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.75)
    draws = sample(logits, jax.random.key(0), jnp.int32(0), sampling.kind, sampling.values())
    shares = np.bincount(np.asarray(draws), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0, 0.625, 0.375, 0], atol=0.03)


@pytest.mark.parametrize("top_k", [0, 1 << 31])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
def test_hardly_any_temperature_draws_the_largest_logit(temperature, top_k):
    logits = jnp.array([[80.0, -80.0, 80.00001, 3.0], [-90.0, -95.0, -91.0, -89.0]])
    sampling = Sampling(temperature, top_k=top_k)
    assert sample(logits, jax.random.key(0), jnp.int32(0), sampling.kind, sampling.values()).tolist() == [2, 3]


def test_other_numbers_and_other_weights_share_one_program(model):
    def count():
        return internals._generate._cache_size()

    def run(m, **options):
        generate(m, [[1, 2, 3]], max_new_tokens=5, key=jax.random.key(0), **options)

    run(model, sampling=HOT)
    before = count()
    run(model, sampling=Sampling(temperature=0.3))
    run(Llama.from_params(CONFIG, random_params(CONFIG, seed=7)), sampling=HOT)
    generate(model, [list(range(15))], max_new_tokens=16, sampling=HOT, key=jax.random.key(9))
    assert count() == before


def test_weights_are_no_constants(model):
    setup = internals._Setup.of(model, PROMPTS, 8, GREEDY, None, None, 0)
    traced = internals._generate.trace(setup.static, False, setup.weights, setup.inputs)
    assert not [c for c in traced.jaxpr.consts if np.size(c) > 64]
    assert max(len(line) for line in traced.lower().as_text().splitlines()) < 4000


def test_streaming_donates_the_cache(model):
    setup = internals._Setup.of(model, [PROMPTS[0]], 8, GREEDY, None, None, 0)
    run = internals._start(setup.static, False, setup.weights, setup.inputs)
    internals._advance(setup.static, setup.weights, setup.inputs, run, np.int32(4))
    assert all(array.is_deleted() for array in (*run.cache.keys, *run.cache.values))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(setup.weights))


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 96]], "prompt 0 has token id 96, the vocabulary has 96"),
        ([[-1]], "token id -1"),
        (
            [list(range(90)) + [1] * 30],
            r"prompt 0 has 120 tokens and max_new_tokens is 9, together 129; .* is 128 tokens",
        ),
        (["text"], "encode the text first"),
        ([[1], [[1, 2], [3]]], "prompt 1 has lists in it"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(PromptError, match=message):
        generate(model, prompts, max_new_tokens=9)
    if prompts:
        with pytest.raises(PromptError):
            stream(model, prompts[-1], max_new_tokens=9)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
)
def test_bad_sampling(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"temperature": "1"}, {"temperature": None}, {"top_k": 2.5}, {"top_p": "a"}])
def test_sampling_of_another_kind(bad):
    ((name, value),) = bad.items()
    with pytest.raises(TypeError, match=f"{name} is {value!r}, expected an? "):
        Sampling(**bad)


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        generate(model, PROMPTS, max_new_tokens=1, sampling=HOT)
    with pytest.raises(ValueError, match=r"the model is abstract: of .*embedding.*float32\[96, 64\]"):
        generate(nnx.eval_shape(lambda: model), PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="chunk is 0"):
        stream(model, PROMPTS[0], max_new_tokens=1, chunk=0)
    for call in (lambda **options: generate(model, PROMPTS, **options), functools.partial(stream, model, PROMPTS[0])):
        with pytest.raises(TypeError, match=r"max_new_tokens is 2\.5, expected an integer"):
            call(max_new_tokens=2.5)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"eos": [1.5]}, TypeError, r"eos is 1\.5, expected an integer"),
        ({"eos": "12"}, TypeError, "eos is '1', expected an integer"),
        ({"eos": [[1], [2]]}, TypeError, r"eos is \[1\], expected an integer"),
        ({"eos": 2**40}, ValueError, "eos is 1099511627776, expected a token id"),
        ({"pad": 1.5}, TypeError, r"pad is 1\.5, expected an integer"),
        ({"pad": None}, TypeError, "pad is None, expected an integer"),
        ({"sampling": 0.5}, TypeError, r"sampling is 0\.5, expected a jaxzip\.models\.Sampling"),
        ({"sampling": HOT, "key": 3}, TypeError, r"key is 3, expected .*jax\.random\.key\(seed\)"),
        (
            {"sampling": HOT, "key": jax.random.split(jax.random.key(0), 3)},
            ValueError,
            r"shape \(3,\), expected one key",
        ),
    ],
)
def test_arguments_of_another_kind(model, bad, error, message):
    with pytest.raises(error, match=message):
        generate(model, PROMPTS, max_new_tokens=1, **bad)


def test_eos_may_be_one_id(model, batch):
    ends = int(batch.tokens[0, 2])
    found = [generate(model, PROMPTS, max_new_tokens=32, eos=eos).sequences() for eos in ([ends], ends, np.int32(ends))]
    assert found[0] == found[1] == found[2] and len(found[0][0]) <= 3


def test_an_unknown_implementation_is_matmuls_error():
    params, _ = jaxzip.compress_params(random_params(CONFIG, dtype="bfloat16"))
    model = Llama.from_params(CONFIG, params, implementation="fii")
    with pytest.raises(ValueError, match="unknown implementation 'fii'; there are: .*decompress"):
        generate(model, PROMPTS, max_new_tokens=1)


def test_numbers_of_tokens_may_be_numpys(model):
    found = generate(model, PROMPTS[:1], max_new_tokens=np.int64(2)).sequences()
    assert found == generate(model, PROMPTS[:1], max_new_tokens=2).sequences()
    assert list(stream(model, PROMPTS[0], max_new_tokens=np.int64(2), chunk=np.int64(2))) == found[0]


def test_buckets():
    lengths = range(1, 5000)
    buckets = [bucket(n) for n in lengths]
    assert all(b >= n and (b <= 16 or b <= 1.25 * n + 16) for n, b in zip(lengths, buckets, strict=True))
    assert len(set(buckets)) < 40 and bucket(256) == 256 and bucket(1024) == 1024
