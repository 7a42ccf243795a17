"""Which models decode in chains of kernels, and that they compute the same where there are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxzip.models import (
    Gemma2,
    Gemma3,
    Llama,
    LlamaConfig,
    Mistral,
    Qwen2,
    Qwen3,
    decode_chain,
    family_of,
    fuse_projections,
    generate,
    random_params,
)
from jaxzip.models.execution import Execution
from test_cuda_lowering import with_cuda_backend  # noqa: F401 - a fixture that every test here uses

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.ops.decode_chain import ChainWeights
from jaxzip.ops.decode_chain import decode_chain as chain_op
from jaxzip.testing import bits, gaussian_weights

# Sizes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=72, intermediate_size=104, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=12,
    max_position_embeddings=256, dtype="bfloat16",
)  # fmt: skip


def encoded(w, format, output_axis=-1):
    if w.ndim < 2 or format == "dense":
        return w
    if format == "raw":
        return jaxzip.compress(w, format="raw", output_axis=output_axis)
    return jax.tree.map(jnp.asarray, encode_as(w, format, output_axis))  # these are so small that they would stay raw


@functools.cache
def params(format="lane-planar", config=CONFIG, other=None):
    """Of a fused model in ``format``; ``other`` is that of the weights of the last layer's MLP."""

    def compress(path, w):
        name = jax.tree_util.keystr(path)
        chosen = other if other and "'1'" in name and "mlp" in name else format
        return encoded(w, chosen, -2 if "embedding" in name else -1) if w.ndim == 2 else w

    return jax.tree_util.tree_map_with_path(compress, fuse_projections(random_params(config)))


OTHERS = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
CONFIGS = [
    CONFIG,
    Gemma2.config_class(**OTHERS, sliding_window=4, layer_types=("sliding_attention", "full_attention")),
    Gemma3.config_class(**{**OTHERS, "tie_word_embeddings": True}),
]
each_kind = pytest.mark.parametrize("config", CONFIGS, ids=[config.model_type for config in CONFIGS])


def model_of(config):
    return family_of(config).from_params(config, params(config=config))


def applies(tree, rows=3, config=CONFIG, **execution):
    return decode_chain.applies(Llama.from_params(config, tree), rows, Execution(**execution))


