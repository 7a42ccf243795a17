"""Tokens of two runs whose sums are in other orders, and so round otherwise."""

import numpy as np


def assert_same_up_to_ties(found, expected):
    """Of two ``Generation`` with logits: a row's tokens are alike until two are as good as each other, logits near."""
    tolerance = 0.03 * np.abs(expected.logits).max()
    for row, (a, b) in enumerate(zip(found.sequences(), expected.sequences(), strict=True)):
        same = next((i for i, (s, t) in enumerate(zip(a, b, strict=True)) if s != t), len(a))
        assert same >= 4
        np.testing.assert_allclose(found.logits[row, : same + 1], expected.logits[row, : same + 1], atol=tolerance)
        if same < len(a):
            assert abs(expected.logits[row, same, a[same]] - expected.logits[row, same, b[same]]) <= tolerance
