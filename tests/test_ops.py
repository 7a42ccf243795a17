"""One test base for every implementation of ``decompress``, ``matmul`` and ``take`` that this machine has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import named_weights

import jaxzip
from jaxzip import ops
from jaxzip.compress import encode_as
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS
from jaxzip.testing import BF16, bits, gaussian_weights

WEIGHTS = named_weights()
# XLA's CPU runtime flushes subnormal fp32 products to zero, in its own dots as in custom calls.
FINITE = [n for n, w in WEIGHTS.items() if np.isfinite(w.astype(np.float32)).all() and "subnormal" not in n]


@pytest.fixture(params=["tca-tbe", "lane-planar"], autouse=True)
def each_format(request, monkeypatch):
    if request.param == "tca-tbe" and _is_about_more_than_the_decoder(request.node):
        pytest.skip("interpreted slowly; lane-planar's product shares this code")
    monkeypatch.setitem(globals(), "FORMAT", request.param)


FORMAT = ""


def _is_about_more_than_the_decoder(node) -> bool:
    """Of tests of the Pallas kernels: those of addends, dtypes and gradients, which no kernel sees."""
    parameters = node.callspec.params if hasattr(node, "callspec") else {}
    decodes = node.cls is TestDecompress or node.originalname == "test_decompress_gives_the_same_bits"
    if parameters.get("implementation") != "pallas" or decodes:
        return False
    dtypes = [
        parameters.get(name, default) for name, default in (("x_dtype", jnp.bfloat16), ("out_dtype", jnp.float32))
    ]
    shared = ("test_against_float64", "test_leading_dimensions_and_vector", "test_gradient_of_activations")
    return (
        node.cls is TestEpilogue
        or node.originalname in shared
        or parameters.get("n", 1) not in (1, 33, 256)
        or dtypes != [jnp.bfloat16, jnp.float32]
    )


def encoded(w, output_axis=KERNEL_AXIS):
    """The tensor in the format under test even where ``compress`` would prefer raw; on the device."""
    return jax.tree.map(jnp.asarray, encode_as(w, FORMAT, output_axis))


def raw(w, output_axis=KERNEL_AXIS):
    return jaxzip.compress(w, format="raw", output_axis=output_axis)


def activations(n, k, dtype=jnp.bfloat16, seed=0):
    return jax.random.normal(jax.random.key(seed), (n, k), jnp.float32).astype(dtype)


# What a weight's values are does not matter to its transposition: tables are of a few shapes, where decoding is slow.
TABLES = ("gaussian 17x130", "gaussian 65x63", "gaussian 200x77", "gaussian 1x64", "all bit patterns")
DECODED = [
    (implementation, output_axis, name)
    for implementation in ops.implementations("decompress")
    for output_axis in (KERNEL_AXIS, TABLE_AXIS)
    for name in WEIGHTS
    if implementation == "ffi" or output_axis == KERNEL_AXIS or name in TABLES
]


@pytest.mark.parametrize(("implementation", "output_axis", "name"), DECODED)
def test_decompress_gives_the_same_bits(implementation, output_axis, name):
    w = WEIGHTS[name]
    out = jaxzip.decompress(encoded(w, output_axis), implementation=implementation)
    assert out.dtype == BF16
    assert np.array_equal(bits(out), bits(w))


@pytest.mark.parametrize("implementation", ops.implementations("decompress"))
class TestDecompress:
    def test_stack(self, implementation):
        w = gaussian_weights((3, 2, 70, 130))
        out = jaxzip.decompress(encoded(w), implementation=implementation)
        assert np.array_equal(bits(out), bits(w))

    def test_vmap(self, implementation):
        w = gaussian_weights((3, 70, 130))
        out = jax.vmap(lambda z: jaxzip.decompress(z, implementation=implementation))(encoded(w))
        assert np.array_equal(bits(out), bits(w))


@pytest.mark.parametrize("implementation", ops.implementations("matmul"))
class TestMatmul:
    @pytest.mark.parametrize("name", FINITE)
    def test_against_float64(self, implementation, name):
        w = WEIGHTS[name]
        x = activations(5, w.shape[0])
        y = jaxzip.matmul(x, encoded(w), implementation=implementation, out_dtype=jnp.float32)
        exact = np.asarray(x, np.float64) @ w.astype(np.float64)
        scale = np.abs(np.asarray(x, np.float64)) @ np.abs(w.astype(np.float64))
        assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 1e-5 * scale + 1e-37)

    def test_same_bits_from_run_to_run(self, implementation):
        z, x = encoded(gaussian_weights((1000, 700))), activations(8, 1000)
        first = jaxzip.matmul(x, z, implementation=implementation)
        for _ in range(5):
            assert np.array_equal(bits(jaxzip.matmul(x, z, implementation=implementation)), bits(first))

    def test_vmap_over_stack_x_and_both(self, implementation):
        w = gaussian_weights((3, 96, 70))
        z, x = encoded(w), activations(12, 96).reshape(3, 4, 96)
        f = lambda x, z: jaxzip.matmul(x, z, implementation=implementation, out_dtype=jnp.float32)  # noqa: E731
        one = jax.tree.map(lambda a: a[0], z)
        for axes, args in [((0, 0), (x, z)), ((None, 0), (x[0], z)), ((0, None), (x, one))]:
            y = jax.vmap(f, axes)(*args)
            for i in range(3):
                single = f(*(a if axis is None else jax.tree.map(lambda v: v[i], a) for a, axis in zip(args, axes)))
                np.testing.assert_allclose(y[i], single, rtol=1e-5, atol=1e-5)

    def test_leading_dimensions_and_vector(self, implementation):
        w = gaussian_weights((96, 70))
        x = activations(6, 96)
        z = encoded(w)
        flat = jaxzip.matmul(x, z, implementation=implementation)
        assert np.array_equal(
            bits(jaxzip.matmul(x.reshape(2, 3, 96), z, implementation=implementation)), bits(flat.reshape(2, 3, 70))
        )
        assert jaxzip.matmul(x[0], z, implementation=implementation).shape == (70,)
        assert jaxzip.matmul(x[:0], z, implementation=implementation).shape == (0, 70)

    def test_gradient_of_activations(self, implementation):
        w = gaussian_weights((96, 70))
        z, x = encoded(w), activations(4, 96, jnp.float32)
        loss = lambda x, w: jnp.sin(jaxzip.matmul(x, w, implementation=implementation)).sum()  # noqa: E731
        dense = lambda x: jnp.sin(x @ jnp.asarray(w, jnp.float32)).sum()  # noqa: E731
        np.testing.assert_allclose(jax.grad(loss)(x, z), jax.grad(dense)(x), rtol=1e-4, atol=1e-5)
        batched = jax.vmap(jax.grad(loss), (0, None))(x.reshape(4, 1, 96), z)
        np.testing.assert_allclose(batched.reshape(4, 96), jax.grad(loss)(x, z), rtol=1e-4, atol=1e-5)


# The C++ kernels choose their loops by the number of rows; the others have tiles of 16 and more, or leave it to XLA.
ROWS = [
    (implementation, n)
    for implementation in ops.implementations("matmul")
    for n in (1, 2, 3, 7, 8, 16, 33, 64, 256)
    if implementation == "ffi" or n in (1, 16, 33, 256)
]


@pytest.mark.parametrize(("implementation", "n"), ROWS)
def test_rows(implementation, n):
    w = gaussian_weights((192, 130))
    x = activations(n, 192)
    y = jaxzip.matmul(x, encoded(w), implementation=implementation)
    assert y.shape == (n, 130) and y.dtype == BF16
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact) < 4e-3


@pytest.mark.parametrize("implementation", [None, "xla", "decompress"])
@pytest.mark.parametrize("out_dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_fp8_results_are_rounded_once(implementation, out_dtype):
    w, x = gaussian_weights((96, 70)), activations(4, 96)
    y = jaxzip.matmul(x, encoded(w), out_dtype=out_dtype, implementation=implementation)
    sums = jnp.dot(x, jnp.asarray(w), preferred_element_type=jnp.float32)
    assert y.dtype == out_dtype and np.array_equal(bits(y), bits(sums.astype(out_dtype)))


def test_sums_of_nothing_are_zero():
    x, bias = jnp.zeros((3, 0), BF16), jnp.ones(5, BF16)
    none = jaxzip.compress(np.zeros((0, 5), BF16))
    assert np.array_equal(jaxzip.matmul(x, none, bias=bias), np.ones((3, 5), BF16))
    experts = jaxzip.compress(np.zeros((2, 0, 5), BF16))
    assert np.array_equal(jaxzip.ragged_matmul(x, experts, jnp.array([1, 2])), np.zeros((3, 5), BF16))
    for implementation in ("ffi", "pallas"):
        with pytest.raises(NotImplementedError, match=r"weights with elements, this one is \(0, 5\)"):
            jaxzip.matmul(x, none, implementation=implementation)


# XLA chooses the order of accumulation of its own dots by the layouts around them.
FUSED = [name for name in ops.implementations("matmul") if name not in ("xla", "decompress")]


# Interpreted kernels are slow, and their decoder sees no dtype but the weight's: other dtypes go with these weights.
OTHER_DTYPES_WITH = ("gaussian 65x63", "all bit patterns")
PRODUCTS = [
    (implementation, x_dtype, out_dtype, name)
    for implementation in FUSED
    for x_dtype in (jnp.bfloat16, jnp.float32)
    for out_dtype in (jnp.bfloat16, jnp.float32)
    for name in WEIGHTS
    if implementation != "pallas" or (x_dtype, out_dtype) == (jnp.bfloat16, jnp.float32) or name in OTHER_DTYPES_WITH
]


@pytest.mark.parametrize(
    ("implementation", "x_dtype", "out_dtype", "name"), PRODUCTS, ids=lambda part: getattr(part, "__name__", part)
)
def test_fused_equals_raw_bit_for_bit(implementation, name, x_dtype, out_dtype):
    """The proof by control: NaN and Inf included, both orders of the matrix."""
    w = WEIGHTS[name]
    x = activations(4, w.shape[0], x_dtype)
    y = jaxzip.matmul(x, encoded(w), implementation=implementation, out_dtype=out_dtype)
    control = jaxzip.matmul(x, raw(w), implementation=implementation, out_dtype=out_dtype)
    assert np.array_equal(bits(y), bits(control))
    table = jaxzip.matmul(x, encoded(w.T, TABLE_AXIS).T, implementation=implementation, out_dtype=out_dtype)
    assert np.array_equal(bits(table), bits(control))


@pytest.mark.parametrize("implementation", ops.implementations("take"))
class TestTake:
    @pytest.mark.parametrize("name", WEIGHTS)
    def test_same_bits_as_dense(self, implementation, name):
        w = WEIGHTS[name]
        rows = w.shape[0]
        ids = np.random.default_rng(0).integers(-rows, rows, (3, 4))
        out = jaxzip.take(encoded(w, TABLE_AXIS), jnp.asarray(ids), implementation=implementation)
        assert np.array_equal(bits(out), bits(w[ids]))

    def test_outside_is_nan(self, implementation):
        z = encoded(gaussian_weights((70, 65)), TABLE_AXIS)
        out = jaxzip.take(z, jnp.array([0, 70, -71, 69]), implementation=implementation)
        assert np.isnan(np.asarray(out[1:3], np.float32)).all()
        assert not np.isnan(np.asarray(out[::3], np.float32)).any()

    @pytest.mark.parametrize(
        ("dtype", "ids"),
        [
            ("uint32", [2**32 - 1, 2**31, 2**32 - 70]),
            ("int64", [2**32, 2**32 - 1, -(2**32), 2**63 - 1, -(2**63)]),
            ("uint64", [2**32, 2**64 - 1]),
            ("int8", [70, -71]),
            ("uint8", [255]),
        ],
    )
    def test_ids_of_other_types(self, implementation, dtype, ids):
        w = gaussian_weights((70, 65))
        with jax.enable_x64(True):
            ids = np.array([*ids, 0, 69], dtype)
            out = jaxzip.take(encoded(w, TABLE_AXIS), ids, implementation=implementation)
        assert np.isnan(np.asarray(out[:-2], np.float32)).all()
        assert np.array_equal(bits(out[-2:]), bits(w[[0, 69]]))


@pytest.mark.parametrize("table", [jnp.asarray, lambda w: raw(w, TABLE_AXIS)], ids=["dense", "raw"])
@pytest.mark.parametrize("columns", [16, 64])
def test_dense_rows_keep_the_bits_of_nan(table, columns):
    """In the last column, where the CPU's code for the rest of a row's vectors once had floats."""
    w = np.arange(1 << 16, dtype=np.uint16).view(BF16).reshape(-1, columns)
    rows = jaxzip.take(table(w), jnp.arange(len(w)))
    assert np.array_equal(bits(rows), bits(w))


def test_best_implementation_is_used_and_agrees():
    w = gaussian_weights((128, 128))
    best = ops.implementations("matmul")[0]
    x = activations(3, 128)
    assert np.array_equal(bits(jaxzip.matmul(x, encoded(w))), bits(jaxzip.matmul(x, encoded(w), implementation=best)))


def test_the_fast_cpu_library_is_there():
    for op in ("decompress", "matmul", "take"):
        assert ops.implementations(op)[0] == "ffi"


def test_dense_weights_are_multiplied_too():
    w, x = gaussian_weights((96, 70)), activations(4, 96)
    assert jaxzip.matmul(x, jnp.asarray(w)).shape == (4, 70)
    with pytest.raises(NotImplementedError, match="raw"):
        jaxzip.matmul(x, jnp.asarray(w), implementation="ffi")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, z: jaxzip.matmul(x, z, implementation="magic"), ValueError, "'magic'.*xla"),
        (lambda x, z: jaxzip.matmul(x[:, :5], z), ValueError, r"\(2, 5\).*K=96"),
        (lambda x, z: jaxzip.matmul(x.astype(jnp.int32), z), TypeError, "int32"),
        (lambda x, z: jaxzip.matmul(x, z, out_dtype=jnp.int8), TypeError, "int8"),
        (lambda x, z: jaxzip.matmul(x, None), TypeError, "NoneType"),
        (lambda x, z: jaxzip.matmul(jnp.float32(1), z), ValueError, r"\(\)"),
        (lambda x, z: jaxzip.matmul(x, encoded(gaussian_weights((2, 96, 70)))), ValueError, "vmap"),
        (lambda x, z: jaxzip.decompress(x), TypeError, "CompressedTensor"),
        (lambda x, z: jaxzip.take(z, jnp.float32(1)), TypeError, "float32"),
        (lambda x, z: jaxzip.take([[1.0]], [0]), TypeError, "got list"),
        (lambda x, z: jaxzip.matmul(z.T, z), TypeError, "the weight comes second"),
        (lambda x, z: jaxzip.einsum("km,nk->nm", z, x), TypeError, "the weight comes second"),
        (lambda x, z: jaxzip.dot_general(z, x, (((0,), (1,)), ((), ()))), TypeError, "the weight comes second"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call(activations(2, 96), encoded(gaussian_weights((96, 70))))


def test_the_users_rank_promotion_is_about_the_users_code():
    w, x, bias = gaussian_weights((64, 70)), activations(4, 64), jnp.ones(70)
    z, table, stack = encoded(w), encoded(w, TABLE_AXIS), encoded(np.stack([w, w]))
    wide = jaxzip.compress(np.random.default_rng(0).normal(size=(64, 70)).astype(np.float32))
    sum_of = lambda x, w, **options: jaxzip.matmul(x, w, bias=bias, **options).sum()  # noqa: E731
    with jax.numpy_rank_promotion("raise"):
        for implementation in (None, "xla", "decompress"):
            jax.grad(sum_of)(x, z, implementation=implementation)
        for weight in (jnp.asarray(w), wide):
            jax.grad(sum_of)(x, weight)
        for implementation in (None, "xla"):
            jaxzip.decompress(z, implementation=implementation)
            jaxzip.decompress(wide, implementation=implementation)
            jaxzip.take(table, jnp.array([1, 2]), implementation=implementation)
            sizes = jnp.array([1, 3])
            jax.grad(lambda x, chosen: jaxzip.ragged_matmul(x, stack, sizes, implementation=chosen).sum())(
                x.astype(jnp.float32), implementation
            )
        with pytest.raises(ValueError, match="rank_promotion"):
            x + bias[:64]


@pytest.mark.parametrize("implementation", [None, *ops.implementations("matmul")])
class TestEpilogue:
    def test_bias_and_residual_are_added_before_the_one_rounding(self, implementation):
        w, x = gaussian_weights((192, 130)), activations(5, 192)
        bias, residual = activations(1, 130, seed=1)[0], activations(5, 130, seed=2)
        z = encoded(w)
        sums = jaxzip.matmul(x, z, implementation=implementation, out_dtype=jnp.float32)
        want = (sums + bias.astype(jnp.float32)) + residual.astype(jnp.float32)
        exact = jaxzip.matmul(x, z, bias=bias, residual=residual, implementation=implementation, out_dtype=jnp.float32)
        assert np.allclose(exact, want, rtol=0, atol=1e-6)
        rounded = jaxzip.matmul(x, z, bias=bias, residual=residual, implementation=implementation)
        assert np.array_equal(bits(rounded), bits(exact.astype(BF16)))

    def test_leading_dimensions_and_one_addend(self, implementation):
        w, x = gaussian_weights((64, 70)), activations(6, 64).reshape(2, 3, 64)
        residual = activations(6, 70, seed=3).reshape(2, 3, 70)
        y = jaxzip.matmul(x, encoded(w), residual=residual, implementation=implementation, out_dtype=jnp.float32)
        alone = jaxzip.matmul(x, encoded(w), implementation=implementation, out_dtype=jnp.float32)
        assert np.allclose(y, alone + residual.astype(jnp.float32), rtol=0, atol=1e-6)

    def test_gradients(self, implementation):
        w, x = gaussian_weights((64, 70)), activations(3, 64)
        bias, residual = activations(1, 70, seed=1)[0], activations(3, 70, seed=2)
        z = encoded(w)

        def loss(x, bias, residual):
            y = jaxzip.matmul(x, z, bias=bias, residual=residual, implementation=implementation, out_dtype=jnp.float32)
            return (y * jnp.arange(70)).sum()

        to_x, to_bias, to_residual = jax.grad(loss, (0, 1, 2))(x, bias, residual)
        assert to_x.shape == x.shape
        assert np.array_equal(np.asarray(to_bias, np.float32), 3 * np.arange(70.0, dtype=np.float32).astype(BF16))
        assert np.array_equal(np.asarray(to_residual), np.tile(np.arange(70).astype(BF16), (3, 1)))


def test_bad_addends_are_named():
    x, z = activations(2, 64), encoded(gaussian_weights((64, 70)))
    with pytest.raises(ValueError, match=r"bias has shape \(71,\), expected \(70,\)"):
        jaxzip.matmul(x, z, bias=jnp.zeros(71, BF16))
    with pytest.raises(ValueError, match=r"residual has shape \(70,\), expected \(2, 70\)"):
        jaxzip.matmul(x, z, residual=jnp.zeros(70, BF16))
    with pytest.raises(TypeError, match="bias must be a floating-point array, got int32"):
        jaxzip.matmul(x, z, bias=jnp.zeros(70, jnp.int32))


def test_batch_invariance():
    x, z = activations(33, 300), encoded(gaussian_weights((300, 130)))
    whole = jaxzip.matmul(x, z, batch_invariant=True)
    for n in (1, 8, 17):
        assert np.array_equal(bits(jaxzip.matmul(x[:n], z, batch_invariant=True)), bits(whole[:n]))
    with pytest.raises(NotImplementedError, match="not batch invariant"):
        jaxzip.matmul(x, z, batch_invariant=True, implementation="xla")
