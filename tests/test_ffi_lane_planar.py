"""Lane-planar in C++ against the NumPy reference, byte for byte, at every instruction-set level; its handlers."""

import jax
import jax.numpy as jnp
import jaxzip.ffi
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxzip.ffi.format_ops import LANE_PLANAR, raw_matmul
from test_lane_planar import CORRUPTIONS, corruptible_payload
from weights import named_weights

import jaxzip
from jaxzip import formats
from jaxzip.compress import encode_as
from jaxzip.errors import CorruptDataError
from jaxzip.formats import lane_planar
from jaxzip.formats.base import pad_axis
from jaxzip.ops import host
from jaxzip.testing import BF16, bits, gaussian_weights

pytestmark = pytest.mark.skipif(not jaxzip.ffi.cpu_available(), reason=jaxzip.ffi.cpu_available().reason)

FORMAT = formats.get("lane-planar")
LEVELS = jaxzip.ffi.cpu_module().isa_levels() if jaxzip.ffi.cpu_available() else []
#: As the encoder sees them: uint16 [M, K].
MATRICES = {name: bits(w).T for name, w in named_weights().items()}
REFERENCE = {name: FORMAT.encode(matrix) for name, matrix in MATRICES.items()}


def cpu():
    return jaxzip.ffi.cpu_module()


@pytest.fixture(params=LEVELS)
def isa(request):
    """Runs the test at every instruction-set level that this machine has."""
    cpu().set_isa(request.param)
    yield request.param
    cpu().set_isa("")


def layouts(matrix):
    """The same matrix with other strides."""
    spread = np.zeros((2 * matrix.shape[0], 3 * matrix.shape[1]), np.uint16)
    spread[::2, ::3] = matrix
    return {
        "c": np.ascontiguousarray(matrix),
        "f": np.asfortranarray(matrix),
        "strided": spread[::2, ::3],
        "reversed": np.ascontiguousarray(matrix[::-1, ::-1])[::-1, ::-1],
    }


def assert_same_payload(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def assert_same(a, b):
    np.testing.assert_array_equal(bits(a), bits(b))


def to_jax(payload):
    return {name: jnp.asarray(array) for name, array in payload.items()}


# --- Codec -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("layout", ["c", "f", "strided", "reversed"])
def test_equals_the_reference(isa, name, layout):
    matrix = MATRICES[name]
    found = cpu().encode_lane_planar(layouts(matrix)[layout])
    assert_same_payload(found, REFERENCE[name])
    out = layouts(np.full(matrix.shape, 0xABCD, np.uint16))[layout]
    cpu().decode_lane_planar(**found, out=out)
    np.testing.assert_array_equal(out, matrix)
    cpu().check_lane_planar(**found, m=matrix.shape[0], k=matrix.shape[1])


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 140),
    k=st.integers(1, 140),
    low=st.integers(0, 250),
    span=st.integers(1, 40),
    strange=st.sampled_from([0.0, 0.01, 0.2]),
    seed=st.integers(0, 1 << 30),
    transposed=st.booleans(),
)
def test_equals_the_reference_whatever_the_exponents(m, k, low, span, strange, seed, transposed):
    rng = np.random.default_rng(seed)
    exponents = np.minimum(low + rng.integers(0, span, (m, k)) + rng.integers(0, 3, (m, 1)) * 12, 255)
    matrix = (exponents << 7 | rng.integers(0, 128, (m, k)) | rng.integers(0, 2, (m, k)) << 15).astype(np.uint16)
    matrix = np.where(rng.random((m, k)) < strange, rng.integers(0, 1 << 16, (m, k)), matrix).astype(np.uint16)
    payload = cpu().encode_lane_planar(np.asfortranarray(matrix) if transposed else matrix, num_threads=1)
    assert_same_payload(payload, FORMAT.encode(matrix))
    FORMAT.validate(payload, m, k)
    out = np.empty_like(matrix)
    cpu().decode_lane_planar(**payload, out=out, num_threads=1)
    np.testing.assert_array_equal(out, matrix)


@pytest.mark.parametrize("exponents", [[120] * 9, [70] * 9, [118] * 8 + [1], [130] * 8 + [2], [100] * 8 + [254], [247]])
def test_shifts_at_the_ends_of_the_range(exponents):
    matrix = np.array([exponents], np.uint16) << 7
    assert_same_payload(cpu().encode_lane_planar(matrix), FORMAT.encode(matrix))


@pytest.mark.parametrize("share", [0.0, 0.004, 0.02, 0.03, 0.035])
def test_every_width_and_overflow(share):
    rng = np.random.default_rng(0)
    matrix = bits(gaussian_weights((640, 256), zeros=0)).copy()
    matrix[rng.random(matrix.shape) < share] = 0x0100
    found = cpu().encode_lane_planar(matrix)
    assert_same_payload(found, FORMAT.encode(matrix))
    cpu().check_lane_planar(**found, m=640, k=256)


