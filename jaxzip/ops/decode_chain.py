"""``decode_chain``: what a decode step of a Llama-like model computes between one attention and the next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzip.ops import registry
from jaxzip.ops.matmul import matmul
from jaxzip.tensor import CompressedTensor

OP = "decode_chain"


class ChainWeights(NamedTuple):
    """What a chain multiplies with; ``W`` is attention's width, ``D`` the model's, ``F`` the intermediate one.

    Attributes:
      o_proj: ``[W, D]``.
      gate_up_proj: ``[D, 2 F]``, columns of the gate first.
      down_proj: ``[F, D]``.
      tail: ``[D, M]``: the next layer's projection of queries, keys and values, or the head.
      mlp_scale, tail_scale: ``[D]``, of the norms before ``gate_up_proj`` and ``tail``.
    """

    o_proj: CompressedTensor
    gate_up_proj: CompressedTensor
    down_proj: CompressedTensor
    tail: CompressedTensor
    mlp_scale: jax.Array
    tail_scale: jax.Array

    @property
    def matrices(self) -> tuple[CompressedTensor, ...]:
        return self[:4]


def decode_chain(
    attended: jax.Array,
    residual: jax.Array,
    weights: ChainWeights,
    *,
    mlp_eps: float,
    tail_eps: float,
    out_dtype: jax.typing.DTypeLike,
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rest of a layer, and the next one's first product.

    ``x1 = attended @ o_proj + residual``; ``x2 = x1 + swiglu(norm(x1) @ gate_up_proj) @ down_proj``;
    ``y = norm(x2) @ tail``. Each step is computed in fp32 and rounded once. Not differentiable by its CUDA
    implementation, which launches all kernels at once so that each starts while the one before ends.

    Args:
      attended: bfloat16 ``[N, W]``, attention's output.
      residual: bfloat16 ``[N, D]``.
      weights: see the class; all of one format.
      mlp_eps, tail_eps: of the norms.
      out_dtype: of ``y``: bfloat16 or float32.
      batch_invariant, implementation: as in :func:`jaxzip.matmul`.

    Returns:
      ``x2[N, D]`` and ``y[N, M]``.

    Raises:
      ValueError, NotImplementedError: as :func:`jaxzip.matmul`.
    """
    options = {"mlp_eps": mlp_eps, "tail_eps": tail_eps, "out_dtype": jnp.dtype(out_dtype)}
    options["batch_invariant"] = bool(batch_invariant)
    with jax.named_scope("jaxzip.decode_chain"):
        return registry.run(OP, implementation, attended, residual, weights, **options)


def available(attended: jax.Array, residual: jax.Array, weights: ChainWeights, **options) -> bool:
    """Whether a GPU would run the chain as one, given the arguments of :func:`decode_chain`."""
    return registry.candidates(OP, "cuda", attended, residual, weights, **options)[0] != registry.XLA


def _one_by_one(attended, residual, weights, *, mlp_eps, tail_eps, out_dtype, batch_invariant):
    """The reference, a product at a time."""

    def norm(x, scale, eps):
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return (wide * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)

    def product(x, w, **options):
        return matmul(x, w, batch_invariant=batch_invariant, **options)

    x1 = product(attended, weights.o_proj, residual=residual)
    gate_up = product(norm(x1, weights.mlp_scale, mlp_eps), weights.gate_up_proj)
    gate, up = (part.astype(jnp.float32) for part in jnp.split(gate_up, 2, axis=-1))
    x2 = product((jax.nn.silu(gate) * up).astype(x1.dtype), weights.down_proj, residual=x1)
    return x2, product(norm(x2, weights.tail_scale, tail_eps), weights.tail, out_dtype=out_dtype)


registry.register(OP, registry.XLA, _one_by_one)