@pytest.mark.parametrize("tied", [False, True])
def test_takes_fused_llamas_in_one_format(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    assert applies(params(config=config), config=config)
    assert applies(params(config=config), 256, config, implementation="ffi")
    assert applies(params(config=config), 1000, config, batch_invariant=True)
    assert applies(params("raw", config), config=config, implementation="ffi")


@pytest.mark.parametrize(
    ("family", "taken"),
    [(Mistral, True), (Qwen3, True), (Gemma2, True), (Gemma3, True), (Qwen2, False)],  # biases
)
def test_takes_the_families_of_these_layers(family, taken):
    assert decode_chain.applies(model_of(family.config_class(**OTHERS)), 3, Execution()) == taken


def test_takes_layers_as_their_classes_compute_them_only():
    class Other(Gemma2.block):
        def __call__(self, x, *args, **options):
            return super().__call__(2 * x, *args, **options)

    model = model_of(CONFIGS[1])
    assert decode_chain.applies(model, 3, Execution())
    model.layers[1].__class__ = Other
    assert not decode_chain.applies(model, 3, Execution())
    model = model_of(CONFIGS[1])
    model.layers[0].pre_mlp_norm.offset = 0.0  # the chain has one of all norms
    assert not decode_chain.applies(model, 3, Execution())


@pytest.mark.parametrize(
    ("format", "other", "options"),
    [
        ("lane-planar", None, {"chain": False}),
        ("lane-planar", None, {"implementation": "xla"}),
        ("lane-planar", None, {"rows": 257}),
        ("raw", None, {}),  # XLA multiplies by these
        ("tca-tbe", None, {}),
        ("lane-planar", "raw", {"implementation": "ffi"}),
        ("lane-planar", "dense", {}),
        ("dense", None, {}),
    ],
)
def test_leaves_others_to_the_ordinary_path(format, other, options):
    assert not applies(params(format, other=other), **options)


def test_leaves_layers_that_are_not_fused_and_other_dtypes_to_the_ordinary_path():
    unfused = jax.tree.map(lambda w: encoded(w, "lane-planar"), random_params(CONFIG))
    unfused["embedder"] = params()["embedder"]
    assert not applies(unfused)
    wide = dataclasses.replace(CONFIG, dtype="float32")
    assert not applies(params("dense", wide), config=wide)


@each_kind
def test_a_step_on_the_cpu_is_the_ordinary_one(config):
    models = [model_of(config) for _ in range(2)]
    models[1].chain = False
    prompts = [[5, 17, 3, 88, 41], [7, 2, 60]]
    chained, ordinary = (generate(m, prompts, max_new_tokens=8, return_logits=True) for m in models)
    assert chained.sequences() == ordinary.sequences()
    np.testing.assert_allclose(chained.logits, ordinary.logits, atol=2e-2)


@each_kind
def test_the_reference_computes_the_layers_bits(config):
    """Run operation by operation: what XLA makes of a whole program may leave out roundings between its parts."""
    model = model_of(config)
    width, hidden = config.num_heads * config.head_dim, config.hidden_size
    out, x = (jnp.asarray(50 * gaussian_weights((3, 1, k), seed=k)) for k in (width, hidden))
    execution = Execution()

    def attend(self, normed, residual, *rest, execution):
        return self.o_proj(out, residual=residual, execution=execution), None, None

    links = list(zip(model.layers, decode_chain._following(model), strict=True))
    for i, (layer, (norm, projection)) in enumerate(links):
        is_head = i == len(links) - 1
        weights = decode_chain._weights(layer, norm, projection)
        options = decode_chain._options(layer, norm, is_head, execution)
        found = chain_op(out[:, 0], x[:, 0], weights, **options, implementation="xla")
        layer.attn.__class__ = type("Attended", (nnx.Module,), {"__call__": attend})
        after, _, _ = layer(x, None, None, None, None, None, execution=execution)
        h = norm(after, execution=execution)
        if is_head and config.tie_word_embeddings:
            y = projection.attend(h, execution=execution)
        else:
            y = projection(h, out_dtype="float32" if is_head else None, execution=execution)
        for a, expected in zip(found, (after, y), strict=True):
            assert a.dtype == expected.dtype
            assert np.array_equal(bits(a), bits(expected[:, 0]))


def relative_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gemma", [False, True])
def test_reference(out_dtype, gemma):
    n, width, d, f, m = 3, 40, 72, 56, 33
    weights = [gaussian_weights(shape, seed=i) for i, shape in enumerate([(width, d), (d, 2 * f), (f, d), (d, m)])]
    scales = [1 + gaussian_weights((d,), seed=10 + i) for i in range(4 if gemma else 2)]
    attended, residual = (gaussian_weights((n, k), seed=20 + k) * 50 for k in (width, d))
    compressed = ChainWeights(*(encoded(w, "lane-planar") for w in weights), *scales)
    o, gate_up, down, tail, x, r = (np.asarray(a, np.float64) for a in (*weights, attended, residual))
    s = [np.asarray(scale, np.float64) + 0.25 * gemma for scale in scales]
    options = {"mlp_eps": 0.1, "tail_eps": 0.5, "out_dtype": out_dtype}
    x1, x2 = x @ o, lambda x1, act: x1 + act @ down
    if gemma:
        options |= {"o_eps": 3.0, "down_eps": 0.02, "norm_offset": 0.25, "activation": "gelu_tanh"}
        x1, x2 = relative_norm(x1, s[2], 3.0), lambda x1, act: x1 + relative_norm(act @ down, s[3], 0.02)
    x1 = x1 + r
    gate, up = np.split(relative_norm(x1, s[0], 0.1) @ gate_up, 2, axis=-1)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    x2 = x2(x1, (0.5 * gate * (1 + tanh) if gemma else gate / (1 + np.exp(-gate))) * up)
    found = chain_op(jnp.asarray(attended), jnp.asarray(residual), compressed, **options)
    assert [a.dtype.name for a in found] == ["bfloat16", out_dtype]
    for a, expected in zip(found, (x2, relative_norm(x2, s[1], 0.5) @ tail), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=0.02, atol=0.02 * np.abs(expected).max())


def test_errors():
    weights = decode_chain._weights(*_first_link(model_of(CONFIGS[1])))
    x = [jnp.ones((1, k), jnp.bfloat16) for k in weights.o_proj.shape]
    options = {"mlp_eps": 0.1, "tail_eps": 0.1, "out_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="there is a o_scale and no down_scale"):
        chain_op(*x, weights._replace(down_scale=None), **options)
    with pytest.raises(ValueError, match="activation is 'relu', expected one of silu, gelu_tanh"):
        chain_op(*x, weights, **options, activation="relu")


def _first_link(model):
    return model.layers[0], *decode_chain._following(model)[0]
