"""Grouped products on a real Hopper GPU: the raw control's bits, whatever the grouping, and close to float64 sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.testing import all_bit_patterns, bimodal_weights, bits, gaussian_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
#: (E, K, M): the experts of Qwen3 30B-A3B (gate and up, down) and a part of Mixtral's, then ragged ones.
SHAPES = [(128, 2048, 1536), (128, 768, 2048), (8, 4096, 2048), (5, 130, 77), (3, 1030, 65), (40, 64, 64), (1, 200, 70)]


def encoded(w, format="lane-planar"):
    if format == "raw":
        return jaxzip.compress(w, format="raw")
    return jax.tree.map(jnp.asarray, encode_as(w, format, -1))


def activations(n, k, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, k), jnp.float32).astype(jnp.bfloat16)


def routed(experts, rows, seed=0):
    """Sizes of the groups that ``rows`` rows fall into by chance."""
    return np.bincount(np.random.default_rng(seed).integers(0, experts, rows), minlength=experts).astype(np.int32)


@jax.jit
def fused(x, z, sizes):
    return jaxzip.ragged_matmul(x, z, sizes, implementation="ffi", out_dtype=jnp.float32)


def reference(x, w, sizes):
    y, row = np.zeros((x.shape[0], w.shape[2])), 0
    for expert in np.nonzero(sizes)[0]:
        rows = slice(row, row + sizes[expert])
        y[rows] = np.asarray(x[rows], np.float64) @ w[expert].astype(np.float64)
        row += sizes[expert]
    return y


@pytest.mark.parametrize("shape", SHAPES)
def test_products_have_the_raw_controls_bits(shape):
    experts, k, m = shape
    w = gaussian_weights(shape, seed=k)
    w[:, :, ::3] *= np.asarray(2.0**-9, w.dtype)  # rows of other exponents, and so of other shifts
    z, raw = encoded(w), encoded(w, "raw")
    for rows, past in ((1, 0), (2 * experts, 3), (9 * experts, 1), (20 * experts, 0)):
        sizes = routed(experts, rows, rows)
        x = activations(rows + past, k)
        y = fused(x, z, sizes)
        assert np.array_equal(bits(y), bits(fused(x, raw, sizes)))
        assert np.array_equal(bits(y), bits(fused(x, z, sizes)))
        want = reference(x, w, sizes)
        np.testing.assert_allclose(y, want, rtol=2e-3, atol=2e-5 * np.abs(want).max())
        assert not bits(y)[rows:].any()
        rounded = jaxzip.ragged_matmul(x, z, sizes, implementation="ffi")
        assert np.array_equal(bits(rounded), bits(y.astype(jnp.bfloat16)))


@pytest.mark.parametrize("sizes", [[2, 3, 1], [0, 40, 3]])
def test_escapes_without_room_in_their_block(sizes):
    """Each expert has a list of its own, of hundreds of entries."""
    w = bimodal_weights((3, 130, 200))
    w[2, :, :3] = np.asarray(1e30, w.dtype)
    z, x = encoded(w), activations(sum(sizes), 130)
    assert z.payload["overflow"].shape[1] > 1000
    y = fused(x, z, np.asarray(sizes, np.int32))
    assert np.array_equal(bits(y), bits(fused(x, encoded(w, "raw"), np.asarray(sizes, np.int32))))
    np.testing.assert_allclose(y, reference(x, w, sizes), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 2048, 192), (16, 768, 130), (8, 8192, 65)])
def test_a_rows_bits_depend_on_its_expert_alone(shape):
    experts, k, m = shape
    z, row = encoded(gaussian_weights(shape)), activations(1, k, seed=5)
    alone = bits(fused(row, z, np.eye(experts, dtype=np.int32)[3]))
    for others in (1, 40, 200, 50 * experts):
        sizes = routed(experts, others, seed=others)
        sizes[3] += 1
        place = sizes[:3].sum() + sizes[3] // 2
        x = activations(others + 1, k).at[place].set(row[0])
        assert np.array_equal(bits(fused(x, z, sizes))[place], alone[0])


def test_nan_stays_with_its_expert_and_its_row():
    w = np.stack([all_bit_patterns(), gaussian_weights((256, 256)), all_bit_patterns(seed=1)])
    x = activations(7, 256).at[3].set(jnp.nan).at[6].set(jnp.nan)
    sizes = np.asarray([2, 3, 0], np.int32)
    y = fused(x, encoded(w), sizes)
    finite = np.isfinite(y)
    special = (bits(w[0]) & 0x7F80 == 0x7F80).any(0)
    assert not finite[:2, special].any() and not finite[3].any() and finite[[2, 4]].all()
    assert not bits(y)[5:].any()
    assert np.array_equal(np.isnan(y), np.isnan(fused(x, encoded(w, "raw"), sizes)))


def test_sizes_that_do_not_fit_touch_nothing_else():
    w = gaussian_weights((4, 130, 77))
    x = activations(6, 130)
    y = fused(x, encoded(w), np.asarray([1, -4, 100, 7], np.int32))
    np.testing.assert_allclose(y, reference(x, w, [1, 0, 5, 0]), rtol=2e-3, atol=1e-5)
    huge = np.full(4, np.iinfo(np.int32).max, np.int32)
    np.testing.assert_allclose(fused(x, encoded(w), huge), reference(x, w, [6, 0, 0, 0]), rtol=2e-3, atol=1e-5)


def test_no_rows():
    z = encoded(gaussian_weights((3, 128, 64)))
    assert fused(activations(0, 128), z, np.zeros(3, np.int32)).shape == (0, 64)
    assert not np.asarray(fused(activations(5, 128), z, np.zeros(3, np.int32))).any()


def test_many_rows_are_decoded_first():
    w = gaussian_weights((2, 256, 192))
    z, sizes = encoded(w), np.asarray([130, 70], np.int32)
    x = activations(200, 256)
    with pytest.raises(NotImplementedError, match="200 rows for 2 experts"):
        fused(x, z, sizes)
    y = jaxzip.ragged_matmul(x, z, sizes, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, reference(x, w, sizes), rtol=2e-3, atol=1e-4)


def test_gradient_in_x():
    w = gaussian_weights((4, 130, 77))
    z, sizes = encoded(w), np.asarray([2, 0, 5, 1], np.int32)
    x, g = activations(10, 130), activations(10, 77, seed=1)
    loss = lambda x: (jaxzip.ragged_matmul(x, z, sizes).astype(jnp.float32) * g).sum()  # noqa: E731
    found = jax.grad(loss)(x).astype(jnp.float32)
    np.testing.assert_allclose(found, reference(g, w.swapaxes(1, 2), sizes), rtol=2e-2, atol=1e-2)
