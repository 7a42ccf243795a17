"""Registers the Pallas kernels as implementation ``"pallas"``.

On the CPU they are interpreted, which is for tests. On a Hopper GPU they are Mosaic kernels; on another GPU, with a jax
that changed what those lean on, or for a format that has none, Triton compiles what the CPU interprets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxzip.pallas_kernels import lane_planar_portable, mosaic_lanes, tca_tbe_matmul, tca_tbe_portable

from jaxzip.ops import registry
from jaxzip.ops.matmul import check_no_config, finish, measured_config
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

LANE_PLANAR = "lane-planar"
TCA_TBE = "tca-tbe"
#: What decodes and multiplies where there is no Mosaic kernel.
PORTABLE_DECOMPRESS = {LANE_PLANAR: lane_planar_portable.decompress, TCA_TBE: tca_tbe_portable.decompress}
PORTABLE_MATMUL = {LANE_PLANAR: lane_planar_portable.matmul, TCA_TBE: tca_tbe_matmul.matmul}
#: Ahead of XLA, behind the FFI kernels (10).
MOSAIC_PRIORITY = 5
#: Nobody gets it without asking.
PORTABLE_PRIORITY = -1
MOST_ROWS = 256
HOPPER = "9.0"


def register_backend() -> None:
    """Entry point of the group ``jaxzip.backends``."""
    _register_portable("cpu", interpret=True)
    register_cuda()


def _register_portable(platform: str, interpret: bool) -> None:
    add = functools.partial(registry.register, name="pallas", platforms=(platform,), priority=PORTABLE_PRIORITY)
    on_gpu = platform == "cuda"
    options = {"interpret": interpret}
    check_decompress = functools.partial(_check_portable, on_gpu=on_gpu)
    check_matmul = functools.partial(_check_portable_matmul, on_gpu=on_gpu)
    add("decompress", fn=functools.partial(_portable_decompress, **options), check=check_decompress)
    add("matmul", fn=functools.partial(_portable_matmul, **options), check=check_matmul)


def register_cuda() -> None:
    """Registers the Mosaic kernels, or says why they cannot be, and what stands in for them."""
    _register_portable("cuda", interpret=False)
    reason = mosaic_lanes.unavailable_reason()
    if reason:
        registry.report_missing("pallas", f"Mosaic kernels: {reason}")
        return
    add = functools.partial(registry.register, name="pallas", platforms=("cuda",))
    add("decompress", fn=_mosaic_decompress, check=_check_mosaic, priority=MOSAIC_PRIORITY)
    listed = {"configurations": _mosaic_configurations}
    add("matmul", fn=_mosaic_matmul, check=_check_mosaic_matmul, priority=MOSAIC_PRIORITY, **listed)


def _check_format(z: CompressedTensor) -> None:
    if z.format != LANE_PLANAR:
        raise NotImplementedError(f"no Pallas kernel for format {z.format}")


def _check_kernel_order(w: CompressedTensor, batch_invariant: bool) -> None:
    if w.format != "raw" and w.output_axis != KERNEL_AXIS:
        raise NotImplementedError("the kernel contracts along K; this tensor's first axis is its output axis: use w.T")
    if batch_invariant:
        raise NotImplementedError("the Pallas kernels' order of accumulation depends on the rows of x")


def _check_portable(z: CompressedTensor, *, on_gpu: bool) -> None:
    if z.format not in PORTABLE_DECOMPRESS:
        raise NotImplementedError(f"no Pallas kernel for format {z.format}")
    if on_gpu and z.format == LANE_PLANAR and not (mosaic_lanes.unavailable_reason() or _other_gpus()):
        raise NotImplementedError("the Triton kernels stand in where the Mosaic ones cannot be")


def _check_portable_matmul(
    x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None, on_gpu: bool
) -> None:
    check_no_config("the portable kernel", config)
    if 0 in w.core_shape:
        raise NotImplementedError(f"the Pallas kernels take weights with elements, this one is {w.core_shape}")
    if w.format != "raw":
        _check_portable(w, on_gpu=on_gpu)
    elif w.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the Pallas kernels multiply raw bfloat16 weights, this one is {w.dtype}")
    _check_kernel_order(w, batch_invariant)
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the Pallas kernels take bfloat16 and float32, x is {x.dtype}")


def _check_mosaic(z: CompressedTensor) -> None:
    _check_format(z)
    if other := _other_gpus():
        raise NotImplementedError(f"the Mosaic kernels need compute capability {HOPPER}, here is {', '.join(other)}")


@functools.cache
def _other_gpus() -> frozenset[str]:
    """Compute capabilities of the GPUs here that are no Hopper; none without a GPU: programs are for one elsewhere."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return frozenset()
    return frozenset(device.compute_capability for device in devices) - {HOPPER}


