"""Grouped products: every implementation against the rows' own products, at every kind of grouping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.testing import BF16, all_bit_patterns, bits, gaussian_weights

FORMATS = ("lane-planar", "tca-tbe", "raw")
IMPLEMENTATIONS = ("xla", "ffi", "decompress", None)
EXPERTS, K, M = 4, 130, 77
#: Rows of each expert, and rows past the last one's: 11 in all but for one, so that they share what is compiled.
GROUPINGS = {
    "each has some": ([3, 1, 5, 2], 0),
    "empty ones and rows past the sum": ([0, 4, 0, 2], 5),
    "all in one": ([0, 0, 11, 0], 0),
    "more than a tile": ([70, 0, 3, 130], 1),
    "none": ([0, 0, 0, 0], 11),
}


def stack(shape=(EXPERTS, K, M), format="lane-planar"):
    w = gaussian_weights(shape, seed=3)
    return w, compressed(w, format)


def compressed(w, format):
    if format == "raw":
        return jaxzip.compress(w, format="raw")
    return jax.tree.map(jnp.asarray, encode_as(w, format, -1))


def activations(rows, k=K, dtype=jnp.bfloat16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, k), np.float32)).astype(dtype)


def reference(x, w, sizes):
    """float64 sums, and zeros past the groups."""
    y, row = np.zeros((x.shape[0], w.shape[2])), 0
    for expert, size in enumerate(sizes):
        rows = slice(row, row + size)
        y[rows] = np.asarray(x[rows], np.float64) @ w[expert].astype(np.float64)
        row += size
    return y


def run(x, z, sizes, **options):
    return jaxzip.ragged_matmul(x, z, jnp.asarray(sizes, jnp.int32), **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_multiplied_by_their_expert(format, implementation):
    w, z = stack(format=format)
    for sizes, past in GROUPINGS.values():
        x = activations(sum(sizes) + past)
        y = run(x, z, sizes, implementation=implementation, out_dtype=jnp.float32)
        assert y.shape == (x.shape[0], M) and y.dtype == jnp.float32
        want = reference(x, w, sizes)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
        assert np.abs(want[: sum(sizes)]).max(initial=1) > 0.1
        assert not bits(y)[sum(sizes) :].any()


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 5, 3), (3, 1, 200), (2, 200, 1), (1, 70, 66)])
@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_ragged_shapes(shape, implementation):
    w, z = stack(shape)
    sizes = [2, 0, 3][: shape[0]]
    x = activations(sum(sizes) + 1, shape[1])
    y = run(x, z, sizes, implementation=implementation, out_dtype=jnp.float32)
    np.testing.assert_allclose(y, reference(x, w, sizes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_fused_rows_have_the_bits_of_matmul_with_their_expert(grouping, dtype):
    """So they depend on neither the grouping, nor the other rows, nor the format."""
    sizes, past = GROUPINGS[grouping]
    x = activations(sum(sizes) + past, dtype=dtype)
    for format in FORMATS:
        w, z = stack(format=format)
        y = bits(jax.jit(run, static_argnames="implementation")(x, z, jnp.asarray(sizes), implementation="ffi"))
        row = 0
        for expert, size in enumerate(sizes):
            alone = jaxzip.compress(w[expert], format="raw")
            want = jaxzip.matmul(x[row : row + size], alone, implementation="ffi")
            np.testing.assert_array_equal(y[row : row + size], bits(want))
            row += size
        assert not y[row:].any()


def test_results_are_rounded_once():
    _, z = stack()
    x = activations(5)
    sizes = [2, 0, 2, 1]
    for implementation in ("xla", "ffi"):
        sums = run(x, z, sizes, out_dtype=jnp.float32, implementation=implementation)
        y = run(x, z, sizes, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        if implementation == "ffi":  # XLA may sum in another order for another result
            np.testing.assert_array_equal(bits(y), bits(sums.astype(jnp.bfloat16)))
        assert run(x.astype(jnp.float32), z, sizes, implementation=implementation).dtype == jnp.float32


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("implementation", ["xla", "ffi"])
def test_nan_stays_with_its_expert_and_its_row(format, implementation):
    w = np.stack([all_bit_patterns((256, 256)), gaussian_weights((256, 256)), all_bit_patterns((256, 256), seed=1)])
    z = compressed(w, format)
    sizes = [2, 3, 0]
    x = activations(7, 256).at[3].set(jnp.nan).at[6].set(jnp.nan)
    y = run(x, z, sizes, implementation=implementation, out_dtype=jnp.float32)
    finite = np.isfinite(y)
    special = (bits(w[0]) & 0x7F80 == 0x7F80).any(0)
    assert special.sum() > 100 and not finite[:2, special].any() and not finite[3].any()
    np.testing.assert_allclose(y[2], reference(x, w[1:2], [7])[2], rtol=1e-4, atol=1e-5)
    assert finite[4].all() and not bits(y)[5:].any()


@pytest.mark.parametrize("format", ["fp16", "fp32", "fp8"])
def test_other_dtypes_are_decoded_first(format):
    dtype = {"fp16": jnp.float16, "fp32": jnp.float32, "fp8": jnp.float8_e4m3fn}[format]
    w = np.asarray(jnp.asarray(gaussian_weights((2, 192, 256)), dtype))
    z = jaxzip.compress(w)
    sizes = [1, 2]
    x = activations(4, 192)
    y = run(x, z, sizes)
    assert z.format != "raw" and y.dtype == (jnp.bfloat16 if format == "fp8" else jnp.float32)
    np.testing.assert_allclose(y, reference(x, w, sizes), rtol=1e-2 if format == "fp8" else 1e-4, atol=1e-2)
    with pytest.raises(NotImplementedError, match="no CPU kernel for format|float16"):
        run(x, z, sizes, implementation="ffi")


def test_a_dense_stack_is_multiplied_by_xla():
    w, z = stack()
    x, sizes = activations(6), [1, 2, 0, 3]
    dense = run(x, jnp.asarray(w), sizes, out_dtype=jnp.float32)
    np.testing.assert_allclose(dense, reference(x, w, sizes), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="these are dense"):
        run(x, jnp.asarray(w), sizes, implementation="ffi")


def test_a_transposed_stack_of_tables():
    w, _ = stack()
    x, sizes = activations(6), [1, 2, 0, 3]
    tables = np.ascontiguousarray(w.swapaxes(1, 2))
    for format in ("lane-planar", "tca-tbe"):
        table = jax.tree.map(jnp.asarray, encode_as(tables, format, -2))
        y = run(x, table.T, sizes, implementation="ffi", out_dtype=jnp.float32)
        np.testing.assert_allclose(y, reference(x, w, sizes), rtol=1e-4, atol=1e-5)
    raw = jaxzip.compress(tables, format="raw", output_axis=-2).T
    y = run(x, raw, sizes, implementation="ffi", out_dtype=jnp.float32)
    np.testing.assert_allclose(y, reference(x, w, sizes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "ffi", None])
def test_gradient_in_x(implementation):
    w, z = stack()
    sizes = [2, 0, 70, 1]
    x = activations(sum(sizes) + 2, dtype=jnp.float32)
    g = activations(x.shape[0], M, dtype=jnp.float32, seed=1)
    loss = lambda x: (run(x, z, sizes, implementation=implementation) * g).sum()  # noqa: E731
    want = reference(g, w.swapaxes(1, 2), sizes)
    found = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want).max() > 0.1 and not bits(found)[sum(sizes) :].any()


def test_vmap_runs_one_after_another():
    _, z = stack((3, 70, 65))
    x = activations(12, 70).reshape(2, 6, 70)
    sizes = jnp.asarray([[2, 1, 1], [0, 0, 6]])
    for implementation in ("xla", "ffi"):
        one = lambda x, s: run(x, z, s, implementation=implementation)  # noqa: B023, E731
        want = jnp.stack([one(x[i], sizes[i]) for i in range(2)])
        np.testing.assert_array_equal(bits(jax.vmap(one)(x, sizes)), bits(want))


def test_sizes_that_do_not_fit_touch_nothing_else():
    w, z = stack()
    x = activations(3)
    y = run(x, z, [-5, 2, 100, 7], implementation="ffi", out_dtype=jnp.float32)
    np.testing.assert_allclose(y, reference(x, w, [0, 2, 1, 0]), rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named():
    _, z = stack()
    x, sizes = activations(3), [1, 1, 1, 0]
    for error, message, arguments in (
        (TypeError, "w must be a CompressedTensor or an array, got list", (x, [1], sizes)),
        (TypeError, "x has dtype int32", (x.astype(jnp.int32), z, sizes)),
        (TypeError, "w has dtype int32", (x, jnp.zeros((EXPERTS, K, M), jnp.int32), sizes)),
        (ValueError, r"expected a stack of experts \[E, K, M\]", (x, jaxzip.compress(np.zeros((K, M), BF16)), sizes)),
        (ValueError, r"x has shape \(3, 129\), expected \[N, K=130\]", (x[:, 1:], z, sizes)),
        (ValueError, r"x has shape \(1, 3, 130\)", (x[None], z, sizes)),
        (ValueError, r"group_sizes have shape \(3,\), expected one size for each of the 4 experts", (x, z, sizes[1:])),
    ):
        with pytest.raises(error, match=message):
            run(*arguments)
    with pytest.raises(TypeError, match="group_sizes have dtype float32"):
        jaxzip.ragged_matmul(x, z, jnp.ones(EXPERTS))
    with pytest.raises(TypeError, match="out_dtype is int8"):
        run(x, z, sizes, out_dtype=jnp.int8)
    with pytest.raises(ValueError, match="unknown implementation 'cublas'"):
        run(x, z, sizes, implementation="cublas")
