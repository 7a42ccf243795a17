"""``Execution``: how a model's operations are to be computed; where kernels of its own can run, and their gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Execution:
    """Static and hashable: programs are compiled for it.

    Attributes:
      implementation: of every matmul and lookup on compressed weights; ``None`` chooses the best here, ``"xla"``
        decodes each weight and then computes exactly what the dense model does. Dense weights are XLA's.
      batch_invariant: a sequence's numbers must not depend on what else is in its batch, see
        :func:`jaxzip.models.generate`.
      chain: decode in chains of kernels where a GPU has them, see ``jaxzip.models.decode_chain``.
    """

    implementation: str | None = None
    batch_invariant: bool = False
    chain: bool = True


DEFAULT = Execution()


@functools.cache
def gpu_is_here() -> bool:
    """Whether this process has CUDA devices, all of compute capability 8.0 or more: those that Triton's kernels need.

    Lowering such a kernel needs to know the GPU: a program lowered for one that is not here gets XLA's operations.
    """
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return bool(devices) and all(int(str(d.compute_capability).split(".")[0]) >= 8 for d in devices)


def with_gradient_of(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, differentiated as ``reference`` is, which computes the same; both take arrays only."""
    function = jax.custom_vjp(kernel)
    function.defvjp(lambda *args: (kernel(*args), args), lambda args, found: jax.vjp(reference, *args)[1](found))
    return function
