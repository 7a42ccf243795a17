"""The weights that every format and every implementation is tested on, by name."""

import numpy as np

from jaxzip.testing import BF16, all_bit_patterns, bimodal_weights, gaussian_weights

RAGGED_SHAPES = ((1, 1), (3, 5), (1, 64), (17, 130), (64, 64), (65, 63), (200, 77), (128, 192))


#: Of matrices that are there for their values: one shape, so that they share what is compiled for it.
SHAPE = (70, 66)


def constant(value: int) -> np.ndarray:
    return np.full(SHAPE, value, np.uint16).view(BF16)


def named_weights() -> dict[str, np.ndarray]:
    """Logical ``[K, M]`` matrices: ordinary ones and the worst a checkpoint can hold."""
    named = {f"gaussian {k}x{m}": gaussian_weights((k, m), seed=k) for k, m in RAGGED_SHAPES}
    rng = np.random.default_rng(7)
    return named | {
        "all bit patterns": all_bit_patterns(),
        "bimodal": bimodal_weights(SHAPE),
        "all zeros": constant(0),
        "all negative zeros": constant(0x8000),
        "all NaN": constant(0x7FC1),
        "all infinite": constant(0x7F80),
        "all subnormal": rng.integers(0, 128, SHAPE).astype(np.uint16).view(BF16),
        "exponents 1..7": (rng.integers(1, 8, SHAPE) << 7).astype(np.uint16).view(BF16),
        "exponents 249..255": (rng.integers(249, 256, SHAPE) << 7 | 3).astype(np.uint16).view(BF16),
        "uniform exponents": rng.integers(0, 1 << 16, SHAPE).astype(np.uint16).view(BF16),
    }
