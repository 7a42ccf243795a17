"""TCA-TBE as a format: published vectors, every bit pattern, windows, sizes, and what a corrupt payload is told."""

import pathlib

import jax
import numpy as np
import pytest
from weights import named_weights

from jaxzip import formats
from jaxzip.errors import CorruptDataError
from jaxzip.formats.tca_tbe import choose_start_exp
from jaxzip.testing import bits, gaussian_weights

GOLDEN = sorted((pathlib.Path(__file__).parent / "data").glob("tca_tbe_*.npz"))
FORMAT = formats.get("tca-tbe")
WEIGHTS = named_weights()


def encode(w):
    return FORMAT.encode(bits(w).T)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_equals_the_published_encoding_byte_for_byte(path):
    golden = np.load(path)
    payload = FORMAT.encode(golden["weights"])
    for name, array in payload.items():
        assert array.tobytes() == golden[name].tobytes(), name
    m, k = golden["weights"].shape
    assert np.array_equal(jax.jit(lambda p: FORMAT.decode(p, m, k))(payload), golden["weights"])


def test_golden_vectors_are_there():
    assert len(GOLDEN) == 2


@pytest.mark.parametrize("name", WEIGHTS)
def test_round_trip(name):
    w = WEIGHTS[name]
    payload = encode(w)
    FORMAT.validate(payload, *w.T.shape)
    decoded = jax.jit(lambda p: FORMAT.decode(p, *w.T.shape))(payload)
    assert np.array_equal(np.asarray(decoded), bits(w).T)


@pytest.mark.parametrize(
    ("exponents", "start_exp"),
    [
        ([0, 0, 0, 0, 0], 0),  # never starts at exponent 0
        ([255] * 5, 248),
        ([120, 121, 126, 127], 119),  # 120..126 ties with 121..127: the lowest
        ([0] * 100 + [100, 101], 94),  # exact zeros do not attract the window
        ([50] * 6 + [200] * 5, 43),  # the better mode of a bimodal tensor
    ],
)
def test_window_is_the_best_covering_one(exponents, start_exp):
    assert choose_start_exp((np.array(exponents) << 7).astype(np.uint16)) == start_exp


def test_coverage_counts_logical_escapes_only():
    w = gaussian_weights((100, 70))
    payload = encode(w)
    exponent = bits(w) >> 7 & 0xFF
    first = int(payload["start_exp"]) + 1
    outside = int(((exponent < first) | (exponent >= first + 7)).sum())
    coverage = FORMAT.coverage(payload, 70, 100)
    assert (coverage.size, coverage.escapes) == (7000, outside)
    assert outside > 0


def test_size_is_that_of_the_formula():
    w = gaussian_weights((1024, 1024))
    payload = encode(w)
    r = FORMAT.coverage(payload, 1024, 1024).fraction
    expected = 3 + 8 * r + 16 * (1 - r) + 320 / 4096
    stored = 8 * sum(a.nbytes for a in payload.values()) / w.size
    assert 0 <= stored - expected < 0.04


def _set(name, index, value):
    def change(payload):
        payload[name][index] = value

    return change


def _clear_frag(frag):
    def change(payload):
        for i in (1, 2, 3):
            payload[f"bitmap{i}"][frag] = 0

    return change


def _shorten(name):
    def change(payload):
        payload[name] = payload[name][:-16]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("tile_offsets", (1, 0), 2**31), ["tile_offsets[1, 0]", str(2**31)]),
        (_set("tile_offsets", (2, 1), 3), ["tile_offsets[2, 1]", "full"]),
        (_set("band_offsets", (5, 0), -1), ["band_offsets[5, 0]", "-1"]),
        (_clear_frag(3), ["tile_offsets[1, 0]", "bitmaps"]),
        (_set("start_exp", (), 255), ["start_exp", "255", "248"]),
        (_shorten("sign_mantissa"), ["sign_mantissa", "truncated"]),
        (_shorten("full"), ["full", "truncated"]),
        (_shorten("bitmap1"), ["bitmap1", "shape"]),
        (lambda p: p.pop("full"), ["incomplete"]),
        (lambda p: p.update(full=p["full"].astype(np.int32)), ["full", "int32", "uint16"]),
    ],
)
def test_corrupt_payloads_are_named(change, words):
    m, k = 128, 130
    payload = encode(gaussian_weights((k, m)))
    FORMAT.validate(payload, m, k)
    change(payload)
    with pytest.raises(CorruptDataError) as error:
        FORMAT.validate(payload, m, k)
    for word in words:
        assert word in str(error.value)


def test_unknown_format():
    with pytest.raises(ValueError, match=f"'zip'; known formats: {', '.join(formats.names())}"):
        formats.get("zip")
