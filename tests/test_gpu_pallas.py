"""The Pallas kernels on a Hopper GPU: exact decoding; products against fp64, the public-API kernels and the FFI's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.pallas_kernels import lane_planar_portable, mosaic_lanes
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.formats import lane_planar as layout
from jaxzip.ops import registry
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS
from jaxzip.testing import BF16, all_bit_patterns, bits, gaussian_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_hopper"),
    pytest.mark.skipif(bool(mosaic_lanes.unavailable_reason()), reason=mosaic_lanes.unavailable_reason()),
]
WEIGHTS = named_weights()
FINITE = [n for n, w in WEIGHTS.items() if np.isfinite(w.astype(np.float32)).all() and "subnormal" not in n]
#: (M, K): ragged ones, and each way to split the work (clusters, groups of K, tiles one after another).
SHAPES = [(1000, 3000), (4097, 1023), (65, 8200), (1024, 4096), (2048, 2048), (9000, 512)]


def encoded(w, output_axis=KERNEL_AXIS):
    return jax.tree.map(jnp.asarray, encode_as(w, "lane-planar", output_axis))


def activations(n, k, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, k), jnp.float32).astype(jnp.bfloat16)


def scales(w, n):
    """Rows of W whose exponents differ, so that their shifts do."""
    return (w * np.exp2(np.arange(w.shape[1]) % n - n // 2).astype(w.dtype)).astype(w.dtype)


def pallas(x, z, **options):
    return jaxzip.matmul(x, z, implementation="pallas", **options)


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = bits(a), bits(b)
    assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} differ"


def assert_sums(y, x, w):
    """fp32 sums in any order: products of bf16 are exact."""
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 1e-5 * scale + 1e-37)


@pytest.mark.parametrize("output_axis", [KERNEL_AXIS, TABLE_AXIS])
@pytest.mark.parametrize("name", WEIGHTS)
def test_decompress_gives_the_same_bits(name, output_axis):
    w = WEIGHTS[name]
    assert_same(jaxzip.decompress(encoded(w, output_axis), implementation="pallas"), jnp.asarray(w))


@pytest.mark.parametrize("shape", [(512, 4096), (4000, 1000), (3, 2, 200, 130)])
def test_decompress_of_larger_matrices_and_of_a_stack(shape):
    w = scales(gaussian_weights(shape), 9) if len(shape) == 2 else gaussian_weights(shape)
    assert_same(jaxzip.decompress(encoded(w), implementation="pallas"), jnp.asarray(w))


@pytest.mark.parametrize("name", FINITE)
def test_products(name):
    w = WEIGHTS[name]
    x = activations(70, w.shape[0])
    assert_sums(pallas(x, encoded(w), out_dtype=jnp.float32), x, w)


@pytest.mark.parametrize("n", [1, 40, 200])
def test_every_bit_pattern_as_a_weight(n):
    """Columns of W with NaN give NaN; the ordinary columns between them are untouched."""
    w = all_bit_patterns()
    ordinary = np.abs(w[:, ::2].astype(np.float32))
    w[:, ::2] = np.where(np.isfinite(ordinary), ordinary, 1).clip(2.0**-20, 2.0**20).astype(BF16)
    x = activations(n, 256)
    y = np.asarray(pallas(x, encoded(w), out_dtype=jnp.float32))
    assert_sums(y[:, ::2], x, w[:, ::2])
    with_nan = np.isnan(w.astype(np.float32)).any(0)
    assert with_nan.any() and np.isnan(y[:, with_nan]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    m, k = shape
    w = scales(gaussian_weights((k, m), seed=m), 5)
    z = encoded(w)
    for n in (1, 33, 128, 256):
        x = activations(n, k, seed=n)
        y = pallas(x, z, out_dtype=jnp.float32)
        assert_sums(y, x, w)
        assert_same(pallas(x, z, out_dtype=jnp.float32), y)


def test_more_escapes_in_a_tile_than_a_warp_has_lanes():
    w = gaussian_weights((256, 256))
    w[:, :16] = (w[:, :16].astype(np.float32) * 2.0 ** np.random.default_rng(0).integers(-12, 13, (256, 16))).astype(
        BF16
    )
    z, x = encoded(w), activations(64, 256)
    ends = np.asarray(z.payload["blocks"])[..., layout.HEADER]
    assert ((ends & 255) > 32).any()
    assert_sums(pallas(x, z, out_dtype=jnp.float32), x, w)


@pytest.mark.parametrize("m", [1000, 1001])
@pytest.mark.parametrize("n", [40, 200])
def test_bias_and_residual(n, m):
    w = scales(gaussian_weights((1024, m)), 5)
    x, z = activations(n, 1024), encoded(w)
    bias, residual = activations(1, m, seed=1)[0], activations(n, m, seed=2)
    sums = pallas(x, z, out_dtype=jnp.float32)
    assert_same(pallas(x, z), sums.astype(jnp.bfloat16))
    with_bias = sums + bias.astype(jnp.float32)
    assert_same(pallas(x, z, bias=bias, out_dtype=jnp.float32), with_bias)
    want = with_bias + residual.astype(jnp.float32)
    assert_same(pallas(x, z, bias=bias, residual=residual, out_dtype=jnp.float32), want)
    assert_same(pallas(x, z, bias=bias, residual=residual), want.astype(jnp.bfloat16))


def test_a_stack_under_vmap_and_rows_under_vmap():
    w = gaussian_weights((3, 512, 200))
    z, x = encoded(w), activations(15, 512).reshape(3, 5, 512)
    together = jax.vmap(pallas)(x, z)
    for i in range(3):
        assert_same(together[i], pallas(x[i], encoded(w[i])))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_public_path_agrees():
    w = scales(gaussian_weights((300, 520)), 5)
    z, x = encoded(w), activations(24, 300)
    m, k = z.matrix_shape
    decoded = jax.jit(lambda p: lane_planar_portable.decompress(p, m, k, transposed=True, interpret=False))(z.payload)
    assert_same(decoded, jaxzip.decompress(z, implementation="pallas"))
    sums = jax.jit(lambda x, p: lane_planar_portable.matmul(x, p, m, k, interpret=False))(x, z.payload)
    np.testing.assert_allclose(sums, pallas(x, z, out_dtype=jnp.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", WEIGHTS)
def test_tca_tbe_decompress_gives_the_same_bits(name):
    z = jax.tree.map(jnp.asarray, encode_as(WEIGHTS[name], "tca-tbe", KERNEL_AXIS))
    assert_same(jaxzip.decompress(z, implementation="pallas"), jnp.asarray(WEIGHTS[name]))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", FINITE)
def test_tca_tbe_products(name):
    w = WEIGHTS[name]
    x, z = activations(70, w.shape[0]), jax.tree.map(jnp.asarray, encode_as(w, "tca-tbe", KERNEL_AXIS))
    y = pallas(x, z, out_dtype=jnp.float32)
    assert_sums(y, x, w)
    assert_same(y, pallas(x, jaxzip.compress(w, format="raw"), out_dtype=jnp.float32))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("n", [1, 16, 33, 100, 256, 300])
def test_tca_tbe_rows_of_x_and_parts_of_k(n, x_dtype):
    w = gaussian_weights((2000, 1000), seed=n)
    x, z = activations(n, 2000).astype(x_dtype), jax.tree.map(jnp.asarray, encode_as(w, "tca-tbe", KERNEL_AXIS))
    y = pallas(x, z, out_dtype=jnp.float32)
    assert_sums(y, x, w)
    assert_same(pallas(x, z, out_dtype=jnp.float32), y)


@pytest.mark.parametrize("n", [8, 64, 128])
def test_agrees_with_the_ffi_kernels(n):
    registry.load_backends()
    if not any(i.name == "ffi" and "cuda" in (i.platforms or ()) for i in registry._registry["matmul"]):
        pytest.skip("no CUDA library")
    w = scales(gaussian_weights((2048, 1000)), 5)
    z, x = encoded(w), activations(n, 2048)
    ffi = jaxzip.matmul(x, z, implementation="ffi", out_dtype=jnp.float32)
    np.testing.assert_allclose(pallas(x, z, out_dtype=jnp.float32), ffi, rtol=1e-4, atol=1e-4)
