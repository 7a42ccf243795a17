"""Lane-planar as a format: every bit pattern, shifts, widths, overflow, sizes, and what a corrupt payload is told."""

import pathlib
import re

import jax
import numpy as np
import pytest
from weights import named_weights

import jaxzip
from jaxzip.errors import CorruptDataError
from jaxzip.formats import lane_planar
from jaxzip.formats.base import pad_axis
from jaxzip.formats.lane_planar import LanePlanar, choose_shifts
from jaxzip.testing import BF16, bits, gaussian_weights

FORMAT = LanePlanar()
WEIGHTS = named_weights()
LAYOUT_H = pathlib.Path(__file__).parents[1] / "ffi/cuda/lane_planar/layout.h"


def encode(w):
    return FORMAT.encode(bits(w).T)


def decode(payload, m, k):
    return np.asarray(jax.jit(lambda p: FORMAT.decode(p, m, k))(payload))


def padded(payload, m, k):
    lengths = FORMAT.bucket_lengths(payload, m, k)
    return {name: pad_axis(a, lengths[name]) if name in lengths else a for name, a in payload.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_round_trip(name):
    w = WEIGHTS[name]
    m, k = w.T.shape
    payload = padded(encode(w), m, k)
    FORMAT.validate(payload, m, k)
    assert np.array_equal(decode(payload, m, k), bits(w).T)


def test_wider_blocks_of_a_stack_decode_to_the_same_bits():
    w = gaussian_weights((130, 70))
    payload = padded(encode(w), 70, 130)
    payload["blocks"] = pad_axis(payload["blocks"], lane_planar.WIDTHS[-1])
    FORMAT.validate(payload, 70, 130)
    assert np.array_equal(decode(payload, 70, 130), bits(w).T)


def test_bimodal_rows_get_their_own_windows():
    w = gaussian_weights((192, 64)).astype(np.float32)
    w[:, 1::2] *= 2.0**-20
    w = w.astype(lane_planar.ml_dtypes.bfloat16)
    payload = encode(w)
    assert (payload["shift"][0::2] < 10).all() and (payload["shift"][1::2] > 20).all()
    assert FORMAT.coverage(payload, 64, 192).fraction > 0.97
    assert np.array_equal(decode(padded(payload, 64, 192), 64, 192), bits(w).T)


@pytest.mark.parametrize(
    ("exponents", "shift"),
    [
        ([120] * 9, 7),  # the lowest of the windows that hold it: 113..120
        ([0] * 9, 0),  # nothing normal
        ([255] * 9, 0),
        ([70] * 9, 0),  # would need 57, more than MAX_SHIFT
        ([118] * 8 + [64], 9),
        (
            [118] * 8 + [63],
            0,
        ),  # a sum of this row could become subnormal when shifted and not otherwise, or the reverse
        ([130] * 8 + [190], -3),
        ([130] * 8 + [191], 0),  # or overflow
    ],
)
def test_shifts(exponents, shift):
    assert choose_shifts((np.array([exponents]) << 7).astype(np.uint16)).tolist() == [shift]


def test_rows_with_subnormals_are_not_shifted_and_nan_keeps_its_exponent():
    row = np.full(20, 118 << 7, np.uint16)
    assert choose_shifts(np.stack([row, np.append(row[:-1], 1).astype(np.uint16)])).tolist() == [9, 0]
    w = np.tile(np.append(row[:-1], 0x7FC1).astype(np.uint16), (64, 1))
    payload = FORMAT.encode(w)
    assert (payload["shift"] == 9).all()
    assert payload["overflow"].size == 0
    assert np.array_equal(decode(payload, 64, 20), w)


def test_entries_past_the_room_of_a_block_overflow():
    w = np.full((64, 128), 120 << 7, np.uint16)
    w[:, 64:67] = 110 << 7  # 192 escapes in the second block
    payload = FORMAT.encode(w)
    assert payload["blocks"].shape[-1] == lane_planar.WIDTHS[-1]
    assert payload["blocks"][0, :, lane_planar.OVERFLOW_WORD].tolist() == [0, 1]
    assert payload["overflow"].size == 2 * (192 - lane_planar.room(lane_planar.WIDTHS[-1]))
    assert set(payload["overflow"][0::2].tolist()) == {2}
    FORMAT.validate(payload, 64, 128)
    assert np.array_equal(decode(padded(payload, 64, 128), 64, 128), w)


def test_coverage_counts_escapes():
    w = gaussian_weights((100, 70))
    payload = encode(w)
    exponent = (bits(w).T >> 7 & 0xFF).astype(int)
    stored = np.where(exponent == 0, 0, exponent + payload["shift"][:70, None])
    coverage = FORMAT.coverage(payload, 70, 100)
    assert (coverage.size, coverage.escapes) == (7000, int((stored >> 3 != 15).sum()))
    assert coverage.escapes > 0


def test_size_of_gaussian_weights():
    w = gaussian_weights((1024, 1024))
    payload = padded(encode(w), 1024, 1024)
    assert 8 * sum(a.nbytes for a in payload.values()) / w.size < 11.4


def test_encoding_does_not_depend_on_the_chunk(monkeypatch):
    w = gaussian_weights((300, 500))
    whole = encode(w)
    monkeypatch.setattr(lane_planar, "_CHUNK", 1)
    for name, array in encode(w).items():
        assert array.tobytes() == whole[name].tobytes(), name


def test_layout_equals_the_kernels():
    constants = dict(re.findall(r"constexpr (?:int|uint32_t) (k\w+) = (\d+);", LAYOUT_H.read_text()))
    text = LAYOUT_H.read_text()
    assert int(constants["kBlock"]) == lane_planar.BLOCK
    assert int(constants["kLowerWords"]) * lane_planar.TILES == lane_planar.CODE_START
    assert lane_planar.CODE_START + int(constants["kCodeWords"]) * lane_planar.TILES == lane_planar.HEADER
    assert int(constants["kMaxBlockWords"]) == lane_planar.WIDTHS[-1]
    widths = re.search(r"kBlockWidths\[\] = \{([\d, ]+)\}", text).group(1)
    assert tuple(int(w) for w in widths.split(",")) == lane_planar.WIDTHS
    assert "kOverflowWord = kHeaderStart + 1" in text and "kEntryStart = kHeaderStart + 2" in text
    positions, of_entry = re.search(r"kPositionBits = (\d+), kEntryPositionBits = (\d+);", text).groups()
    assert 1 << int(positions) == lane_planar.POSITIONS and int(of_entry) == lane_planar.ENTRY_POSITION_BITS
    assert int(re.search(r"kUpperBytes = (0x[0-9a-f]+)u", text).group(1), 16) == lane_planar.CODES


def _set(name, index, value):
    def change(payload):
        payload[name][index] = value

    return change


def _spill(*pairs):
    """Overflow entries of the payload of :func:`corruptible_payload`, whose block 1 has two of them."""

    def change(payload):
        payload["overflow"] = np.array(pairs, np.uint32).ravel()

    return change


def _no_entries_in_tile_0(payload):
    payload["blocks"][0, 1, lane_planar.HEADER] &= 0xFFFFFF00


def corruptible_payload():
    """(payload, M, K): six blocks; the first has two escapes more than room, all NaN."""
    m, k = 128, 130
    w = np.full((k, m), 2.0**-6, BF16)
    w[[70, 129]] = np.asarray(2.0**-30, BF16)  # escapes of all tiles
    w[:64, :64] = np.asarray(2.0**-6, BF16)
    w[:2, :63] = np.nan
    payload = encode(w)
    assert payload["overflow"].size == 4
    return payload, m, k


CORRUPTIONS = [
    (_set("blocks", (1, 0, lane_planar.HEADER), 0xFF0000FF), ["blocks[3]", "decrease"]),
    (_set("blocks", (0, 1, lane_planar.HEADER), 0xFFFFFFFF), ["blocks[1]", "room"]),
    (_set("blocks", (0, 1, lane_planar.HEADER), 0), ["blocks[1]", "past its ends"]),
    (_set("blocks", (0, 2, lane_planar.OVERFLOW_WORD), 77), ["blocks[2]", "overflow"]),
    (_set("blocks", (0, 0, lane_planar.OVERFLOW_WORD), 0), ["blocks[0]", "overflow"]),
    (_set("blocks", (0, 0, lane_planar.ENTRY_START), 0x00050005), ["blocks[0]", "order"]),
    (_no_entries_in_tile_0, ["blocks[1]", "tile"]),
    (_set("overflow", 1, 1 << 20), ["overflow[0]", "17 bits"]),
    (_set("overflow", 2, 99), ["overflow[1]", "past the 6"]),
    (_spill((1, 1 | 31 << 12), (1, 0 | 31 << 12)), ["overflow[0]", "order"]),
    (_spill((1, 0 | 31 << 12), (1, 0 | 31 << 12)), ["overflow[0]", "order"]),
    (_spill((0, 0), (1, 1 | 31 << 12)), ["overflow[0]", "order"]),
    (_spill((1, 0 | 31 << 12), (1, 4095 | 31 << 12)), ["overflow[0]", "before the end"]),
    (_set("shift", 5, 100), ["shift[5]", "40"]),
    (lambda p: p.update(overflow=p["overflow"][:-1]), ["overflow", "truncated"]),
    (lambda p: p.update(blocks=p["blocks"][..., :-1]), ["words", "1472"]),
    (lambda p: p.pop("shift"), ["incomplete"]),
]


@pytest.mark.parametrize(("change", "words"), CORRUPTIONS)
def test_corrupt_payloads_are_named(change, words):
    payload, m, k = corruptible_payload()
    FORMAT.validate(payload, m, k)
    change(payload)
    with pytest.raises(CorruptDataError) as error:
        FORMAT.validate(payload, m, k)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("output_axis", [-1, -2])
def test_compress_keeps_the_bits_and_is_never_larger_than_raw(name, output_axis):
    w = WEIGHTS[name]
    z = jaxzip.compress(w, format="lane-planar", output_axis=output_axis)
    assert z.format in ("lane-planar", "raw") and z.shape == w.shape
    assert z.nbytes <= w.nbytes
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


def test_large_tensors_of_the_worst_kinds():
    shape = (512, 512)
    nan = np.full(shape, 0x7FC1, np.uint16).view(BF16)
    assert jaxzip.compress(nan, format="lane-planar").format == "raw"
    zeros = jaxzip.compress(np.zeros(shape, BF16), format="lane-planar")
    assert zeros.format == "raw"  # every one is an escape: exponent 0 is never in the window
    two_scales = gaussian_weights(shape).astype(np.float32)
    two_scales[:, ::2] *= 2.0**-20
    z = jaxzip.compress(two_scales.astype(BF16), format="lane-planar")
    assert z.format == "lane-planar" and z.bits_per_weight < 11.7
    for w in (nan, np.zeros(shape, BF16), two_scales.astype(BF16)):
        z = jaxzip.compress(w, format="lane-planar")
        assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


def test_rules_and_reports_take_it():
    params = {"mlp": {"kernel": gaussian_weights((256, 256))}, "attn": {"kernel": gaussian_weights((256, 256))}}
    tree, report = jaxzip.compress_params(params, [jaxzip.CompressionRule(".*mlp.*", format="lane-planar")])
    row = next(r for r in report.tensors if r.path == "mlp/kernel")
    assert tree["mlp"]["kernel"].format == row.format == "lane-planar" and 0.9 < row.coverage < 1
    assert tree["attn"]["kernel"] is params["attn"]["kernel"]


def test_stacks_share_a_width_and_run_under_vmap_and_jit():
    w = gaussian_weights((3, 128, 192))
    w[1, ::40] *= np.asarray(2.0**-12, BF16)  # more escapes
    z = jaxzip.compress(w, format="lane-planar")
    assert z.shape == w.shape and z.format == "lane-planar"
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))
    assert np.array_equal(bits(jax.vmap(lambda one: jaxzip.decompress(one, implementation="xla"))(z)), bits(w))
