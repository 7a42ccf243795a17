"""Users' own Flax models with compressed weights: NNX and Linen layers, einsum, adapters, saving.

                 compress_module (NNX)          compress_linen (params)
                          │ puts into parameters        │
                          v                             v
kernel      CompressedKernel: a matrix inside, the kernel's own shape outside
                          │ read by a layer as an Operand
                          v
hooks       dot_general, einsum, promote_dtype ──► jaxzip.matmul       embed  lookups in compressed tables
"""

from jaxzip.modules.adapters import Adapted, add_adapters
from jaxzip.modules.compress_module import compress_module, compress_with_report, is_compressed, transcode_module
from jaxzip.modules.embed import CompressedEmbed
from jaxzip.modules.hooks import DotGeneral, Einsum, dot_general, einsum, promote_dtype, promote_dtype_linen
from jaxzip.modules.kernel import CompressedKernel, KernelAxes, Operand, compress_kernel
from jaxzip.modules.linen import KernelBox, compress_linen, find_uses, fused
from jaxzip.modules.rule import KernelRule
from jaxzip.modules.save import restore_module, save_module

__all__ = [
    "Adapted",
    "CompressedEmbed",
    "CompressedKernel",
    "DotGeneral",
    "Einsum",
    "KernelAxes",
    "KernelBox",
    "KernelRule",
    "Operand",
    "add_adapters",
    "compress_kernel",
    "compress_linen",
    "compress_module",
    "compress_with_report",
    "dot_general",
    "einsum",
    "find_uses",
    "fused",
    "is_compressed",
    "promote_dtype",
    "promote_dtype_linen",
    "restore_module",
    "save_module",
    "transcode_module",
]
