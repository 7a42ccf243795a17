"""The GPU's kernels of attention and norm in interpret mode against XLA's, and what they do not depend on."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import attention, decode_attention
from jaxzip.models.attention import _append_and_attend, _kernel_for_each, _kernel_for_one, attend
from jaxzip.models.decode_attention import FIXED, GATHER, HeadNorm, supported
from jaxzip.models.execution import with_gradient_of
from jaxzip.models.layers import RMSNorm
from jaxzip.models.prefill_attention import prefill_attention
from jaxzip.models.rms_norm import rms_norm

from jaxzip.testing import bits

CHUNK = FIXED[0]

pytestmark = pytest.mark.skipif(not supported(64, "bfloat16"), reason="this JAX has no Pallas Triton backend")


def case(batch, heads, kv_heads, head_dim, slots, length=1, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    angles = rng.standard_normal((batch, length, head_dim // 2)).astype(np.float32)
    cache = [draw(batch, kv_heads, slots, head_dim) for _ in range(2)]
    return draw(batch, length, (heads + 2 * kv_heads) * head_dim), jnp.cos(angles), jnp.sin(angles), *cache


one = functools.partial(_kernel_for_one, interpret=True)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "head_dim", "slots", "start", "end"),
    [
        (2, 8, 2, 32, 300, [0, 37], 290),
        (1, 4, 4, 64, CHUNK, [0], 0),
        (3, 10, 2, 64, 2 * CHUNK, [0, 150, 127], 150),
        (1, 8, 1, 128, CHUNK * (GATHER + 3), [3], CHUNK * (GATHER + 2) + 5),
        (2, 2, 1, 64, CHUNK + 1, [0, 1], CHUNK),
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_one_query_a_row(monkeypatch, long, batch, heads, kv_heads, head_dim, slots, start, end):
    # The longest chunks, of which a short cache has one, or the shortest.
    monkeypatch.setattr(decode_attention, "CHUNKS", ((0, decode_attention.CHUNKS[0 if long else -1][1]),))
    arguments = (*case(batch, heads, kv_heads, head_dim, slots), jnp.array(start, jnp.int32), jnp.int32(end))
    out, keys, values = one(*arguments)
    expected, *cache = jax.jit(functools.partial(_append_and_attend, num_heads=heads))(*arguments)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=0.01)
    assert np.array_equal(bits(values), bits(cache[1]))
    # The rotated key is rounded once; contracted multiply-adds may round the other way.
    np.testing.assert_allclose(np.asarray(keys, np.float32), np.asarray(cache[0], np.float32), rtol=0.01, atol=1e-6)
    untouched = np.arange(slots) != end
    assert np.array_equal(bits(keys)[:, :, untouched], bits(arguments[3])[:, :, untouched])


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_large_heads_their_norms_and_capped_scores(cap, offset):
    batch, heads, kv_heads, head_dim, slots = 2, 4, 2, 256, 300
    qkv, *others = case(batch, heads, kv_heads, head_dim, slots)
    head_norm = None if offset is None else HeadNorm(1e-6, offset)
    scales = () if offset is None else 1 + 0.5 * jax.random.normal(jax.random.key(1), (2, head_dim), jnp.bfloat16)
    arguments = (7 * qkv, *others, jnp.array([0, 140], jnp.int32), jnp.int32(290), *scales)
    options = {"cap": cap, "head_norm": head_norm, "divisor": 24.0}
    out, keys, values = one(*arguments, **options)
    expected, *cache = jax.jit(functools.partial(_append_and_attend, num_heads=heads, **options))(*arguments)
    wide = [np.asarray(a, np.float32) for a in (out, expected, keys, cache[0])]
    np.testing.assert_allclose(*wide[:2], rtol=0.02, atol=0.02 if offset is None else 0.01)
    np.testing.assert_allclose(*wide[2:], rtol=0.01, atol=1e-6)
    assert np.array_equal(bits(values), bits(cache[1]))
    # Each option counts.
    without = jax.jit(functools.partial(_append_and_attend, num_heads=heads, divisor=24.0))(*arguments[:7])
    assert (options["cap"] or head_norm) is None or np.abs(wide[1] - np.asarray(without[0], np.float32)).max() > 0.1


def test_every_query_for_itself(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)  # two blocks of fewer kernels than of 256 queries
    length, heads, slots, end = 128, 2, 552, 400
    arguments = (*case(2, heads, 1, 32, slots, length), jnp.array([0, end + 75], jnp.int32), jnp.int32(end))
    out, keys, values = _kernel_for_each(*arguments, num_heads=heads, interpret=True)
    expected, *cache = _append_and_attend(*arguments, num_heads=heads)
    seen = np.arange(length) + end >= np.array([[0], [end + 75]])
    np.testing.assert_allclose(np.asarray(out, np.float32)[seen], np.asarray(expected, np.float32)[seen], atol=0.02)
    assert not np.asarray(out, np.float32)[~seen].any()
    assert np.array_equal(bits(keys), bits(cache[0])) and np.array_equal(bits(values), bits(cache[1]))


def test_a_row_depends_on_neither_batch_nor_padding_nor_the_length_of_the_cache(monkeypatch):
    qkv, cos, sin, keys, values = case(3, 8, 2, 64, 400)
    fixed = functools.partial(one, batch_invariant=True)
    alone = fixed(qkv[1:2], cos[1:2], sin[1:2], keys[1:2], values[1:2], jnp.array([0]), jnp.int32(300))[0]
    # The same sequence, 57 slots later, between others, in a longer cache.
    moved = [jnp.pad(a, ((0, 0), (0, 0), (57, 200), (0, 0))) for a in (keys, values)]
    monkeypatch.setattr(decode_attention, "CHUNKS", ((2, (1024, 2)), *decode_attention.CHUNKS))
    together = fixed(qkv, cos, sin, *moved, jnp.array([4, 57, 200]), jnp.int32(357))[0]
    assert np.array_equal(bits(alone[0]), bits(together[1]))


@pytest.mark.parametrize(("rows", "features"), [(1, 256), (7, 640), (3, 5120)])
def test_norm(rows, features):
    x = 3 * jax.random.normal(jax.random.key(0), (rows, features), jnp.bfloat16)
    scale = 1 + 0.1 * jax.random.normal(jax.random.key(1), (features,), jnp.bfloat16)
    norm = RMSNorm(features, eps=1e-5, dtype="bfloat16")
    norm.scale.set_value(scale)
    found = rms_norm(x, scale, 1e-5, interpret=True)
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(norm(x), np.float32), rtol=0.01)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0.005)


def test_too_many_queries():
    rows = decode_attention.MAX_ROWS + 1
    shapes = [(rows, 96), (rows, 16), (rows, 16), (rows, 1, 8, 32), (rows, 1, 8, 32), (rows,), (1,)]
    call = functools.partial(decode_attention.decode_attention, append=True, interpret=True)
    with pytest.raises(ValueError, match="up to 65535 queries at a time, got 65536"):
        jax.eval_shape(call, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


def test_gradients_are_those_of_xla():
    *operands, keys, values = case(2, 4, 2, 32, 200)
    reference = functools.partial(_append_and_attend, num_heads=4)
    kernel = with_gradient_of(reference, one)

    def loss(attend, qkv, keys):
        out = attend(qkv, *operands[1:], keys, values, jnp.array([0, 70], jnp.int32), jnp.int32(150))[0]
        return jnp.sum(out.astype(jnp.float32) ** 2)

    found, expected = (
        jax.grad(functools.partial(loss, f), argnums=(0, 1))(operands[0], keys) for f in (kernel, reference)
    )
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(b, np.float32)).max() > 0.01
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02)


def test_what_the_kernel_takes():
    assert supported(256, "bfloat16") and supported(64, "float16")
    assert not supported(80, "bfloat16") and not supported(16, "bfloat16") and not supported(64, "float32")


def on_an_absent_gpu():
    """A mesh of it, for JAX versions whose Triton backend asks what it compiles for."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("head_dim", [64, 256])
