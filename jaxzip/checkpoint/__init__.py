"""Checkpoints: compressed Orbax checkpoints in and out, importers of safetensors and GGUF, verification.

source              any checkpoint, read one tensor at a time (orbax_source, safetensors_source, gguf_source)
  | convert         compresses; partial writes it so that it survives kill -9; layout says what is in it
  v
compressed Orbax checkpoint  --read-->  CompressedTensors     --verify-->  the same bits as the source?
  | restore
  v
the original Orbax tree, or the original safetensors files

hf_names, gemma_names   tensors of known models by their names
kernel_layout           kernels of rank 3 and more as the matrices that they are multiplied as
"""

from jaxzip.checkpoint.convert import convert
from jaxzip.checkpoint.inspect import inspect
from jaxzip.checkpoint.layout import LAYOUT_VERSION, is_compressed
from jaxzip.checkpoint.progress import ProgressCallback
from jaxzip.checkpoint.read import Checkpoint, open_checkpoint
from jaxzip.checkpoint.restore import restore
from jaxzip.checkpoint.source import Source, TensorInfo, open_source
from jaxzip.checkpoint.verify import VerifyResult, verify, verify_checksums

__all__ = [
    "LAYOUT_VERSION",
    "Checkpoint",
    "ProgressCallback",
    "Source",
    "TensorInfo",
    "VerifyResult",
    "convert",
    "inspect",
    "is_compressed",
    "open_checkpoint",
    "open_source",
    "restore",
    "verify",
    "verify_checksums",
]
