"""``gated_matmul`` by its reference: that it is the product and the gate, its gradient and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzip
from jaxzip.ops.activations import gated
from jaxzip.ops.gated_matmul import fills_gpu, gated_matmul
from jaxzip.testing import bits, gaussian_weights

W = gaussian_weights((96, 140))
X = jax.random.normal(jax.random.key(3), (9, 96), jnp.bfloat16)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("format", ["lane-planar", "raw"])
def test_is_the_product_and_the_gate(format, activation):
    w = jaxzip.compress(W, format=format)
    act = jax.jit(gated_matmul, static_argnums=2)(X, w, activation)
    products = jaxzip.matmul(X, w)
    assert np.array_equal(bits(act), bits(gated(products[:, :70], products[:, 70:], activation)))


def test_gradient():
    w = jaxzip.compress(W, format="lane-planar")

    def by_dense(x):
        return gated(*jnp.split(x @ jnp.asarray(W), 2, axis=-1), "silu").astype(jnp.float32).sum()

    found = jax.grad(lambda x: gated_matmul(x, w, "silu").astype(jnp.float32).sum())(X)
    want = np.asarray(jax.grad(by_dense)(X), np.float32)
    assert np.linalg.norm(np.asarray(found, np.float32) - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("x", "w", "activation", "words"),
    [
        (X, W, "relu", "silu"),
        (X, W[:, :139], "silu", r"\[K, 2 F\]"),
        (X[:, :95], W, "silu", "K=96"),
        (X[0], W, "silu", "K=96"),
    ],
)
def test_bad_arguments(x, w, activation, words):
    with pytest.raises(ValueError, match=words):
        gated_matmul(x, jaxzip.compress(w, format="lane-planar"), activation)


def test_where_a_gpu_has_enough_to_do():
    wide = 2 * 14336
    few = (1, 256, 257, 384, 512, 700)
    assert [n for n in (*few, 1024, 1100, 1200, 2048, 2049) if fills_gpu(n, wide)] == [1024, 1200, 2048]
    assert not fills_gpu(512, 2 * 1536) and fills_gpu(4096, 2 * 1536)
