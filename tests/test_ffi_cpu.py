"""The CPU kernels against golden vectors, NumPy references, each other, and payloads that lie."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxzip.ffi
import numpy as np
import pytest
from jaxzip.ffi.format_ops import TCA_TBE, raw_matmul

from jaxzip.formats import tca_tbe

pytestmark = pytest.mark.skipif(not jaxzip.ffi.cpu_available(), reason=jaxzip.ffi.cpu_available().reason)

BF16 = jnp.dtype(jnp.bfloat16)
GOLDEN = sorted((pathlib.Path(__file__).parent / "data").glob("tca_tbe_*.npz"))
SHAPES = [(1, 1), (3, 5), (17, 130), (64, 64), (65, 63), (200, 77), (128, 192), (1, 300), (300, 1)]
LEVELS = jaxzip.ffi.cpu_module().isa_levels() if jaxzip.ffi.cpu_available() else []


@pytest.fixture(params=LEVELS)
def isa(request):
    """Runs the test at every instruction-set level that this machine has."""
    cpu = jaxzip.ffi.cpu_module()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa("")


def gaussian(shape, seed=0):
    weights = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 0.02
    weights.flat[::2003] = 0
    return weights.astype(BF16).view(np.uint16)


def special_weights():
    rng = np.random.default_rng(1)
    bimodal = np.where(rng.random((130, 100)) < 0.5, 0x1000, 0x6000) | rng.integers(0, 128, (130, 100))
    return {
        "all_patterns": np.arange(65536, dtype=np.uint16).reshape(256, 256),
        "shuffled_patterns": rng.permutation(65536).astype(np.uint16).reshape(256, 256),
        "zeros": np.zeros((70, 90), np.uint16),
        "nan": np.full((65, 129), 0xFFC1, np.uint16),
        "bimodal": bimodal.astype(np.uint16),
        "outside_window": (rng.integers(0, 128, (64, 128)) | rng.integers(0, 2, (64, 128)) << 15).astype(np.uint16),
        "highest_window": (rng.integers(249, 256, (96, 64)) << 7 | 3).astype(np.uint16),
    } | {f"{m}x{k}": gaussian((m, k), m) for m, k in SHAPES}


SPECIAL = special_weights()


def encode(weights, **kwargs):
    return jaxzip.ffi.cpu_module().encode_tca_tbe(weights, **kwargs)


def layouts(weights):
    """The same matrix with other strides."""
    spread = np.zeros((2 * weights.shape[0], 3 * weights.shape[1]), np.uint16)
    spread[::2, ::3] = weights
    return {
        "c": np.ascontiguousarray(weights),
        "f": np.asfortranarray(weights),
        "strided": spread[::2, ::3],
        "reversed": np.ascontiguousarray(weights[::-1, ::-1])[::-1, ::-1],
    }


def decode(payload, shape, layout="c"):
    out = layouts(np.full(shape, 0xABCD, np.uint16))[layout]
    jaxzip.ffi.cpu_module().decode_tca_tbe(**payload, out=out)
    return out


def to_jax(payload):
    return {name: jnp.asarray(array) for name, array in payload.items()}


def stack(payloads):
    """One payload with a leading batch dimension, padded to common lengths."""

    def pad(name):
        length = max(p[name].shape[0] for p in payloads) if payloads[0][name].ndim else None
        return np.stack(
            [
                p[name]
                if length is None
                else np.pad(p[name], [(0, length - p[name].shape[0])] + [(0, 0)] * (p[name].ndim - 1))
                for p in payloads
            ]
        )

    return to_jax({name: pad(name) for name in TCA_TBE.fields})


def bits(array):
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def assert_same(a, b):
    np.testing.assert_array_equal(bits(a), bits(b))


# --- Codec -----------------------------------------------------------------------------------------------------


def test_golden_files_are_there():
    assert len(GOLDEN) >= 2


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("layout", ["c", "f", "strided"])
def test_golden(isa, path, layout):
    golden = np.load(path)
    weights = golden["weights"]
    payload = encode(layouts(weights)[layout])
    for name, array in payload.items():
        expected = golden[name]
        if name.startswith("bitmap"):
            expected = expected.view(np.uint32).reshape(-1, 2)
        assert array.shape == expected.shape and array.tobytes() == expected.tobytes(), name
    np.testing.assert_array_equal(decode(payload, weights.shape), weights)


@pytest.mark.parametrize("name", SPECIAL)
def test_round_trip(isa, name):
    weights = SPECIAL[name]
    first = None
    for layout, array in layouts(weights).items():
        payload = encode(array, num_threads=1 + len(layout) % 3)
        first = first or payload
        for field in payload:
            assert payload[field].tobytes() == first[field].tobytes(), (layout, field)
        np.testing.assert_array_equal(decode(payload, weights.shape, layout), weights)
        jaxzip.ffi.cpu_module().check_tca_tbe(**payload, m=weights.shape[0], k=weights.shape[1])


def test_every_level_encodes_the_same():
    cpu = jaxzip.ffi.cpu_module()
    found = []
    for level in LEVELS:
        cpu.set_isa(level)
        found.append(encode(SPECIAL["shuffled_patterns"]))
    cpu.set_isa("")
    for payload in found[1:]:
        for field in payload:
            assert payload[field].tobytes() == found[0][field].tobytes(), field


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_do_not_change_the_result(threads):
    weights = gaussian((330, 200))
    one, many = encode(weights, num_threads=1), encode(weights, num_threads=threads)
    assert all(one[f].tobytes() == many[f].tobytes() for f in one)


def test_window_has_the_largest_coverage_lowest_among_equals():
    exponents = np.repeat(np.array([10, 16, 100, 106], np.uint16), 1024)
    assert encode((exponents << 7).reshape(64, 64))["start_exp"] == 9
    # Exponent 0 cannot be covered, and the window stays clear of it however many zeros there are.
    assert encode(np.zeros((64, 64), np.uint16))["start_exp"] == 0


def test_layout_constants():
    layout = jaxzip.ffi.cpu_module().layout()
    names = {
        "frag": "FRAG",
        "block": "BLOCK",
        "band_rows": "BAND_ROWS",
        "bands_per_block": "BANDS_PER_BLOCK",
        "frags_per_band": "FRAGS_PER_BAND",
        "frags_per_block": "FRAGS_PER_BLOCK",
        "window": "WINDOW",
        "max_start_exp": "MAX_START_EXP",
        "sign_mantissa_align": "SIGN_MANTISSA_ALIGN",
        "full_align": "FULL_ALIGN",
    }
    for ours, theirs in names.items():
        assert layout[ours] == getattr(tca_tbe, theirs), ours
    assert layout["frags_per_block"] * layout["frag"] ** 2 == layout["block"] ** 2
    assert sorted(layout["frag_order"]) == [(r, c) for r in range(8) for c in range(8)]
    assert layout["frag_order"][:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_encode_refuses_empty_and_other_dtypes():
    with pytest.raises(ValueError, match="at least one row"):
        encode(np.zeros((0, 4), np.uint16))
    with pytest.raises(TypeError):
        encode(np.zeros((4, 4), np.float32))


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="not available"):
        jaxzip.ffi.cpu_module().set_isa("avx1024")


def test_level_from_environment():
    code = "import jaxzip.ffi as f; print(f.cpu_module().isa())"
    env = os.environ | {"JAXZIP_CPU_ISA": "generic"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
        == "generic"
    )


FEW_THREADS = """
import resource
import numpy as np
import jaxzip.ffi
cpu = jaxzip.ffi.cpu_module()
weights = np.arange(4096 * 512, dtype=np.uint16).reshape(4096, 512)
expected = cpu.encode_tca_tbe(weights, num_threads=1)
with open("/proc/self/statm") as f:
    pages = int(f.read().split()[0])
