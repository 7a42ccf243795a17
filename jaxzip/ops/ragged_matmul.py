"""``ragged_matmul``: rows grouped by expert, each group times its own matrix of a compressed stack."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxzip.ops import explicit_axes, registry
from jaxzip.ops.decompress import decompress
from jaxzip.ops.manual_axes import varying, varying_alike, varying_over
from jaxzip.ops.matmul import checked_activations
from jaxzip.tensor import CompressedTensor

#: Rows of one group that the reference multiplies at a time.
_TILE_ROWS = 64


def ragged_matmul(
    x: jax.Array,
    w: CompressedTensor | jax.Array,
    group_sizes: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """``x[i] @ w[group of i]``: ``jax.lax.ragged_dot`` with a compressed right side, for mixtures of experts.

    The first ``group_sizes[0]`` rows of ``x`` are multiplied by ``w[0]``, the next ``group_sizes[1]`` by ``w[1]``, and
    so on; rows past the sum of ``group_sizes`` give zeros. Sums are fp32 and rounded once.

    Fused kernels (``"ffi"``) read and decode only the experts that have rows, and never hold a decoded weight whole. A
    row's bits depend on its values and on its expert alone: not on the other rows, on their number, or on how they are
    routed. On a GPU they are for decoding, up to 64 rows a group on average. For more, ``"decompress"`` is faster:
    it decodes the whole stack, then ``jax.lax.ragged_dot`` multiplies. That sums in XLA's order, and may multiply all
    rows by all experts, zeros in place of the rows of others: a NaN or infinity in one expert can then reach every row.

    Differentiable in ``x`` (a compressed ``w`` is frozen). Jittable; ``jax.vmap`` runs its elements one after another.

    Args:
      x: bf16, fp16 or fp32 ``[N, K]``, sorted by group.
      w: compressed ``[E, K, M]`` (``jaxzip.compress`` of such a stack), or a dense array of that shape, which
        ``jax.lax.ragged_dot`` multiplies.
      group_sizes: integers ``[E]``, none negative, their sum at most ``N``. Values are not checked: others give
        unspecified results, but touch no memory outside the operands.
      out_dtype: dtype of the result; default: the one that ``x`` and ``w`` promote to; ``x``'s for an fp8 weight.
      implementation: ``"ffi"`` (fused), ``"decompress"``, ``"xla"`` (plain XLA, an expert at a time), or ``None`` for
        the best one that takes these arguments.

    Returns:
      ``[N, M]``.

    Raises:
      TypeError: ``x`` is no floating-point array, ``group_sizes`` are not integers, or ``w`` is neither compressed nor
        an array.
      ValueError: shapes do not match, or no such implementation.
      NotImplementedError: the implementation asked for cannot take these arguments; the message says why.
    """
    x = checked_activations("ragged_matmul", x, w)
    group_sizes = jnp.asarray(group_sizes)
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"ragged_matmul: group_sizes have dtype {group_sizes.dtype}, expected integers")
    if w.ndim != 3:
        raise ValueError(f"ragged_matmul: w has shape {w.shape}, expected a stack of experts [E, K, M]")
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"ragged_matmul: x has shape {x.shape}, expected [N, K={w.shape[1]}] for w {w.shape}")
    if group_sizes.shape != (w.shape[0],):
        raise ValueError(
            f"ragged_matmul: group_sizes have shape {group_sizes.shape}, expected one size for each of the "
            f"{w.shape[0]} experts of w {w.shape}"
        )
    out_dtype = jnp.dtype(_product_dtype(x, w) if out_dtype is None else out_dtype)
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise TypeError(f"ragged_matmul: out_dtype is {out_dtype}, expected a floating-point dtype")
    return _ragged_matmul(x, w, group_sizes.astype(jnp.int32), out_dtype, implementation)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _ragged_matmul(x, w, group_sizes, out_dtype, implementation):
    with jax.named_scope("jaxzip.ragged_matmul"):
        # A group's rows may be on several devices: each computes all rows, and keeps its own.
        rows = P(explicit_axes.split_of(x)[0])
        product = functools.partial(_grouped, out_dtype, implementation)
        return explicit_axes.run(product, (x, w, group_sizes), (P(), P(), P()), rows)


def _grouped(out_dtype, implementation, x, w, group_sizes):
    if isinstance(w, CompressedTensor):
        return _compressed(out_dtype, implementation, *varying_alike((x, w, group_sizes)))
    if implementation not in (None, registry.XLA):
        raise NotImplementedError(
            f"ragged_matmul: {implementation} multiplies compressed weights; these are dense: compress them with "
            'format="raw" to send them through the same kernel'
        )
    return _ragged_dot(x, w, group_sizes, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _compressed(out_dtype, implementation, x, w, group_sizes):
    run = functools.partial(registry.run, "ragged_matmul", implementation, out_dtype=out_dtype)
    return jax.custom_batching.sequential_vmap(run)(x, w, group_sizes)


def _compressed_fwd(out_dtype, implementation, x, w, group_sizes):
    # Of x only the dtype is needed: an empty array carries it through the trace.
    return _compressed(out_dtype, implementation, x, w, group_sizes), (jnp.zeros((0,), x.dtype), w, group_sizes)


def _compressed_bwd(out_dtype, implementation, residuals, g):
    x, w, group_sizes = residuals
    decode = functools.partial(decompress, implementation=registry.XLA if implementation == registry.XLA else None)
    to_x = functools.partial(_by_expert, out_dtype=x.dtype, decode=lambda expert: decode(expert).T, columns=w.shape[1])
    return jax.custom_batching.sequential_vmap(to_x)(g, w, group_sizes), None, None


_compressed.defvjp(_compressed_fwd, _compressed_bwd)


def _product_dtype(x, w):
    """What a product is made in; JAX promotes fp8 to nothing, but each of the activations' dtypes holds it exactly."""
    return x.dtype if jnp.dtype(w.dtype).itemsize == 1 else jnp.promote_types(x.dtype, w.dtype)


