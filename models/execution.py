"""``Execution``: how a model's operations are to be computed, the same for all of them."""

from __future__ import annotations

import dataclasses
import functools

import jax


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static and hashable: programs are compiled for it.

    Attributes:
      implementation: of every matmul and lookup on compressed weights; ``None`` chooses the best here, ``"xla"``
        decodes each weight and then computes exactly what the dense model does. Dense weights are XLA's.
      batch_invariant: a sequence's numbers must not depend on what else is in its batch, see
        :func:`jaxzip.models.generate`.
    """

    implementation: str | None = None
    batch_invariant: bool = False


DEFAULT = Execution()


@functools.cache
def gpu_is_here() -> bool:
    """Whether this process has a CUDA device.

    Lowering a Triton kernel needs to know the GPU: a program lowered for one that is not here gets XLA's operations.
    """
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
