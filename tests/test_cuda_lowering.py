"""What programs become on an NVIDIA GPU, lowered on a machine without one: the custom calls and their results."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jaxzip.ffi import cuda_backend

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.formats import auto
from jaxzip.ops import registry
from jaxzip.ops.encode import COUNTS, PAYLOAD, SHIFTS
from jaxzip.ops.gated_matmul import gated_matmul
from jaxzip.testing import gaussian_weights

# Shapes that no other test uses: JAX keeps traces, and with them the choice of implementation, for the process.
K, M = 267, 331


@pytest.fixture(autouse=True)
def with_cuda_backend(monkeypatch):
    """The CUDA implementations, whether their library was built or not; gone after the test."""
    registry.load_backends()
    ours = lambda i: i.name in ("ffi", "pallas") and i.platforms == ("cuda",)  # noqa: E731
    without = {op: [i for i in known if not ours(i)] for op, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", without)
    monkeypatch.setattr(auto, "_preferences", [])
    monkeypatch.setattr(cuda_backend, "register_cuda", lambda: None)
    cuda_backend.register_cuda_backend()
    yield
    jax.clear_caches()


def encoded(format, output_axis=-1):
    w = gaussian_weights((K, M))
    if format == "raw":
        return jaxzip.compress(w, format="raw", output_axis=output_axis)
    return jax.tree.map(jnp.asarray, encode_as(w, format, output_axis))


def custom_calls(f, *arguments):
    """Name and result types of every custom call of ours."""
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(jaxzip_\w+)\(.*?-> (.*)", text)


def rows(n):
    return jnp.ones((n, K), jnp.bfloat16)


@pytest.mark.parametrize("n", [1, 200])
def test_lane_planar_and_its_raw_control(n):
    bias, residual = jnp.ones(M, jnp.bfloat16), jnp.ones((n, M), jnp.bfloat16)
    want = [("jaxzip_lane_planar_gemm", f"tensor<{n}x{M}xf32>")]
    for format, implementation in (("lane-planar", None), ("lane-planar", "ffi"), ("raw", "ffi")):
        z = encoded(format)
        options = {"implementation": implementation, "out_dtype": jnp.float32}
        assert custom_calls(lambda x, z: jaxzip.matmul(x, z, **options), rows(n), z) == want
        both = lambda x, z, b, r: jaxzip.matmul(x, z, bias=b, residual=r, **options)  # noqa: E731
        assert custom_calls(both, rows(n), z, bias, residual) == want


def test_tca_tbe_has_a_workspace():
    z = encoded("tca-tbe")
    assert custom_calls(jaxzip.matmul, rows(9), z) == [
        ("jaxzip_tca_tbe_matmul", f"(tensor<9x{M}xbf16>, tensor<{(6 + 512) * 64 * 16}xf32>)")
    ]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), z)
    assert custom_calls(jax.vmap(jaxzip.matmul), jnp.ones((2, 1, K), jnp.bfloat16), stack) == [
        ("jaxzip_tca_tbe_matmul", f"(tensor<2x1x{M}xbf16>, tensor<2x{(6 + 512) * 64 * 8}xf32>)")
    ]


@pytest.mark.parametrize(("format", "n"), [("tca-tbe", 33), ("lane-planar", 16385)])
def test_many_rows_are_multiplied_by_xla(format, n):
    name = format.replace("-", "_")
    assert custom_calls(jaxzip.matmul, rows(n), encoded(format)) == [
        (f"jaxzip_{name}_decompress", f"tensor<{K}x{M}xbf16>")
    ]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_of_many_rows_is_one_call(activation):
    k, m = 72, 7936
    w = jax.tree.map(jnp.asarray, encode_as(gaussian_weights((k, m)), "lane-planar", -1))
    run = functools.partial(gated_matmul, activation=activation)
    x = jnp.ones((512, k), jnp.bfloat16)
    text = jax.jit(run).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    (attributes, result) = re.findall(r"custom_call @jaxzip_lane_planar_gemm\(.*?\{(.*?)\} :.*?-> (.*)", text)[0]
    assert "gated = true" in attributes and result == "tensor<512x3968xbf16>"
    assert f"gelu_tanh = {str(activation == 'gelu_tanh').lower()}" in attributes
    raw = jaxzip.compress(gaussian_weights((k, m)), format="raw")
    asked = functools.partial(run, implementation="ffi")
    assert [result for _, result in custom_calls(asked, x, raw)] == ["tensor<512x3968xbf16>"]
    # A slice that is mostly empty, too few columns, raw weights: the product and the gate by themselves.
    assert custom_calls(run, jnp.ones((513, k), jnp.bfloat16), w)[0][1] == f"tensor<513x{m}xbf16>"
    narrow = jax.tree.map(jnp.asarray, encode_as(gaussian_weights((k, 256)), "lane-planar", -1))
    assert custom_calls(run, x, narrow)[0][1] == "tensor<512x256xbf16>"
    assert custom_calls(run, x, raw) == []


def test_raw_weights_are_multiplied_by_xla_unless_the_control_is_asked_for():
    assert custom_calls(jaxzip.matmul, rows(3), encoded("raw")) == []


def test_batch_invariance_takes_the_fused_kernel_at_any_n():
    run = lambda x, z: jaxzip.matmul(x, z, batch_invariant=True)  # noqa: E731
    assert custom_calls(run, rows(3000), encoded("lane-planar"))[0][0] == "jaxzip_lane_planar_gemm"
    with pytest.raises(NotImplementedError, match="depends on the rows of x"):
        jax.jit(run).trace(rows(3000), encoded("tca-tbe")).lower(lowering_platforms=("cuda",))


def test_lookup_reads_rows_of_lane_planar_only():
    table = encoded("lane-planar", -2)
    assert custom_calls(jaxzip.take, table, jnp.arange(4)) == [("jaxzip_lane_planar_take", f"tensor<4x{M}xbf16>")]


def test_encoding_has_three_steps():
    bits = jnp.zeros((K, M), jnp.uint16)
    blocks, words = 6 * 5, 6 * 64
    run = functools.partial(registry.run, transposed=True)
    shift, starts = jnp.zeros(words, jnp.int8), jnp.zeros(blocks + 1, jnp.uint32)
    assert custom_calls(lambda b: run(SHIFTS, None, b), bits) == [("jaxzip_lane_planar_shifts", f"tensor<{words}xi8>")]
    counts = custom_calls(lambda b, s: run(COUNTS, None, b, s), bits, shift)
    assert counts == [("jaxzip_lane_planar_counts", f"tensor<{blocks}xui32>")]
    payload = custom_calls(lambda b, s, f: run(PAYLOAD, None, b, s, f, width=1440, overflow=64), bits, shift, starts)
    assert payload == [("jaxzip_lane_planar_encode", "(tensor<6x5x1440xui32>, tensor<64xui32>)")]


def test_decoding_first_leaves_the_rounding_to_the_dot():
    z = encoded("lane-planar")

    def dots(x, **options):
        f = lambda x, z: jaxzip.matmul(x, z, implementation="decompress", **options)  # noqa: E731
        text = jax.jit(f).trace(x, z).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r"dot_general .*-> tensor<\w+x(\w+)>", text)

    assert dots(rows(300)) == ["bf16"]
    assert dots(rows(300), out_dtype=jnp.float32) == ["f32"]
    assert dots(rows(300).astype(jnp.float32)) == ["f32"]
    assert dots(rows(300).astype(jnp.float32), out_dtype=jnp.bfloat16) == ["f32"]
    assert dots(rows(300), bias=jnp.ones(M, jnp.bfloat16)) == ["f32"]


def test_grouped_products_are_fused_for_few_rows_an_expert():
    def calls(format, rows, experts=3, **options):
        one = encoded(format)
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * experts), one)
        run = lambda x, z, sizes: jaxzip.ragged_matmul(x, z, sizes, **options)  # noqa: E731
        return custom_calls(run, jnp.ones((rows, K), jnp.bfloat16), stack, jnp.zeros(experts, jnp.int32))

    gemm = "jaxzip_lane_planar_ragged_gemm"
    assert calls("lane-planar", 192) == [(gemm, f"tensor<192x{M}xbf16>")]
    assert calls("lane-planar", 5, out_dtype=jnp.float32) == [(gemm, f"tensor<5x{M}xf32>")]
    assert calls("lane-planar", 193) == [("jaxzip_lane_planar_decompress", f"tensor<3x{K}x{M}xbf16>")]
    assert calls("tca-tbe", 5) == [("jaxzip_tca_tbe_decompress", f"tensor<3x{K}x{M}xbf16>")]
    assert calls("raw", 5) == []
    assert calls("raw", 5, implementation="ffi") == [(gemm, f"tensor<5x{M}xbf16>")]
    with pytest.raises(NotImplementedError, match="above 64 each"):
        calls("lane-planar", 193, implementation="ffi")
    with pytest.raises(NotImplementedError, match="up to 1024 experts"):
        calls("lane-planar", 5, 1025, implementation="ffi")
