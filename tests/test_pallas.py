"""The Pallas backend on a machine without a GPU: its programs for one, its choices, what the test base leaves out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxzip.pallas_kernels import backend, lane_planar_portable, mosaic_lanes, portable_matmul, tca_tbe_matmul

import jaxzip
from jaxzip.compress import encode_as
from jaxzip.formats import lane_planar as layout
from jaxzip.ops import registry
from jaxzip.tensor import CompressedTensor
from jaxzip.testing import BF16, bits, gaussian_weights

needs_mosaic = pytest.mark.skipif(bool(mosaic_lanes.unavailable_reason()), reason=mosaic_lanes.unavailable_reason())
MODEL_SHAPES = [(1024, 4096), (4096, 14336), (6144, 4096), (34816, 5120), (128256, 4096)]


def encoded(w, output_axis=-1, format="lane-planar"):
    return jax.tree.map(jnp.asarray, encode_as(w, format, output_axis))


def abstract(m, k, width=1464, batch=()):
    """A tensor of shapes only, for lowering."""
    row_blocks, columns = layout.block_grid(m, k)
    payload = {
        "shift": jax.ShapeDtypeStruct((*batch, row_blocks * layout.BLOCK), jnp.int8),
        "blocks": jax.ShapeDtypeStruct((*batch, row_blocks, columns, width), jnp.uint32),
        "overflow": jax.ShapeDtypeStruct((*batch, 4096), jnp.uint32),
    }
    return CompressedTensor(payload, (k, m), BF16, "lane-planar")


def rows(n, k, batch=()):
    return jax.ShapeDtypeStruct((*batch, n, k), jnp.bfloat16)


def lowered(f, *arguments) -> str:
    jax.clear_caches()  # traces keep the choice of implementation
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text: str) -> list[str]:
    return re.findall(r"custom_call @(\w+)\(", text)


def pallas_matmul(x, z, **options):
    return jaxzip.matmul(x, z, implementation="pallas", **options)


@needs_mosaic
@pytest.mark.parametrize("n", [1, 32, 100, 128, 256])
@pytest.mark.parametrize("shape", [*MODEL_SHAPES, (77, 8200), (65, 63)], ids=str)
def test_a_matmul_is_one_kernel(shape, n):
    m, k = shape
    text = lowered(pallas_matmul, rows(n, k), abstract(m, k))
    assert custom_calls(text) == ["mosaic_gpu_v2"]
    assert not re.search(r"dot_general|stablehlo.reduce|stablehlo.transpose", text)
    assert f"-> tensor<{n}x{m}xbf16>" in text


@needs_mosaic
def test_addends_and_fp32_stay_in_the_kernel():
    z, x = abstract(1001, 300), rows(5, 300)
    bias, residual = jax.ShapeDtypeStruct((1001,), jnp.bfloat16), jax.ShapeDtypeStruct((5, 1001), jnp.bfloat16)
    text = lowered(
        lambda x, z, b, r: pallas_matmul(x, z, bias=b, residual=r, out_dtype=jnp.float32), x, z, bias, residual
    )
    assert custom_calls(text) == ["mosaic_gpu_v2"]
    assert "stablehlo.add" not in text and "-> tensor<5x1001xf32>" in text


@needs_mosaic
@pytest.mark.parametrize("width", layout.WIDTHS)
def test_every_block_width(width):
    assert custom_calls(lowered(pallas_matmul, rows(40, 500), abstract(700, 500, width))) == ["mosaic_gpu_v2"]
    decompress = lambda z: jaxzip.decompress(z, implementation="pallas")  # noqa: E731
    assert custom_calls(lowered(decompress, abstract(700, 500, width))) == ["mosaic_gpu_v2"]


@needs_mosaic
def test_a_stack_is_one_kernel_too():
    text = lowered(jax.vmap(pallas_matmul), rows(9, 256, (3,)), abstract(512, 256, batch=(3,)))
    assert custom_calls(text) == ["mosaic_gpu_v2"]


@needs_mosaic
def test_more_rows_than_it_takes():
    with pytest.raises(NotImplementedError, match="up to 256 rows of x, here are 257"):
        lowered(pallas_matmul, rows(257, 256), abstract(512, 256))


@pytest.fixture
def own_registry(monkeypatch):
    registry.load_backends()
    without = {op: [i for i in known if i.platforms != ("cuda",)] for op, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", without)
    monkeypatch.setattr(registry, "_missing", {})
    yield
    jax.clear_caches()


@needs_mosaic
def test_it_is_the_best_there_is_without_the_ffi_library(own_registry):
    backend.register_cuda()
    assert custom_calls(lowered(jaxzip.matmul, rows(64, 512), abstract(256, 512))) == ["mosaic_gpu_v2"]
    assert custom_calls(lowered(jaxzip.decompress, abstract(256, 512))) == ["mosaic_gpu_v2"]
    assert custom_calls(lowered(jaxzip.matmul, rows(300, 512), abstract(256, 512))) == [
        "mosaic_gpu_v2"
    ]  # decompression


def test_without_mosaic_the_reason_is_given(own_registry, monkeypatch):
    monkeypatch.setattr(mosaic_lanes, "_missing", "jax 9 lacks it")
    backend.register_cuda()
    there = [i for i in registry._registry["matmul"] if i.name == "pallas" and i.platforms == ("cuda",)]
    assert [i.priority for i in there] == [backend.PORTABLE_PRIORITY]
    assert "jax 9 lacks it" in registry._missing["pallas"]


@pytest.fixture
def verified_triton(monkeypatch):
    """Modules for Triton are verified as they are made, if this JAX makes them so; else a GPU's compiler does."""
    try:
        from jax._src.pallas.triton.pallas_call_registration import lowering

        lower = lowering.lower_jaxpr_to_triton_module
    except (ImportError, AttributeError):
        return

    def and_verify(*arguments, **options):
        result = lower(*arguments, **options)
        module = getattr(result, "module", result)
        assert getattr(module, "operation", module).verify()
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", and_verify)


