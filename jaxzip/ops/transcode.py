"""``transcode``: a compressed tensor in another format, without the dense tensor in between."""

from __future__ import annotations

import jax
import numpy as np

from jaxzip import formats
from jaxzip.compress import AUTO, best_format, check_dtype, compress, from_payloads
from jaxzip.ops import host
from jaxzip.ops.decompress import require_compressed
from jaxzip.tensor import CompressedTensor
from jaxzip.x64 import check_uncut


def transcode(z: CompressedTensor, format: str = AUTO, *, on_host: bool = False) -> CompressedTensor:
    """``compress(decompress(z), format=format)``, the same arrays, a few rows at a time.

    Between ``tca-tbe`` and ``lane-planar`` 64 rows a thread are dense at any time. From and to ``raw``, whose payload
    is the dense tensor, it encodes or decodes. A tensor that has the format already comes back as it is.

    Args:
      z: any compressed tensor; a stack is transcoded matrix by matrix.
      format: a name of ``jaxzip.formats``, or ``"auto"``: the fastest one on JAX's default device, and the one that
        ``z`` has where no format is faster than others. A tensor that the format would not shrink becomes ``raw``.
      on_host: leave the payload in NumPy arrays instead of moving it to JAX's default device.

    Raises:
      TypeError: ``z`` is traced or no CompressedTensor, ``format`` does not take its dtype, or JAX would cut its
        64 bits to 32.
      ValueError: unknown format, or a matrix format for a tensor that is no matrix.
    """
    require_compressed(z, "transcode")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in z.payload.values()):
        raise TypeError("transcode runs on the host and cannot be traced; transcode outside of jit")
    if not on_host:
        check_uncut(z.dtype, "transcode: z", "keep it in NumPy arrays with on_host=True")
    if format == AUTO:
        kept = None if z.format == "raw" else z.format
        format = best_format(z.dtype, otherwise=kept) if z.ndim >= 2 and z.size else "raw"
    check_dtype(z.dtype, formats.get(format), "transcode")
    if format == z.format:
        result = z
    elif z.format == "raw":
        return compress(host.dense(z), format=format, output_axis=z.output_axis, on_host=on_host)
    else:
        result = _raw(z) if format == "raw" else _between(z, format)
    return jax.tree.map(np.asarray if on_host else jax.numpy.asarray, result)


def _between(z: CompressedTensor, format: str) -> CompressedTensor:
    m, k = z.matrix_shape
    try:
        payloads = [
            host.transcode(host.matrix(z, index), z.format, format, m, k) for index in np.ndindex(z.batch_shape)
        ]
    except OverflowError:  # more elements than the format can address
        return _raw(z)
    result = from_payloads(payloads, z.batch_shape, z.core_shape, z.dtype, format, z.output_axis)
    return result if result.nbytes < z.size * z.dtype.itemsize else _raw(z)


def _raw(z: CompressedTensor) -> CompressedTensor:
    return CompressedTensor({"values": host.dense(z)}, z.core_shape, z.dtype, "raw", z.output_axis)
