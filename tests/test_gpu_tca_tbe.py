"""The fused TCA-TBE matmul and the decoder on a real NVIDIA GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.ffi import cuda_ops
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS
from jaxzip.testing import BF16, all_bit_patterns, bits, gaussian_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
WEIGHTS = named_weights()
SHAPES = [(64, 64), (1, 1), (330, 200), (1096, 65), (20000, 96), (4096, 1024)]


def encoded(w, output_axis=KERNEL_AXIS):
    return jax.tree.map(jnp.asarray, encode_as(w, "tca-tbe", output_axis))


def fused(x, z):
    """The kernel itself: jaxzip.matmul leaves more than 32 rows to the decoder and XLA's dot."""
    return cuda_ops.tca_tbe_matmul(x, z.payload, *z.matrix_shape)


def rows(n, k):
    return jax.random.normal(jax.random.key(n), (n, k), jnp.bfloat16)


def relative_error(y, exact):
    return np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("n", [1, 3, 8, 11, 16, 32, 33, 256, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_right_and_repeats(shape, n):
    w = gaussian_weights(shape)
    x, z = rows(n, shape[0]), encoded(w)
    y = fused(x, z)
    assert relative_error(y, np.asarray(x, np.float64) @ w.astype(np.float64)) < 4e-3
    assert np.array_equal(bits(y), bits(fused(x, z)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_hot_rows_give_the_weights_themselves(name):
    """x = e_k selects row k of the kernel: sums of one product and zeros, exact for every finite weight."""
    w = WEIGHTS[name]
    if w.ndim != 2:
        pytest.skip("one matrix")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = w.astype(np.float64)
    if not np.isfinite(values).all():
        pytest.skip("0 * inf is NaN in every other row")
    k = min(w.shape[0], 64)
    x = jnp.eye(k, w.shape[0], dtype=jnp.bfloat16)
    # Tensor Cores take subnormals; only the sign of a zero is lost in a sum.
    assert np.array_equal(np.asarray(fused(x, encoded(w)), np.float64), values[:k])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.13, 0.16, 0.25, 0.6, 1.0])
def test_any_share_of_fallbacks(share):
    """A block stages 13% of its weights as fallbacks in shared memory; one with more fetches them a band at a time."""
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 16, (256, 192)) & 0x807F | rng.integers(120, 127, (256, 192)) << 7
    outside = rng.integers(0, 1 << 16, words.shape) & 0xBFFF  # finite: no exponent above 127
    w = np.where(rng.random(words.shape) < share, outside, words).astype(np.uint16).view(BF16)
    z = encoded(w)
    assert np.array_equal(bits(jaxzip.decompress(z, implementation="ffi")), bits(w))
    for n in (8, 16, 32):
        k = jnp.arange(n) * 7
        x = jax.nn.one_hot(k, w.shape[0], dtype=jnp.bfloat16)
        assert np.array_equal(np.asarray(fused(x, z), np.float32), w[np.asarray(k)].astype(np.float32))


def test_nan_and_infinity_arrive():
    w = all_bit_patterns()
    x = rows(8, w.shape[0])
    y = np.asarray(fused(x, encoded(w)), np.float32)
    dense = np.asarray(x.astype(jnp.float32) @ jnp.asarray(w).astype(jnp.float32))
    assert np.isnan(y[np.isnan(dense)]).all()


@pytest.mark.parametrize("output_axis", [KERNEL_AXIS, TABLE_AXIS])
@pytest.mark.parametrize("shape", SHAPES)
def test_decompress_of_ragged_shapes(shape, output_axis):
    w = gaussian_weights(shape)
    assert np.array_equal(bits(jaxzip.decompress(encoded(w, output_axis), implementation="ffi")), bits(w))


def test_two_products_in_one_program():
    """They share nothing, the workspaces included."""
    a, b = (encoded(gaussian_weights((768, 512), seed=s)) for s in (1, 2))
    x = rows(8, 768)
    both = jax.jit(lambda x, a, b: (fused(x, a), fused(x, b)))(x, a, b)
    assert np.array_equal(bits(both[0]), bits(fused(x, a)))
    assert np.array_equal(bits(both[1]), bits(fused(x, b)))


def test_matmul_takes_this_kernel_for_few_rows():
    z = encoded(gaussian_weights((768, 512)))
    bias, x = rows(1, 512)[0], rows(8, 768)
    assert np.array_equal(bits(jaxzip.matmul(x, z)), bits(fused(x, z)))
    y = jaxzip.matmul(x, z, bias=bias, out_dtype=jnp.float32, implementation="ffi")
    assert np.array_equal(y, cuda_ops.tca_tbe_matmul(x, z.payload, 512, 768, out_dtype=jnp.float32) + bias)
    with pytest.raises(NotImplementedError, match="above 32"):
        jaxzip.matmul(rows(33, 768), z, implementation="ffi")
