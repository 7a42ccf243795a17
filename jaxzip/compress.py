"""``compress``: an array in, a CompressedTensor out."""

from __future__ import annotations

import jax
import numpy as np

from jaxzip import formats
from jaxzip.errors import UnsupportedDtypeError
from jaxzip.formats import auto
from jaxzip.formats.base import pad_axis
from jaxzip.ops import encode, host, registry
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor
from jaxzip.x64 import check_uncut

AUTO = "auto"


def compress(
    w: jax.Array | np.ndarray,
    *,
    format: str = AUTO,
    output_axis: int = KERNEL_AXIS,
    on_host: bool = False,
) -> CompressedTensor:
    """Encodes ``w`` losslessly.

    A bf16 array on a GPU that has lane-planar's kernels is encoded to that format where it is; everything else goes
    through the host's encoders. The bytes are the same.

    Args:
      w: a Flax kernel ``[K, M]``, or with ``output_axis=-2`` a table ``[M, K]`` (embeddings, PyTorch weights). Leading
        dimensions are a stack: each matrix is encoded for itself, and ``jax.vmap`` or ``lax.scan`` run over it.
      format: a name of ``jaxzip.formats``, or ``"auto"``: the fastest one on JAX's default device, and with ``on_host``
        the smallest one, whatever the machine (see ``jaxzip.formats.auto``). A tensor that the format would not shrink,
        and with ``"auto"`` one of a dtype without a format or of rank below 2, is stored ``raw``. bf16 has several
        formats; fp16, fp32, fp8 e4m3fn and e5m2 have one each, which ``"auto"`` takes on every machine. Those have no
        fused kernels: ``matmul`` decodes them, then multiplies.
      output_axis: which of the last two axes holds output features, -1 or -2.
      on_host: leave the payload in NumPy arrays instead of moving it to JAX's default device.

    Raises:
      TypeError: ``w`` is a tracer or no array, ``format`` does not take its dtype, or JAX would cut its 64 bits to 32.
      ValueError: unknown format, bad ``output_axis``, an array without elements, or rank below 2 with a matrix format.
    """
    check_array(w)
    check_output_axis(output_axis)
    if format != AUTO:
        _check_explicit(w, formats.get(format))
    if not on_host:
        check_uncut(w.dtype, "compress: w", "keep it in NumPy arrays with on_host=True")
    if format == AUTO:
        format = (auto.for_storage if on_host else best_format)(w.dtype) if w.ndim >= 2 and w.size else "raw"
    z = CompressedTensor({"values": w}, tuple(w.shape[-2:]), np.dtype(w.dtype), "raw", output_axis)
    if format != "raw":
        try:
            on_device = not on_host and _device_encodes(w, format)
            encoded = encode.encode_on_device(w, output_axis) if on_device else encode_as(w, format, output_axis)
        except OverflowError:  # more elements than the format can address
            encoded = z
        z = encoded if encoded.nbytes < z.nbytes else z
    return z if on_host else jax.tree.map(jax.numpy.asarray, z)


def _device_encodes(w: jax.Array | np.ndarray, format: str) -> bool:
    """Whether the device that holds ``w`` has an encoder that is faster than the way to the host."""
    if format != "lane-planar" or not isinstance(w, jax.Array) or w.dtype != auto.BF16 or len(w.devices()) > 1:
        return False
    (device,) = w.devices()
    if device.platform != "gpu" or w.shape[-1] * w.shape[-2] > np.iinfo(np.int32).max:
        return False
    return registry.candidates(encode.SHIFTS, "cuda")[0] != registry.XLA


def best_format(dtype: np.dtype, device: jax.Device | None = None, *, otherwise: str | None = None) -> str:
    """What ``"auto"`` is for computing with arrays of ``dtype`` on ``device``; see ``jaxzip.formats.auto.choose``."""
    registry.load_backends()  # which say what they are fast at
    return auto.choose(dtype, device, otherwise=otherwise)


