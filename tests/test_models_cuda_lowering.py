"""Which of our custom calls a model's programs make on an NVIDIA GPU, lowered on a machine without one."""

import collections
import dataclasses
import importlib
import re

import jax
import numpy as np
import pytest
from jaxzip.models import GREEDY, Gemma3Config, LlamaConfig, family_of, fuse_projections, random_params
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture that every test here uses

import jaxzip

internals = importlib.import_module("jaxzip.models.generate")

# Sizes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
CONFIG = LlamaConfig(
    vocab_size=211, hidden_size=192, intermediate_size=448, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=32,
    max_position_embeddings=1024, dtype="bfloat16",
)  # fmt: skip
GEMMA = Gemma3Config(**dataclasses.asdict(CONFIG), sliding_window=64, layer_types=("sliding_attention",) * 3)
RULES = (
    jaxzip.CompressionRule(".*embedding", "lane-planar", output_axis=-2, min_size=1),
    jaxzip.CompressionRule(".*", "lane-planar", min_size=1),
)


def params_of(config):
    # Layers of one payload shape are lowered once.
    one = fuse_projections(jaxzip.compress_params(random_params(config), RULES)[0])
    return {**one, "layers": {str(i): one["layers"]["0"] for i in range(config.num_layers)}}


@pytest.fixture(scope="module")
def params():
    return params_of(CONFIG)


def setup_of(params, length, *, chain=True, prompts=1, config=CONFIG, **options):
    model = family_of(config).from_params(config, params)
    model.chain = chain
    return internals._Setup.of(model, [[7] * length] * prompts, 8, GREEDY, None, None, 0, **options)


def with_heads_of_64(config):
    """The chain's attention takes these, and not those of 32."""
    return dataclasses.replace(config, head_dim=64)


def custom_calls(traced, layer="run_block", times=1) -> dict[str, int]:
    """Of the text, in which layers of the same shapes are one function that was lowered once."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(rf"func private @{layer}\w*\(", text)) == times
    return collections.Counter(re.findall(r"custom_call @(jaxzip_\w+)\(", text))


def decode_loop(s):
    run = jax.eval_shape(lambda w, i: internals._prefill(s.static, False, w, i), s.weights, s.inputs)
    return internals._advance.trace(s.static, s.weights, s.inputs, run, np.int32(4), 8)


# 300 rows are too many for a fused kernel, unless the order of sums is to be the same for any number.
ROWS = pytest.mark.parametrize(("prompts", "batch_invariant"), [(1, False), (64, True), (300, True)])


@ROWS
def test_a_layer_decodes_in_one_chain_behind_attention(params, prompts, batch_invariant):
    found = custom_calls(
        decode_loop(setup_of(params, 5, prompts=prompts, batch_invariant=batch_invariant)), "run_link", 2
    )
    # The layers', and the last one's with the head; before them the first layer's projection.
    assert found == {"jaxzip_decode_chain": 2, "jaxzip_lane_planar_gemm": 1, "jaxzip_lane_planar_take": 1}


@ROWS
def test_a_layer_decodes_in_one_chain_with_its_attention(prompts, batch_invariant):
    config = with_heads_of_64(CONFIG)
    s = setup_of(params_of(config), 5, prompts=prompts, batch_invariant=batch_invariant, config=config)
    assert custom_calls(decode_loop(s), "run_link", 2) == {
        "jaxzip_decode_layer": 2, "jaxzip_lane_planar_gemm": 1, "jaxzip_lane_planar_take": 1,
    }  # fmt: skip


def chains_of(traced, name):
    """Operands, attributes and types of the results of each such call."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(rf"custom_call @{name}\((.*?)\) \{{(.*?)\}} : .* -> \((.*?)\)\n", text)
    return [(operands.split(","), *rest) for operands, *rest in calls]


