"""What tests of compressed NNX modules look at: the bits of a result, and the custom calls of a program."""

import re

import jax
import numpy as np
from flax import nnx

from jaxzip.testing import bits


def lowered(model, *args) -> str:
    """The program of a call of an NNX model."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)).lower(state, *args).as_text()


def targets(text: str) -> set[str]:
    """Our custom calls in a program."""
    return set(re.findall(r"jaxzip_\w+", text))


def assert_same(a, b) -> None:
    np.testing.assert_array_equal(bits(a), bits(b))
