"""Prompts' attention by cuDNN against XLA's, alone and in a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import Llama, LlamaConfig, attention, generate, prefill_attention, random_params
from jaxzip.models.attention import _append_and_attend, _kernel_for_prompts
from near_ties import assert_same_up_to_ties

from jaxzip.testing import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=64,
    max_position_embeddings=2048,
)  # fmt: skip


def case(rows, length, heads, kv_heads, head_dim, slots, dtype="bfloat16"):
    rng = np.random.default_rng(length + head_dim)
    angles = rng.standard_normal((rows, length, head_dim // 2)).astype(np.float32)
    qkv = jnp.asarray(rng.standard_normal((rows, length, (heads + 2 * kv_heads) * head_dim)), dtype)
    cache = [jnp.zeros((rows, kv_heads, slots, head_dim), dtype) for _ in range(2)]
    return qkv, jnp.cos(angles), jnp.sin(angles), *cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 6, 2), (128, 8, 8), (128, 8, 1), (256, 4, 2)])
@pytest.mark.parametrize(
    ("length", "start", "window"),
    [(16, [0, 15], None), (320, [0, 131], None), (1024, [1, 700], None), (320, [0, 131], 64), (1000, [7, 0], 1000)],
)
def test_attention(length, start, window, head_dim, heads, kv_heads, dtype):
    assert prefill_attention.supported(head_dim, dtype, None)
    arrays = case(2, length, heads, kv_heads, head_dim, length + 40, dtype)
    arguments = *arrays, jnp.array(start, jnp.int32), jnp.int32(0)
    options = {"num_heads": heads, "divisor": 9.0, "window": window}
    found, *cache = jax.jit(functools.partial(_kernel_for_prompts, **options))(*arguments)
    expected, *other = jax.jit(functools.partial(_append_and_attend, **options))(*arguments)
    real = np.arange(length) >= np.array(start)[:, None]
    np.testing.assert_allclose(np.asarray(found, np.float32)[real], np.asarray(expected, np.float32)[real], atol=0.02)
    assert not np.asarray(found, np.float32)[~real].any()
    assert np.array_equal(bits(cache[1]), bits(other[1]))
    # A rotated key is rounded once; contracted multiply-adds may round the other way.
    np.testing.assert_allclose(*(np.asarray(keys[0], np.float32) for keys in (cache, other)), rtol=0.01, atol=1e-5)


def test_a_models_prompts_and_gradients(monkeypatch):
    model = Llama.from_params(CONFIG, random_params(CONFIG))
    prompts = [list(range(1, 200)), list(range(5, 400)), [7]]
    tokens = jnp.array([prompts[1][:64]])
    loss = lambda model: jnp.mean(jax.nn.logsumexp(model(tokens), -1))  # noqa: E731
    run = lambda: (  # noqa: E731
        generate(model, prompts, max_new_tokens=24, eos=(), return_logits=True),
        jax.grad(lambda p: loss(Llama.from_params(CONFIG, p)))(model.to_params()),
    )
    here, gradient = run()
    again, _ = run()
    assert np.array_equal(here.tokens, again.tokens)
    assert np.array_equal(bits(here.logits), bits(again.logits))
    monkeypatch.setattr(attention.prefill_attention, "supported", lambda *a: False)
    jax.clear_caches()
    by_xla, expected = run()
    assert_same_up_to_ties(here, by_xla)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 0.05 * np.abs(b).max() + 1e-6


def test_a_cap_on_scores_is_xlas():
    assert not prefill_attention.supported(64, "bfloat16", 30.0)
    capped = dataclasses.replace(CONFIG, head_dim=36)
    assert not prefill_attention.supported(capped.head_dim, "bfloat16", None)
