"""Model families on a Hopper GPU: the bits of ``raw`` weights, windows in attention's kernels, rows in any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import (
    Gemma2Config,
    Gemma3Config,
    MistralConfig,
    Mixtral,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    family_of,
    fuse_projections,
    generate,
    random_params,
)
from jaxzip.models.attention import _append_and_attend, _kernel_for_each, _kernel_for_one
from jaxzip.models.decode_attention import HeadNorm

import jaxzip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_hopper"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
SIZES = {
    "vocab_size": 500, "hidden_size": 256, "intermediate_size": 640, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2,
    "head_dim": 64, "max_position_embeddings": 1024, "dtype": "bfloat16",
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_token": 2}
SLIDING = {"sliding_window": 16, "layer_types": ("sliding_attention", "sliding_attention", "full_attention")}
CONFIGS = [
    MistralConfig(**SIZES, sliding_window=20),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES),
    Gemma2Config(**SIZES, **SLIDING),
    Gemma3Config(**{**SIZES, "head_dim": 256}, **SLIDING),
    Gemma3Config(**SIZES, **SLIDING),
    MixtralConfig(**SIZES, **EXPERTS),
    Qwen3MoeConfig(**SIZES, **EXPERTS, expert_size=320, normalized_weights=True, dense_layers=(1,)),
]
PROMPTS = [[5, 17, 3, 88, 41, 2, 60], [400, 1, 2, 3]]
NAMES = [f"{config.model_type}-{config.head_dim}" for config in CONFIGS]


def model(config, format):
    def compress(path, w):
        if w.ndim < 2:
            return w
        z = jaxzip.compress(w, format=format, output_axis=-2 if path[-1].key == "embedding" else -1)
        return z if format == "raw" or z.format != "raw" else w

    tree = jax.tree_util.tree_map_with_path(compress, random_params(config))
    return family_of(config).from_params(config, fuse_projections(tree), implementation="ffi")


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_logits_and_tokens_equal_those_of_the_raw_control(config):
    encoded, raw = (model(config, format) for format in ("lane-planar", "raw"))
    router = getattr(encoded.layers[0].mlp, "router", None)
    if router is not None:  # too small to be compressed: in the control it must be XLA's as well
        for layer in raw.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.kernel.set_value(layer.mlp.router.kernel.get_value().payload["values"])
    options = {"max_new_tokens": 40, "return_logits": True, "eos": ()}
    one, control, again = (generate(m, PROMPTS, **options) for m in (encoded, raw, encoded))
    assert np.isfinite(one.logits).all()
    assert one.tokens.tolist() == control.tokens.tolist()
    assert one.logits.tobytes() == control.logits.tobytes() == again.logits.tobytes()


def test_logits_are_those_of_the_cpu():
    for config in CONFIGS:
        params, tokens = random_params(config), jnp.array([PROMPTS[0] * 6])
        on_gpu = np.asarray(jax.jit(lambda m, t: m(t))(family_of(config).from_params(config, params), tokens))
        wide = dataclasses.replace(config, dtype="float32")
        with jax.default_device(jax.devices("cpu")[0]):
            params = jax.tree.map(lambda w: np.asarray(w, np.float32), params)
            on_cpu = np.asarray(jax.jit(lambda m, t: m(t))(family_of(wide).from_params(wide, params), tokens))
        error = np.abs(on_gpu - on_cpu).mean() / np.abs(on_cpu).mean()
        assert error < 0.05, (config.model_type, error)


@pytest.mark.parametrize("index", [0, 2, 3, 4, 6], ids=NAMES.__getitem__)
def test_tokens_do_not_depend_on_the_batch(index):
    encoded, rng = model(CONFIGS[index], "lane-planar"), np.random.default_rng(0)
    prompts = [rng.integers(0, 500, length).tolist() for length in rng.integers(1, 60, 7)]
    options = {"max_new_tokens": 24, "return_logits": True, "batch_invariant": True, "eos": ()}
    together, alone = generate(encoded, prompts, **options), generate(encoded, [prompts[3]], **options)
    assert alone.logits[0].tobytes() == together.logits[3].tobytes()


@pytest.mark.parametrize(("length", "window"), [(1, 5), (1, 300), (40, 9), (40, 200)])
def test_windows_in_attentions_kernels(length, window):
    rng, heads = np.random.default_rng(0), 10
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    angles = rng.standard_normal((3, length, 64)).astype(np.float32)
    arguments = (
        draw(3, length, 14 * 128),
        jnp.cos(angles),
        jnp.sin(angles),
        draw(3, 2, 700, 128),
        draw(3, 2, 700, 128),
    )
    arguments += (jnp.array([0, 130, 60], jnp.int32), jnp.int32(600))
    options = {"window": window, "divisor": 9.0}
    each = {} if length == 1 else {"num_heads": heads}
    kernel = _kernel_for_one if length == 1 else _kernel_for_each
    out = jax.jit(lambda *a: kernel(*a, **each, **options)[0])(*arguments)
    expected = jax.jit(lambda *a: _append_and_attend(*a, num_heads=heads, **options)[0])(*arguments)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.03)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize(
    ("length", "head_norm"), [(1, None), (1, HeadNorm(1e-6, 0.0)), (1, HeadNorm(1e-6, 1.0)), (40, None)]
)
@pytest.mark.parametrize("batch", [1, 40])
def test_heads_norms_and_caps_in_attentions_kernels(batch, length, head_norm, head_dim, cap):
    keys, heads, kv_heads, slots = jax.random.split(jax.random.key(0), 5), 8, 2, 1500
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    angles = jax.random.normal(keys[0], (batch, length, head_dim // 2))
    qkv = 3 * draw(keys[1], batch, length, (heads + 2 * kv_heads) * head_dim)
    cache = [draw(key, batch, kv_heads, slots, head_dim) for key in keys[2:4]]
    start = jnp.arange(batch, dtype=jnp.int32) * 20
    scales = tuple(1 + 0.5 * draw(keys[4], 2, head_dim)) if head_norm else ()
    arguments = (qkv, jnp.cos(angles), jnp.sin(angles), *cache, start, jnp.int32(1400), *scales)
    options = {"cap": cap} | ({"head_norm": head_norm} if head_norm else {})
    each = {} if length == 1 else {"num_heads": heads}
    kernel = _kernel_for_one if length == 1 else _kernel_for_each
    out, new_keys, _ = jax.jit(lambda *a: kernel(*a, **each, **options))(*arguments)
    expected, other_keys, _ = jax.jit(lambda *a: _append_and_attend(*a, num_heads=heads, **options))(*arguments)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=0.01, atol=0.1)
    # Both round; where norms do before the rotation, its difference of two can be of any relative size.
    np.testing.assert_allclose(
        np.asarray(new_keys, np.float32),
        np.asarray(other_keys, np.float32),
        rtol=0.01,
        atol=0.13 if head_norm else 1e-5,
    )


def test_only_experts_that_have_rows_are_read():
    """NaN in the weights of an expert that no token has reaches nothing."""
    config = MixtralConfig(**SIZES, **EXPERTS)
    params = random_params(config)
    for layer in params["layers"].values():
        layer["mlp"]["router"]["kernel"][:, 5] = 0
        for stack in layer["mlp"]["experts"].values():
            stack["kernel"][5, ::16, ::16] = np.nan  # not more, or the stack would be stored raw
    tree = jax.tree_util.tree_map_with_path(
        lambda path, w: jaxzip.compress(w, format="lane-planar") if w.ndim == 3 else w, params
    )
    assert tree["layers"]["0"]["mlp"]["experts"]["down_proj"]["kernel"].format == "lane-planar"
    logits = Mixtral.from_params(config, tree)(jnp.array([PROMPTS[0]]))
    assert np.isfinite(np.asarray(logits)).all()