@pytest.mark.skipif(not hasattr(jax.sharding, "AbstractDevice"), reason="jax cannot name a device that is not there")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")  # which later releases will not have
def test_the_portable_kernels_become_triton_on_a_gpu(verified_triton):
    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    z = encoded(gaussian_weights((130, 200)))
    other = encoded(gaussian_weights((130, 200)), format="tca-tbe")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        matmul = lambda x, p: lane_planar_portable.matmul(x, p, 200, 130, interpret=False)  # noqa: E731
        decompress = lambda p: lane_planar_portable.decompress(p, 200, 130, transposed=True, interpret=False)  # noqa: E731
        assert "triton" in lowered(matmul, rows(8, 130), z.payload)
        assert "triton" in lowered(decompress, z.payload)
        assert "triton" in lowered(lambda z: jaxzip.decompress(z, implementation="pallas"), other)
        for n in (1, 64, 256):
            text = lowered(
                lambda x, p: tca_tbe_matmul.matmul(x, p, 200, 130, interpret=False), rows(n, 130), other.payload
            )
            assert text.count("triton") == 1 and f"-> tensor<{n}x200xf32>" in text


def test_parts_of_k_cover_it():
    for columns in range(1, 300):
        for programs in (1, 2, 11, 64, 132, 264, 1000):
            parts, blocks = portable_matmul.parts_of_k(programs, columns)
            assert (parts - 1) * blocks < columns <= parts * blocks


def test_k_in_parts():
    """A program has five blocks of K, the last one three: sums in order, for every format as for raw weights."""
    w = gaussian_weights((1100, 100), seed=1)
    x = jax.random.normal(jax.random.key(0), (3, 1100), jnp.bfloat16)
    assert portable_matmul.parts_of_k(2, 18) == (4, 5)
    raw = pallas_matmul(x, jaxzip.compress(w, format="raw"), out_dtype=jnp.float32)
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    assert np.allclose(raw, exact, rtol=0, atol=1e-5)
    for format in ("lane-planar", "tca-tbe"):
        assert np.array_equal(bits(pallas_matmul(x, encoded(w, format=format), out_dtype=jnp.float32)), bits(raw))


def test_a_tensor_without_an_overflow_list():
    w = gaussian_weights((64, 64), zeros=0)
    z = encoded(w)
    payload = {**z.payload, "overflow": jnp.zeros(0, jnp.uint32)}
    out = lane_planar_portable.decompress(payload, 64, 64, transposed=True, interpret=True)
    assert np.array_equal(bits(out), bits(w))


def sharded(mesh, **options):
    """A kernel [K, M] in shards along M: one payload a shard, side by side in the leaves."""

    def local(x, z):
        return pallas_matmul(x, jax.tree.map(lambda leaf: leaf[0], z))

    specs = {"in_specs": (P(), P("model")), "out_specs": P(None, "model")}
    return jax.jit(jax.shard_map(local, mesh=mesh, **specs, **options))


@pytest.mark.parametrize("format", ["lane-planar", "tca-tbe"])
def test_shard_map_interpreted(format):
    w = gaussian_weights((96, 512))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (8, 96), jnp.bfloat16)
    shards = encoded(np.moveaxis(w.reshape(96, 4, 128), 1, 0), format=format)
    # The interpreter's own loops do not say over which axes they vary.
    assert np.array_equal(
        bits(sharded(mesh, check_vma=False)(x, shards)), bits(pallas_matmul(x, encoded(w, format=format)))
    )


@needs_mosaic
def test_shard_map_on_a_gpu():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    text = lowered(sharded(mesh), rows(64, 512), abstract(256, 512, batch=(4,)))
    assert custom_calls(text).count("mosaic_gpu_v2") == 1