# The encoder looks at every 16th band of 64 rows before it chooses a width; one block in 128 may have too many escapes.
@pytest.mark.parametrize(
    ("bands", "columns", "escapes", "width"),
    [
        (range(3, 4), 64, 2000, 1424),  # as guessed, with overflow entries
        (range(1, 16), 1024, 40, 1440),  # wider than guessed
        (range(1), 64, 40, 1424),  # not as wide as guessed
        (range(1, 16), 1024, 2000, 1472),  # too many for any width
        (range(17), 1024, 200, 1472),  # the same, as guessed
    ],
)
def test_blocks_that_a_sample_does_not_show(bands, columns, escapes, width):
    rng = np.random.default_rng(1)
    matrix = (rng.integers(120, 128, (17 * 64, 1024)) << 7 | rng.integers(0, 128, (17 * 64, 1024))).astype(np.uint16)
    for band in bands:
        for column in range(0, columns, 64):
            block = matrix[64 * band : 64 * band + 64, column : column + 64]
            places = np.unravel_index(rng.choice(64 * 64, escapes, replace=False), block.shape)
            block[places] = rng.integers(90, 110, escapes) << 7
    found = cpu().encode_lane_planar(matrix)
    assert found["blocks"].shape[-1] == width
    assert_same_payload(found, FORMAT.encode(matrix))
    cpu().check_lane_planar(**found, m=matrix.shape[0], k=matrix.shape[1])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_do_not_change_the_result(threads):
    matrix = bits(gaussian_weights((330, 200)))
    assert_same_payload(
        cpu().encode_lane_planar(matrix, num_threads=threads), cpu().encode_lane_planar(matrix, num_threads=1)
    )


def test_wider_blocks_and_padded_overflow_decode_to_the_same_bits(isa):
    matrix = MATRICES["gaussian 200x77"]
    payload = dict(cpu().encode_lane_planar(matrix))
    payload["blocks"] = pad_axis(payload["blocks"], lane_planar.WIDTHS[-1])
    payload["overflow"] = pad_axis(payload["overflow"], 64)
    out = np.empty_like(matrix)
    cpu().check_lane_planar(**payload, m=matrix.shape[0], k=matrix.shape[1])
    cpu().decode_lane_planar(**payload, out=out)
    np.testing.assert_array_equal(out, matrix)


def test_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="at least one row"):
        cpu().encode_lane_planar(np.zeros((0, 4), np.uint16))
    with pytest.raises(TypeError):
        cpu().encode_lane_planar(np.zeros((4, 4), np.float32))


@pytest.mark.parametrize("case", range(len(CORRUPTIONS)))
def test_corrupt_payloads_are_named_as_by_the_reference(case):
    change, _ = CORRUPTIONS[case]
    payload, m, k = corruptible_payload()
    host.validate(payload, "lane-planar", m, k, implementation="ffi")
    change(payload)
    messages = []
    for implementation in ("reference", "ffi"):
        with pytest.raises(CorruptDataError) as error:
            host.validate(payload, "lane-planar", m, k, implementation=implementation)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("tile", range(lane_planar.TILES))
def test_overflow_entries_come_after_the_blocks_own(tile):
    matrix = np.full((64, 64), lane_planar.PADDING, np.uint16)
    matrix[16 * tile : 16 * tile + 2] = 0x7FC0
    payload = cpu().encode_lane_planar(matrix)
    entries = payload["blocks"][0, 0, lane_planar.ENTRY_START :].view(np.uint16)
    last = lane_planar.entry_position(int(entries[-1]), tile)
    assert payload["overflow"].size == 2 * (128 - entries.size) and last >> 10 == tile
    for position in {last + 1, last, last - 1, last & 2047, 0}:
        payload["overflow"][1] = position | 31 << 12
        for implementation in ("reference", "ffi"):
            if position > last:
                host.validate(payload, "lane-planar", 64, 64, implementation=implementation)
                continue
            with pytest.raises(CorruptDataError, match=r"overflow\[0\] has an entry before the end"):
                host.validate(payload, "lane-planar", 64, 64, implementation=implementation)


def test_random_corruption_is_judged_as_by_the_reference_and_never_crashes(isa):
    rng = np.random.default_rng(0)
    payload, m, k = corruptible_payload()
    places = {
        "shift": lambda size: rng.integers(size),
        "overflow": lambda size: rng.integers(size),
        # Only what may be wrong: ends, overflow words and entries.
        "blocks": lambda size: (
            rng.integers(size // 4 // 1472) * 1472 * 4 + rng.integers(4 * lane_planar.HEADER, 4 * 1472)
        ),
    }
    for _ in range(150):
        corrupt = {name: array.copy() for name, array in payload.items()}
        name = rng.choice(list(places))
        raw = corrupt[name].reshape(-1).view(np.uint8)
        raw[places[name](raw.size)] ^= 1 << rng.integers(8)
        verdicts = []
        for implementation in ("reference", "ffi"):
            try:
                host.validate(corrupt, "lane-planar", m, k, implementation=implementation)
                verdicts.append("")
            except CorruptDataError as error:
                verdicts.append(str(error))
        assert verdicts[0] == verdicts[1]
        out = np.empty((m, k), np.uint16)
        try:
            cpu().decode_lane_planar(**corrupt, out=out)
        except ValueError:
            pass


# --- Handlers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_decompress(isa, name):
    matrix = MATRICES[name]
    m, k = matrix.shape
    payload = to_jax(REFERENCE[name])
    assert_same(LANE_PLANAR.decompress(payload, m, k), matrix.T)
    assert_same(jax.jit(lambda p: LANE_PLANAR.decompress(p, m, k, transposed=False))(payload), matrix)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 17, 40])
