"""The chain's attention on a Hopper GPU: against exact sums, what it may not read or write, orders of sums; tokens."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import made_of_shape, weight_shapes
from jaxzip.ffi import decode_layer
from jaxzip.ffi.custom_call import call_with_results
from jaxzip.ffi.decode_layer import MOST_HEADS, layer_results
from jaxzip.models import Gemma2Config, Gemma3Config, LlamaConfig, Qwen3Config, generate
from near_ties import assert_same_up_to_ties
from test_gpu_chain import decode_program, encoded, model

from jaxzip.ops.decode_chain import ChainWeights
from jaxzip.ops.decode_layer import AttentionArrays
from jaxzip.testing import bits, gaussian_weights

internals = importlib.import_module("jaxzip.models.generate")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_hopper"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
HIDDEN, INTERMEDIATE, TAIL = 128, 192, 130


@functools.cache
def weights(width, format="lane-planar"):
    shapes = [(width, HIDDEN), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN), (HIDDEN, TAIL)]
    matrices = [encoded(gaussian_weights(shape, seed=i), format) for i, shape in enumerate(shapes)]
    return ChainWeights(*matrices, *(jnp.asarray(1 + gaussian_weights((HIDDEN,), seed=i)) for i in (8, 9)))


def case(n, kv_heads, group, head_dim, slots, own, window=None, head_norm=False, seed=0):
    """Rows of all lengths from one slot on; NaN where they see nothing, also in the slot that is to be written."""
    rng = np.random.default_rng(seed + n + slots)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    start = rng.integers(0, own + 1, n).astype(np.int32)
    start[0], start[-1] = (0, own) if n > 1 else (own // 3, own // 3)
    first = np.maximum(start, own + 1 - (window or slots))
    slot = np.arange(slots)
    seen = (slot >= first[:, None]) & (slot < own)
    cache = []
    for _ in range(2):
        values = draw(n, kv_heads, slots, head_dim)
        # The ends of what a row sees count for more, so that one left out shows in the sums of long rows.
        values[:, :, max(own - 1, 0)] *= 8
        values[np.arange(n), :, np.minimum(first, slots - 1)] *= 8
        cache.append(np.where(seen[:, None, :, None], values, np.nan))
    angles = draw(n, head_dim // 2)
    qkv = draw(n, (group + 2) * kv_heads * head_dim)
    qkv[:, -kv_heads * head_dim :] *= 8
    scales = 1 + 0.5 * draw(2, head_dim) if head_norm else ()
    return AttentionArrays(
        jnp.asarray(qkv, jnp.bfloat16),
        jnp.asarray(np.cos(angles)),
        jnp.asarray(np.sin(angles)),
        *(jnp.asarray(values, jnp.bfloat16) for values in cache),
        jnp.asarray(start),
        jnp.int32(own),
        *(jnp.asarray(scale, jnp.bfloat16) for scale in scales),
    )


@functools.partial(jax.jit, static_argnames=("options", "batch_invariant"))
def _run(arrays, residual, weights, options, batch_invariant):
    norms = {"mlp_eps": 1e-5, "tail_eps": 1e-6, "out_dtype": jnp.dtype("float32")}
    return layer_results(arrays, residual, weights, **dict(options), **norms, batch_invariant=batch_invariant)


def run(arrays, format="lane-planar", batch_invariant=False, residual=None, **options):
    """All results by name."""
    n, head_dim = arrays.start.shape[0], arrays.keys.shape[3]
    residual = jnp.asarray(gaussian_weights((n, HIDDEN), sigma=1, seed=n)) if residual is None else residual
    options = {"divisor": head_dim**0.5} | options
    w = weights(arrays.heads * head_dim, format)
    return _run(arrays, residual, w, tuple(sorted(options.items())), batch_invariant)


def rounded(x):
    return np.asarray(np.asarray(x, np.float32).astype(jnp.bfloat16), np.float32)


def exact(a: AttentionArrays, divisor, window=None, cap=None, head_norm_eps=0.0, head_norm_offset=0.0):
    """In fp64 from rotated queries and keys in bf16: the output, sums of absolute values, and the new slots."""
    n, kv_heads, _, head_dim = a.keys.shape
    split = np.asarray(a.qkv, np.float32).reshape(n, -1, head_dim)
    cos, sin = (np.asarray(angles)[:, None] for angles in (a.cos, a.sin))

    def rotated(x, scale):
        if scale is not None:
            inverse_rms = 1 / np.sqrt(np.mean(x**2, -1, keepdims=True) + np.float32(head_norm_eps))
            x = rounded(x * inverse_rms * (np.asarray(scale, np.float32) + np.float32(head_norm_offset)))
        first, second = np.split(x, 2, -1)
        return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], -1))

    q, k, v = np.split(split, [a.heads, a.heads + kv_heads], axis=1)
    q, k = rotated(q, a.q_scale), rotated(k, a.k_scale)
    own, out, size = int(a.own), np.zeros((2, n, kv_heads, a.heads // kv_heads, head_dim)), None
    keys, values = (np.asarray(cache, np.float32) for cache in (a.keys, a.values))
    for row in range(n):
        first = max(int(a.start[row]), own + 1 - (window or own + 1))
        seen = [
            np.concatenate([cache[row, :, first:own], new[row][:, None]], 1).astype(np.float64)
            for cache, new in ((keys, k), (values, v))
        ]
        scores = np.einsum("kgd,ktd->kgt", q[row].reshape(kv_heads, -1, head_dim), seen[0]) / divisor
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        for i, v_or_size in enumerate((seen[1], np.abs(seen[1]))):
            out[i, row] = np.einsum("kgt,ktd->kgd", shares, v_or_size)
    out, size = out.reshape(2, n, -1)
    return out, size, k, v


def check(a: AttentionArrays, found, **options):
    options = {"divisor": a.keys.shape[3] ** 0.5} | options
    out, size, new_key, new_value = exact(a, **options)
    attended = np.asarray(found["attended"], np.float64)
    assert np.isfinite(attended).all()
    # The result is rounded to bf16, and shares may be before they are multiplied with values.
    error = np.abs(attended - out)
    assert (error <= 2**-8 * np.abs(out) + 2**-7 * size).all(), (error / size).max()
    assert error.mean() <= 2**-8 * size.mean()
    own = int(a.own)
    for name, new in (("keys", new_key), ("values", new_value)):
        before, after = bits(getattr(a, name)), bits(found[name])
        others = np.arange(before.shape[2]) != own
        assert np.array_equal(before[:, :, others], after[:, :, others]), name
        difference = np.abs(after[:, :, own].astype(np.int32) - bits(jnp.asarray(new, jnp.bfloat16)).astype(np.int32))
        if name == "values":
            assert not difference.any()
        else:  # a contracted multiply-add may round the other way; around zero these are other bits
            close = np.abs(np.asarray(found[name], np.float32)[:, :, own] - new) <= 2**-20
            assert ((difference <= 1) | close).all() and (difference == 0).mean() > 0.99


#: Rows, slots, own slot.
SIZES = [(1, 1, 0), (1, 700, 699), (2, 37, 20), (5, 130, 129), (17, 300, 257), (65, 515, 400)]


@pytest.mark.parametrize(("n", "slots", "own"), SIZES)
@pytest.mark.parametrize(
    ("head_dim", "group"), [(d, g) for d, most in MOST_HEADS.items() for g in (1, 2, 3, 4, 5, 8, 16) if g <= most]
)
def test_attention(head_dim, group, n, slots, own):
    a = case(n, 1 if group > 8 else 2, group, head_dim, slots, own)
    for batch_invariant in (False, True):
        check(a, run(a, batch_invariant=batch_invariant))


@pytest.mark.parametrize(("n", "kv_heads", "group", "slots", "own"), [(1, 8, 4, 9000, 8500), (40, 2, 5, 3000, 2999)])
@pytest.mark.parametrize("head_dim", MOST_HEADS)
def test_long_rows(head_dim, n, kv_heads, group, slots, own):
    a = case(n, kv_heads, group, head_dim, slots, own)
    for batch_invariant in (False, True):
        check(a, run(a, batch_invariant=batch_invariant))


OPTIONS = [
    {"window": 1},
    {"window": 5, "cap": 3.0},
    {"window": 300, "divisor": 24.0},
    {"window": 100_000},
    {"cap": 50.0, "divisor": 12.0},
    {"head_norm_eps": 1e-6},
    {"head_norm_eps": 0.3, "head_norm_offset": 1.0, "cap": 1.5},
    {"head_norm_eps": 1e-6, "head_norm_offset": 1.0, "window": 129, "divisor": 16.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("head_dim", MOST_HEADS)
def test_windows_caps_and_norms_of_heads(head_dim, n, options):
    a = case(n, 2, 4, head_dim, 900, 871, options.get("window"), "head_norm_eps" in options)
    for batch_invariant in (False, True):
        check(a, run(a, batch_invariant=batch_invariant, **options), **options)


def same(one, other):
    return {name: np.array_equal(bits(one[name]), bits(other[name])) for name in one}


@pytest.mark.parametrize("n", [1, 8, 40, 70])
@pytest.mark.parametrize("head_dim", MOST_HEADS)
def test_raw_control_and_run_to_run(head_dim, n):
    a, options = case(n, 2, 4, head_dim, 900, 870, head_norm=True), {"head_norm_eps": 1e-6, "cap": 20.0}
    first = run(a, **options)
    assert all(same(first, run(a, "raw", **options)).values())
    for _ in range(20):
        assert all(same(first, run(a, **options)).values())


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("head_dim", MOST_HEADS)
def test_rows_depend_on_neither_batch_nor_padding_nor_the_length_of_the_cache(head_dim, window):
    n, own = 64, 700
    a = case(n, 2, 4, head_dim, 720, own, window, head_norm=True)
    options = {"batch_invariant": True, "head_norm_eps": 1e-6, "window": window}
    residual = jnp.asarray(gaussian_weights((n, HIDDEN), sigma=1))
    together = run(a, residual=residual, **options)
    for row in (0, 31, 63):
        start, rows = int(a.start[row]), slice(row, row + 1)
        # The row alone, from slot 0 on and then behind some padding, in caches of other lengths.
        for before, behind in ((0, 1), (77, 300)):
            widths = ((0, 0), (0, 0), (before, behind), (0, 0))
            moved = [jnp.pad(cache[rows, :, start : own + 1], widths) for cache in (a.keys, a.values)]
            given = [value[rows] for value in (a.qkv, a.cos, a.sin)]
            place = jnp.full(1, before, jnp.int32), jnp.int32(own - start + before)
            alone = run(
                AttentionArrays(*given, *moved, *place, a.q_scale, a.k_scale), residual=residual[rows], **options
            )
            for name in ("attended", "x1", "x2", "y"):
                assert np.array_equal(bits(alone[name][0]), bits(together[name][row])), (row, before, name)
            for name in ("keys", "values"):
                assert np.array_equal(bits(alone[name][0, :, place[1]]), bits(together[name][row, :, own])), name


def test_special_values_stay_in_their_rows():
    a = case(4, 2, 4, 128, 300, 250)
    clean = run(a)
    for value in (np.nan, np.inf):
        found = run(a._replace(qkv=a.qkv.at[1, -3].set(value)))  # of a value: its row's sums get it
        assert not np.isfinite(np.asarray(found["attended"][1], np.float32)).all()
        for row in (0, 2, 3):
            assert all(np.array_equal(bits(found[name][row]), bits(clean[name][row])) for name in clean if name != "gu")


def test_independent_layers_in_one_program():
    # XLA may run them at once, on several streams.
    many = [case(n, 2, 4, 128, 900, 800) for n in (1, 3, 8, 16, 33, 64)]
    together = jax.jit(lambda many: [run(a) for a in many])
    for _ in range(10):
        for found, a in zip(together(many), many, strict=True):
            assert all(same(found, run(a)).values())


@pytest.mark.parametrize("group", [1, 8, 9, 16, 17])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256, 512])
def test_the_kernel_takes_what_python_says(head_dim, group):
    a = case(2, 1, group, head_dim, 20, 10)
    if group <= MOST_HEADS.get(head_dim, 0):
        check(a, run(a))
        return
    with pytest.raises(jax.errors.JaxRuntimeError, match="attention takes no qkv of shape"):
        jax.block_until_ready(run(a))


def test_errors_name_what_is_wrong(monkeypatch):
    a = case(3, 2, 4, 64, 20, 10)
    for name, wrong in (("cos", a.cos[:, 1:]), ("start", a.start[:2]), ("own", a.own[None])):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jaxzip_decode_layer: {name} has "):
            jax.block_until_ready(run(a._replace(**{name: wrong})))
    with pytest.raises(jax.errors.JaxRuntimeError, match="q_scale and k_scale must both be given or both be empty"):
        jax.block_until_ready(run(a._replace(q_scale=jnp.ones(64, jnp.bfloat16))))
    copying = lambda *given, in_place, **options: call_with_results(*given, **options)  # noqa: E731
    monkeypatch.setattr(decode_layer, "call_with_results", copying)
    with pytest.raises(jax.errors.JaxRuntimeError, match="keys must be updated in place"):
        jax.block_until_ready(run(a, divisor=3.0))


SHARED = {
    "vocab_size": 500, "hidden_size": 256, "intermediate_size": 640, "num_layers": 3, "num_heads": 8,
    "num_kv_heads": 2, "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "layer_types": ("sliding_attention", "sliding_attention", "full_attention")}
CONFIGS = [
    LlamaConfig(**SHARED, head_dim=64),
    Qwen3Config(**SHARED, head_dim=128),
    Gemma2Config(**SHARED, head_dim=256, **WINDOWS),
    Gemma3Config(**SHARED, head_dim=256, **WINDOWS),
]
each_kind = pytest.mark.parametrize("config", CONFIGS, ids=[config.model_type for config in CONFIGS])
PROMPTS = [list(range(3, 40)), [300, 1, 2, 3, 4, 5, 6]]


@each_kind
def test_tokens_with_and_without_the_chain(config):
    chained, ordinary = (
        generate(model(config, chain=chain), PROMPTS, max_new_tokens=32, return_logits=True) for chain in (True, False)
    )
    assert_same_up_to_ties(chained, ordinary)


@each_kind
def test_logits_equal_those_of_the_raw_control(config):
    runs = [
        generate(model(config, format), PROMPTS, max_new_tokens=24, return_logits=True)
        for format in ("lane-planar", "raw", "lane-planar")
    ]
    assert len({run.logits.tobytes() for run in runs}) == 1


@each_kind
def test_tokens_do_not_depend_on_the_batch(config):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 500, length).tolist() for length in rng.integers(1, 250, 19)]
    options = {"max_new_tokens": 24, "return_logits": True, "batch_invariant": True, "eos": ()}
    together = generate(model(config), prompts, **options)
    for row in (0, 7, 18):
        alone = generate(model(config), [prompts[row]], **options)
        assert alone.logits[0].tobytes() == together.logits[row].tobytes()


@each_kind
@pytest.mark.parametrize("batch", [1, 2])
def test_one_call_a_layer_and_no_copies(config, batch):
    program, s = decode_program(model(config, implementation=None), PROMPTS[:batch])
    text = program.as_text()
    assert text.count('custom_call_target="jaxzip_decode_layer"') == config.num_layers
    # Debugging information may name that kernel's file, depending on which tests ran before.
    kernels = text.replace("decode_attention.py", "")
    assert "jaxzip_decode_chain" not in kernels and "decode_attention" not in kernels
    assert made_of_shape(text, weight_shapes(s.weights)) == []
    start = jax.eval_shape(lambda w, i: internals._start(s.static, False, w, i), s.weights, s.inputs)
    cache = [*start.cache.keys, *start.cache.values]
    shape = "bf16[" + ",".join(map(str, cache[0].shape)) + "]"
    assert [line for line in made_of_shape(text, {shape}) if "jaxzip_decode_layer" not in line] == []
    assert program.memory_analysis().alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
