"""Encoding on the device gives the host encoder's payload, byte for byte."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.formats import tca_tbe_device
from jaxzip.ops.encode import encode_on_device
from jaxzip.testing import BF16, bits, gaussian_weights

WEIGHTS = named_weights()
# Three shapes, whose padding others have too, are left to the host's encoders: for these each shape is compiled.
NAMES = [name for name in WEIGHTS if name not in ("gaussian 3x5", "gaussian 1x64", "gaussian 64x64")]
GOLDEN = sorted((pathlib.Path(__file__).parent / "data").glob("tca_tbe_*.npz"))
TCA_TBE = "tca-tbe"


def assert_same_payload(z, want):
    assert (z.shape, z.dtype, z.format, z.output_axis, z.layout_version) == (
        want.shape, want.dtype, want.format, want.output_axis, want.layout_version
    )  # fmt: skip
    assert list(z.payload) == list(want.payload)
    for name, array in want.payload.items():
        got = np.asarray(z.payload[name])
        assert got.dtype == array.dtype and got.shape == array.shape, name
        assert np.array_equal(got, array), f"{name}: {np.count_nonzero(got != array)} of {array.size} differ"


@pytest.mark.parametrize("format", ["lane-planar", TCA_TBE])
@pytest.mark.parametrize(
    "name, output_axis", [*((name, -1) for name in NAMES), ("gaussian 65x63", -2), ("uniform exponents", -2)]
)
def test_the_bytes_of_the_host_encoder(name, output_axis, format):
    w = WEIGHTS[name]
    z = encode_on_device(jnp.asarray(w), output_axis, format=format)
    assert_same_payload(z, encode_as(w, format, output_axis))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_tca_tbe_as_it_was_published(path):
    """The lists of a payload are longer than the published ones: zeros, up to the length of their bucket."""
    golden = np.load(path)
    z = encode_on_device(jnp.asarray(golden["weights"].view(BF16)), -2, format=TCA_TBE)
    for name, array in z.payload.items():
        got, want = np.asarray(array).tobytes(), golden[name].tobytes()
        assert got[: len(want)] == want and not any(got[len(want) :]), name


@pytest.mark.parametrize("output_axis", [-1, -2])
def test_tca_tbe_a_few_rows_of_blocks_at_a_time(monkeypatch, output_axis):
    """Two rows of BlockTiles of five: the last step comes by one that the step before it has encoded."""
    monkeypatch.setattr(tca_tbe_device, "_TOGETHER", 2 * 3 * 4096)
    w = gaussian_weights((170, 260) if output_axis == -1 else (260, 170), seed=3)
    w.flat[::50] = np.float32(1e30)
    z = encode_on_device(jnp.asarray(w), output_axis, format=TCA_TBE)
    assert_same_payload(z, encode_as(w, TCA_TBE, output_axis))
    assert np.array_equal(bits(jaxzip.decompress(z)), bits(w))


@pytest.mark.parametrize("format", ["lane-planar", TCA_TBE])
def test_stacks_of_matrices_with_other_widths_and_lists(format):
    easy = 0.02 * jax.random.normal(jax.random.key(0), (130, 70), jnp.bfloat16)
    hard = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(1), (130, 70), jnp.uint16), jnp.bfloat16)
    stack = jnp.stack([easy, hard, easy * 2])[:, None]
    z = encode_on_device(stack, format=format)
    assert_same_payload(z, encode_as(np.asarray(stack), format, -1))
    decoded = jax.lax.bitcast_convert_type(jaxzip.decompress(z), jnp.uint16)
    assert np.array_equal(decoded, jax.lax.bitcast_convert_type(stack, jnp.uint16))


def test_refuses_what_it_cannot_encode():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(encode_on_device)(jnp.ones((64, 64), jnp.bfloat16))
    with pytest.raises(TypeError, match="bfloat16"):
        encode_on_device(jnp.ones((64, 64), jnp.float32))
    for format in ("lane-planar", TCA_TBE):
        with pytest.raises(ValueError, match="unknown implementation"):
            encode_on_device(jnp.ones((64, 64), jnp.bfloat16), format=format, implementation="gone")
        for shape in ((0, 64), (0, 64, 64), (64,)):
            with pytest.raises(ValueError, match="expected matrices with elements"):
                encode_on_device(jnp.ones(shape, jnp.bfloat16), format=format)
    with pytest.raises(ValueError, match="unknown format 'gone'"):
        encode_on_device(jnp.ones((64, 64), jnp.bfloat16), format="gone")
    with pytest.raises(NotImplementedError, match="raw is encoded on the host only"):
        encode_on_device(jnp.ones((64, 64), jnp.bfloat16), format="raw")
    with pytest.raises(NotImplementedError, match="65536x40000 matrix is too large"):
        tca_tbe_device.check_size(65536, 40000)
