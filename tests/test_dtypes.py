"""fp16, fp32 and fp8 weights: every bit pattern comes back, sizes are as stated, products are the dense ones."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxzip
from jaxzip import formats, ops
from jaxzip.compress import encode_as, format_for
from jaxzip.errors import CorruptDataError
from jaxzip.formats import auto, bit_groups
from jaxzip.ops import host
from jaxzip.testing import bits, gaussian_weights

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
DTYPES = (FP16, FP32, E4M3, E5M2)
NAMES = {FP16: "split-fp16", FP32: "split-fp32", E4M3: "window-fp8-e4m3fn", E5M2: "window-fp8-e5m2"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def patterns(dtype, shape, seed=0):
    """Uniformly random bits, NaN payloads and all."""
    word = np.dtype(f"u{dtype.itemsize}")
    values = np.random.default_rng(seed).integers(0, 1 << 8 * dtype.itemsize, shape, dtype=np.uint64)
    return values.astype(word).view(dtype)


def gaussian(dtype, shape, seed=0):
    """Gaussian weights; those of fp8 scaled as quantisers do, so that the largest is the largest number there is."""
    w = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
    if dtype.itemsize == 1 and w.size:
        w *= np.float32(ml_dtypes.finfo(dtype).max) / abs(w).max()
    return w.astype(dtype)


#: Of matrices that are there for their values: one shape, so that they share what is compiled for it.
SHAPE = (70, 66)


def constant(dtype, value, shape=SHAPE):
    return np.full(shape, value, np.dtype(f"u{dtype.itemsize}")).view(dtype)


@functools.cache
def named_weights(dtype):
    """``[K, M]`` matrices: ordinary, ragged, and the worst that a checkpoint can hold."""
    word = np.dtype(f"u{dtype.itemsize}")
    shapes = ((1, 1), (3, 5), (1, 64), (17, 130), (65, 63), (128, 192))
    sign = 1 << 8 * dtype.itemsize - 1
    info = ml_dtypes.finfo(dtype)
    nan = np.asarray(np.nan, dtype).view(word)
    mantissas = np.resize(np.arange(1 << min(info.nmant, 12), dtype=np.uint64), SHAPE)  # again and again
    one_bit = 1 << np.resize(np.arange(8 * dtype.itemsize, dtype=np.uint64), SHAPE)
    lone = constant(dtype, sign)
    lone[-1, -1:] = constant(dtype, sign | 1, (1,))
    named = {f"gaussian {k}x{m}": gaussian(dtype, (k, m), seed=k) for k, m in shapes}
    named |= {
        "random patterns": patterns(dtype, SHAPE),
        "zeros": constant(dtype, 0),
        "negative zeros": constant(dtype, sign),
        "NaN": constant(dtype, nan),
        "all ones": constant(dtype, 2 * sign - 1),
        "smallest subnormals": constant(dtype, 1),
        "one bit each": one_bit.astype(word).view(dtype),
        "a lone odd mantissa": lone,
        # Exponents of all ones (infinities, NaN payloads; e4m3fn's largest numbers) and of zero (subnormals).
        "highest exponent": (sign - 1 - mantissas).astype(word).view(dtype),
        "lowest exponent": mantissas.astype(word).view(dtype),
        "two scales": np.where(np.arange(70)[:, None] % 2, 1, 2.0**-6).astype(FP32) * gaussian(FP32, SHAPE),
    }
    named["two scales"] = named["two scales"].astype(dtype)
    if dtype.itemsize < 4:  # every pattern there is
        every = np.random.default_rng(1).permutation(1 << 8 * dtype.itemsize).astype(word)
        named["every pattern"] = every.reshape(1 << 4 * dtype.itemsize, -1).view(dtype)
    else:
        structured = np.arange(1 << 16, dtype=np.uint32).reshape(256, 256)
        named["every head"] = (structured << 16 | 0x1234).view(dtype)
        named["every low half"] = (structured | 0x7F800000).view(dtype)
    return named


CASES = [(dtype, name) for dtype in DTYPES for name in named_weights(dtype)]
each_case = pytest.mark.parametrize(("dtype", "name"), CASES, ids=[f"{d}-{n}" for d, n in CASES])


@each_case
def test_host_codecs_keep_every_bit_and_agree(dtype, name):
    """Reference and fast codec: the same payload, valid, and the same bits back from each."""
    w = bits(named_weights(dtype)[name]).T
    payload = host.encode(w, NAMES[dtype])
    reference = host.encode(w, NAMES[dtype], implementation="reference")
    assert list(payload) == list(reference) == list(formats.get(NAMES[dtype]).fields(*w.shape))
    for field, array in reference.items():
        assert (payload[field].dtype, payload[field].shape) == (array.dtype, array.shape)
        assert payload[field].tobytes() == array.tobytes(), field
    for implementation in (None, "reference"):
        host.validate(payload, NAMES[dtype], *w.shape, implementation=implementation)
        out = np.zeros_like(w, order="C")
        host.decode(payload, NAMES[dtype], out, implementation=implementation)
        np.testing.assert_array_equal(out, w)


@pytest.mark.parametrize(
    ("dtype", "name", "output_axis"),
    [(*case, -1) for case in CASES] + [(dtype, "random patterns", -2) for dtype in DTYPES],
    ids=str,
)
def test_decompress_keeps_every_bit(dtype, name, output_axis):
    w = named_weights(dtype)[name]
    z = jax.tree.map(jnp.asarray, encode_as(w, NAMES[dtype], output_axis))
    out = jaxzip.decompress(z)
    assert (out.dtype, out.shape) == (w.dtype, w.shape)
    assert np.array_equal(bits(out), bits(w))
    assert np.array_equal(bits(host.dense(z)), bits(w))


@each_dtype
@pytest.mark.parametrize("implementation", [None, "xla", "ffi"])
def test_implementations_decode_what_they_have_kernels_for(dtype, implementation):
    w = gaussian(dtype, (192, 128))
    z = jaxzip.compress(w)
    assert z.format == NAMES[dtype]
    if implementation == "ffi" and dtype.itemsize == 1:
        with pytest.raises(NotImplementedError, match="window-fp8"):
            jaxzip.decompress(z, implementation=implementation)
        return
    assert np.array_equal(bits(jaxzip.decompress(z, implementation=implementation)), bits(w))


@each_dtype
def test_stacks_jit_vmap_and_scan(dtype):
    """Matrices of one stack need other numbers of escapes and planes; each keeps its bits."""
    w = np.stack([gaussian(dtype, (96, 130)), constant(dtype, 0, (96, 130)), patterns(dtype, (96, 130))])
    z = jax.tree.map(jnp.asarray, encode_as(w, NAMES[dtype], -1))
    assert (z.shape, z.matrix_shape) == (w.shape, (130, 96))
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))
    assert np.array_equal(bits(jax.vmap(jaxzip.decompress)(z)), bits(w))
    # As integers: XLA's CPU backend widens what it writes into a loop's fp8 result, and quiets NaNs.
    word = np.dtype(f"u{dtype.itemsize}")
    looped = jax.lax.map(lambda z: jax.lax.bitcast_convert_type(jaxzip.decompress(z), word), z)
    assert np.array_equal(looped, bits(w))
    assert np.array_equal(bits(host.dense(z)), bits(w))
    deep = w.reshape(3, 1, 96, 130)
    assert np.array_equal(bits(jaxzip.decompress(encode_as(deep, NAMES[dtype], -2))), bits(deep))
    one = jax.tree.map(lambda leaf: leaf[0], z).T
    assert np.array_equal(bits(jax.jit(jaxzip.decompress)(one)), bits(w[0].T))


@each_dtype
def test_layers_of_one_shape_share_a_trace(dtype):
    f = jax.jit(lambda z: jaxzip.decompress(z))
    for seed in (0, 1):
        f(jaxzip.compress(gaussian(dtype, (256, 128), seed)))
    assert f._cache_size() == 1


# --- Sizes -----------------------------------------------------------------------------------------------------

BF16_WEIGHTS = gaussian_weights((512, 512))


@pytest.mark.parametrize(
    ("w", "low", "high"),
    [
        (gaussian(FP16, (512, 512)), 14.2, 14.4),
        (gaussian(FP32, (512, 512)), 27.2, 27.4),
        (gaussian(E4M3, (512, 512)), 7.15, 7.35),
        (gaussian(E5M2, (512, 512)), 6.15, 6.35),
        # Weights that were narrower once lose the planes that are zero.
        (BF16_WEIGHTS.astype(FP32), 11.2, 11.4),
        (gaussian(FP16, (512, 512)).astype(FP32), 19.2, 19.4),
        (np.where(abs(BF16_WEIGHTS) < 2**-10, 0, BF16_WEIGHTS).astype(FP16), 11.2, 11.6),
        # Few exponents take a narrow code.
        (np.random.default_rng(0).choice([-1.5, -1, 1, 1.75], (512, 512)).astype(E4M3), 4.0, 4.1),
        (np.random.default_rng(0).choice([0.5, -1, 1, 0.75], (512, 512)).astype(E5M2), 4.0, 4.1),
    ],
)  # fmt: skip
def test_sizes(w, low, high):
    z = jaxzip.compress(w)
    assert z.format == NAMES[w.dtype]
    assert low < z.bits_per_weight < high
    assert z.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(z))
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


@each_dtype
def test_what_would_grow_is_raw(dtype):
    for w in (patterns(dtype, (256, 256)), gaussian(dtype, (3, 5)), gaussian(dtype, (8192,)), gaussian(dtype, (0, 64))):
        z = jaxzip.compress(w)
        assert (z.format, z.shape, z.nbytes) == ("raw", w.shape, w.nbytes)
        assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


def test_the_window_of_fp8_takes_the_fewest_bits():
    """Against all windows of all widths, each encoded."""
    for dtype in (E4M3, E5M2):
        fmt = formats.get(NAMES[dtype])
        for w in (
            gaussian(dtype, (64, 96)),
            patterns(dtype, (64, 96)),
            constant(dtype, 0),
            named_weights(dtype)["NaN"],
        ):
            exponents = (bits(w) & 0x7F) >> fmt.mantissa_bits
            costs = [
                width * w.size + 16 * int(((exponents < start) | (exponents >= start + (1 << width))).sum())
                for width in range(fmt.exponent_bits + 1)
                for start in range((1 << fmt.exponent_bits) - (1 << width) + 1)
            ]
            start, width = fmt.choose_window(exponents)
            outside = (exponents < start) | (exponents >= start + (1 << width))
            assert width * w.size + 16 * int(outside.sum()) == min(costs)
            assert fmt.coverage(fmt.encode(bits(w)), *w.shape).escapes == int(outside.sum())


def test_reports_say_what_hardly_shrinks_and_what_is_decoded_first():
    params = {
        "half": gaussian(FP16, (128, 256)),
        "single": gaussian(FP32, (128, 256)),
        "was_bf16": BF16_WEIGHTS.astype(FP32),
        "e4m3": gaussian(E4M3, (128, 256)),
        "e5m2": gaussian(E5M2, (128, 256)),
        "noise": patterns(FP16, (128, 256)),
        "brain": BF16_WEIGHTS,
        "stack": gaussian(E4M3, (2, 128, 256)),
    }
    tree, report = jaxzip.compress_params(params)
    rows = {row.path: row for row in report.tensors}
    for name in ("half", "single", "e4m3", "stack"):
        assert "hardly shrinks" in rows[name].note and f"of {8 * params[name].dtype.itemsize} bits" in rows[name].note
    for name in ("was_bf16", "e5m2"):
        assert "hardly" not in rows[name].note and "decoded before" in rows[name].note
    assert rows["brain"].note == "" and "smaller" in rows["noise"].note and rows["noise"].format == "raw"
    assert rows["stack"].escapes == sum(
        jaxzip.rules.tensor_report("", jaxzip.compress(w)).escapes for w in params["stack"]
    )
    sizes = jaxzip.rules.sizes_by_dtype(report.tensors)
    assert set(sizes) == {"float16", "float32", "float8_e4m3fn", "float8_e5m2", "bfloat16"}
    assert sizes["float16"]["tensors"] == 2 and sizes["float16"]["compressed"] == 1
    assert sum(size["stored_bytes"] for size in sizes.values()) == report.stored_bytes
    assert sizes["float8_e4m3fn"]["ratio"] > 0.85 > sizes["float8_e5m2"]["ratio"]
    for name, w in params.items():
        dense = jaxzip.decompress(tree[name]) if isinstance(tree[name], jaxzip.CompressedTensor) else tree[name]
        assert np.array_equal(bits(dense), bits(w))
    assert "float8_e5m2: 1 tensors" in str(report)


# --- Products --------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("implementation", [None, "decompress", "xla"])
def test_matmul_is_that_of_the_dense_weight(dtype, x_dtype, implementation):
    # Small integers: every product and sum is exact, whatever the order.
    rng = np.random.default_rng(0)
    w = rng.integers(-3, 4, (192, 128)).astype(dtype)
    x = jnp.asarray(rng.integers(-3, 4, (5, 192)), x_dtype)
    z = jaxzip.compress(w)
    assert z.format == NAMES[dtype]
    y = jax.jit(functools.partial(jaxzip.matmul, implementation=implementation))(x, z)
    wide = jnp.promote_types(x_dtype, dtype) if dtype.itemsize > 1 else jnp.dtype(x_dtype)
    assert y.dtype == wide
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert np.array_equal(np.asarray(jaxzip.matmul(x, z, out_dtype=jnp.float32)), exact)
    assert np.array_equal(np.asarray(y), exact.astype(wide))
    assert np.array_equal(np.asarray(x @ z), np.asarray(jaxzip.matmul(x, jnp.asarray(w))))


@each_dtype
def test_there_is_no_fused_kernel_and_the_refusal_says_so(dtype):
    z = jaxzip.compress(gaussian(dtype, (128, 128)))
    fused = set(ops.implementations("matmul")) - {"xla", "decompress"}
    assert "ffi" in fused
    for implementation in fused:
        with pytest.raises(NotImplementedError, match=NAMES[dtype]):
            jaxzip.matmul(jnp.ones((2, 128), jnp.bfloat16), z, implementation=implementation)


@each_dtype
def test_gradient_is_that_of_the_dense_weight(dtype):
    w, x = gaussian(FP32, (96, 70)).astype(dtype), jax.random.normal(jax.random.key(0), (4, 96))
    z = jax.tree.map(jnp.asarray, encode_as(w, NAMES[dtype], -1))
    loss = lambda x, w: jnp.sin(jaxzip.matmul(x, w)).sum()  # noqa: E731
    dense = lambda x: jnp.sin(x @ jnp.asarray(w, jnp.float32)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(x, z), jax.grad(dense)(x), rtol=1e-4, atol=1e-5)


@each_dtype
def test_take_gives_rows_bit_for_bit_and_nan_outside(dtype):
    w = named_weights(dtype)["random patterns"]
    z = jax.tree.map(jnp.asarray, encode_as(w, NAMES[dtype], -2))
    ids = np.random.default_rng(0).integers(-len(w), len(w), (3, 4))
    for table in (z, jnp.asarray(w), jaxzip.compress(w, format="raw")):
        assert np.array_equal(bits(jaxzip.take(table, jnp.asarray(ids))), bits(w[ids]))
        outside = np.asarray(jaxzip.take(table, jnp.array([len(w), -len(w) - 1])), np.float32)
        assert np.isnan(outside).all()


# --- Choice of format ------------------------------------------------------------------------------------------


def test_each_dtype_has_the_format_that_takes_it():
    assert set(auto.DTYPES) == {*DTYPES, auto.BF16}
    for dtype in auto.DTYPES:
        assert dtype in formats.get(auto.for_storage(dtype)).dtypes


@each_dtype
def test_formats_are_strict_for_a_tensor_and_lenient_for_a_tree(dtype):
    w = gaussian(dtype, (128, 128))
    for other in ("tca-tbe", "lane-planar"):
        with pytest.raises(TypeError, match=f"{other}.*{dtype}"):
            jaxzip.compress(w, format=other)
        with pytest.raises(TypeError, match=f"{other}.*{dtype}"):
            jaxzip.transcode(jaxzip.compress(w), other)
        rule = jaxzip.CompressionRule(format=other)
        assert jaxzip.compress_params({"w": w}, [rule])[0]["w"].format == NAMES[dtype]
        assert format_for(dtype, other) == NAMES[dtype] and format_for(auto.BF16, other) == other
    with pytest.raises(TypeError, match=NAMES[dtype]):
        jaxzip.compress(gaussian_weights((128, 128)), format=NAMES[dtype])
    assert format_for(dtype, "raw") == "raw" and format_for(dtype, "auto") == "auto"


@each_dtype
def test_transcode_to_raw_and_back(dtype):
    w = gaussian(dtype, (128, 192))
    z = jaxzip.compress(w)
    assert jaxzip.transcode(z).format == jaxzip.transcode(z, NAMES[dtype]).format == NAMES[dtype]
    raw = jaxzip.transcode(z, "raw")
    assert raw.format == "raw" and np.array_equal(bits(raw.payload["values"]), bits(w))
    again = jaxzip.transcode(raw)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(z), strict=True):
        assert np.array_equal(a, b)


# --- Corrupt payloads ------------------------------------------------------------------------------------------


def _fp8_payload():
    w = bits(gaussian(E5M2, (100, 200)))
    return formats.get("window-fp8-e5m2"), host.encode(w, "window-fp8-e5m2"), w.shape


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p | {"start_exp": np.uint8(32)}, "start_exp is 32"),
        (lambda p: p | {"fields": p["fields"][..., :2]}, "2 planes"),
        (lambda p: p | {"fields": p["fields"][:-1]}, "fields has shape"),
        (lambda p: p | {"starts": p["starts"] + np.uint32(1)}, r"starts\[0\] is 1"),
        (lambda p: p | {"starts": np.sort(p["starts"])[[0, 2, 1, *range(3, p["starts"].size)]]}, r"starts\[2\]"),
        (lambda p: p | {"escapes": p["escapes"][:-1]}, "truncated"),
        (lambda p: p | {"escapes": p["escapes"][::-1]}, "out of order"),
        (lambda p: p | {"escapes": np.append(p["escapes"], np.uint16(7))}, "past"),
        (lambda p: {n: a for n, a in p.items() if n != "starts"}, "incomplete"),
        (lambda p: p | {"escapes": p["escapes"].astype(np.uint32)}, "dtype"),
    ],
)
def test_corrupt_fp8_payloads_are_refused(change, words):
    fmt, payload, shape = _fp8_payload()
    assert payload["starts"][-1] > 100 and payload["starts"].size > 3
    fmt.validate(payload, *shape)
    with pytest.raises(CorruptDataError, match=words):
        fmt.validate(change(payload), *shape)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_corrupt_split_payloads_are_refused(dtype):
    w = bits(gaussian(dtype, (70, 130)))
    payload = host.encode(w, NAMES[dtype])
    low = payload["low"]
    changes = [
        ({"low": np.concatenate([low, low], -1)}, "planes"),
        ({"low": low[:-1]}, "low has shape"),
        ({"low": low.astype(np.uint16)}, "dtype"),
        ({"start_exp": np.uint8(255)}, "start_exp"),
        ({"tile_offsets": payload["tile_offsets"] + np.uint32(16)}, "tile_offsets"),
    ]
    for implementation in (None, "reference"):
        for change, words in changes:
            with pytest.raises(CorruptDataError, match=words):
                host.validate(payload | change, NAMES[dtype], *w.shape, implementation=implementation)


def test_bit_groups_are_little_endian_planes():
    fields = np.array([[1, 2, 3, 0, 7, 0, 0, 4, 6]], np.uint8)
    packed = bit_groups.pack(fields, (2, 0))
    assert packed.tolist() == [[[0b10010000, 0b00010101], [1, 0]]]
    for xp in (np, jnp):
        assert np.array_equal(bit_groups.unpack(packed, (2, 0), 9, xp), fields & 5)