limit = pages * resource.getpagesize() + (7 << 29)  # each thread wants a gigabyte
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for _ in range(20):
    payload = cpu.encode_tca_tbe(weights, num_threads=64)
    assert all(np.array_equal(payload[name], expected[name]) for name in expected)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets limits of Linux")
def test_threads_that_cannot_be_started_are_not_needed():
    command = ["sh", "-c", 'ulimit -s 1048576 && exec "$0" -c "$1"', sys.executable, FEW_THREADS]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_sizes_that_would_overflow_are_refused():
    payload = encode(gaussian((64, 64)))
    empty = {name: np.zeros((0, 2) if array.ndim == 2 else 0, array.dtype) for name, array in payload.items()}
    empty |= {"start_exp": np.zeros((), np.uint8), "tile_offsets": np.zeros((1, 2), np.uint32)}
    with pytest.raises(ValueError, match="from 1 to"):
        jaxzip.ffi.cpu_module().check_tca_tbe(**empty, m=1 << 38, k=1 << 38)


@pytest.mark.parametrize("format", ["tca-tbe", "lane-planar"])
def test_weights_at_odd_addresses(format):
    records = np.zeros((64, 96), dtype=[("tag", "u1"), ("weight", jnp.bfloat16)])
    records["weight"] = gaussian((64, 96)).view(BF16)
    z = jaxzip.compress(records["weight"], format=format)
    np.testing.assert_array_equal(np.asarray(jaxzip.decompress(z)).view(np.uint16), gaussian((64, 96)))


