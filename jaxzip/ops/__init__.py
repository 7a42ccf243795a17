"""Operations on compressed tensors, one module each; ``registry`` holds their implementations and chooses among them.

matmul, take, ragged_matmul ──► registry ──► xla (here: decompress, then XLA's own operation)
decompress                  ──►            └► ffi, pallas (backends; they register themselves, see ``registry``)
gated_matmul: a product and its gate, which a backend may run as one
decode_chain: the rest of a layer and the next one's first product, which a backend may run as one
decode_layer: the same with the attention before it
other_dtypes: split tensors (fp16, fp32) decode their bf16 head by ``decompress`` and join the low bits to it
explicit_axes, manual_axes: how operations are split over meshes, and what ``jax.shard_map`` wants to know of them
host: encode, decode, validate on NumPy arrays ──► the format's fast codec, or its reference
"""

from jaxzip.ops.decompress import decompress
from jaxzip.ops.matmul import matmul
from jaxzip.ops.ragged_matmul import ragged_matmul
from jaxzip.ops.registry import implementations
from jaxzip.ops.take import take

__all__ = ["decompress", "implementations", "matmul", "ragged_matmul", "take"]
