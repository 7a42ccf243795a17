"""Operations on compressed tensors, one module each; ``registry`` holds their implementations and chooses among them.

    matmul, take ──► registry ──► xla (here: decompress, then XLA's own operation)
    decompress  ──►            └► ffi, pallas (backends; they register themselves, see ``registry``)
    encode      ──► the fast encoder of the format, or its NumPy reference
"""

from jaxzip.ops.decompress import decompress
from jaxzip.ops.encode import encode
from jaxzip.ops.matmul import matmul
from jaxzip.ops.registry import implementations
from jaxzip.ops.take import take

__all__ = ["decompress", "encode", "implementations", "matmul", "take"]