def test_import_loads_no_library_and_no_backend():
    # A platform that does not exist fails as soon as JAX initialises a backend.
    code = "import jaxzip.ffi, jaxzip.ffi.format_ops, sys; sys.exit('jaxzip.ffi._cpu' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "none_such"}, check=True)


@pytest.mark.skipif(not jaxzip.ffi.cuda_available(), reason=jaxzip.ffi.cuda_available().reason)
def test_cuda_handler_registers_and_lowers_without_a_gpu():
    jaxzip.ffi.register_cuda()
    payload = encode(gaussian((64, 64)))
    traced = jax.jit(lambda p: TCA_TBE.decompress(p, 64, 64)).trace(payload)
    assert "@jaxzip_tca_tbe_decompress" in traced.lower(lowering_platforms=("cuda",)).as_text()


# --- Handlers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIAL)
def test_decompress(isa, name):
    weights = SPECIAL[name]
    m, k = weights.shape
    payload = to_jax(encode(weights))
    assert_same(TCA_TBE.decompress(payload, m, k), weights.T)
    assert_same(jax.jit(lambda p: TCA_TBE.decompress(p, m, k, transposed=False))(payload), weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(64, 64), (200, 77), (17, 130), (128, 320)])
def test_matmul_is_close_to_float64(isa, shape, dtype):
    m, k = shape
    weights = gaussian(shape)
    payload = to_jax(encode(weights))
    w64 = weights.view(BF16).astype(np.float64)
    for n in (1, 2, 7, 8, 9, 40, 130):
        x = jnp.asarray(np.random.default_rng(n).standard_normal((n, k)), dtype)
        expected = np.asarray(x, np.float64) @ w64.T
        bound = np.abs(np.asarray(x, np.float64)) @ np.abs(w64.T) * k * 2.0**-24
        y = np.asarray(TCA_TBE.matmul(x, payload, m, k, out_dtype=jnp.float32), np.float64)
        assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("n", [*range(1, 18), 31, 40])
def test_matmul_equals_raw_bit_for_bit(isa, n):
    m, k = 150, 200
    weights = gaussian((m, k))
    weights[3, 5], weights[140, 199], weights[70, 0], weights[9, 9] = 0x7FC0, 0x7F80, 0xFF80, 0xFFFF
    payload = to_jax(encode(weights))
    x = jnp.asarray(np.random.default_rng(n).standard_normal((n, k)), jnp.float32)
    w, turned = jnp.asarray(weights.view(BF16)), jnp.asarray(weights.T.view(BF16))  # XLA's transpose may quiet a NaN
    for x_dtype in (jnp.bfloat16, jnp.float32):
        for out_dtype in (jnp.bfloat16, jnp.float32):
            y = TCA_TBE.matmul(x.astype(x_dtype), payload, m, k, out_dtype)
            assert y.dtype == out_dtype
            assert_same(y, raw_matmul(x.astype(x_dtype), w, True, out_dtype))
            assert_same(y, raw_matmul(x.astype(x_dtype), turned, False, out_dtype))
            nan = np.isnan(np.asarray(y, np.float32)).all(axis=0)
            assert nan[3] and nan[9] and nan.sum() == 2


def test_matmul_rows_do_not_depend_on_each_other(isa):
    m, k = 130, 190
    payload = to_jax(encode(gaussian((m, k))))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((140, k)), jnp.bfloat16)
    whole = TCA_TBE.matmul(x, payload, m, k, jnp.float32)
    for n in (1, 2, 3, 8, 11, 139):
        assert_same(TCA_TBE.matmul(x[:n], payload, m, k, jnp.float32), whole[:n])


