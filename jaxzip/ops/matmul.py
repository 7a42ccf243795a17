"""``matmul``: activations times a compressed weight."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxzip.ops import explicit_axes, measured, registry
from jaxzip.ops.decompress import decompress
from jaxzip.ops.manual_axes import varying_alike
from jaxzip.tensor import CompressedTensor

ACTIVATION_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def matmul(
    x: jax.Array,
    w: CompressedTensor | jax.Array,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    batch_invariant: bool = False,
    implementation: str | None = None,
    config: str | None = None,
) -> jax.Array:
    """``x[..., K] @ w[K, M] + bias + residual`` with fp32 accumulation and one rounding to ``out_dtype``.

    Fused kernels exist for bf16 weights. Others (fp16, fp32, fp8) are decoded whole, then XLA multiplies: the result is
    that of the dense weight, its memory and time those of a dense copy on top.

    Fused implementations decode ``w`` in registers and never hold it whole. Their order of accumulation is fixed: the
    same bits from run to run, and the same bits for a ``raw`` tensor as for any other format. Differentiable in ``x``,
    ``bias`` and ``residual`` (``w`` is frozen: its cotangent is zero). Jittable; a stack of weights goes through
    ``jax.vmap`` or ``jax.lax.scan``.

    Args:
      x: bf16, fp16 or fp32 ``[..., K]``.
      w: compressed ``[K, M]``, or a dense array of that shape, which XLA multiplies.
      bias: ``[M]``, added in fp32 before the rounding.
      residual: ``[..., M]``, added in fp32 after the bias.
      out_dtype: dtype of the result; default: the one that ``x`` and ``w`` promote to; ``x``'s for an fp8 weight.
      batch_invariant: a row of the result must not depend on how many other rows ``x`` has. On a GPU that fixes one
        configuration for all of them, which costs speed; XLA's own dot cannot promise it.
      implementation: ``"ffi"`` or ``"pallas"`` (fused), ``"decompress"`` (the best decode, then XLA's dot), ``"xla"``
        (plain XLA throughout), or ``None``: what :func:`jaxzip.tuning.tune` measured to be the fastest for this
        shape on this kind of device, else the best one by rule.
      config: how the implementation named splits its work on a GPU, in its own words: one that
        :func:`jaxzip.tuning.configurations` lists. ``None``: the one that was measured to be its fastest, else its own
        choice. Each has an order of accumulation of its own. A batch invariant product has just one.

    Returns:
      ``[..., M]``.

    Raises:
      TypeError: ``x``, ``bias`` or ``residual`` is not a floating-point array, or ``w`` is neither compressed nor an
        array.
      ValueError: shapes do not match, no such implementation, or it has no such configuration for these shapes.
      NotImplementedError: the implementation asked for cannot take these arguments; the message says why.
    """
    x = checked_activations("matmul", x, w)
    if w.ndim != 2:
        raise ValueError(f"matmul: w has shape {w.shape}, expected a matrix [K, M]; map a stack with jax.vmap")
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x has shape {x.shape}, its last dimension must be K={w.shape[0]} of w {w.shape}")
    out_dtype = jnp.dtype(_common_dtype(x.dtype, w.dtype) if out_dtype is None else out_dtype)
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise TypeError(f"matmul: out_dtype is {out_dtype}, expected a floating-point dtype")
    _check_addend("bias", bias, (w.shape[1],))
    _check_addend("residual", residual, (*x.shape[:-1], w.shape[1]))
    if config is not None and implementation is None:
        raise ValueError(
            f"matmul: config is {config!r}, but each implementation has configurations of its own: name it as well, "
            'such as implementation="ffi"'
        )
    return _matmul(x, w, bias, residual, out_dtype, bool(batch_invariant), implementation, config, measured.epoch())


def checked_activations(op: str, x, w) -> jax.Array:
    """``x`` as an array, if operation ``op`` can multiply it by ``w``; else TypeError. Shapes are not looked at."""
    if isinstance(x, CompressedTensor):
        raise TypeError(f"{op}: x is a CompressedTensor; the weight comes second, and one of the two must be dense")
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        x = jnp.asarray(x)
    if not isinstance(w, CompressedTensor) and not isinstance(w, jax.Array | np.ndarray):
        advice = "; a CompressedKernel is multiplied by jaxzip.einsum" if hasattr(w, "__jax_array__") else ""
        raise TypeError(f"{op}: w must be a CompressedTensor or an array, got {type(w).__name__}{advice}")
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected bfloat16, float16 or float32; cast it first")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{op}: w has dtype {w.dtype}, expected a floating-point weight")
    return x


def _check_addend(name, value, shape):
    if value is None:
        return
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"matmul: {name} must be a floating-point array, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if tuple(value.shape) != shape:
        raise ValueError(f"matmul: {name} has shape {tuple(value.shape)}, expected {shape}")


# `epoch` only tells traces apart: another table of measurements may choose another implementation or configuration.
@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7, 8))
def _matmul(x, w, bias, residual, out_dtype, batch_invariant, implementation, config, epoch):
    with jax.named_scope("jaxzip.matmul"):
        if not isinstance(w, CompressedTensor):
            if implementation not in (None, registry.XLA):
                raise NotImplementedError(
                    f"matmul: {implementation} multiplies compressed weights; this one is dense: compress it with "
                    'format="raw" to send it through the same kernel'
                )
            _check_not_invariant(batch_invariant)
            check_no_config("XLA's dot", config)
            return finish(_dot(x, w, jnp.float32), bias, residual, out_dtype)
        product = functools.partial(_matmul_rows, out_dtype, batch_invariant, implementation, config)
        rows = P(*explicit_axes.split_of(x)[:-1])
        return explicit_axes.run(product, (x, w, bias, residual), (rows, P(), P(), rows), rows)


def _matmul_rows(out_dtype, batch_invariant, implementation, config, x, w, bias, residual):
    leading = x.shape[:-1]
    rows = math.prod(leading)
    if residual is not None:
        residual = residual.reshape(rows, w.shape[1])
    operands = varying_alike((x.reshape(rows, x.shape[-1]), w, bias, residual))
    y = _matmul_2d(out_dtype, batch_invariant, implementation, config, *operands)
    return y.reshape(*leading, w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul_2d(out_dtype, batch_invariant, implementation, config, x, w, bias, residual):
    options = {"out_dtype": out_dtype, "batch_invariant": batch_invariant, "config": config}
    return registry.run("matmul", implementation, x, w, bias, residual, **options)


def _matmul_2d_fwd(out_dtype, batch_invariant, implementation, config, x, w, bias, residual):
    # Of x, bias and residual only the dtypes are needed: empty arrays carry them through the trace.
    like = [None if a is None else jnp.zeros((0,), a.dtype) for a in (x, bias, residual)]
    return _matmul_2d(out_dtype, batch_invariant, implementation, config, x, w, bias, residual), (like, w)


def _matmul_2d_bwd(out_dtype, batch_invariant, implementation, config, residuals, g):
    (x, bias, residual), w = residuals
    dense = decompress(w, implementation=registry.XLA if implementation == registry.XLA else None)
    to_bias = None if bias is None else g.astype(jnp.float32).sum(0).astype(bias.dtype)
    to_residual = None if residual is None else g.astype(residual.dtype)
    return _dot(g, dense.T, x.dtype), None, to_bias, to_residual


_matmul_2d.defvjp(_matmul_2d_fwd, _matmul_2d_bwd)


def _common_dtype(x_dtype, w_dtype):
    """What a product is made in; JAX promotes fp8 to nothing, but each of the activations' dtypes holds it exactly."""
    return x_dtype if jnp.dtype(w_dtype).itemsize == 1 else jnp.promote_types(x_dtype, w_dtype)


def _dot(x, w, out_dtype, sums=jnp.float32):
    common = _common_dtype(x.dtype, w.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x.astype(common), w.astype(common), dims, preferred_element_type=sums)
    return y.astype(out_dtype)


def finish(y: jax.Array, bias: jax.Array | None, residual: jax.Array | None, out_dtype) -> jax.Array:
    """The epilogue where a kernel has none: fp32 sums ``[..., M]`` plus bias plus residual, rounded once."""
    if bias is not None:
        with jax.numpy_rank_promotion("allow"):
            y = y + bias.astype(jnp.float32)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def _check_not_invariant(batch_invariant: bool) -> None:
    if batch_invariant:
        raise NotImplementedError("XLA chooses a dot's order of accumulation by its shape: not batch invariant")


def check_no_config(what: str, config: str | None) -> None:
    """Raises NotImplementedError if a configuration is asked of what has none."""
    if config is not None:
        raise NotImplementedError(f"{what} has no configurations to choose from; config is {config!r}")


def _check_xla(x, w, bias, residual, *, out_dtype, batch_invariant, config=None) -> None:
    _check_not_invariant(batch_invariant)
    check_no_config("XLA's dot", config)


def matmul_xla(x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None) -> jax.Array:
    """The reference: XLA's decode to a dense array, then XLA's dot.

    The weight's bits are exact; the order of accumulation is XLA's, which may choose it by what surrounds the dot.
    """
    return finish(_dot(x, decompress(w, implementation=registry.XLA), jnp.float32), bias, residual, out_dtype)


def matmul_decompressed(
    x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None
) -> jax.Array:
    """The best decode that is there, then XLA's dot: where there is no fused kernel."""
    return finish(_dot(x, decompress(w), jnp.float32), bias, residual, out_dtype)


def matmul_decompressed_rounding(
    x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None
) -> jax.Array:
    """The same on a GPU, whose dots round their fp32 sums themselves: fp32 results would be written and read again."""
    if bias is not None or residual is not None:
        return matmul_decompressed(x, w, bias, residual, out_dtype=out_dtype, batch_invariant=batch_invariant)
    # A dot's result is never narrower than its operands; fp8 is rounded from fp32.
    common = _common_dtype(x.dtype, w.dtype)
    sums = jnp.float32 if out_dtype.itemsize == 1 else jnp.promote_types(out_dtype, common)
    return _dot(x, decompress(w), out_dtype, sums=sums)


registry.register("matmul", registry.XLA, matmul_xla, check=_check_xla)
registry.register("matmul", "decompress", matmul_decompressed, check=_check_xla, priority=1)
registry.register(
    "matmul", "decompress", matmul_decompressed_rounding, check=_check_xla, platforms=("cuda",), priority=2
)


def _measured_us(platform: str, x, w: CompressedTensor, bias, residual, *, out_dtype, batch_invariant, config=None):
    """What implementations were measured to take; batch invariance is not a matter of speed."""
    kind = None if batch_invariant else _measured_kind(platform, x)
    return kind and measured.times(kind, w.format, *w.matrix_shape, x.shape[0])


def measured_config(implementation: str, platform: str, x, w: CompressedTensor, *, format: str) -> str | None:
    """The configuration of this implementation that was measured to be the fastest; ``None``: its own choice.

    Of ``format``, rather than the tensor's: raw weights, the control of exactness, take what that format does.
    """
    kind = _measured_kind(platform, x)
    return kind and measured.config(kind, format, *w.matrix_shape, x.shape[0], implementation)


def _measured_kind(platform: str, x) -> str | None:
    """The kind of device whose measurements tell about ``x [N, K]``, which must be bfloat16."""
    return measured.device_kind(platform) if x.dtype == jnp.bfloat16 and x.shape[0] > 0 else None


registry.choose_by("matmul", _measured_us)