def format_for(dtype: np.dtype, format: str) -> str:
    """``format`` where one is asked for a whole tree: bf16's formats stand for compression of any dtype.

    So for a bf16 format and a dtype that has its own format: the latter.
    """
    dtype = np.dtype(dtype)
    if format == AUTO or dtype not in auto.DTYPES or auto.BF16 not in formats.get(format).dtypes:
        return format
    return format if dtype in formats.get(format).dtypes else auto.for_storage(dtype)


def check_array(w, caller: str = "compress") -> None:
    """Raises TypeError unless ``w`` is an array with values."""
    if isinstance(w, jax.core.Tracer):
        raise TypeError(
            f"{caller} runs on the host and cannot be traced; compress outside of jit and pass the result in"
        )
    if not isinstance(w, jax.Array | np.ndarray):
        raise TypeError(f"{caller}: expected an array, got {type(w).__name__}")
    if jax.numpy.issubdtype(w.dtype, jax.dtypes.extended):
        raise TypeError(f"{caller}: an array of {w.dtype} cannot be stored; keep jax.random.key_data(key)")


def check_output_axis(output_axis: int, caller: str = "compress") -> None:
    """Raises ValueError unless ``output_axis`` is one of the last two axes, counted from the end."""
    if output_axis not in (KERNEL_AXIS, TABLE_AXIS):
        raise ValueError(f"{caller}: output_axis is {output_axis}, expected -1 ([K, M]) or -2 ([M, K])")


def check_dtype(dtype: np.dtype, fmt: formats.Format, caller: str = "compress") -> None:
    """Raises UnsupportedDtypeError, a TypeError, unless ``fmt`` takes ``dtype``."""
    if fmt.name != "raw" and np.dtype(dtype) not in fmt.dtypes:
        names = ", ".join(str(d) for d in fmt.dtypes)
        message = f'{caller}: {fmt.name} takes {names}, w has dtype {dtype}; use format="auto" or "raw"'
        raise UnsupportedDtypeError(message)


def _check_explicit(w, fmt: formats.Format) -> None:
    if fmt.name == "raw":
        return
    check_dtype(w.dtype, fmt)
    if w.ndim < 2:
        raise ValueError(f'compress: {fmt.name} takes matrices, w has shape {w.shape}; use format="auto" or "raw"')
    if w.size == 0:
        raise ValueError(f"compress: w has shape {w.shape} and no elements")


def encode_as(w, format: str, output_axis: int) -> CompressedTensor:
    """Encodes ``w`` to a matrix format whether that is smaller or not; the payload stays on the host.

    Raises:
      OverflowError: a matrix has more elements than the format can address.
    """
    bits = host.bits(np.asarray(w))
    if output_axis == KERNEL_AXIS:
        bits = bits.swapaxes(-1, -2)
    batch, (m, k) = bits.shape[:-2], bits.shape[-2:]
    payloads = [host.encode(matrix, format) for matrix in (bits.reshape(-1, m, k) if batch else bits[None])]
    return from_payloads(payloads, batch, tuple(w.shape[-2:]), np.dtype(w.dtype), format, output_axis)


def from_payloads(
    payloads: list[formats.Payload],
    batch: tuple[int, ...],
    core_shape: tuple[int, int],
    dtype: np.dtype,
    format: str,
    output_axis: int,
) -> CompressedTensor:
    """The tensor of exact payloads, one for each matrix of a stack of shape ``batch``, padded to common lengths."""
    fmt = formats.get(format)
    m, k = CompressedTensor({}, core_shape, dtype, format, output_axis).matrix_shape
    lengths = [fmt.bucket_lengths(p, m, k) for p in payloads]
    common = {name: max(each[name] for each in lengths) for name in lengths[0]}
    payload = {}
    for name in fmt.fields(m, k):
        arrays = [pad_axis(p.pop(name), common[name]) if name in common else p.pop(name) for p in payloads]
        payload[name] = np.stack(arrays).reshape((*batch, *arrays[0].shape)) if batch else arrays[0]
    return CompressedTensor(payload, core_shape, dtype, format, output_axis, fmt.version)
