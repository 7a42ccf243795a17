"""What compiled programs do with weights, read from their optimised HLO."""

import re

import jax

#: Instructions that give a buffer another name and move nothing.
_NAMES = {"parameter", "get-tuple-element", "opt-barrier", "bitcast", "tuple", "while", "conditional", "call"}
_HLO_DTYPES = {"uint32": "u32", "uint64": "u64", "uint8": "u8", "int8": "s8", "bfloat16": "bf16", "int32": "s32"}


def weight_shapes(weights) -> set[str]:
    """HLO types of the arrays of rank 2 and more among ``weights``: of payloads, or of dense matrices."""
    leaves = [leaf for leaf in jax.tree.leaves(weights) if leaf.ndim > 1]
    return {f"{_HLO_DTYPES[leaf.dtype.name]}[{','.join(map(str, leaf.shape))}]" for leaf in leaves}


def made_of_shape(hlo: str, shapes: set[str]) -> list[str]:
    """Instructions with a result (or an element of it) of one of these types, other than those that move nothing."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
        if match and match[2] not in _NAMES and any(shape in match[1] for shape in shapes):
            found.append(line.strip())
    return found
