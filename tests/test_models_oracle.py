"""All families against Hugging Face transformers: logits and greedy tokens of small random models.

Its numbers are in tests/data/oracle, so that torch is not needed; where it is installed, new models are made.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.models import generate
from jaxzip.models.loading import read_model

from jaxzip.checkpoint import convert, open_checkpoint

HERE = pathlib.Path(__file__).parent / "data" / "oracle"
make = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("oracle_make", HERE / "make.py"))
spec.loader.exec_module(make)
TOLERANCE = 1e-4


@functools.cache
def _converted_to(family: str, directory: pathlib.Path) -> pathlib.Path:
    convert(HERE / family, directory / family)
    return directory / family


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The compressed checkpoint of a family."""
    directory = tmp_path_factory.mktemp("oracle")
    return lambda family: _converted_to(family, directory)


def load(path, **options):
    return read_model(open_checkpoint(path), path, **options)


def check(model, expected):
    found = jax.jit(lambda model, tokens: model(tokens))(model, jnp.array([make.PROMPTS[0]]))[0]
    assert np.abs(np.asarray(found) - expected["logits"]).max() < TOLERANCE
    tokens = generate(model, make.PROMPTS, max_new_tokens=make.NEW_TOKENS, eos=()).tokens
    for i, row in enumerate(tokens):
        assert row.tolist() == expected[f"tokens_{i}"].tolist()


@pytest.mark.parametrize("family", make.FAMILIES)
def test_logits_and_tokens_are_those_of_transformers(family, converted):
    expected = np.load(HERE / family / "expected.npz")
    check(load(converted(family), dtype="float32"), expected)


def test_every_family_has_its_numbers():
    from jaxzip.models import FAMILIES

    assert set(FAMILIES) == {*make.FAMILIES, "gemma3"}  # which is gemma3_text with an image encoder beside it
    for family in make.FAMILIES:
        expected = np.load(HERE / family / "expected.npz")
        assert expected["margin"] >= make.LEAST_MARGIN and len(expected["tokens_0"]) == make.NEW_TOKENS == 64
