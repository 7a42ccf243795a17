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


def setup_of(params, length, **options):
    model = Llama.from_params(CONFIG, params)
    return internals._Setup.of(model, [[7] * length], 8, GREEDY, None, None, 0, **options)


def custom_calls(traced) -> dict[str, int]:
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("func private @run_block") == 1
    return collections.Counter(re.findall(r"custom_call @(jaxzip_\w+)\(", text))


def test_a_layer_decodes_by_four_products(params):
    s = setup_of(params, 5)
    run = jax.eval_shape(lambda w, i: internals._prefill(s.static, False, w, i), s.weights, s.inputs)
    found = custom_calls(internals._advance.trace(s.static, s.weights, s.inputs, run, np.int32(4), 8))
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