def _check_mosaic_matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None) -> None:
    _check_mosaic(w)
    _check_kernel_order(w, batch_invariant)
    for name, value in (("x", x), ("bias", bias), ("residual", residual)):
        if value is not None and value.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the Mosaic kernels take bfloat16, {name} is {value.dtype}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the Mosaic kernels return bfloat16 and float32, not {out_dtype}")
    if x.shape[0] > MOST_ROWS:
        raise NotImplementedError(f"the Mosaic kernels take up to {MOST_ROWS} rows of x, here are {x.shape[0]}")
    if config is not None and x.shape[0] > 0:
        _named_config(x, w, config)


def _portable_decompress(z: CompressedTensor, *, interpret: bool) -> jax.Array:
    return _each_matrix(functools.partial(PORTABLE_DECOMPRESS[z.format], interpret=interpret), z)


def _mosaic_decompress(z: CompressedTensor) -> jax.Array:
    from jaxzip.pallas_kernels import lane_planar_decompress

    return _each_matrix(lane_planar_decompress.decompress, z)


def _each_matrix(decompress, z: CompressedTensor) -> jax.Array:
    m, k = z.matrix_shape
    one = functools.partial(decompress, m=m, k=k, transposed=z.output_axis == KERNEL_AXIS)
    for _ in z.batch_shape:
        one = jax.vmap(one)
    return one(dict(z.payload))


def _portable_matmul(
    x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None, interpret: bool
) -> jax.Array:
    if w.format == "raw":
        values = w.payload["values"]
        sums = lane_planar_portable.raw_matmul(x, values, rows_first=w.raw_transposed, interpret=interpret)
    else:
        sums = PORTABLE_MATMUL[w.format](x, w.payload, *w.matrix_shape, interpret=interpret)
    return finish(sums, bias, residual, out_dtype)


def _problem(x, w: CompressedTensor) -> tuple[int, int, int, int]:
    """N, M, K and the words of a block: what configurations depend on."""
    return (x.shape[0], *w.matrix_shape, w.payload["blocks"].shape[-1])


def _named_config(x, w: CompressedTensor, name: str):
    """The configuration of this name. Raises ValueError if there is none for this product."""
    from jaxzip.pallas_kernels import matmul_configs

    config = matmul_configs.find(name, *_problem(x, w))
    if config is None:
        n, m, k, _ = _problem(x, w)
        listed = ", ".join(f'"{c}"' for c in _mosaic_configurations(x, w))
        raise ValueError(
            f'matmul, implementation="pallas": no configuration "{name}" for x [{n}, {k}] and a weight of {m} outputs; '
            f"the best by its model: {listed}"
        )
    return config


def _mosaic_configurations(x, w: CompressedTensor, *_, **__) -> tuple[str, ...]:
    from jaxzip.pallas_kernels import matmul_configs

    return tuple(config.name for config in matmul_configs.best(*_problem(x, w))) if x.shape[0] else ()


def _mosaic_matmul(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None) -> jax.Array:
    from jaxzip.pallas_kernels import lane_planar_matmul, matmul_configs

    m, k = w.matrix_shape
    if x.shape[0] == 0:
        return jnp.zeros((0, m), out_dtype)
    if config is not None:
        chosen = _named_config(x, w, config)
    else:
        name = measured_config("pallas", "cuda", x, w, format=w.format)
        chosen = (name and matmul_configs.find(name, *_problem(x, w))) or matmul_configs.choose(*_problem(x, w))
    options = {"bias": bias, "residual": residual, "out_dtype": out_dtype}
    return lane_planar_matmul.matmul(x, w.payload, m, k, config=chosen, **options)
