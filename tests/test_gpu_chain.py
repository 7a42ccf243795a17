"""A decode step's chain on a Hopper GPU: against each kernel alone, the raw control, other streams; tokens."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import made_of_shape, weight_shapes
from jaxzip.ffi.decode_chain import GATED_ROWS, GATED_STEP, chain_results
from jaxzip.models import GREEDY, Gemma3Config, LlamaConfig, family_of, fuse_projections, generate, random_params
from near_ties import assert_same_up_to_ties

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.ops.decode_chain import ChainWeights
from jaxzip.testing import bits, gaussian_weights

internals = importlib.import_module("jaxzip.models.generate")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_hopper"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
#: Attention's width, hidden size, intermediate size, columns of the tail.
WHOLE, RAGGED, LARGE = (256, 320, 448, 384), (100, 132, 77, 131), (2048, 2048, 5632, 3072)
#: Options by kind of layer; those of the second have norms behind ``o_proj`` and ``down_proj``.
KINDS = {
    "llama": {"mlp_eps": 1e-5, "tail_eps": 1e-6},
    "gemma": {
        "mlp_eps": 0.3, "tail_eps": 0.1, "o_eps": 0.05, "down_eps": 1e-4, "norm_offset": 1.0, "activation": "gelu_tanh",
    },
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


def encoded(w, format, output_axis=-1):
    if format == "raw":
        return jaxzip.compress(w, format="raw", output_axis=output_axis)
    return jax.tree.map(jnp.asarray, encode_as(w, format, output_axis))  # small ones would stay raw


@functools.cache
def matrices(sizes, format):
    width, d, f, m = sizes
    shapes = [(width, d), (d, 2 * f), (f, d), (d, m)]
    return [encoded(gaussian_weights(shape, seed=i), format) for i, shape in enumerate(shapes)]


@functools.cache
def weights(sizes, kind, format="lane-planar"):
    count, mean = (4, 0) if kind == "gemma" else (2, 1)
    scales = [jnp.asarray(mean + gaussian_weights((sizes[1],), sigma=0.3, seed=9 + i)) for i in range(count)]
    return ChainWeights(*matrices(sizes, format), *scales)


def activations(sizes, n):
    return [jnp.asarray(gaussian_weights((n, k), sigma=1, seed=n + k)) for k in sizes[:2]]


@functools.partial(jax.jit, static_argnames=("kind", "out_dtype", "batch_invariant"))
def run(attended, residual, weights, kind, out_dtype=jnp.bfloat16, batch_invariant=False):
    options = {"out_dtype": jnp.dtype(out_dtype), "batch_invariant": batch_invariant, **KINDS[kind]}
    return chain_results(attended, residual, weights, **options)


def close(found, expected, rtol):
    """To ``rtol`` of each value, or of a thousandth of the largest: sums of products that cancel out."""
    expected = np.asarray(expected, np.float64)
    atol = rtol * 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=atol)


def same(one, other):
    return {name: np.array_equal(bits(one[name]), bits(other[name])) for name in one}


def normed(x, scale, eps, offset=0.0):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * (np.asarray(scale, np.float64) + offset)


def activated(gate, kind):
    t = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3) if kind == "gemma" else gate
    return gate / (1 + np.exp(-t))


@each_kind
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 16, 33, 64, 200, 256])
@pytest.mark.parametrize("sizes", [WHOLE, RAGGED, LARGE])
def test_each_kernel_does_what_it_does_alone(sizes, n, batch_invariant, kind):
    w, (attended, residual) = weights(sizes, kind), activations(sizes, n)
    out_dtype = jnp.float32 if n % 2 else jnp.bfloat16
    found, eps = run(attended, residual, w, kind, out_dtype, batch_invariant), KINDS[kind]
    options = {"implementation": "ffi", "batch_invariant": batch_invariant}
    products = {
        "gu": jaxzip.matmul(found["h1"], w.gate_up_proj, **options),
        "y": jaxzip.matmul(found["h2"], w.tail, out_dtype=out_dtype, **options),
    }
    if kind == "gemma":
        products["o"] = jaxzip.matmul(attended, w.o_proj, **options)
        products["d"] = jaxzip.matmul(found["act"], w.down_proj, **options)
    else:
        products["x1"] = jaxzip.matmul(attended, w.o_proj, residual=residual, **options)
        products["x2"] = jaxzip.matmul(found["act"], w.down_proj, residual=found["x1"], **options)
    gated = n <= GATED_ROWS and sizes[2] % GATED_STEP == 0
    assert found["gu"].shape == (n, 0 if gated else 2 * sizes[2])
    if gated:
        found["gu"] = products["gu"]
    # Otherwise a chain may use other configurations, and with them another order of sums.
    if batch_invariant:
        assert same(products, found) == dict.fromkeys(products, True)
    for name, value in products.items():
        close(found[name], value, 2**-7)

    def wide(name):
        return np.asarray(found[name], np.float64)

    gate, up = np.split(wide("gu"), 2, axis=-1)
    expected, same_gates = activated(gate, kind) * up, batch_invariant or not gated
    if kind == "gemma" and not same_gates:
        around = [activated((1 + step) * gate, kind) * up for step in (-(2**-7), 2**-7)]
        expected = np.clip(wide("act"), np.min([*around, expected], 0), np.max([*around, expected], 0))
    # A gate that another order of sums rounds to its neighbour moves SiLU's result by two steps, and GELU's by more.
    close(found["act"], expected, 2**-8 if same_gates else 2**-6)
    offset = eps.get("norm_offset", 0.0)
    for x, h, scale, norm in (("x1", "h1", w.mlp_scale, "mlp_eps"), ("x2", "h2", w.tail_scale, "tail_eps")):
        close(found[h], normed(wide(x), scale, eps[norm], offset), 2**-8)
    if kind == "gemma":
        for product, added, x, scale, norm in (
            ("o", residual, "x1", w.o_scale, "o_eps"),
            ("d", found["x1"], "x2", w.down_scale, "down_eps"),
        ):
            inner = normed(wide(product), scale, eps[norm], offset).astype(jnp.bfloat16).astype(np.float32)
            expected = (inner + np.asarray(added, np.float32)).astype(jnp.bfloat16)
            # The norm is rounded, and then the sum: few are so near to the middle that fp32 rounds them the other way.
            assert np.mean(bits(found[x]) == bits(expected)) > 0.99
            step = 2**-7 * (np.abs(inner) + np.abs(np.asarray(expected, np.float32)))
            assert (np.abs(wide(x) - np.asarray(expected, np.float64)) <= step).all()


@each_kind
@pytest.mark.parametrize("n", [1, 7, 16, 64, 130])
@pytest.mark.parametrize("sizes", [WHOLE, RAGGED])
def test_raw_control_and_run_to_run(sizes, n, kind):
    given = activations(sizes, n)
    first = run(*given, weights(sizes, kind), kind)
    assert all(same(first, run(*given, weights(sizes, kind, "raw"), kind)).values())
    for _ in range(20):
        assert all(same(first, run(*given, weights(sizes, kind), kind)).values())


@each_kind
@pytest.mark.parametrize("sizes", [WHOLE, RAGGED])
def test_rows_do_not_depend_on_the_batch(sizes, kind):
    given = activations(sizes, 64)
    together = run(*given, weights(sizes, kind), kind, batch_invariant=True)
    for n in (1, 5, 33):
        alone = run(*(x[:n] for x in given), weights(sizes, kind), kind, batch_invariant=True)
        assert all(np.array_equal(bits(alone[name]), bits(together[name][:n])) for name in alone)


@each_kind
def test_special_values_stay_in_their_rows(kind):
    attended, residual = activations(WHOLE, 4)
    clean = run(attended, residual, weights(WHOLE, kind), kind)
    for value in (np.nan, np.inf):
        found = run(attended.at[1, 3].set(value), residual, weights(WHOLE, kind), kind)
        for name in clean:
            assert np.array_equal(bits(found[name][2:]), bits(clean[name][2:])), name
            assert np.isnan(np.asarray(found["y"][1], np.float32)).all()


@each_kind
def test_independent_chains_in_one_program(kind):
    # XLA may run them at once, on several streams.
    many = [activations(LARGE, n) for n in (1, 3, 8, 16, 33, 64)]
    together = jax.jit(lambda many, w: [run(*given, w, kind) for given in many])
    for _ in range(10):
        for found, given in zip(together(many, weights(LARGE, kind)), many, strict=True):
            assert all(same(found, run(*given, weights(LARGE, kind), kind)).values())


# Heads that attention in the chain does not take: it comes before. The others are in test_gpu_attention.
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=256, intermediate_size=640, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=32,
    max_position_embeddings=1024, dtype="bfloat16",
)  # fmt: skip
NOT_WHOLE = dataclasses.replace(CONFIG, hidden_size=200, intermediate_size=300, vocab_size=333, num_kv_heads=4)
GEMMA = Gemma3Config(
    **dataclasses.asdict(CONFIG), sliding_window=16,
    layer_types=("sliding_attention", "sliding_attention", "full_attention"),
)  # fmt: skip
PROMPTS = [[5, 17, 3, 88, 41, 2, 60], [300, 1, 2, 3, 4, 5, 6]]


def model(config, format="lane-planar", chain=True, implementation="ffi"):
    def encode(path, w):
        axis = -2 if "embedding" in jax.tree_util.keystr(path) else -1
        return encoded(np.asarray(w), format, axis) if w.ndim == 2 else w

    params = jax.tree_util.tree_map_with_path(encode, fuse_projections(random_params(config)))
    found = family_of(config).from_params(config, params, implementation=implementation)
    found.chain = chain
    return found


def decode_program(model, prompts=PROMPTS):
    s = internals._Setup.of(model, prompts, 16, GREEDY, None, None, 0)
    start = internals._start(s.static, False, s.weights, s.inputs)
    return internals._advance.lower(s.static, s.weights, s.inputs, start, np.int32(9), s.static.look_every).compile(), s


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", [CONFIG, NOT_WHOLE, GEMMA], ids=["llama", "not whole", "gemma"])
def test_tokens_with_and_without_the_chain(config, tied):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    chained, ordinary = (
        generate(model(config, chain=chain), PROMPTS, max_new_tokens=24, return_logits=True) for chain in (True, False)
    )
    assert_same_up_to_ties(chained, ordinary)


@pytest.mark.parametrize("config", [CONFIG, NOT_WHOLE, GEMMA], ids=["llama", "not whole", "gemma"])
def test_logits_equal_those_of_the_raw_control(config):
    runs = [
        generate(model(config, format), PROMPTS, max_new_tokens=24, return_logits=True)
        for format in ("lane-planar", "raw", "lane-planar")
    ]
    assert len({run.logits.tobytes() for run in runs}) == 1
    assert all(run.sequences() == runs[0].sequences() for run in runs)


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["llama", "gemma"])
def test_one_call_a_layer_and_no_copies(config):
    program, s = decode_program(model(config, implementation=None))
    text = program.as_text()
    assert text.count('custom_call_target="jaxzip_decode_chain"') == config.num_layers
    assert text.count('custom_call_target="jaxzip_lane_planar_gemm"') == 1  # the first layer's projection
    assert made_of_shape(text, weight_shapes(s.weights)) == []
