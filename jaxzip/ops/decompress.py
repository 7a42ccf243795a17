"""``decompress``: the exact array that a CompressedTensor stands for."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxzip import formats
from jaxzip.ops import explicit_axes, registry
from jaxzip.ops.other_dtypes import decompress_split, is_split
from jaxzip.tensor import TABLE_AXIS, CompressedTensor
from jaxzip.x64 import check_uncut


def decompress(z: CompressedTensor, *, implementation: str | None = None) -> jax.Array:
    """Decodes ``z`` to a dense array of ``z.shape`` and ``z.dtype`` with the very bits that were compressed.

    Jittable; works under ``vmap`` and on stacks (leading dimensions of the leaves).

    Args:
      z: any compressed tensor.
      implementation: ``"xla"``, ``"ffi"``, ``"pallas"``, or ``None`` for the best one here.

    Raises:
      TypeError: ``z`` is no CompressedTensor, or JAX would cut its 64 bits to 32.
      ValueError: no such implementation.
      NotImplementedError: nothing here can decode ``z``; the message has every reason.
    """
    require_compressed(z, "decompress")
    check_uncut(z.dtype, "decompress: z", 'take the array as it is stored, z.payload["values"]')
    return _decompress(z, implementation)


def require_compressed(z, op: str) -> None:
    if not isinstance(z, CompressedTensor):
        advice = "its array is z.dense()" if hasattr(z, "dense") else "make one with jaxzip.compress"
        raise TypeError(f"{op}: expected a CompressedTensor, got {type(z).__name__}; {advice}")


@functools.partial(jax.jit, static_argnames="implementation")
def _decompress(z: CompressedTensor, implementation: str | None) -> jax.Array:
    with jax.named_scope("jaxzip.decompress"):
        if z.format == "raw":
            values = z.payload["values"]
            return values.swapaxes(-1, -2) if z.raw_transposed else values
        stack = P(*explicit_axes.split_of(next(iter(z.payload.values())))[: len(z.batch_shape)])
        return explicit_axes.run(functools.partial(_decode, implementation), (z,), (stack,), stack)


def _decode(implementation, z):
    if is_split(z):
        with jax.numpy_rank_promotion("allow"):
            return decompress_split(z, functools.partial(_decompress, implementation=implementation))
    return registry.run("decompress", implementation, z)


def decompress_xla(z: CompressedTensor) -> jax.Array:
    """The reference: same-width integer operations on each matrix of the stack."""
    fmt, (m, k) = formats.get(z.format), z.matrix_shape

    def one(payload):
        bits = fmt.decode(payload, m, k)
        return jax.lax.bitcast_convert_type(bits if z.output_axis == TABLE_AXIS else bits.T, jnp.dtype(z.dtype))

    for _ in z.batch_shape:
        one = jax.vmap(one)
    return one(dict(z.payload))


registry.register("decompress", registry.XLA, decompress_xla)
