"""Which of our custom calls a model's programs make on an NVIDIA GPU, lowered on a machine without one."""

import collections
import importlib
import re

import jax
import numpy as np
import pytest
from jaxzip.models import GREEDY, Llama, LlamaConfig, fuse_projections, random_params
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture that every test here uses

import jaxzip

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


def setup_of(params, length, *, chain=True, prompts=1, config=CONFIG, **options):
    model = Llama.from_params(config, params)
    model.chain = chain
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


def test_batch_invariance_never_leaves_the_fused_kernel(params):
    s = setup_of(params, 400, batch_invariant=True)
    found = custom_calls(internals._start.trace(s.static, False, s.weights, s.inputs))
    assert found == {"jaxzip_lane_planar_gemm": 4 + 1, "jaxzip_lane_planar_take": 1}