def test_matmul_equals_raw_bit_for_bit(isa, n):
    m, k = 150, 200
    matrix = bits(gaussian_weights((m, k))).copy()
    matrix[3, 5], matrix[140, 199], matrix[70, 0], matrix[9, 9] = 0x7FC0, 0x7F80, 0xFF80, 0xFFFF
    payload = to_jax(cpu().encode_lane_planar(matrix))
    x = jnp.asarray(np.random.default_rng(n).standard_normal((n, k)), jnp.float32)
    w = jnp.asarray(matrix.view(BF16))
    for x_dtype in (jnp.bfloat16, jnp.float32):
        for out_dtype in (jnp.bfloat16, jnp.float32):
            y = LANE_PLANAR.matmul(x.astype(x_dtype), payload, m, k, out_dtype)
            assert y.dtype == out_dtype
            assert_same(y, raw_matmul(x.astype(x_dtype), w, True, out_dtype))


@pytest.mark.parametrize("name", ["gaussian 200x77", "all bit patterns", "all NaN", "gaussian 1x64"])
def test_take(isa, name):
    matrix = MATRICES[name]
    m, k = matrix.shape
    ids = np.random.default_rng(0).integers(0, m, (3, 11)).astype(np.int32)
    payload = to_jax(REFERENCE[name])
    assert_same(LANE_PLANAR.take(jnp.asarray(ids), payload, m, k), matrix[ids])
    outside = LANE_PLANAR.take(jnp.asarray([-1, 0, m, 2**31 - 1]), payload, m, k)
    assert_same(outside[1], matrix[0])
    np.testing.assert_array_equal(bits(outside)[[0, 2, 3]], 0x7FC0)


def test_vmap_over_stacked_payloads():
    w = gaussian_weights((3, 70, 100))
    z = encode_as(w, "lane-planar", -1)
    payload = to_jax(z.payload)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 70)), jnp.bfloat16)
    dense = jax.vmap(lambda p: LANE_PLANAR.decompress(p, 100, 70))(payload)
    assert_same(dense, w)
    rows = jax.vmap(lambda p: LANE_PLANAR.take(jnp.arange(5), p, 100, 70))(payload)
    assert_same(rows, w.swapaxes(1, 2)[:, :5])
    y = jax.jit(jax.vmap(lambda x, p: LANE_PLANAR.matmul(x, p, 100, 70, jnp.float32)))(x, payload)
    raw = jax.vmap(lambda x, w: raw_matmul(x, w, False, jnp.float32))(x, jnp.asarray(w))
    assert_same(y, raw)


def test_operations_use_the_kernels():
    w = gaussian_weights((256, 320))
    z, raw = (jaxzip.compress(w, format=f) for f in ("lane-planar", "raw"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 256)), jnp.bfloat16)
    assert_same(jaxzip.decompress(z, implementation="ffi"), w)
    assert_same(jaxzip.matmul(x, z, implementation="ffi"), jaxzip.matmul(x, raw, implementation="ffi"))
    table = jaxzip.compress(w, format="lane-planar", output_axis=-2)
    ids = jnp.asarray([3, -1, 255])
    assert_same(jaxzip.take(table, ids, implementation="ffi"), w[np.asarray(ids)])


@pytest.mark.filterwarnings("ignore")
def test_handlers_survive_corrupt_payloads(isa):
    payload, m, k = corruptible_payload()
    blocks = payload["blocks"].copy()
    blocks[0, 1, lane_planar.HEADER] = 0xFFFFFFFF
    overflow = payload["blocks"].copy()
    overflow[1, 1, lane_planar.OVERFLOW_WORD] = 0x7FFFFFFF
    x = jnp.ones((3, k), jnp.bfloat16)
    for changed in (blocks, overflow):
        arrays = to_jax(payload | {"blocks": changed})
        for call in (
            lambda: LANE_PLANAR.decompress(arrays, m, k),
            lambda: LANE_PLANAR.matmul(x, arrays, m, k),
            lambda: LANE_PLANAR.take(jnp.arange(m), arrays, m, k),
        ):
            with pytest.raises(jax.errors.JaxRuntimeError, match="corrupt payload: blocks"):
                call().block_until_ready()


@pytest.mark.parametrize(("field", "cut"), [("shift", -1), ("blocks", -1), ("overflow", -1)])
def test_wrong_shapes_are_refused(field, cut):
    payload, m, k = corruptible_payload()
    short = payload | {field: payload[field][:cut]}
    with pytest.raises(ValueError, match=field):
        cpu().check_lane_planar(**short, m=m, k=k)
    with pytest.raises(jax.errors.JaxRuntimeError, match=field):
        LANE_PLANAR.decompress(to_jax(short), m, k).block_until_ready()