def test_matmul_takes_any_leading_shape():
    payload = to_jax(encode(gaussian((64, 64))))
    x = jnp.ones((2, 3, 64), jnp.bfloat16)
    assert TCA_TBE.matmul(x, payload, 64, 64).shape == (2, 3, 64)
    assert TCA_TBE.matmul(x[0, 0], payload, 64, 64).shape == (64,)
    assert TCA_TBE.matmul(x[:0], payload, 64, 64).shape == (0, 3, 64)


def test_matmul_rounds_once_to_nearest_even():
    # Sums of two powers of two that land on, just below and just above a tie.
    k = 64
    weights = np.zeros((64, k), np.float32)
    weights[0, :2] = 1, 2.0**-8
    weights[1, :2] = 1 + 2.0**-7, 2.0**-8
    weights[2, :3] = 1, 2.0**-8, 2.0**-20
    weights = weights.astype(BF16)
    y = TCA_TBE.matmul(jnp.ones((1, k), jnp.bfloat16), to_jax(encode(weights.view(np.uint16))), 64, k)
    assert np.asarray(y, np.float32)[0, :3].tolist() == [1, 1 + 2.0**-6, 1 + 2.0**-7]


def test_vmap_over_stacked_payloads_and_over_x(isa):
    m, k = 100, 70
    weights = [gaussian((m, k), seed) for seed in range(3)]
    payloads = stack([encode(w) for w in weights])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, k)), jnp.bfloat16)

    def multiply(x, p):
        return TCA_TBE.matmul(x, p, m, k, jnp.float32)

    singles = [to_jax(encode(w)) for w in weights]
    both = jax.jit(jax.vmap(multiply))(x, payloads)
    one_x = jax.vmap(multiply, in_axes=(None, 0))(x[0], payloads)
    one_w = jax.vmap(multiply, in_axes=(0, None))(x, singles[1])
    crossed = jax.vmap(jax.vmap(multiply, in_axes=(None, 0)), in_axes=(0, None))(x, payloads)
    raw = jax.vmap(lambda x, w: raw_matmul(x, w, True, jnp.float32))(x, jnp.asarray(np.stack(weights).view(BF16)))
    assert_same(both, raw)
    for i in range(3):
        assert_same(both[i], multiply(x[i], singles[i]))
        assert_same(one_x[i], multiply(x[0], singles[i]))
        assert_same(one_w[i], multiply(x[i], singles[1]))
        for j in range(3):
            assert_same(crossed[i, j], multiply(x[i], singles[j]))
    dense = jax.vmap(lambda p: TCA_TBE.decompress(p, m, k, transposed=False))(payloads)
    rows = jax.vmap(lambda p: TCA_TBE.take(jnp.arange(5), p, m, k))(payloads)
    for i in range(3):
        assert_same(dense[i], weights[i])
        assert_same(rows[i], weights[i][:5])


@pytest.mark.parametrize("name", ["200x77", "all_patterns", "nan", "1x300"])
def test_take(isa, name):
    weights = SPECIAL[name]
    m, k = weights.shape
    ids = np.random.default_rng(0).integers(0, m, (3, 11)).astype(np.int32)
    payload = to_jax(encode(weights))
    assert_same(TCA_TBE.take(jnp.asarray(ids), payload, m, k), weights[ids])
    outside = TCA_TBE.take(jnp.asarray([-1, 0, m, 2**31 - 1]), payload, m, k)
    assert_same(outside[1], weights[0])
    np.testing.assert_array_equal(bits(outside)[[0, 2, 3]], 0x7FC0)


# --- Corrupt payloads ------------------------------------------------------------------------------------------


