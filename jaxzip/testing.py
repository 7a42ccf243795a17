"""Weights for tests and benchmarks: seeded, with the outliers that real tensors have, and every special bit pattern."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)


def gaussian_weights(
    shape: tuple[int, ...], *, sigma: float = 0.02, zeros: float = 0.0005, seed: int = 0
) -> np.ndarray:
    """bf16 Gaussian weights of deviation ``sigma``, a share ``zeros`` of which is exactly zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape, np.float32)
    w *= sigma
    w[rng.random(shape, np.float32) < zeros] = 0
    return w.astype(BF16)


def bimodal_weights(shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """bf16 weights of two scales, 2^-20 apart: no window of exponents covers both."""
    w = gaussian_weights(shape, seed=seed).astype(np.float32)
    w[np.random.default_rng(seed + 1).random(shape) < 0.4] *= 2.0**-20
    return w.astype(BF16)


def all_bit_patterns(shape: tuple[int, int] = (256, 256), *, seed: int = 0) -> np.ndarray:
    """Each of the 65,536 bf16 bit patterns (NaN payloads, infinities, zeros, subnormals) once, shuffled."""
    bits = np.random.default_rng(seed).permutation(1 << 16).astype(np.uint16)
    return bits.reshape(shape).view(BF16)


def bits(array) -> np.ndarray:
    """The unsigned integer view of an array: what bit-for-bit comparisons compare."""
    array = np.asarray(array)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))