def test_lowers_for_a_gpu(head_dim):
    qkv, cos, sin, keys, values = case(2, 4, 2, head_dim, 600)
    arguments = (qkv[:, 0], cos[:, 0], sin[:, 0], keys, values, jnp.zeros(2, jnp.int32), jnp.array([590], jnp.int32))
    arguments += (*jnp.ones((2, head_dim), jnp.bfloat16),)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
    options = {"append": True, "cap": 50.0, "head_norm": HeadNorm(1e-6, 1.0)}
    attend = jax.jit(functools.partial(decode_attention.decode_attention, **options))
    with on_an_absent_gpu():
        text = attend.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "decode_attention" in text and "gather_attention" in text


@pytest.mark.parametrize(
    ("length", "start", "window"), [(48, [0, 47, 5], None), (40, [0, 13, 39], 7), (16, [3, 0, 1], 64)]
)
def test_prompts_turned_to_the_left(length, start, window):
    """What is around cuDNN, around the same function by XLA: rows of different lengths, windows, grouped queries."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.standard_normal((3, length, heads, 32)), jnp.bfloat16) for heads in (6, 2, 2))
    first = jnp.array(start, jnp.int32)
    options = {"divisor": 4.0, "window": window}
    turned = prefill_attention(q, k, v, first, implementation="xla", **options)
    expected = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), first, jnp.int32(0), **options)
    real = np.arange(length) >= np.array(start)[:, None]
    np.testing.assert_allclose(np.asarray(turned, np.float32)[real], np.asarray(expected, np.float32)[real], atol=0.02)
    assert not np.asarray(turned, np.float32)[~real].any()
