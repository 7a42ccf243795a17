"""``decode_chain``: what a decode step of a Llama- or Gemma-like model computes between one attention and the next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzip.ops import registry
from jaxzip.ops.activations import ACTIVATIONS, gated
from jaxzip.ops.matmul import matmul
from jaxzip.ops.rows import rms_normed
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
      o_scale, down_scale: ``[D]``, of the norms behind ``o_proj`` and ``down_proj``, or ``None``: there are none.
    """

    o_proj: CompressedTensor
    gate_up_proj: CompressedTensor
    down_proj: CompressedTensor
    tail: CompressedTensor
    mlp_scale: jax.Array
    tail_scale: jax.Array
    o_scale: jax.Array | None = None
    down_scale: jax.Array | None = None

    @property
    def matrices(self) -> tuple[CompressedTensor, ...]:
        return self[:4]

    @property
    def scales(self) -> tuple[jax.Array, ...]:
        """Those that there are: two or four."""
        return tuple(scale for scale in self[4:] if scale is not None)


def decode_chain(
    attended: jax.Array,
    residual: jax.Array,
    weights: ChainWeights,
    *,
    mlp_eps: float,
    tail_eps: float,
    out_dtype: jax.typing.DTypeLike,
    o_eps: float = 0.0,
    down_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str = "silu",
    batch_invariant: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rest of a layer, and the next one's first product.

    ``x1 = attended @ o_proj + residual``; ``x2 = x1 + gated(norm(x1) @ gate_up_proj) @ down_proj``;
    ``y = norm(x2) @ tail``. Where there are norms behind ``o_proj`` and ``down_proj``, these products go through them
    before they are added. Each step is computed in fp32 and rounded once. Not differentiable by its CUDA
    implementation, which launches all kernels at once so that each starts while the one before ends.

    Args:
      attended: bfloat16 ``[N, W]``, attention's output.
      residual: bfloat16 ``[N, D]``.
      weights: see the class; all of one format.
      mlp_eps, tail_eps, o_eps, down_eps: of the norms; the last two count where ``weights`` has their scales.
      out_dtype: of ``y``: bfloat16 or float32.
      norm_offset: added to the scales of all norms.
      activation: of the gate: ``"silu"`` or ``"gelu_tanh"``.
      batch_invariant, implementation: as in :func:`jaxzip.matmul`.

    Returns:
      ``x2[N, D]`` and ``y[N, M]``.

    Raises:
      ValueError: only one of ``o_scale`` and ``down_scale`` is there, or ``activation`` is not known; also as
        :func:`jaxzip.matmul`.
      NotImplementedError: as :func:`jaxzip.matmul`.
    """
    check_chain(OP, weights, activation)
    options = {"mlp_eps": mlp_eps, "tail_eps": tail_eps, "o_eps": o_eps, "down_eps": down_eps}
    options |= {"out_dtype": jnp.dtype(out_dtype), "norm_offset": norm_offset, "activation": activation}
    options["batch_invariant"] = bool(batch_invariant)
    with jax.named_scope("jaxzip.decode_chain"):
        return registry.run(OP, implementation, attended, residual, weights, **options)


def available(attended: jax.Array, residual: jax.Array, weights: ChainWeights, **options) -> bool:
    """Whether a GPU would run the chain as one, given the arguments of :func:`decode_chain`."""
    return registry.candidates(OP, "cuda", attended, residual, weights, **options)[0] != registry.XLA


def check_chain(op: str, weights: ChainWeights, activation: str) -> None:
    """What :func:`decode_chain` raises before it runs, for operation ``op``."""
    if len(weights.scales) == 3:
        there, missing = ("o", "down") if weights.down_scale is None else ("down", "o")
        raise ValueError(f"{op}: there is a {there}_scale and no {missing}_scale; pass both or neither")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")


def _one_by_one(
    attended, residual, weights, *, mlp_eps, tail_eps, o_eps, down_eps, out_dtype, norm_offset, activation,
    batch_invariant,
):  # fmt: skip
    """The reference, a product at a time."""

    def norm(x, scale, eps):
        return rms_normed(x, scale, eps, norm_offset)

    def product(x, w, **options):
        return matmul(x, w, batch_invariant=batch_invariant, **options)

    def add(x, w, scale, eps, residual):
        return product(x, w, residual=residual) if scale is None else residual + norm(product(x, w), scale, eps)

    x1 = add(attended, weights.o_proj, weights.o_scale, o_eps, residual)
    gate_up = product(norm(x1, weights.mlp_scale, mlp_eps), weights.gate_up_proj)
    act = gated(*jnp.split(gate_up, 2, axis=-1), activation)
    x2 = add(act, weights.down_proj, weights.down_scale, down_eps, x1)
    return x2, product(norm(x2, weights.tail_scale, tail_eps), weights.tail, out_dtype=out_dtype)


registry.register(OP, registry.XLA, _one_by_one)
