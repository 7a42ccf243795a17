"""What a storage format is: a name, a version, the arrays of its payload, and a reference encode and decode."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

Payload = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """Dtype and shape of one payload array, without batch dimensions. ``None`` marks a data-dependent length."""

    dtype: np.dtype
    shape: tuple[int | None, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How well a window fits a tensor: ``escapes`` of ``size`` elements lie outside the exponent window."""

    size: int
    escapes: int

    @property
    def fraction(self) -> float:
        return 1.0 - self.escapes / self.size


class Format(abc.ABC):
    """A lossless storage format of matrices ``W[M, K]`` (rows are output features, see the layout's document).

    A payload is a dict of arrays in the order of :meth:`fields`. Formats hold no state: the same instance
    serves every tensor, and everything that differs between tensors is in the payload or in its shape.
    """

    name: str
    version: int
    #: The first version that this one still decodes.
    oldest_version: int = 1
    dtypes: tuple[np.dtype, ...]

    @abc.abstractmethod
    def fields(self, m: int, k: int) -> dict[str, FieldSpec]:
        """Names, dtypes and shapes of the payload arrays of an ``[m, k]`` matrix, in canonical order."""

    @abc.abstractmethod
    def encode(self, bits: np.ndarray) -> Payload:
        """Reference encoder (NumPy): the exact, unpadded payload of ``bits`` ``[M, K]``.

        ``bits`` are unsigned integers as wide as the format's dtypes: uint16 for bf16.
        """

    @abc.abstractmethod
    def decode(self, payload: Mapping[str, jax.Array], m: int, k: int) -> jax.Array:
        """Reference decoder (XLA, traceable): the bits of every element ``[m, k]``, as :meth:`encode` takes them."""

    @abc.abstractmethod
    def validate(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
        """Checks every length, offset and count that a kernel later trusts.

        Raises:
          CorruptDataError: naming the array, the place, what was expected and what was found.
        """

    @abc.abstractmethod
    def coverage(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> Coverage:
        """Elements inside and outside the window (``m * k`` in all)."""

    def bucket_lengths(self, payload: Mapping[str, np.ndarray], m: int, k: int) -> dict[str, int]:
        """Lengths to which data-dependent arrays are padded, so that tensors of one shape share few traces."""
        return {}


def check_field_shapes(fmt: Format, payload: Mapping[str, np.ndarray], m: int, k: int) -> None:
    """Raises ``CorruptDataError`` unless ``payload`` has exactly the fields, dtypes and shapes of ``fmt``."""
    from jaxzip.errors import CorruptDataError

    specs = fmt.fields(m, k)
    if set(payload) != set(specs):
        raise CorruptDataError(
            f"{fmt.name}: payload arrays are {sorted(payload)}, expected {sorted(specs)}; the tensor is incomplete "
            "or of another format"
        )
    for name, spec in specs.items():
        array = payload[name]
        if np.dtype(array.dtype) != spec.dtype:
            raise CorruptDataError(f"{fmt.name}: {name} has dtype {array.dtype}, expected {spec.dtype}")
        fits = len(array.shape) == spec.ndim and all(
            want in (None, have) for want, have in zip(spec.shape, array.shape)
        )
        if not fits:
            raise CorruptDataError(
                f"{fmt.name}: {name} has shape {tuple(array.shape)}, expected {spec.shape} for M={m}, K={k}"
            )


def pad_axis(array: np.ndarray, length: int) -> np.ndarray:
    """Appends zeros to the last axis of ``array`` up to ``length``."""
    extra = length - array.shape[-1]
    if extra == 0:
        return array
    return np.concatenate([array, np.zeros((*array.shape[:-1], extra), array.dtype)], axis=-1)
