"""jaxzip: large language models made smaller and faster in JAX without changing one bit of their weights.

formats/   storage formats: layout, reference encode and decode
tensor     CompressedTensor, the pytree          compress, rules   arrays and trees in, compressed out
ops/       matmul, ragged_matmul, decompress, take; their implementations (backends: jaxzip.ffi, jaxzip.pallas_kernels)
checkpoint/ Orbax in and out, importers           models  Flax transformers      cli  the commands
modules/   users' own Flax models: compress_module, einsum, dot_general, adapters
"""

from jaxzip.compress import compress
from jaxzip.errors import CheckpointError, CorruptDataError, JaxzipError, UnsupportedVersionError
from jaxzip.ops import decompress, matmul, ragged_matmul, take
from jaxzip.ops.transcode import transcode
from jaxzip.rules import CompressionReport, CompressionRule, compress_params
from jaxzip.tensor import CompressedTensor

__version__ = "0.1.0"

#: Offered here, imported on first use: they import Flax, which the rest does without.
_FROM_MODULES = ("compress_module", "dot_general", "einsum")

__all__ = [
    "CheckpointError",
    "CompressedTensor",
    "CompressionReport",
    "CompressionRule",
    "CorruptDataError",
    "JaxzipError",
    "UnsupportedVersionError",
    "compress",
    "compress_module",
    "compress_params",
    "decompress",
    "dot_general",
    "einsum",
    "matmul",
    "ragged_matmul",
    "take",
    "transcode",
]


def __getattr__(name: str):
    if name not in _FROM_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("jaxzip.modules"), name)
