"""Which models decode in chains of kernels, and that they compute the same where there are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import (
    Gemma2,
    Gemma3,
    Llama,
    LlamaConfig,
    Mistral,
    Qwen2,
    Qwen3,
    decode_chain,
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
from jaxzip.testing import gaussian_weights

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


def applies(tree, rows=3, config=CONFIG, **execution):
    return decode_chain.applies(Llama.from_params(config, tree), rows, Execution(**execution))


@pytest.mark.parametrize("tied", [False, True])
def test_takes_fused_llamas_in_one_format(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    assert applies(params(config=config), config=config)
    assert applies(params(config=config), 256, config, implementation="ffi")
    assert applies(params(config=config), 1000, config, batch_invariant=True)
    assert applies(params("raw", config), config=config, implementation="ffi")


OTHERS = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}


@pytest.mark.parametrize(
    ("family", "taken"),
    [(Mistral, True), (Qwen3, True), (Qwen2, False), (Gemma2, False), (Gemma3, False)],  # biases, norms behind, GeGLU
)
def test_takes_the_families_that_are_llamas(family, taken):
    config = family.config_class(**OTHERS)
    model = family.from_params(config, params(config=config))
    assert decode_chain.applies(model, 3, Execution()) == taken


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


def test_a_step_on_the_cpu_is_the_ordinary_one():
    models = [Llama.from_params(CONFIG, params()) for _ in range(2)]
    models[1].chain = False
    prompts = [[5, 17, 3, 88, 41], [7, 2, 60]]
    chained, ordinary = (generate(m, prompts, max_new_tokens=8, return_logits=True) for m in models)
    assert chained.sequences() == ordinary.sequences()
    np.testing.assert_allclose(chained.logits, ordinary.logits, atol=2e-2)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_reference(out_dtype):
    n, width, d, f, m = 3, 40, 72, 56, 33
    weights = [gaussian_weights(shape, seed=i) for i, shape in enumerate([(width, d), (d, 2 * f), (f, d), (d, m)])]
    scales = [1 + gaussian_weights((d,), seed=10 + i) for i in range(2)]
    attended, residual = (gaussian_weights((n, k), seed=20 + k) * 50 for k in (width, d))

    def norm(x, scale, eps):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale

    o, gate_up, down, tail, s1, s2, x, r = (np.asarray(a, np.float64) for a in (*weights, *scales, attended, residual))
    x1 = x @ o + r
    gate, up = np.split(norm(x1, s1, 0.1) @ gate_up, 2, axis=-1)
    x2 = x1 + gate / (1 + np.exp(-gate)) * up @ down
    compressed = ChainWeights(*(encoded(w, "lane-planar") for w in weights), *scales)
    options = {"mlp_eps": 0.1, "tail_eps": 0.5, "out_dtype": out_dtype}
    found = chain_op(jnp.asarray(attended), jnp.asarray(residual), compressed, **options)
    assert [a.dtype.name for a in found] == ["bfloat16", out_dtype]
    for a, expected in zip(found, (x2, norm(x2, s2, 0.5) @ tail), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
