"""Encoding by the CUDA kernels gives the host encoder's payload, byte for byte."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_encode_device import assert_same_payload
from weights import named_weights

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.ops.encode import encode_on_device

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
WEIGHTS = named_weights()
COMPRESS = importlib.import_module("jaxzip.compress")  # the module, whose name a function has too


@pytest.mark.parametrize("output_axis", [-1, -2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_bytes_of_the_host_encoder(name, output_axis):
    w = WEIGHTS[name]
    z = encode_on_device(jnp.asarray(w), output_axis, implementation="ffi")
    assert_same_payload(z, encode_as(w, "lane-planar", output_axis))


@pytest.mark.parametrize("shape", [(4096, 6144), (14336, 4096), (1000, 3001)], ids=str)
@pytest.mark.parametrize("output_axis", [-1, -2])
def test_large_weights_with_rows_of_other_scale(shape, output_axis):
    w = 0.02 * jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    w = w * 2.0 ** jax.random.randint(jax.random.key(2), (shape[0], 1), -6, 7).astype(jnp.bfloat16)
    z = encode_on_device(w, output_axis, implementation="ffi")
    assert_same_payload(z, encode_as(np.asarray(w), "lane-planar", output_axis))
    assert bool((jaxzip.decompress(z) == w).all())


@pytest.mark.parametrize("output_axis", [-1, -2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_tca_tbe_by_xla(name, output_axis):
    z = encode_on_device(jnp.asarray(WEIGHTS[name]), output_axis, format="tca-tbe")
    assert_same_payload(z, encode_as(WEIGHTS[name], "tca-tbe", output_axis))


def test_tca_tbe_in_several_steps():
    w = 0.02 * jax.random.normal(jax.random.key(4), (3001, 4100), jnp.bfloat16)
    assert_same_payload(encode_on_device(w, format="tca-tbe"), encode_as(np.asarray(w), "tca-tbe", -1))


def test_a_stack():
    stack = 0.02 * jax.random.normal(jax.random.key(3), (3, 130, 200), jnp.bfloat16)
    stack = stack.at[1].multiply(2.0**100)
    assert_same_payload(encode_on_device(stack, implementation="ffi"), encode_as(np.asarray(stack), "lane-planar", -1))


def test_compress_encodes_where_the_weight_is(monkeypatch):
    w = 0.02 * jax.random.normal(jax.random.key(4), (300, 200), jnp.bfloat16)
    expected = encode_as(np.asarray(w), "lane-planar", -1)
    monkeypatch.setattr(COMPRESS, "encode_as", None)  # the host's, which must not be needed
    z = jaxzip.compress(w, format="lane-planar")
    assert_same_payload(z, expected)
    assert z.payload["blocks"].devices() == w.devices()
