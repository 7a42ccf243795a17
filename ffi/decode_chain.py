"""The custom call of a decode step's chain of kernels, and which arguments it takes; on CUDA only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxzip.ffi.cuda_ops import fragment_blocks
from jaxzip.ffi.custom_call import call_with_results
from jaxzip.ffi.format_ops import LANE_PLANAR

from jaxzip.ops import registry
from jaxzip.ops.decode_chain import OP, ChainWeights
from jaxzip.tensor import KERNEL_AXIS, CompressedTensor

FORMATS = ("lane-planar", "raw")
ACTIVATIONS = ("silu", "gelu_tanh")
#: Most rows for which the activation is part of its product, where the intermediate size is a multiple of the second.
GATED_ROWS, GATED_STEP = 64, 64
#: Results of the custom call, in their order: what goes from kernel to kernel, then the products of the tail.
RESULTS = ("x1", "h1", "gu", "act", "x2", "h2", "y")
#: Its results behind these where there are norms behind ``o_proj`` and ``down_proj``: the products before the norms.
PRODUCTS_BEHIND = ("o", "d")


def register_decode_chain(check_device, rows: int, priority: int) -> None:
    """Registers the chain: ``check_device`` refuses GPUs, ``rows`` is the most that one fused matmul is good for."""
    check = functools.partial(check_chain, check_device=check_device, rows=rows)
    registry.register(OP, "ffi", _chain, check=check, platforms=("cuda",), priority=priority)


def chain_results(
    attended: jax.Array, residual: jax.Array, weights: ChainWeights, **options: Any
) -> dict[str, jax.Array]:
    """All that the kernels write, by name; ``gu`` is empty where the activation is part of its product.

    Arguments are those of :func:`jaxzip.ops.decode_chain.decode_chain`. Raw weights go through the same kernels, after
    XLA has brought them into fragment order: the control of exactness.

    Raises:
      jax.errors.JaxRuntimeError: at run time, when shapes do not fit each other.
    """
    call = chain_call(residual, weights, **options)
    found = call_with_results(
        "jaxzip_decode_chain", call.results, attended, *call.operands, vmap_method="sequential", **call.attributes
    )
    return dict(zip(call.names, found, strict=True))


class ChainCall(NamedTuple):
    """What the custom calls of a chain have in common, each behind what is its own.

    Attributes:
      names, results: of what the kernels write.
      operands: the residual, the weights and the scales.
      attributes: by name.
    """

    names: tuple[str, ...]
    results: list[jax.ShapeDtypeStruct]
    operands: list[jax.Array]
    attributes: dict[str, np.generic | bool]


def chain_call(
    residual: jax.Array,
    weights: ChainWeights,
    *,
    mlp_eps: float,
    tail_eps: float,
    out_dtype: jnp.dtype,
    o_eps: float = 0.0,
    down_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str = "silu",
    batch_invariant: bool = False,
) -> ChainCall:
    """See the class; arguments are those of :func:`jaxzip.ops.decode_chain.decode_chain`."""
    (n, hidden), intermediate = residual.shape, weights.down_proj.matrix_shape[1]
    gated = n <= GATED_ROWS and intermediate % GATED_STEP == 0
    products = 0 if gated else 2 * intermediate
    shapes = [(n, hidden), (n, hidden), (n, products), (n, intermediate), (n, hidden), (n, hidden)]
    results = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    results.append(jax.ShapeDtypeStruct((n, weights.tail.matrix_shape[0]), out_dtype))
    behind = weights.o_scale is not None
    results += [jax.ShapeDtypeStruct((n, hidden), jnp.bfloat16) for _ in PRODUCTS_BEHIND if behind]
    matrices = [operand for w in weights.matrices for operand in _operands(w)]
    attributes = {
        "intermediate": np.int64(intermediate),
        "mlp_eps": np.float32(mlp_eps),
        "tail_eps": np.float32(tail_eps),
        "o_eps": np.float32(o_eps),
        "down_eps": np.float32(down_eps),
        "norm_offset": np.float32(norm_offset),
        "gelu_tanh": activation == "gelu_tanh",
        "batch_invariant": batch_invariant,
        "raw": weights.tail.format == "raw",
    }
    names = RESULTS + PRODUCTS_BEHIND if behind else RESULTS
    return ChainCall(names, results, [residual, *matrices, *weights.scales], attributes)


def _chain(attended, residual, weights, **options):
    found = chain_results(attended, residual, weights, **options)
    return found["x2"], found["y"]


def _operands(w: CompressedTensor) -> list[jax.Array]:
    if w.format == "raw":
        values = w.payload["values"]
        return fragment_blocks(values if w.raw_transposed else values.T)
    return LANE_PLANAR.operands(w.payload)


def check_chain(
    attended, residual, weights, *, out_dtype, batch_invariant, check_device, rows, activation="silu", **_
) -> None:
    formats = {w.format for w in weights.matrices}
    if len(formats) > 1 or not formats <= set(FORMATS):
        raise NotImplementedError(f"the chain's weights must all be {' or all '.join(FORMATS)}, not {sorted(formats)}")
    if any(w.output_axis != KERNEL_AXIS for w in weights.matrices):
        raise NotImplementedError("the chain contracts along K; a tensor's first axis is its output axis: use w.T")
    arrays = (attended, residual, *weights.matrices, *weights.scales)
    if dtypes := {a.dtype.name for a in arrays} - {"bfloat16"}:
        raise NotImplementedError(f"the chain takes bfloat16, not {sorted(dtypes)}")
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"the chain returns bfloat16 and float32, not {out_dtype}")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"the chain has the activations {' and '.join(ACTIVATIONS)}, not {activation}")
    if attended.shape[0] > rows and not batch_invariant:
        raise NotImplementedError(f"{attended.shape[0]} rows: above {rows}, decoding weights first is faster")
    check_device()
