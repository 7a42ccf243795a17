"""Grouped products: every implementation against the rows' own products, at every kind of grouping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.testing import bits, gaussian_weights

FORMATS = ("lane-planar", "tca-tbe", "raw")
IMPLEMENTATIONS = ("xla", "decompress", None)
EXPERTS, K, M = 4, 130, 77
#: Rows of each expert, and rows past the last one's.
GROUPINGS = {
    "each has some": ([3, 1, 5, 2], 0),
    "empty ones and rows past the sum": ([0, 4, 0, 2], 3),
    "all in one": ([0, 0, 9, 0], 0),
    "more than a tile": ([70, 0, 3, 130], 1),
    "none": ([0, 0, 0, 0], 4),
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