def check_gemma(attributes, results):
    assert "gelu_tanh = true" in attributes
    assert ", norm_offset = 1.000000e+00 : f32" in attributes
    for name in ("mlp_eps", "tail_eps", "o_eps", "down_eps"):
        assert f"{name} = 9.99999974E-6 : f32" in attributes
    assert len(re.findall("tensor<3x192xbf16>", results)) == 4 + 2  # between the kernels, and before the norms


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_of_gemma_decodes_in_one_chain(tied):
    config = dataclasses.replace(GEMMA, tie_word_embeddings=tied)
    traced = decode_loop(setup_of(params_of(config), 5, prompts=3, config=config))
    assert custom_calls(traced, "run_link", 2) == {
        "jaxzip_decode_chain": 2, "jaxzip_lane_planar_gemm": 1, "jaxzip_lane_planar_take": 1,
    }  # fmt: skip
    calls = chains_of(traced, "jaxzip_decode_chain")
    assert len(calls) == 2
    for operands, attributes, results in calls:
        # Activations, residual, four weights of three arrays each, four scales.
        assert len(operands) == 2 + 4 * 3 + 4
        check_gemma(attributes, results)


def test_attention_in_the_chain_updates_the_cache_in_place():
    config = dataclasses.replace(with_heads_of_64(GEMMA), layer_types=("sliding_attention",) * 2 + ("full_attention",))
    traced = decode_loop(setup_of(params_of(config), 5, prompts=3, config=config))
    assert custom_calls(traced, "run_link", 2)["jaxzip_decode_layer"] == 2  # the first two are one
    calls = chains_of(traced, "jaxzip_decode_layer")
    windows = []
    for operands, attributes, results in calls:
        # Attention's arrays and its two scales, then as above.
        assert len(operands) == 9 + 1 + 4 * 3 + 4
        check_gemma(attributes, results)
        assert results.startswith("tensor<3x384xbf16>, tensor<3x3x")  # attention's output, the cache
        aliases = re.findall(r"output_tuple_indices = \[(\d+)\], operand_index = (\d+)", attributes)
        assert aliases == [("1", "3"), ("2", "4")]
        assert "cap = 0.000000e+00 : f32" in attributes and "divisor = 1.600000e+01 : f32" in attributes
        assert "head_norm_eps = 9.99999974E-6 : f32" in attributes
        assert "head_norm_offset = 1.000000e+00 : f32" in attributes
        windows.append(re.search(r"window = (\d+) : i64", attributes)[1])
    assert sorted(windows) == ["0", "64"]
    # Nothing of a layer is left to other kernels: neither products nor what would write the cache.
    assert left_of_layers(traced, 2) == set()
    behind = decode_loop(setup_of(params_of(GEMMA), 5, prompts=3, config=GEMMA))
    assert left_of_layers(behind, 2) >= {"stablehlo.dot_general", "stablehlo.dynamic_update_slice"}


def left_of_layers(traced, count):
    """Operations of the functions of layers, other than ours, shapes and the choice of a platform, a constant."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    layers = re.findall(r"func\.func private @run_link\w*\(.*?\n  \}\n", text, re.DOTALL)
    assert len(layers) == count
    found = set(re.findall(r"^ *%\S+ = (?:call @|\")?([\w.]+)", "".join(layers), re.MULTILINE))
    return found - {f"stablehlo.{name}" for name in ("custom_call", "reshape", "broadcast_in_dim", "constant", "case")}


def test_without_the_chain_a_layer_decodes_by_four_products(params):
    found = custom_calls(decode_loop(setup_of(params, 5, chain=False)))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1, "jaxzip_lane_planar_take": 1}


@pytest.mark.parametrize(("prompts", "decoded"), [(1, False), (42, True)])
def test_long_prompts_are_prefilled_from_decoded_weights(params, prompts, decoded):
    s = setup_of(params, 400, prompts=prompts)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    # The head sees the last token only.
    products = {"jaxzip_lane_planar_decompress": 4, "jaxzip_lane_planar_gemm": 1}
    assert found == {**(products if decoded else {"jaxzip_lane_planar_gemm": 5}), "jaxzip_lane_planar_take": 1}


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_prompts_have_the_gate_in_its_product(batch_invariant):
    config = dataclasses.replace(CONFIG, intermediate_size=3968)
    s = setup_of(params_of(config), 512, batch_invariant=batch_invariant, config=config)
    text = internals._start.trace(s.static, False, s.weights, s.inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall("gated = true", text)) == (not batch_invariant)


def test_batch_invariance_never_leaves_the_fused_kernel(params):
    s = setup_of(params, 400, batch_invariant=True)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1, "jaxzip_lane_planar_take": 1}
