"""Configurations on a real Hopper GPU: each gives the raw control's bits; what ``tune`` records is what runs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.pallas_kernels import mosaic_lanes

import jaxzip
from jaxzip import tuning
from jaxzip.compress import encode_as
from jaxzip.ops import measured
from jaxzip.testing import bits, gaussian_weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
SHAPES = [(1024, 4096), (4096, 2048), (1000, 3000), (4097, 1023)]


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv(measured.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path)
    measured.forget()
    yield
    monkeypatch.undo()
    measured.forget()


def weights(m, k):
    """Rows whose exponents differ, so that their shifts do; with escapes, infinities and NaNs."""
    w = np.array(gaussian_weights((k, m)))
    w = (w * np.exp2(np.arange(m) % 5 - 2).astype(w.dtype)).astype(w.dtype)
    w[:: k // 7, :: m // 11] *= np.asarray(1e20, w.dtype)
    special = w.copy()
    special[k // 2, m // 3], special[k // 3, m // 2] = np.inf, np.nan
    return special


def encoded(w):
    return jax.tree.map(jnp.asarray, encode_as(w, "lane-planar", -1))


def activations(n, k):
    return jax.random.normal(jax.random.key(n), (n, k), jnp.float32).astype(jnp.bfloat16)


def assert_same(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert np.array_equal(bits(a), bits(b)), f"{np.count_nonzero(bits(a) != bits(b))} of {a.size} differ"


def config_that_runs(x, z, **options):
    f = lambda x, z: jaxzip.matmul(x, z, implementation="ffi", **options)  # noqa: E731
    return re.search(r'(?<!_)config = "(.*?)"', jax.jit(f).lower(x, z).as_text())[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_listed_configuration_gives_the_control_s_bits(shape):
    m, k = shape
    w = weights(m, k)
    z, control = encoded(w), jaxzip.compress(jnp.asarray(w), format="raw")
    for n in (1, 5, 16, 30, 64, 128, 200):
        x = activations(n, k)
        exact, scale = sums(x, w)
        finite = np.isfinite(exact)
        listed = tuning.configurations(z, n)["ffi"]
        assert len(listed) > 1 and not finite.all()
        own = jaxzip.matmul(x, z, implementation="ffi")
        for i, config in enumerate(listed):
            y = jaxzip.matmul(x, z, implementation="ffi", config=config)
            assert_same(y, jaxzip.matmul(x, control, implementation="ffi", config=config))
            if i == 0:
                assert_same(y, own)
            found = np.asarray(y, np.float64)
            assert np.array_equal(finite, np.isfinite(found))
            error = np.abs(found[finite] - exact[finite])
            assert np.all(error <= 2**-8 * np.abs(exact[finite]) + 1e-5 * scale[finite]), config


def sums(x, w):
    """The product in fp64, and that of the magnitudes, to which the errors of sums in any order are compared."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    with np.errstate(invalid="ignore"):
        return x @ w, np.abs(x) @ np.abs(w)


@pytest.mark.skipif(bool(mosaic_lanes.unavailable_reason()), reason=mosaic_lanes.unavailable_reason())
def test_every_listed_pallas_configuration_is_a_product():
    m, k = 4096, 2048
    w = gaussian_weights((k, m))
    z = encoded(w)
    for n in (8, 100, 200):
        x = activations(n, k)
        exact, scale = sums(x, w)
        listed = tuning.configurations(z, n)["pallas"]
        own = jaxzip.matmul(x, z, implementation="pallas", out_dtype=jnp.float32)
        for i, config in enumerate(listed):
            y = jaxzip.matmul(x, z, implementation="pallas", config=config, out_dtype=jnp.float32)
            assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 1e-5 * scale)
            assert i > 0 or np.array_equal(np.asarray(y).view(np.uint32), np.asarray(own).view(np.uint32))


@pytest.mark.parametrize("n", [8, 33, 200])
def test_a_product_of_two_launches_has_the_rows_of_either(n):
    """The last 3 of 16 row blocks, the last one of which is ragged, as a launch of its own."""
    m, k = 1000, 1096
    z, x = encoded(weights(m, k)), activations(n, k)
    groups = 4 if n <= 128 else 2
    main, tail = f"wgmma {groups}/1 C1 cl4", f"wgmma {groups}/{2 if n <= 64 else 1} C3 cl2"
    bias, residual = activations(1, m)[0], activations(n, m)
    multiply = functools.partial(jaxzip.matmul, x, z, implementation="ffi", bias=bias, residual=residual)
    both, first, second = (multiply(config=config) for config in (f"{main} + 3 {tail}", main, tail))
    assert_same(both[:, : 13 * 64], first[:, : 13 * 64])
    assert_same(both[:, 13 * 64 :], second[:, 13 * 64 :])


