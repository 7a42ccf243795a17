"""Which of our custom calls a model's programs make on an NVIDIA GPU, lowered on a machine without one."""

import collections
import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import GREEDY, Llama, LlamaConfig, attention, decode_attention, fuse_projections, random_params
from jaxzip.models.decode_attention import FIXED
from jaxzip.models.execution import Execution
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture that every test here uses

import jaxzip
from jaxzip.ops import prefill_matmul
from jaxzip.tensor import CompressedTensor
from jaxzip.testing import bits

internals = importlib.import_module("jaxzip.models.generate")

# Sizes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
CONFIG = LlamaConfig(
    vocab_size=211, hidden_size=192, intermediate_size=448, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=32,
    max_position_embeddings=1024, dtype="bfloat16",
)  # fmt: skip
RULES = (
    jaxzip.CompressionRule(".*embedding", "lane-planar", output_axis=-2, min_size=1),
    jaxzip.CompressionRule(".*", "lane-planar", min_size=1),
)


@pytest.fixture(scope="module")
def params():
    # Layers of one payload shape are lowered once.
    one = fuse_projections(jaxzip.compress_params(random_params(CONFIG), RULES)[0])
    return {**one, "layers": {str(i): one["layers"]["0"] for i in range(CONFIG.num_layers)}}


def setup_of(
    params, length, *, chain=True, gather_in_chain=False, prefill_fused=False, prompts=1, config=CONFIG,
    implementation=None, **options,
):  # fmt: skip
    model = Llama.from_params(config, params, implementation=implementation)
    model.chain, model.gather_in_chain, model.prefill_fused = chain, gather_in_chain, prefill_fused
    return internals._Setup.of(model, [[7] * length] * prompts, 8, GREEDY, None, None, 0, **options)


def custom_calls(traced, layer="run_block", times=1) -> dict[str, int]:
    """Of the text, in which layers of the same shapes are one function that was lowered once."""
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(rf"func private @{layer}\w*\(", text)) == times
    return collections.Counter(re.findall(r"custom_call @(jaxzip_\w+)\(", text))


def decode_loop(s):
    run = jax.eval_shape(lambda w, i: internals._prefill(s.static, False, w, i), s.weights, s.inputs)
    return internals._advance.trace(s.static, s.weights, s.inputs, run, np.int32(4), 8)


# 300 rows are too many for a fused kernel, unless the order of sums is to be the same for any number.
@pytest.mark.parametrize(("prompts", "batch_invariant"), [(1, False), (64, True), (300, True)])
def test_a_layer_decodes_in_one_chain(params, prompts, batch_invariant):
    found = custom_calls(
        decode_loop(setup_of(params, 5, prompts=prompts, batch_invariant=batch_invariant)), "run_link", 2
    )
    # The layers', and the last one's with the head; before them the first layer's projection.
    assert found == {"jaxzip_decode_chain": 2, "jaxzip_lane_planar_gemm": 1, "jaxzip_lane_planar_take": 1}


@pytest.mark.parametrize(("length", "in_chunks"), [(200, True), (5, False)])
def test_a_chain_puts_attentions_chunks_together_if_asked_to(monkeypatch, params, length, in_chunks):
    # As if a GPU were here; Pallas kernels are lowered as XLA's operations.
    monkeypatch.setattr(attention, "gpu_is_here", lambda: True)
    kernel = decode_attention.decode_attention
    interpreted = lambda *args, **options: kernel(*args, **{**options, "interpret": True})  # noqa: E731
    monkeypatch.setattr(decode_attention, "decode_attention", interpreted)
    slots = length + 31
    chunks = -(-slots // FIXED[0])

    def chains(**options):
        text = decode_loop(setup_of(params, length, **options)).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"custom_call @jaxzip_decode_chain\((.*?)\).*: \((.*?)\) -> (.*)", text), text

    (ordinary, _), (found, text) = chains(), chains(gather_in_chain=True)
    assert len(ordinary) == len(found) == 2
    heads = CONFIG.num_heads // CONFIG.num_kv_heads
    sums = f"tensor<1x{CONFIG.num_kv_heads}x{chunks}x{heads}x{CONFIG.head_dim}xf32>"
    width = f"tensor<1x{CONFIG.num_heads * CONFIG.head_dim}xbf16>"
    for (before, types_before, results_before), (after, types, results) in zip(ordinary, found, strict=True):
        more = (4, 1) if in_chunks else (0, 0)  # five operands in place of one, and attention's output
        assert (after.count("%"), results.count("tensor")) == (
            before.count("%") + more[0], results_before.count("tensor") + more[1]
        )  # fmt: skip
        assert (sums in types) == in_chunks and types_before.endswith(width)
    assert (f"chunk_slots = {FIXED[0]} : i64" in text) == in_chunks


def test_without_the_chain_a_layer_decodes_by_four_products(params):
    found = custom_calls(decode_loop(setup_of(params, 5, chain=False)))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1, "jaxzip_lane_planar_take": 1}


def test_long_prompts_are_prefilled_from_decoded_weights(params):
    s = setup_of(params, 400)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    # The head sees the last token only.
    assert found == {
        "jaxzip_lane_planar_decompress": 4, "jaxzip_lane_planar_gemm": 1, "jaxzip_lane_planar_take": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("length", "large", "sliced"), [(400, False, True), (600, False, False), (600, True, True), (1300, True, False)]
)
def test_prompts_of_a_few_slices_go_through_the_fused_kernel_if_asked_to(monkeypatch, params, length, large, sliced):
    monkeypatch.setattr(prefill_matmul, "LARGE", 1 if large else 1 << 40)
    config = dataclasses.replace(CONFIG, max_position_embeddings=2048)
    s = setup_of(params, length, config=config, prefill_fused=True)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    products = {"jaxzip_lane_planar_gemm": 4 + 1} if sliced else {
        "jaxzip_lane_planar_decompress": 4, "jaxzip_lane_planar_gemm": 1,
    }  # fmt: skip
    assert found == {**products, "jaxzip_lane_planar_take": 1}


def test_the_raw_control_goes_through_the_fused_kernel_with_it(params):
    raw = jax.tree.map(
        lambda w: jaxzip.compress(jaxzip.decompress(w), format="raw", output_axis=w.output_axis)
        if isinstance(w, CompressedTensor) else w,
        params, is_leaf=lambda w: isinstance(w, CompressedTensor),
    )  # fmt: skip
    s = setup_of(raw, 400, prefill_fused=True, implementation="ffi")
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1}
    s = setup_of(raw, 400, prefill_fused=True)
    assert not custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))


def test_prefill_in_slices_has_gradients(params):
    linear = Llama.from_params(CONFIG, params).layers[0].mlp.down_proj
    x = jax.random.normal(jax.random.key(0), (300, CONFIG.intermediate_size), jnp.bfloat16)

    def loss(x, execution):
        return jnp.sum(linear(x, execution=execution).astype(jnp.float32) ** 2)

    found, expected = (
        jax.jit(jax.grad(loss), static_argnums=1)(x, Execution(prefill_fused=sliced)) for sliced in (True, False)
    )
    assert np.abs(np.asarray(found, np.float32)).max() > 0 and np.array_equal(bits(found), bits(expected))


def test_batch_invariance_never_leaves_the_fused_kernel(params):
    s = setup_of(params, 400, batch_invariant=True)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1, "jaxzip_lane_planar_take": 1}