def corruptions(payload):
    """Payloads of a [128, 192] weight that lie, each with the field that a check should name."""

    def changed(name, index, value):
        array = payload[name].copy()
        array[index] = value
        return payload | {name: array}

    yield "start_exp", changed("start_exp", (), 249)
    yield "offsets", changed("bitmap1", (77, 0), payload["bitmap1"][77, 0] ^ 0xFFFFFFFF)
    yield "offsets", payload | {f"bitmap{i}": np.zeros_like(payload["bitmap1"]) for i in (1, 2, 3)}
    yield "offsets", payload | {f"bitmap{i}": np.full_like(payload["bitmap1"], 0xFFFFFFFF) for i in (1, 2, 3)}
    yield "tile_offsets", changed("tile_offsets", (3, 0), 0xFFFFFFF0)
    yield "tile_offsets", changed("tile_offsets", (2, 1), 0xFFFFFFF8)
    yield "tile_offsets", changed("tile_offsets", (0, 0), 16)
    yield "tile_offsets", changed("tile_offsets", (6, 1), payload["tile_offsets"][6, 1] + 8)
    yield "band_offsets", changed("band_offsets", (5, 0), -1)
    yield "band_offsets", changed("band_offsets", (7, 1), 2**31 - 1)
    yield "sign_mantissa", payload | {"sign_mantissa": payload["sign_mantissa"][:-16]}
    yield "full", payload | {"full": payload["full"][:-8]}
    yield "sign_mantissa", payload | {"sign_mantissa": payload["sign_mantissa"][:0]}


def test_check_names_what_is_wrong(isa):
    payload = encode(gaussian((128, 192)))
    for field, corrupt in corruptions(payload):
        with pytest.raises(ValueError, match=rf"{field}.*: expected -?\d+, found -?\d+"):
            jaxzip.ffi.cpu_module().check_tca_tbe(**corrupt, m=128, k=192)


def test_check_accepts_bucket_padding():
    payload = encode(gaussian((128, 192)))
    padded = payload | {f: np.pad(payload[f], (0, 100), constant_values=255) for f in ("sign_mantissa", "full")}
    jaxzip.ffi.cpu_module().check_tca_tbe(**padded, m=128, k=192)


@pytest.mark.parametrize("field", ["bitmap2", "tile_offsets", "band_offsets"])
def test_wrong_lengths_are_refused(field):
    payload = encode(gaussian((128, 192)))
    short = payload | {field: payload[field][:-1]}
    with pytest.raises(ValueError, match=rf"{field}: expected shape"):
        jaxzip.ffi.cpu_module().check_tca_tbe(**short, m=128, k=192)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"{field} has shape \[\d+, 2\], expected \[\d+, 2\]"):
        TCA_TBE.decompress(to_jax(short), 128, 192).block_until_ready()


@pytest.mark.filterwarnings("ignore")
def test_kernels_survive_corrupt_payloads(isa):
    payload = encode(gaussian((128, 192)))
    x = jnp.ones((3, 192), jnp.bfloat16)
    for _, corrupt in corruptions(payload):
        arrays = to_jax(corrupt)
        with pytest.raises(ValueError):
            decode(corrupt, (128, 192))
        with pytest.raises(jax.errors.JaxRuntimeError, match="corrupt payload"):
            TCA_TBE.decompress(arrays, 128, 192).block_until_ready()
        with pytest.raises(jax.errors.JaxRuntimeError, match="corrupt payload"):
            TCA_TBE.matmul(x, arrays, 128, 192).block_until_ready()
        try:  # a row may lie outside what is corrupt: it must not crash, and may be right
            TCA_TBE.take(jnp.arange(128), arrays, 128, 192).block_until_ready()
        except jax.errors.JaxRuntimeError as e:
            assert "corrupt payload" in str(e)


def test_random_corruption_never_crashes(isa):
    rng = np.random.default_rng(0)
    payload = encode(gaussian((128, 128)))
    for _ in range(100):
        corrupt = {name: array.copy() for name, array in payload.items()}
        name = rng.choice([f for f in TCA_TBE.fields if f not in ("sign_mantissa", "full")])
        raw = corrupt[name].reshape(-1).view(np.uint8)
        raw[rng.integers(raw.size)] ^= 1 << rng.integers(8)
        try:
            decode(corrupt, (128, 128))
        except ValueError:
            pass


def test_wrong_sizes_are_refused():
    payload = to_jax(encode(gaussian((64, 64))))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected"):
        TCA_TBE.decompress(payload, 128, 64).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"bfloat16 or float32"):
        TCA_TBE.matmul(jnp.ones((1, 64), jnp.float16), payload, 64, 64).block_until_ready()
