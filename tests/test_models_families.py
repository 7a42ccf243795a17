"""Configurations of published models, attention's windows in the GPU's kernels, experts, and programs for a GPU."""

import collections
import dataclasses
import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import (
    FAMILIES,
    GREEDY,
    DecoderConfig,
    Gemma2Config,
    Gemma3Config,
    LinearRopeScaling,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    UnsupportedConfigError,
    config_from_hf,
    family_of,
    fuse_projections,
    generate,
    layers,
    memory_plan,
    random_params,
)  # fmt: skip
from jaxzip.models.attention import _append_and_attend, _kernel_for_each, _kernel_for_one
from jaxzip.models.decode_attention import supported
from jaxzip.models.execution import Execution
from jaxzip.models.layers import RMSNorm
from jaxzip.models.moe import MixtureOfExperts, group
from jaxzip.models.rms_norm import rms_norm
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture
from test_models_attention import case

import jaxzip
from jaxzip.testing import bits

internals = importlib.import_module("jaxzip.models.generate")

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False,
    "tie_word_embeddings": True, "eos_token_id": 151643, "hidden_act": "silu",
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 4608, "intermediate_size": 36864,
    "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
    "query_pre_attn_scalar": 144, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0,
}  # fmt: skip
#: As in the 4B model's config.json: what its class has as defaults is left out.
GEMMA3_4B = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
MIXTRAL = {
    **MISTRAL, "model_type": "mixtral", "sliding_window": None, "rope_theta": 1e6, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip
PUBLISHED = {
    "mistral": MISTRAL, "qwen2": QWEN2, "gemma2": GEMMA2, "gemma3": GEMMA3_4B, "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config = config_from_hf(PUBLISHED[name])
    assert family_of(config) is FAMILIES[name] and hash(config) is not None
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    shapes = family_of(config)(config).to_params()
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    billions = {"mistral": 7.2, "qwen2": 0.5, "gemma2": 27.2, "gemma3": 3.9, "mixtral": 46.7, "qwen3_moe": 30.5}
    assert round(parameters / 1e9, 1) == billions[name]


def test_what_configurations_say():
    mistral, qwen2, gemma2, gemma3 = (config_from_hf(PUBLISHED[n]) for n in ("mistral", "qwen2", "gemma2", "gemma3"))
    assert mistral.window(0) == mistral.window(31) == 4096
    assert config_from_hf({**MISTRAL, "sliding_window": None}).window(0) is None
    assert qwen2.window(23) is None and qwen2.tie_word_embeddings and qwen2.head_dim == 64
    windowed = config_from_hf({**QWEN2, "use_sliding_window": True})
    assert windowed.window(20) is None and windowed.window(21) == 32768
    assert gemma2.query_divisor == 12 and (gemma2.window(0), gemma2.window(1)) == (4096, None)
    assert gemma2.tie_word_embeddings and gemma2.eos_token_ids == (1,) and gemma2.embedding_scale == 4608**0.5
    assert [gemma3.window(i) for i in (0, 4, 5, 6, 11)] == [1024, 1024, None, 1024, None]
    assert gemma3.rope(0) == (10000.0, None) and gemma3.rope(5) == (1e6, LinearRopeScaling(8.0))
    assert (gemma3.num_heads, gemma3.num_kv_heads, gemma3.head_dim, gemma3.vocab_size) == (8, 4, 256, 262208)
    assert gemma3.eos_token_ids == (1, 106) and gemma3.attn_softcap is None
    moe = config_from_hf({**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert moe.dense_layers[:4] == (0, 2, 3, 4) and moe.expert_size == 768 and moe.normalized_weights


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"model_type": "mamba", "architectures": None}, "model_type is 'mamba'"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types is"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "only causal"),
        ("gemma2", {"attention_bias": True}, "attention_bias is True"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_token=9"),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("qwen3_moe", {"num_experts": None}, "num_experts=None"),
        ("mistral", {"model_type": ["mistral"]}, "model_type is ['mistral'], expected a string"),
        ("mistral", {"model_type": "mine", "architectures": 5}, "architectures is 5, expected a list"),
        ("mistral", {"sliding_window": "x"}, "sliding_window is 'x'"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers is 'x'"),
        ("gemma2", {"layer_types": [["x"]]}, "layer_types is [['x']]"),
        ("gemma2", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma2", {"final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
        ("gemma3", {"text_config": 5}, "text_config is 5"),
        ("gemma3", {"text_config": {"rope_local_base_freq": "x"}}, "rope_local_base_freq is 'x'"),
        ("mixtral", {"num_local_experts": "x"}, "num_local_experts is 'x'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3_moe", {"mlp_only_layers": 5}, "mlp_only_layers is 5"),
    ],
)
def test_what_is_not_computed_is_refused(name, change, message):
    with pytest.raises(UnsupportedConfigError, match=re.escape(message)):
        config_from_hf({**PUBLISHED[name], **change})


def test_no_familys_configuration():
    with pytest.raises(UnsupportedConfigError, match="DecoderConfig is no family's"):
        family_of(DecoderConfig(96, 64, 96, 1, 4, 2, 16))


triton = pytest.mark.skipif(not supported(64, "bfloat16"), reason="this JAX has no Pallas Triton backend")


@triton
@pytest.mark.slow
def test_windows_in_the_kernel_of_one_query():
    arguments = (*case(3, 8, 2, 32, 400), jnp.array([0, 37, 300], jnp.int32), jnp.int32(310))
    for invariant, window in ((False, 7), (True, 130)):
        options = {"window": window, "divisor": 4.0}
        out, keys, _ = _kernel_for_one(*arguments, interpret=True, batch_invariant=invariant, **options)
        expected, cache, _ = _append_and_attend(*arguments, num_heads=8, **options)
        np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.01)
        np.testing.assert_allclose(np.asarray(keys, np.float32), np.asarray(cache, np.float32), rtol=0.01, atol=1e-6)


@triton
@pytest.mark.slow
def test_windows_in_the_kernel_of_every_query():
    length = 40
    arguments = (*case(2, 4, 2, 32, 90, length), jnp.array([0, 30], jnp.int32), jnp.int32(17))
    options = {"num_heads": 4, "window": 9, "divisor": 7.0}
    out = np.asarray(_kernel_for_each(*arguments, interpret=True, **options)[0], np.float32)
    expected = np.asarray(_append_and_attend(*arguments, **options)[0], np.float32)
    seen = np.arange(length) + 17 >= np.array([[0], [30]])
    np.testing.assert_allclose(out[seen], expected[seen], atol=0.02)
    wide = np.asarray(_append_and_attend(*arguments, **{**options, "window": None})[0], np.float32)
    assert np.abs(wide - expected)[seen].max() > 0.1


@triton
def test_norm_with_an_offset_in_its_kernel():
    x, scale = (
        jax.random.normal(jax.random.key(0), (3, 640), jnp.bfloat16),
        jnp.linspace(-1, 1, 640, dtype=jnp.bfloat16),
    )
    norm = RMSNorm(640, eps=1e-6, dtype="bfloat16", offset=1.0)
    norm.scale.set_value(scale)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * (1 + np.asarray(scale, np.float64))
    for found in (norm(x), rms_norm(x, scale, 1e-6, offset=1.0, interpret=True)):
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0.005, atol=1e-3)


def test_rows_by_expert():
    chosen = jnp.array([[3, 0], [0, 1], [3, 1], [0, 3]], jnp.int32)
    order, sizes = group(chosen, 5)
    assert sizes.tolist() == [3, 2, 0, 3, 0]
    assert order.tolist() == [1, 2, 6, 3, 5, 0, 4, 7]


MOE = MixtralConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
    max_position_embeddings=128, num_experts=6, num_experts_per_token=3, dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("normalized", [False, True])
def test_experts_against_a_loop_over_tokens(normalized):
    sizes = {"experts": 6, "top_k": 3, "intermediate": 128, "normalized": normalized}
    layer, rng = MixtureOfExperts(MOE, **sizes), np.random.default_rng(0)
    layer.router.kernel.set_value(jnp.asarray(rng.standard_normal((64, 6)), jnp.float32))
    weights = {name: rng.standard_normal(shape) / 8 for name, shape in
               (("gate_proj", (6, 64, 128)), ("up_proj", (6, 64, 128)), ("down_proj", (6, 128, 64)))}  # fmt: skip
    for name, w in weights.items():
        getattr(layer.experts, name).kernel.set_value(jnp.asarray(w, jnp.float32))
    x = rng.standard_normal((2, 9, 64))
    found = np.asarray(layer(jnp.asarray(x, jnp.float32), jnp.ones((2, 9, 64), jnp.float32)))
    logits = x @ np.asarray(layer.router.kernel.get_value(), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for b, s in np.ndindex(2, 9):
        chosen = np.argsort(-shares[b, s])[:3]
        total, out = shares[b, s][chosen].sum() if normalized else 1.0, np.ones(64)
        for e in chosen:
            gate = x[b, s] @ weights["gate_proj"][e]
            hidden = gate / (1 + np.exp(-gate)) * (x[b, s] @ weights["up_proj"][e])
            out += shares[b, s][e] / total * (hidden @ weights["down_proj"][e])
        np.testing.assert_allclose(found[b, s], out, rtol=1e-4, atol=1e-4)


def compressed(config):
    """A model of layers that have the same weights: those of one payload shape are lowered once."""
    rules = (
        jaxzip.CompressionRule(".*embedding", "lane-planar", output_axis=-2, min_size=1),
        jaxzip.CompressionRule(format="lane-planar"),
    )
    params = fuse_projections(jaxzip.compress_params(random_params(config), rules)[0])
    params["layers"] = {name: params["layers"]["0"] for name in params["layers"]}
    return family_of(config).from_params(config, params)


def test_a_tokens_experts_do_not_depend_on_the_batch(monkeypatch):
    config = dataclasses.replace(MOE, dtype="bfloat16")
    layer = compressed(config).layers[0].mlp
    x = jax.random.normal(jax.random.key(0), (5, 4, 64), jnp.bfloat16)
    run = jax.jit(functools.partial(layer, execution=Execution(batch_invariant=True)))
    together = run(x)
    assert np.array_equal(bits(together[2:3]), bits(run(x[2:3])))
    # More rows than the kernel takes at a time: 60 of 6 experts, up to 6 x 3.
    monkeypatch.setattr(layers, "FUSED_ROWS", 3)
    in_chunks = jax.jit(functools.partial(layer, execution=Execution(batch_invariant=True)))
    assert np.array_equal(bits(in_chunks(x)), bits(together))


#: Sizes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
SMALL = {
    "vocab_size": 211, "hidden_size": 128, "intermediate_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ("sliding_attention", "full_attention")}
GEMM, TAKE = "jaxzip_lane_planar_gemm", "jaxzip_lane_planar_take"
#: Our custom calls in the text of a decode step; products of the same shapes are there once.
ON_GPU = [
    (Qwen3Config(**SMALL), {"jaxzip_decode_chain": 2, GEMM: 1, TAKE: 1}),
    (Qwen3Config(**SMALL, **WINDOWS), {"jaxzip_decode_chain": 2, GEMM: 1, TAKE: 1}),
    (Gemma3Config(**SMALL, **WINDOWS), {"jaxzip_decode_chain": 2, GEMM: 1, TAKE: 1}),
    (Gemma2Config(**SMALL, tie_word_embeddings=True), {"jaxzip_decode_chain": 2, GEMM: 1, TAKE: 1}),
    (
        Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_token=2, expert_size=192),
        {"jaxzip_lane_planar_ragged_gemm": 2, GEMM: 2 + 1, TAKE: 1},
    ),
]


@pytest.mark.parametrize(("config", "expected"), ON_GPU, ids=lambda v: getattr(v, "model_type", ""))
def test_decoding_on_a_gpu_runs_fused(config, expected, with_cuda_backend):  # noqa: F811
    model = compressed(config)
    s = internals._Setup.of(model, [[7] * 5], 8, GREEDY, None, None, 0)
    run = jax.eval_shape(lambda w, i: internals._prefill(s.static, False, w, i), s.weights, s.inputs)
    traced = internals._advance.trace(s.static, s.weights, s.inputs, run, np.int32(4), 8)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert collections.Counter(re.findall(r"custom_call @(jaxzip_\w+)\(", text)) == expected


@pytest.mark.slow
def test_fused_parts_give_the_tokens_of_separate_ones():
    """Experts as well; the kernels sum each output alike."""
    config = ON_GPU[-1][0]
    rules = (jaxzip.CompressionRule(".*embedding", output_axis=-2), jaxzip.CompressionRule(format="lane-planar"))
    params = jaxzip.compress_params(random_params(config), rules)[0]
    models = [family_of(config).from_params(config, tree) for tree in (params, fuse_projections(params))]
    found = [generate(model, [[5, 6, 7]], max_new_tokens=4, eos=(), return_logits=True) for model in models]
    assert np.array_equal(bits(found[0].logits), bits(found[1].logits))


def test_memory_plan_of_experts():
    """Activations of those that a token has; where weights are decoded for prefill, those of all."""
    config = config_from_hf(MIXTRAL)
    small, large = (memory_plan(config, 0, 1, 512, 256, format=of).working for of in (None, "lane-planar"))
    assert small >= 512 * 2 * 3 * 14336 * 2
    assert large - small >= 8 * 2 * 4096 * 14336 * 2 - 512 * 2 * 14336 * 2