def _ragged_dot(x, w, group_sizes, out_dtype):
    common = _product_dtype(x, w)
    y = jax.lax.ragged_dot(x.astype(common), w.astype(common), group_sizes, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)


def _by_expert(x, w: CompressedTensor, group_sizes, *, out_dtype, decode, columns: int) -> jax.Array:
    """Decodes one expert after the other, if it has rows, and multiplies these, some at a time.

    ``jax.lax.ragged_dot`` may multiply all rows by all experts (on the CPU, after copying the rows for each of them),
    zeros in place of the rows of others: a NaN or infinity in any expert would reach all of them.
    """
    rows = x.shape[0]
    tile = min(rows, _TILE_ROWS)
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), rows)
    begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])

    def multiply(expert, begin, end, y):
        dense = decode(expert)
        common = _product_dtype(x, dense)
        dense = dense.astype(common)

        def step(state):
            row, y = state
            some = jax.lax.dynamic_slice_in_dim(padded, row, tile).astype(common)
            products = jnp.dot(some, dense, preferred_element_type=jnp.float32).astype(out_dtype)
            others = jax.lax.dynamic_slice_in_dim(y, row, tile)
            mine = row + jnp.arange(tile)[:, None] < end
            y = jax.lax.dynamic_update_slice_in_dim(y, jnp.where(mine, products, others), row, 0)
            return row + tile, y

        return jax.lax.while_loop(lambda state: state[0] < end, step, (begin, y))[1]

    def expert_step(y, of_expert):
        expert, begin, end = of_expert
        return jax.lax.cond(begin < end, multiply, lambda *operands: operands[-1], expert, begin, end, y), None

    y = varying_over(varying(x), jnp.zeros((rows + tile, columns), out_dtype))
    return jax.lax.scan(expert_step, y, (w, begins, ends))[0][:rows]


def ragged_matmul_xla(x, w: CompressedTensor, group_sizes, *, out_dtype) -> jax.Array:
    """The reference: XLA's decode of each expert that has rows, then XLA's dot."""
    decode = functools.partial(decompress, implementation=registry.XLA)
    return _by_expert(x, w, group_sizes, out_dtype=out_dtype, decode=decode, columns=w.shape[2])


def ragged_matmul_decompressed(x, w: CompressedTensor, group_sizes, *, out_dtype) -> jax.Array:
    """The best decode of the whole stack, then ``jax.lax.ragged_dot``: for many rows on a GPU."""
    return _ragged_dot(x, decompress(w), group_sizes, out_dtype)


registry.register("ragged_matmul", registry.XLA, ragged_matmul_xla)
registry.register("ragged_matmul", "decompress", ragged_matmul_decompressed, priority=-1)
registry.register("ragged_matmul", "decompress", ragged_matmul_decompressed, platforms=("cuda",), priority=1)
