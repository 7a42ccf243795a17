"""Users' models as they are found in public Flax projects, written for the tests: jaxzip is not mentioned in them.

``NnxDecoder``: NNX, attention by LinearGeneral with kernels (D, N, H) and (N, H, D), a gated MLP, a tied head.
``LinenDecoder``: Linen, attention by a module of its own that has one einsum parameter ``w`` of shape (N, D, H) or
(2, K, D, H), layers in a Python loop or in ``nn.scan``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

BF16 = jnp.bfloat16
VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 128, 64, 4, 2, 32, 128, 2


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """``q[B, T, N, H]``, ``k`` and ``v`` ``[B, T, K, H]`` to ``[B, T, N, H]``; N is a multiple of K."""
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    t = jnp.arange(q.shape[1])
    scores = jnp.where(t[:, None] >= t[None, :], scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


class NnxAttention(nnx.Module):
    def __init__(self, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": BF16, "rngs": rngs}
        self.query = nnx.LinearGeneral(DIM, (HEADS, HEAD_DIM), **options)
        self.key = nnx.LinearGeneral(DIM, (KV_HEADS, HEAD_DIM), **options)
        self.value = nnx.LinearGeneral(DIM, (KV_HEADS, HEAD_DIM), **options)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), DIM, axis=(-2, -1), use_bias=False, **options)

    def __call__(self, x):
        return self.out(causal_attention(self.query(x), self.key(x), self.value(x)))


class NnxMlp(nnx.Module):
    def __init__(self, *, dtype, rngs: nnx.Rngs):
        options = {"dtype": dtype, "param_dtype": BF16, "rngs": rngs}
        self.gate = nnx.Linear(DIM, HIDDEN, use_bias=False, **options)
        self.up = nnx.Linear(DIM, HIDDEN, use_bias=False, **options)
        self.down = nnx.Einsum("btf,fd->btd", (HIDDEN, DIM), (DIM,), **options)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class NnxLayer(nnx.Module):
    def __init__(self, *, dtype, rngs: nnx.Rngs):
        self.attention = NnxAttention(dtype=dtype, rngs=rngs)
        self.mlp = NnxMlp(dtype=dtype, rngs=rngs)
        self.norm1 = nnx.RMSNorm(DIM, rngs=rngs)
        self.norm2 = nnx.RMSNorm(DIM, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x)).astype(x.dtype)
        return x + self.mlp(self.norm2(x)).astype(x.dtype)


class NnxDecoder(nnx.Module):
    """int ids ``[B, T]`` to logits ``[B, T, VOCAB]``; ``dtype`` is the one that layers compute in."""

    def __init__(self, *, dtype=BF16, rngs: nnx.Rngs):
        self.embedder = nnx.Embed(VOCAB, DIM, dtype=dtype, param_dtype=BF16, rngs=rngs)
        self.layers = nnx.List([NnxLayer(dtype=dtype, rngs=rngs) for _ in range(LAYERS)])
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, ids):
        x = self.embedder(ids)
        for layer in self.layers:
            x = self.dropout(layer(x))
        return self.embedder.attend(x)


class LinenEinsum(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.05, BF16), self.shape)
        return jnp.einsum(equation, x, w)


class LinenAttention(nn.Module):
    einsum: type[nn.Module]

    def setup(self):
        self.q_einsum = self.einsum((HEADS, DIM, HEAD_DIM))
        self.kv_einsum = self.einsum((2, KV_HEADS, DIM, HEAD_DIM))
        self.attn_vec_einsum = self.einsum((HEADS, HEAD_DIM, DIM))

    def __call__(self, x):
        q = self.q_einsum("BTD,NDH->BTNH", x)
        k, v = self.kv_einsum("BSD,CKDH->CBSKH", x)
        return self.attn_vec_einsum("BTNH,NHD->BTD", causal_attention(q, k, v))


class LinenLayer(nn.Module):
    einsum: type[nn.Module]

    @nn.compact
    def __call__(self, x, _=None):
        options = {"dtype": BF16, "param_dtype": BF16}
        x = x + LinenAttention(self.einsum, name="attn")(nn.RMSNorm(name="norm1", **options)(x))
        y = nn.RMSNorm(name="norm2", **options)(x)
        y = nn.gelu(nn.DenseGeneral((2, HIDDEN // 2), name="up", **options)(y))
        y = nn.DenseGeneral(DIM, axis=(-2, -1), name="down", **options)(y)
        y = nn.Einsum((DIM, DIM), "...d,de->...e", name="mix", **options)(y)
        return x + nn.Dense(DIM, name="out", **options)(y), None


class LinenDecoder(nn.Module):
    """int ids ``[B, T]`` to logits ``[B, T, VOCAB]``; ``einsum`` is the attention's module."""

    einsum: type[nn.Module] = LinenEinsum
    scan: bool = False

    @nn.compact
    def __call__(self, ids):
        embedder = nn.Embed(VOCAB, DIM, dtype=BF16, param_dtype=BF16, name="embedder")
        x = embedder(ids)
        if self.scan:
            stack = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack(self.einsum, name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = LinenLayer(self.einsum, name=f"layer_{i}")(x)
        return embedder.attend(x)
