"""Lane-planar's kernels on a real Hopper GPU: exact decoding, products that equal the raw control's bit for bit."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.ops.activations import gated
from jaxzip.ops.gated_matmul import gated_matmul
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS
from jaxzip.testing import all_bit_patterns, bits, gaussian_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
WEIGHTS = named_weights()
FORMAT = "lane-planar"
#: (M, K) of the projections of Llama 3.1 8B, Qwen3 14B and Llama 3.1 70B, and ragged ones.
MODEL_SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (1024, 4096), (14336, 4096),
    (7168, 5120), (5120, 5120), (34816, 5120), (5120, 17408),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
]  # fmt: skip
RAGGED_SHAPES = [(1000, 3000), (4097, 1023), (65, 8200), (6141, 4093), (14335, 4100), (5119, 5121)]


def encoded(w, output_axis=KERNEL_AXIS):
    return jax.tree.map(jnp.asarray, encode_as(w, FORMAT, output_axis))


def raw(w):
    return jaxzip.compress(w, format="raw")


def activations(n, k, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, k), jnp.float32).astype(jnp.bfloat16)


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.dtype == jnp.float32:
        a, b = np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
    else:
        a, b = bits(a), bits(b)
    assert np.array_equal(a, b), f"{np.count_nonzero(a != b)} of {a.size} differ"


def fused(x, z, **options):
    return jaxzip.matmul(x, z, implementation="ffi", **options)


def scales(w, n):
    """Rows of W whose exponents differ, so that their shifts do."""
    return (w * np.exp2(np.arange(w.shape[1]) % n - n // 2).astype(w.dtype)).astype(w.dtype)


@pytest.mark.parametrize("output_axis", [KERNEL_AXIS, TABLE_AXIS])
@pytest.mark.parametrize("name", WEIGHTS)
def test_decompress_gives_the_same_bits(name, output_axis):
    w = WEIGHTS[name]
    assert_same(jaxzip.decompress(encoded(w, output_axis), implementation="ffi"), jnp.asarray(w))


@pytest.mark.parametrize("name", WEIGHTS)
def test_take_gives_the_same_rows(name):
    table = jnp.asarray(WEIGHTS[name])
    ids = jnp.asarray([[0, table.shape[0] - 1, -1], [table.shape[0], 5, 5]])
    z = encoded(WEIGHTS[name], TABLE_AXIS)
    assert_same(jaxzip.take(z, ids, implementation="ffi"), jaxzip.take(table, ids))
    every = jnp.arange(table.shape[0])
    assert_same(jax.jit(jaxzip.take)(z, every), table)


@pytest.mark.parametrize("shape", [(4096, 14336), (3, 2, 200, 130)])
def test_decompress_of_a_large_matrix_and_of_a_stack(shape):
    w = scales(gaussian_weights(shape), 9) if len(shape) == 2 else gaussian_weights(shape)
    assert_same(jaxzip.decompress(encoded(w), implementation="ffi"), jnp.asarray(w))


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 16, 31, 64, 100, 128, 256, 300, 1100])
def test_every_bit_pattern_as_a_weight(n, out_dtype):
    """NaN and infinities among them: only the control, the same kernel on raw weights, says what is right."""
    w = all_bit_patterns()
    x = activations(n, w.shape[0])
    assert_same(fused(x, encoded(w), out_dtype=out_dtype), fused(x, raw(w), out_dtype=out_dtype))


@pytest.mark.parametrize("n", [8, 130, 400])
@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_to_the_raw_control(name, n):
    w = WEIGHTS[name]
    x = activations(n, w.shape[0])
    assert_same(fused(x, encoded(w), out_dtype=jnp.float32), fused(x, raw(w), out_dtype=jnp.float32))


@pytest.mark.parametrize("shape", [*MODEL_SHAPES, *RAGGED_SHAPES], ids=str)
def test_shapes(shape):
    m, k = shape
    w = scales(0.02 * jax.random.normal(jax.random.key(m), (k, m), jnp.bfloat16), 5)
    z, control = encoded(w), raw(w)
    assert_same(jaxzip.decompress(z, implementation="ffi"), w)
    for n in (1, 8, 32, 200, 600) if m * k >= 50e6 else (1, 2, 8, 13, 16, 32, 64, 200, 257, 600):
        x = activations(n, k, seed=n)
        y = fused(x, z, out_dtype=jnp.float32)
        assert_same(y, fused(x, control, out_dtype=jnp.float32))
        assert_same(y, fused(x, z, out_dtype=jnp.float32))
        assert_same(fused(x, z), y.astype(jnp.bfloat16))
        exact = jnp.dot(x, w, precision="highest", preferred_element_type=jnp.float32)
        # Tensor Cores cut off what does not fit a sum's 24 bits, so that errors grow with the length of a sum.
        assert float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) < max(1e-5, 2e-9 * k)


@pytest.mark.parametrize("n", [1, 8, 40, 128, 300, 2500, 4200])
def test_bias_and_residual(n):
    w = scales(gaussian_weights((512, 1000)), 5)
    x, z = activations(n, 512), encoded(w)
    bias, residual = activations(1, 1000, seed=1)[0], activations(n, 1000, seed=2)
    options = {"batch_invariant": n > 4096}  # which has the fused kernel take any number of rows
    sums = fused(x, z, out_dtype=jnp.float32, **options)
    for b, r in ((bias, None), (None, residual), (bias, residual)):
        want = sums
        for addend in (b, r):
            want = want if addend is None else want + addend.astype(jnp.float32)
        assert_same(fused(x, z, bias=b, residual=r, out_dtype=jnp.float32, **options), want)
        assert_same(fused(x, z, bias=b, residual=r, **options), want.astype(jnp.bfloat16))
        assert_same(fused(x, raw(w), bias=b, residual=r, out_dtype=jnp.float32, **options), want)


# Rows and outputs for which clusters of two CTAs share x, the last with teams that have no outputs; K with a cut chunk,
# and one without tensor maps.
@pytest.mark.parametrize(("n", "m"), [(400, 8448), (1024, 4096), (2048, 4096), (700, 11000), (400, 8336)])
@pytest.mark.parametrize("k", [512, 1032, 131])
def test_many_rows(n, m, k):
    w = scales(gaussian_weights((k, m)), 5)
    x, z, control = activations(n, k), encoded(w), raw(w)
    bias, residual = activations(1, m, seed=1)[0], activations(n, m, seed=2)
    sums = fused(x, z, out_dtype=jnp.float32)
    exact = jnp.dot(x, w, precision="highest", preferred_element_type=jnp.float32)
    assert float(jnp.linalg.norm(sums - exact) / jnp.linalg.norm(exact)) < 1e-5
    assert_same(sums, fused(x, control, out_dtype=jnp.float32))
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        want = sums
        for addend in (b, r):
            want = want if addend is None else want + addend.astype(jnp.float32)
        assert_same(fused(x, z, bias=b, residual=r), want.astype(jnp.bfloat16))
        assert_same(fused(x, control, bias=b, residual=r), want.astype(jnp.bfloat16))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("n", "m", "k"), [(512, 8448, 512), (700, 5248, 1032), (1024, 8320, 192), (2048, 28672, 256)])
def test_gated_product_of_many_rows(n, m, k, activation):
    w = scales(gaussian_weights((k, m)), 5)
    x, z = activations(n, k), encoded(w)
    act = gated_matmul(x, z, activation, implementation="ffi")
    assert_same(act, gated_matmul(x, raw(w), activation, implementation="ffi"))
    assert_same(act, gated_matmul(x, z, activation, implementation="ffi"))
    # Exponentials differ in their last bits, so now and then a result in its last.
    want = gated(*jnp.split(fused(x, z), 2, axis=-1), activation).astype(jnp.float32)
    assert float(jnp.linalg.norm(act - want) / jnp.linalg.norm(want)) < 2e-3


def test_every_bit_pattern_by_many_rows():
    patterns = all_bit_patterns()
    w = jnp.concatenate([patterns] * (8448 // patterns.shape[1]), axis=1)
    x, z, control = activations(512, w.shape[0]), encoded(w), raw(w)
    assert_same(fused(x, z), fused(x, control))
    act = gated_matmul(x, z, "silu", implementation="ffi")
    assert_same(act, gated_matmul(x, control, "silu", implementation="ffi"))


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 4096), (1000, 3000), (4096, 14336)], ids=str)
def test_batch_invariance(shape):
    m, k = shape
    w = gaussian_weights((k, m))
    z, x = encoded(w), activations(130, k)
    whole = fused(x, z, batch_invariant=True, out_dtype=jnp.float32)
    for first, n in ((0, 1), (5, 1), (0, 2), (3, 7), (0, 8), (0, 16), (9, 23), (0, 32), (0, 64), (60, 70)):
        part = fused(x[first : first + n], z, batch_invariant=True, out_dtype=jnp.float32)
        assert_same(part, whole[first : first + n])
    assert_same(fused(x, raw(w), batch_invariant=True, out_dtype=jnp.float32), whole)


def test_a_stack_under_vmap_and_rows_under_vmap():
    w = gaussian_weights((3, 256, 200))
    z, x = encoded(w), activations(15, 256).reshape(3, 5, 256)
    both = jax.vmap(fused)(x, z)
    for i in range(3):
        assert_same(both[i], fused(x[i], encoded(w[i])))
    first = encoded(w[0])
    assert_same(jax.vmap(lambda x: fused(x, first))(x), fused(x, first))


def test_inside_a_jitted_loop_and_from_several_threads():
    w = gaussian_weights((1024, 1024))

    @jax.jit
    def loop(x, z):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(fused(x, z)), x)

    x, z = activations(4, 1024), encoded(w)
    want = loop(x, z)
    assert_same(want, loop(x, raw(w)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: jax.block_until_ready(loop(x, z)), range(16)):
            assert_same(got, want)


def test_auto_takes_this_format_here():
    w = gaussian_weights((256, 320))
    assert jaxzip.compress(w).format == FORMAT
    assert jaxzip.compress(w, on_host=True).format == "tca-tbe"


def test_what_the_kernel_does_not_take_is_decoded_first():
    w = gaussian_weights((256, 320))
    z = encoded(w)
    for x in (activations(16385, 256), activations(4, 256).astype(jnp.float32)):
        with pytest.raises(NotImplementedError):
            fused(x, z)
        exact = np.asarray(x, np.float64) @ w.astype(np.float64)
        y = np.asarray(jaxzip.matmul(x, z), np.float64)
        assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 4e-3


def test_payloads_of_wrong_shape_never_reach_a_kernel():
    z = encoded(gaussian_weights((256, 320)))
    x = activations(4, 256)
    for name, cut in (("blocks", lambda a: a[:, :, :-8]), ("shift", lambda a: a[:-1]), ("overflow", lambda a: a[:-1])):
        broken = jaxzip.CompressedTensor({**z.payload, name: cut(z.payload[name])}, z.core_shape, z.dtype, FORMAT)
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            jax.block_until_ready(fused(x, broken))
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            jax.block_until_ready(jaxzip.decompress(broken, implementation="ffi"))
