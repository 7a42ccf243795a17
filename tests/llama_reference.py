"""Llama in NumPy fp64, one sequence at a time and without a cache: what the models' tests compare with.

Written from the papers and shares no code with ``jaxzip.models``.
"""

import math

import numpy as np


def frequencies(config) -> np.ndarray:
    """RoPE angles per position, pair by pair, with Llama 3.1's scaling as its authors describe it."""
    out = []
    for i in range(config.head_dim // 2):
        freq = 1.0 / config.rope_theta ** (2 * i / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            wavelength = 2 * math.pi / freq
            longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
            shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
            if wavelength > longest:
                freq = freq / scaling.factor
            elif wavelength >= shortest:
                smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                freq = (1 - smooth) * freq / scaling.factor + smooth * freq
        out.append(freq)
    return np.array(out)


def logits(config, params, tokens) -> np.ndarray:
    """fp64 ``[S, vocab_size]`` for a list of tokens."""
    embedding = np.asarray(params["embedder"]["embedding"], np.float64)
    x = embedding[list(tokens)]
    for i in range(config.num_layers):
        layer = params["layers"][str(i)]
        x = x + _attention(config, layer["attn"], _norm(config, x, layer["input_norm"]))
        x = x + _mlp(layer["mlp"], _norm(config, x, layer["post_attn_norm"]))
    x = _norm(config, x, params["final_norm"])
    return x @ embedding.T if config.tie_word_embeddings else _linear(params["lm_head"], x)


def greedy(config, params, prompt, count) -> list[int]:
    """The next ``count`` most likely tokens, each from a forward pass over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits(config, params, tokens)[-1])))
    return tokens[len(prompt) :]


def _linear(layer, x):
    return x @ np.asarray(layer["kernel"], np.float64)


def _norm(config, x, layer):
    rms = np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
    return x / rms * np.asarray(layer["scale"], np.float64)


def _mlp(layer, x):
    gate = _linear(layer["gate_proj"], x)
    return _linear(layer["down_proj"], gate / (1 + np.exp(-gate)) * _linear(layer["up_proj"], x))


def _attention(config, layer, x):
    q, k, v = (_linear(layer[name], x) for name in ("q_proj", "k_proj", "v_proj"))
    size, group, out = config.head_dim, config.num_heads // config.num_kv_heads, []
    for head in range(config.num_heads):
        kv = slice(head // group * size, (head // group + 1) * size)
        qh, kh = (_rope(config, a) for a in (q[:, head * size : (head + 1) * size], k[:, kv]))
        scores = qh @ kh.T / math.sqrt(size)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(weights / weights.sum(-1, keepdims=True) @ v[:, kv])
    return _linear(layer["o_proj"], np.concatenate(out, -1))


def _rope(config, x):
    half = config.head_dim // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), frequencies(config)))
    return np.concatenate([turned.real, turned.imag], -1)
