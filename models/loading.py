"""``load_model``: a model and its tokenizer from a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxzip.models.config import LlamaConfig
from jaxzip.models.fuse import fuse_projections
from jaxzip.models.llama import Llama
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
) -> tuple[Llama, Tokenizer]:
    """Loads a model and its tokenizer.

    Args:
      path: a compressed checkpoint that was converted from a Llama model's safetensors or GGUF file.
      implementation: of every matmul, see :func:`jaxzip.matmul`.
      format: what compressed weights are changed to on the way in; ``"auto"``: what runs fastest on this process's
        devices. ``None``: as they are stored.
      transform: applied to the tree of parameters before the model gets it, for instance to decompress it.
      fuse: whether projections of the same input become one weight, see :func:`jaxzip.models.fuse_projections`;
        ``None``: on a GPU. They are put together on the host, which then holds all weights.

    Raises:
      CheckpointError: the checkpoint has no model configuration or no tokenizer.
      UnsupportedConfigError: the model is not one that ``jaxzip.models`` computes.
      CorruptDataError: a tensor is corrupt.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint, path)
    if fuse is None:
        fuse = default_device().platform == "gpu"
    params = checkpoint.load_tree(format=format, on_host=fuse)
    if transform:
        params = transform(params)
    model = Llama.from_params(config, fuse_projections(params) if fuse else params, implementation=implementation)
    return model, read_tokenizer(checkpoint, config, path)


def read_config(checkpoint: Checkpoint, path: str | Path) -> LlamaConfig:
    """The model's configuration, as the source had it.

    Raises:
      CheckpointError: the source had none.
    """
    if checkpoint.hf_config is None:
        raise CheckpointError(
            f"{path} has no model configuration: it was converted from a plain tree of arrays; build the model with "
            "jaxzip.models.Llama.from_params(config, open_checkpoint(path).load_tree())"
        )
    return LlamaConfig.from_hf(checkpoint.hf_config)


def read_tokenizer(checkpoint: Checkpoint, config: LlamaConfig, path: str | Path) -> Tokenizer:
    """The tokenizer that came with the source.

    Raises:
      CheckpointError: the source had none, or it is damaged.
    """
    data = checkpoint.extra_file("tokenizer.json")
    if data is None:
        raise CheckpointError(f"{path} has no tokenizer.json: its source had none beside the weights")
    try:
        return Tokenizer.from_json(data, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    except ValueError as error:
        raise CheckpointError(f"{path}: tokenizer.json is damaged ({error}); convert the model again") from None
