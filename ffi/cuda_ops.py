"""Typed wrappers around the FFI handlers that only CUDA has, for code that is being traced by JAX.

As in `format_ops`, they check nothing that the handlers check again, and operands may carry leading batch dimensions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxzip.ffi.custom_call import Payload, call, call_with_workspace, sizes
from jaxzip.ffi.format_ops import LANE_PLANAR, TCA_TBE

_BLOCK = 64
# [M, K] reshaped to (row block, tile, r & 1, g, k block, j, r >> 1, t, h) and permuted is in fragment order.
_TO_FRAGMENTS = (0, 4, 1, 5, 3, 7, 6, 2, 8)


def lane_planar_matmul(
    x: jax.Array,
    payload: Payload,
    m: int,
    k: int,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    activation: str | None = None,
    batch_invariant: bool = False,
    config: str = "",
    config_asked_for: bool = False,
) -> jax.Array:
    """x @ W.T + bias + residual for a lane-planar W [M, K], decoded in registers; fp32 sums, one rounding.

    Args:
      x: bfloat16 [N, K].
      payload: `shift`, `blocks` and `overflow` of one weight.
      m: logical rows of the weight.
      k: logical columns of the weight.
      bias: bfloat16 [M].
      residual: bfloat16 [N, M].
      out_dtype: bfloat16 or float32.
      activation: "silu" or "gelu_tanh": the first half of the result is a gate for the second, see
        :mod:`jaxzip.ops.gated_matmul`.
      batch_invariant: a row of the result does not depend on N.
      config: which kernel, and how it splits its work, see :mod:`jaxzip.ffi.cuda_configs`; "": the library chooses.
      config_asked_for: one that does not fit is an error, rather than passed over.

    Returns:
      [N, M] of `out_dtype`, [N, M / 2] of a gated product.
    """
    operands = LANE_PLANAR.operands(payload)
    options = {"activation": activation, "batch_invariant": batch_invariant}
    options |= {"config": config, "config_asked_for": config_asked_for}
    return _matmul(x, operands, m, k, bias, residual, out_dtype, **options, raw=False)


def raw_matmul(x: jax.Array, w: jax.Array, rows_first: bool = False, **options) -> jax.Array:
    """The same kernels over a dense bfloat16 weight, [K, M] or [M, K] (`rows_first`): the control of their exactness.

    XLA first brings the weight into fragment order, so this is as slow as a copy of it. `options` as in
    `lane_planar_matmul`.
    """
    w = w if rows_first else w.T
    return _matmul(x, fragment_blocks(w), *w.shape, raw=True, **options)


def fragment_blocks(w: jax.Array) -> list[jax.Array]:
    """The operands that stand for a dense bfloat16 weight [M, K] in the kernels' raw mode: bits in fragment order."""
    m, k = w.shape
    rows, columns = -(-m // _BLOCK), -(-k // _BLOCK)
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
    bits = jnp.pad(bits, ((0, rows * _BLOCK - m), (0, columns * _BLOCK - k)))
    fragments = bits.reshape(rows, 4, 2, 8, columns, 4, 2, 4, 2).transpose(_TO_FRAGMENTS)
    blocks = jax.lax.bitcast_convert_type(fragments.reshape(rows, columns, _BLOCK * _BLOCK // 2, 2), jnp.uint32)
    return [jnp.zeros(rows * _BLOCK, jnp.int8), blocks, jnp.zeros(0, jnp.uint32)]


def _matmul(x, weight, m, k, bias=None, residual=None, out_dtype=jnp.bfloat16, *, raw, activation=None, **options):
    addends, given = _addends(bias, residual)
    attributes = {"batch_invariant": False, "config": "", "config_asked_for": False} | options | given
    attributes |= {"gated": activation is not None, "gelu_tanh": activation == "gelu_tanh"}
    shape = (x.shape[0], m if activation is None else m // 2)
    return call("jaxzip_lane_planar_gemm", shape, out_dtype, x, *weight, *addends, **sizes(m, k), raw=raw, **attributes)


def _addends(bias, residual):
    """Operands, empty where there is none, and the attributes that say so."""
    none = jnp.zeros(0, jnp.bfloat16)
    given = {"has_bias": bias is not None, "has_residual": residual is not None}
    return [none if bias is None else bias, none if residual is None else residual], given


#: Most rows of x in one launch of the TCA-TBE kernel, and the row blocks that its CTAs may have in part.
_TCA_TBE_ROWS = 256
_TCA_TBE_SHARED_BLOCKS = 512


def tca_tbe_matmul(
    x: jax.Array,
    payload: Payload,
    m: int,
    k: int,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """As `lane_planar_matmul`, for a TCA-TBE payload ."""
    n = x.shape[0]
    columns = min(n, _TCA_TBE_ROWS)
    padded = next((width for width in (8, 16) if columns <= width), -(-columns // 32) * 32)
    workspace = (-(-m // _BLOCK) + _TCA_TBE_SHARED_BLOCKS) * _BLOCK * padded
    results = [jax.ShapeDtypeStruct((n, m), out_dtype), jax.ShapeDtypeStruct((workspace,), jnp.float32)]
    addends, given = _addends(bias, residual)
    operands = TCA_TBE.operands(payload)
    return call_with_workspace("jaxzip_tca_tbe_matmul", results, x, *operands, *addends, **sizes(m, k), **given)
