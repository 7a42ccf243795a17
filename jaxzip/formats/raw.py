"""The raw format: the array as it is, for tensors that no other format would shrink, and as the control of kernels."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from jaxzip.formats.base import Coverage, FieldSpec, Format, Payload


class Raw(Format):
    """One array, ``values``, of any dtype and rank, in its logical order (never transposed)."""

    name = "raw"
    version = 1
    dtypes = ()

    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        raise NotImplementedError("raw keeps the logical array; it has no matrix layout")

    def encode(self, bits: np.ndarray) -> Payload:
        return {"values": bits}

    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        return payload["values"]

    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        """Nothing to check: no value of ``values`` is ever used as an address."""

    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        return Coverage(size=m * k, escapes=m * k)
