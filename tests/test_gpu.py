"""What runs on an NVIDIA GPU, on a real one: the CUDA decoder on every weight, and matmul through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.ffi import cuda_available
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS
from jaxzip.testing import bits, gaussian_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
WEIGHTS = named_weights()


def encoded(w, output_axis=KERNEL_AXIS):
    return jax.tree.map(jnp.asarray, encode_as(w, "tca-tbe", output_axis))


def test_the_cuda_library_is_there():
    assert cuda_available(), cuda_available().reason


@pytest.mark.parametrize("output_axis", [KERNEL_AXIS, TABLE_AXIS])
@pytest.mark.parametrize("implementation", ["ffi", "xla"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_decompress_gives_the_same_bits(name, implementation, output_axis):
    w = WEIGHTS[name]
    out = jaxzip.decompress(encoded(w, output_axis), implementation=implementation)
    assert out.devices() == {jax.devices("cuda")[0]}
    assert np.array_equal(bits(out), bits(w))


def test_decompress_of_a_large_matrix_and_of_a_stack():
    for shape in ((4096, 14336), (3, 2, 200, 130)):
        w = gaussian_weights(shape)
        assert np.array_equal(bits(jaxzip.decompress(encoded(w), implementation="ffi")), bits(w))


@pytest.mark.parametrize("n", [1, 8, 64])
def test_matmul_of_the_decoded_weight(n):
    """Fused for few rows, decoded and then XLA's dot for many: the same product as that of the dense weight."""
    w = gaussian_weights((512, 768))
    x = jax.random.normal(jax.random.key(0), (n, 512), jnp.bfloat16)
    y = jaxzip.matmul(x, encoded(w))
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact) < 4e-3
    assert np.array_equal(bits(y), bits(jaxzip.matmul(x, encoded(w))))


def test_inside_a_jitted_loop_with_weights_as_arguments():
    w = gaussian_weights((256, 256))

    @jax.jit
    def loop(x, z):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(jaxzip.matmul(x, z)), x)

    x = jax.random.normal(jax.random.key(0), (4, 256), jnp.bfloat16)
    assert np.array_equal(bits(loop(x, encoded(w))), bits(loop(x, encoded(w))))
