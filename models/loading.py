"""``load_model``: a model and its tokenizer from a compressed checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxzip.models import gemma_orbax
from jaxzip.models.config import DecoderConfig
from jaxzip.models.decoder import Decoder
from jaxzip.models.families import config_from_hf, family_of
from jaxzip.models.fuse import fuse_projections
from jaxzip.models.hf_values import token_id, token_ids
from jaxzip.models.tokenizer import Tokenizer

from jaxzip.checkpoint import Checkpoint, open_checkpoint
from jaxzip.errors import CheckpointError
from jaxzip.formats.auto import default_device


def load_model(
    path: str | Path,
    *,
    implementation: str | None = None,
    format: str | None = "auto",
    transform: Callable[[Any], Any] | None = None,
    fuse: bool | None = None,
    dtype: str | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Loads a model of whatever family, and its tokenizer.

    Args:
      path: a compressed checkpoint that was converted from a model's safetensors or GGUF file, or from an Orbax
        checkpoint of Gemma's.
      implementation: of every matmul, see :func:`jaxzip.matmul`.
      format: what compressed weights are changed to on the way in; ``"auto"``: what runs fastest on this process's
        devices. ``None``: as they are stored.
      transform: applied to the tree of parameters before the model gets it, for instance to decompress it.
      fuse: whether projections of the same input become one weight, see :func:`jaxzip.models.fuse_projections`;
        ``None``: on a GPU. They are put together on the host, which then holds all weights.
      dtype: of activations and KV cache, see ``DecoderConfig``; default: the checkpoint's.

    Raises:
      CheckpointError: the checkpoint has no model configuration or no tokenizer.
      UnsupportedConfigError: the model is not one that ``jaxzip.models`` computes.
      CorruptDataError: a tensor is corrupt.
    """
    checkpoint = open_checkpoint(path)
    options = {"implementation": implementation, "format": format, "transform": transform, "fuse": fuse}
    model = read_model(checkpoint, path, dtype=dtype, **options)
    return model, read_tokenizer(checkpoint, model.config, path)


def read_model(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    implementation: str | None = None,
    format: str | None = "auto",
    transform: Callable[[Any], Any] | None = None,
    fuse: bool | None = None,
    dtype: str | None = None,
) -> Decoder:
    """The model alone; arguments and errors are those of :func:`load_model`."""
    config = read_config(checkpoint, path)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    if fuse is None:
        fuse = default_device().platform == "gpu"
    params = model_params(config, checkpoint.load_tree(format=format, on_host=fuse))
    if transform:
        params = transform(params)
    if fuse:
        params = fuse_projections(params)
    return family_of(config).from_params(config, params, implementation=implementation)


def model_params(config: DecoderConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among a checkpoint's tensors: a tied head is left out, and what is no language model's.

    A Gemma's own tree, nested or flat, becomes that of ``jaxzip.models``.
    """
    if gemma_orbax.is_gemma_tree(tree):
        return gemma_orbax.params_from_gemma(tree)
    known = {"embedder", "layers", "final_norm", *(() if config.tie_word_embeddings else ("lm_head",))}
    return {name: value for name, value in tree.items() if name in known}


def read_config(checkpoint: Checkpoint, path: str | Path) -> DecoderConfig:
    """The model's configuration, as the source had it; generation_config.json says which tokens end a text.

    Raises:
      CheckpointError: the source had none.
      UnsupportedConfigError: the model is of another family than those in ``jaxzip.models``, or a value in its
        configuration is not what its key asks for.
      CorruptDataError: a configuration is damaged.
    """
    hf = checkpoint.hf_config or _json(checkpoint, "config.json", path)
    if not hf:
        raise CheckpointError(
            f"{path} has no model configuration: it was converted from a plain tree of arrays; build the model with "
            "jaxzip.models.Llama.from_params(config, open_checkpoint(path).load_tree())"
        )
    config, generation = config_from_hf(hf), _json(checkpoint, "generation_config.json", path)
    changes: dict[str, Any] = {}
    where = "generation_config.json: "
    if generation.get("eos_token_id") is not None:
        changes["eos_token_ids"] = token_ids(generation, "eos_token_id", where=where)
    if generation.get("bos_token_id") is not None:
        changes["bos_token_id"] = token_id(generation, "bos_token_id", where=where)
    return dataclasses.replace(config, **changes)


def _json(checkpoint: Checkpoint, name: str, path: str | Path) -> dict[str, Any]:
    """A small JSON file that came with the source; empty if there was none."""
    try:
        found = json.loads(checkpoint.extra_file(name) or b"{}")
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is damaged ({error}); convert the model again") from None
    return found if isinstance(found, dict) else {}


def read_tokenizer(checkpoint: Checkpoint, config: DecoderConfig, path: str | Path) -> Tokenizer:
    """The tokenizer that came with the source.

    Raises:
      CheckpointError: the source had none, or it is damaged.
    """
    data = checkpoint.extra_file("tokenizer.json")
    if data is None:
        raise CheckpointError(
            f"{path} has no tokenizer.json: its source had none beside the weights; put it there and convert again"
        )
    try:
        return Tokenizer.from_json(data, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    except ValueError as error:
        raise CheckpointError(f"{path}: tokenizer.json is damaged ({error}); convert the model again") from None
