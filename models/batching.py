"""Prompts of different lengths as one batch of few distinct shapes, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxzip.models.config import DecoderConfig

from jaxzip.errors import PromptError

MIN_BUCKET = 16


def bucket(length: int) -> int:
    """``length`` rounded up to one of four sizes an octave: at most a quarter is padding, and few programs compile."""
    step = max(MIN_BUCKET, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def pad_prompts(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Checks ``prompts`` and pads them on the left.

    Returns:
      int32 ``[B, S]`` tokens, with ``S`` a bucket, and int32 ``[B]`` slots of padding in each row.

    Raises:
      ValueError: ``max_new_tokens`` is below 1.
      PromptError: there is no prompt, one is empty, has an id outside the vocabulary, or leaves no room in the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
    rows = [_row(i, prompt) for i, prompt in enumerate(prompts)]
    if not rows:
        raise PromptError("there is no prompt; pass a list with at least one list of token ids")
    for i, row in enumerate(rows):
        _check(config, i, row, max_new_tokens)
    width = bucket(max(len(row) for row in rows))
    tokens = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
    return tokens, np.array([width - len(row) for row in rows], np.int32)


def _row(i: int, prompt: Sequence[int]) -> np.ndarray:
    try:
        return np.asarray(prompt)
    except ValueError:  # lists in it, of different lengths
        raise PromptError(f"prompt {i} has lists in it; each prompt is one list of token ids") from None


def _check(config: DecoderConfig, i: int, row: np.ndarray, max_new_tokens: int) -> None:
    if row.size == 0:
        raise PromptError(f"prompt {i} is empty; give at least one token, for instance the beginning-of-text token")
    if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
        raise PromptError(f"prompt {i} is no list of token ids (shape {row.shape}, {row.dtype}); encode the text first")
    if row.min() < 0 or row.max() >= config.vocab_size:
        wrong = row.min() if row.min() < 0 else row.max()
        raise PromptError(
            f"prompt {i} has token id {wrong}, the vocabulary has {config.vocab_size} tokens; "
            "use the tokenizer that belongs to the model"
        )
    if len(row) + max_new_tokens > config.max_position_embeddings:
        raise PromptError(
            f"prompt {i} has {len(row)} tokens and max_new_tokens is {max_new_tokens}, together "
            f"{len(row) + max_new_tokens}; the model's context is {config.max_position_embeddings} tokens: shorten the "
            "prompt or lower max_new_tokens"
        )
