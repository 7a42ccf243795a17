"""Encoding on the device gives the host encoder's payload, byte for byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.ops.encode import encode_on_device

WEIGHTS = named_weights()


def assert_same_payload(z, want):
    assert (z.shape, z.dtype, z.format, z.output_axis, z.layout_version) == (
        want.shape, want.dtype, want.format, want.output_axis, want.layout_version
    )  # fmt: skip
    assert list(z.payload) == list(want.payload)
    for name, array in want.payload.items():
        got = np.asarray(z.payload[name])
        assert got.dtype == array.dtype and got.shape == array.shape, name
        assert np.array_equal(got, array), f"{name}: {np.count_nonzero(got != array)} of {array.size} differ"


@pytest.mark.parametrize(
    "name, output_axis", [*((name, -1) for name in WEIGHTS), ("gaussian 65x63", -2), ("uniform exponents", -2)]
)
def test_the_bytes_of_the_host_encoder(name, output_axis):
    w = WEIGHTS[name]
    assert_same_payload(encode_on_device(jnp.asarray(w), output_axis), encode_as(w, "lane-planar", output_axis))


def test_stacks_of_matrices_with_other_widths_and_lists():
    easy = 0.02 * jax.random.normal(jax.random.key(0), (130, 70), jnp.bfloat16)
    hard = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(1), (130, 70), jnp.uint16), jnp.bfloat16)
    stack = jnp.stack([easy, hard, easy * 2])[:, None]
    z = encode_on_device(stack)
    assert_same_payload(z, encode_as(np.asarray(stack), "lane-planar", -1))
    bits = jax.lax.bitcast_convert_type(jaxzip.decompress(z), jnp.uint16)
    assert np.array_equal(bits, jax.lax.bitcast_convert_type(stack, jnp.uint16))


def test_refuses_what_it_cannot_encode():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(encode_on_device)(jnp.ones((64, 64), jnp.bfloat16))
    with pytest.raises(TypeError, match="bfloat16"):
        encode_on_device(jnp.ones((64, 64), jnp.float32))
    with pytest.raises(ValueError, match="unknown implementation"):
        encode_on_device(jnp.ones((64, 64), jnp.bfloat16), implementation="gone")
