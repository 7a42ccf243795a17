"""Root-mean-square norm on a GPU in one kernel, a row a program: its order of sums depends on nothing but the width.

XLA splits the norm of a single row into two kernels and sums it in another order than that of many rows. Written for
Pallas' Triton backend; where a JAX has none, ``supported`` is false and XLA computes norms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without this backend
    plt = None

#: Widest row: a program holds it in registers.
MAX_FEATURES = 1 << 14
_FEATURES_A_WARP = 1024


def supported(features: int) -> bool:
    """Whether the kernel takes rows of this width; it runs on CUDA devices only."""
    return plt is not None and features <= MAX_FEATURES


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, offset: float = 0.0, interpret: bool = False) -> jax.Array:
    """``x / rms(x) * (offset + scale)`` of rows ``x[N, features]``, in fp32, rounded once to ``x.dtype``."""
    rows, features = x.shape
    padded = pl.next_power_of_2(features)
    warps = min(16, max(1, padded // _FEATURES_A_WARP))
    return pl.pallas_call(
        functools.partial(_one_row, eps=eps, offset=offset, padded=padded),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
        name="rms_norm",
        **({} if interpret else {"compiler_params": plt.CompilerParams(num_warps=warps, num_stages=1)}),
    )(x, scale)


def _one_row(x_ref, scale_ref, out_ref, *, eps, offset, padded):
    row, whole = pl.program_id(0), pl.ds(0, padded)
    features = x_ref.shape[1]
    inside = jnp.arange(padded) < features
    x = plt.load(x_ref.at[row, whole], mask=inside, other=0).astype(jnp.float32)
    scale = plt.load(scale_ref.at[whole], mask=inside, other=0).astype(jnp.float32)
    if offset:
        scale = scale + offset
    inverse_rms = jax.lax.rsqrt(jnp.sum(x * x) / features + eps)
    plt.store(out_ref.at[row, whole], (x * inverse_rms * scale).astype(out_ref.dtype), mask=inside)