def test_what_cannot_run_is_refused_or_passed_over():
    w = gaussian_weights((512, 1000))
    z, x = encoded(w), activations(8, 512)
    own = jaxzip.matmul(x, z, implementation="ffi")
    with pytest.raises(
        ValueError, match=r'"wgmma 4/2 C8 cl999" does not fit x \[8, 512\] and a weight of 1000 outputs'
    ):
        jaxzip.matmul(x, z, implementation="ffi", config="wgmma 4/2 C8 cl999")
    kind = measured.device_kind("cuda")
    for unusable in ("wgmma 4/2 C8 cl999", "of another version"):
        measured.record(kind, "lane-planar", 1000, 512, 8, {"ffi": 1.0}, {"ffi": unusable})
        assert config_that_runs(x, z) == unusable
        assert_same(jaxzip.matmul(x, z, implementation="ffi"), own)


def test_the_kernel_itself_refuses_what_does_not_fit():
    """Where the program was made on a machine without the library, nobody looked before."""
    from jaxzip.ffi import cuda_ops

    z, x = encoded(gaussian_weights((512, 1000))), activations(8, 512)
    run = jax.jit(
        lambda x, z: cuda_ops.lane_planar_matmul(
            x, z.payload, 1000, 512, config="direct t4 w16x1 C1 cl17", config_asked_for=True
        )
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=r'"direct t4 w16x1 C1 cl17" does not fit x \[8, 512\]'):
        jax.block_until_ready(run(x, z))


def test_a_batch_of_rows_keeps_the_configuration_asked_for():
    """Unasked, rows mapped over one weight are so many more rows, for which a recorded one is not."""
    m, k = 1024, 4096
    z, x = encoded(gaussian_weights((k, m))), activations(24, k).reshape(3, 8, k)
    config = tuning.configurations(z, 8)["ffi"][-1]
    each = jnp.stack([jaxzip.matmul(rows, z, implementation="ffi", config=config) for rows in x])
    mapped = jax.vmap(lambda rows: jaxzip.matmul(rows, z, implementation="ffi", config=config))(x)
    assert_same(mapped, each)
    unasked = jax.vmap(lambda rows: jaxzip.matmul(rows, z, implementation="ffi"))
    before = unasked(x)
    measured.record(measured.device_kind("cuda"), "lane-planar", m, k, 8, {"ffi": 1.0}, {"ffi": config})
    assert_same(unasked(x), before)


def test_the_batch_invariant_configuration_is_the_only_one():
    m, k = 1024, 4096
    z, x = encoded(gaussian_weights((k, m))), activations(70, k)
    with pytest.raises(ValueError, match="not the batch invariant one") as caught:
        jaxzip.matmul(x, z, implementation="ffi", batch_invariant=True, config="wgmma 4/1 C1 cl1")
    only = re.search(r'is "(wgmma .*?)": give', str(caught.value))[1]
    want = jaxzip.matmul(x, z, implementation="ffi", batch_invariant=True)
    assert_same(jaxzip.matmul(x, z, implementation="ffi", batch_invariant=True, config=only), want)
    assert_same(jaxzip.matmul(x[:9], z, implementation="ffi", batch_invariant=True, config=only), want[:9])


def test_tune_records_configurations_that_matmul_takes(monkeypatch):
    """Every configuration is worth it here: the fastest of those that are not the kernel's own choice is recorded."""
    monkeypatch.setattr(tuning, "WORTH", 100.0)
    monkeypatch.setattr(tuning, "HOPELESS", 100.0)
    m, k = 1024, 4096
    z, x = encoded(gaussian_weights((k, m))), activations(8, k)
    assert config_that_runs(x, z) == ""
    (found,) = tuning.tune(z, (8,), repeats=2)
    listed = tuning.configurations(z, 8)["ffi"]
    config = found.configs["ffi"]
    assert config in listed[1:] and config_that_runs(x, z) == config
    y = jaxzip.matmul(x, z, implementation="ffi")
    assert_same(y, jaxzip.matmul(x, z, implementation="ffi", config=config))
    control = jaxzip.compress(jaxzip.decompress(z), format="raw")
    assert_same(y, jaxzip.matmul(x, control, implementation="ffi"))  # which takes the same configuration
    with tuning.disabled():
        own = jaxzip.matmul(x, z, implementation="ffi")
    assert_same(own, jaxzip.matmul(x, z, implementation="ffi", config=listed[0]))
