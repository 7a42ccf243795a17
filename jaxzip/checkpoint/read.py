"""``open_checkpoint``: a compressed checkpoint's tensors, one by one or as a tree, checked before "
"anything uses them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes  # noqa: F401 - gives NumPy the names of bfloat16 and float8
import numpy as np

from jaxzip import formats
from jaxzip.checkpoint import array_store, checksum, kernel_layout, layout
from jaxzip.checkpoint.partial import check_name, child_name
from jaxzip.checkpoint.tree_metadata import Leaf, nest
from jaxzip.compress import AUTO, best_format, format_for
from jaxzip.errors import CheckpointError, CorruptDataError, TensorNotFoundError, UnsupportedVersionError
from jaxzip.ops import host
from jaxzip.ops.transcode import transcode
from jaxzip.tensor import CompressedTensor
from jaxzip.x64 import is_cut

if TYPE_CHECKING:
    from jaxzip.modules.kernel import CompressedKernel, KernelAxes

    #: What a checkpoint holds at a path.
    Tensor = CompressedTensor | CompressedKernel | np.ndarray

Sharding = jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding | None]


class Checkpoint:
    """An open compressed checkpoint; made by :func:`open_checkpoint`.

    Attributes:
      path: its directory.
      metadata: the JSON document of its custom metadata, see ``jaxzip.checkpoint.layout``.
      tensors: metadata entries by '/'-joined path, in the source's order.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: Mapping[str, Any] = layout.read_document(path)
        self.tensors: Mapping[str, dict[str, Any]] = {"/".join(e["path"]): e for e in self.metadata["tensors"]}

    @property
    def hf_config(self) -> dict[str, Any] | None:
        """The model's configuration in the terms of Hugging Face's config.json; ``None`` if it is no known model."""
        return self.metadata["hf_config"]

    @property
    def other_leaves(self) -> tuple[Leaf, ...]:
        """The tree's leaves without an array: strings, ``None``, empty dicts."""
        return tuple(Leaf.from_json(leaf) for leaf in self.metadata["other_leaves"])

    def extra_file(self, name: str) -> bytes | None:
        """A small file that was beside the weights, such as "tokenizer.json"; ``None`` if there was none.

        Raises:
          CheckpointError: it was there and is missing.
          CorruptDataError: it is damaged.
        """
        if name not in self.metadata["extra_files"]:
            return None
        file = self.path / layout.EXTRA_DIRECTORY / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}); get the checkpoint again") from None
        if hashlib.sha256(content).hexdigest() != self.metadata["extra_files"][name]:
            raise CorruptDataError(f"{file} is corrupt: its checksum is not the recorded one; get the checkpoint again")
        return content

    def entry(self, name: str) -> dict[str, Any]:
        """The metadata entry of a tensor.

        Raises:
          TensorNotFoundError: there is no such tensor; names the nearest.
        """
        if name not in self.tensors:
            raise TensorNotFoundError(layout.not_found(name, self.tensors, self.path))
        return self.tensors[name]

    def load(self, name: str, *, format: str | None = None, verify: bool = False) -> Tensor:
        """Reads one tensor to the host: a CompressedTensor with NumPy leaves, or the array if it is stored raw.

        A kernel of rank 3 or more that is stored as a matrix is a ``jaxzip.modules.CompressedKernel`` of its own shape.

        Args:
          name: '/'-joined path.
          format: change a compressed tensor to this format, a few rows at a time; ``"auto"``: the fastest one on JAX's
            default device, where there is one that is. ``None``: as it is stored. Tensors of other dtypes than bf16
            have one format each and stay in it, but for ``"raw"``.
          verify: also decode it and compare the checksum of the original bits.

        Raises:
          TensorNotFoundError: no such tensor.
          ValueError: unknown ``format``.
          CheckpointError: a file is missing, or the tensor's format is unknown.
          UnsupportedVersionError: a newer jaxzip wrote the tensor.
          CorruptDataError: a file is truncated, has a wrong checksum, or contradicts the format.
        """
        entry = self.entry(name)
        if format not in (None, AUTO):
            formats.get(format)  # also where nothing is changed to it
        leaf = Leaf.from_json(entry["leaf"])
        if entry["format"] == "raw":
            value = self._read(leaf, "", entry)
        else:
            value = self._read_compressed(name, leaf, entry)
        if verify and not checksum.matches(dense(value, entry["checksum"]["order"]), entry["checksum"]):
            raise CorruptDataError(
                f"{name}: the decoded bits do not have the checksum of the original; get {self.path} again"
            )
        if format is not None and not isinstance(value, np.ndarray):
            z = _matrix(value)
            again = transcode(z, format_for(z.dtype, format), on_host=True)
            value = again if z is value else dataclasses.replace(value, matrix=again)
        return value

    def load_tree(
        self,
        *,
        on_host: bool = False,
        sharding: Sharding | None = None,
        format: str | None = None,
        verify: bool = False,
    ) -> Any:
        """Reads the whole tree: nested dicts (lists where the source had sequences) of CompressedTensors and arrays.

        Args:
          on_host: leave NumPy arrays instead of moving each tensor to the device as it is read. Tensors of 64 bits,
            which JAX would cut to 32 (unless jax_enable_x64 is set), stay NumPy arrays in any case.
          sharding: for all tensors, or a function of a tensor's name; it applies to each payload array.
          format: see :meth:`load`; ``"auto"`` is the fastest one where the tensor goes.
          verify: see :meth:`load`.

        Raises:
          CheckpointError, CorruptDataError, UnsupportedVersionError: see :meth:`load`.
        """
        pairs = []
        for name, entry in self.tensors.items():
            where = sharding(name) if callable(sharding) else sharding
            value = self.load(name, format=_resolve(format, entry, where), verify=verify)
            leaf = Leaf.from_json(entry["leaf"])
            if leaf.value_type == "scalar":
                value = value.item()
            elif not on_host and not is_cut(value.dtype):
                value = jax.device_put(value, where)
            pairs.append((leaf, value))
        empty = {"Dict": {}, "List": [], "Tuple": ()}
        pairs += [(leaf, empty.get(leaf.value_type, leaf.value)) for leaf in self.other_leaves]
        return nest(pairs)

    def _read(self, leaf: Leaf, field: str, spec: Mapping[str, Any]) -> np.ndarray:
        name = child_name(leaf, field)
        check_name(name)
        return array_store.read_array(self.path, name, shape=tuple(spec["shape"]), dtype=np.dtype(spec["dtype"]))

    def _read_compressed(self, name: str, leaf: Leaf, entry: Mapping[str, Any]) -> Tensor:
        if entry["format"] not in formats.names():
            raise CheckpointError(
                f"{name}: unknown format {entry['format']!r}; this jaxzip knows "
                f"{', '.join(formats.names())}; upgrade jaxzip"
            )
        fmt = formats.get(entry["format"])
        if entry["format_version"] > fmt.version:
            raise UnsupportedVersionError(
                f"{name}: {fmt.name} version {entry['format_version']}, this jaxzip reads up to "
                f"{fmt.version}; upgrade jaxzip"
            )
        if entry["format_version"] < fmt.oldest_version:
            raise UnsupportedVersionError(
                f"{name}: {fmt.name} version {entry['format_version']}, this jaxzip reads {fmt.oldest_version} to "
                f"{fmt.version}; restore it with the jaxzip that wrote it, or convert again from its source"
            )
        axes, shape = None, list(entry["shape"])
        if kernel_layout.MATRIX_KEY in entry:
            axes, shape = self._axes(name, entry)
        payload = {field: self._read(leaf, field, spec) for field, spec in entry["payload"].items()}
        core = tuple(shape[-entry["core_ndim"] :])
        z = CompressedTensor(
            payload, core, np.dtype(entry["dtype"]), fmt.name, entry["output_axis"], entry["format_version"]
        )
        try:
            validate(z)
        except CorruptDataError as error:
            raise CorruptDataError(f"{name} in {self.path}: {error}") from None
        if list(z.shape) != shape:
            raise CorruptDataError(f"{name}: the payload has shape {z.shape}, the metadata says {shape}")
        return z if axes is None else _kernel(z, axes)

    def _axes(self, name: str, entry: Mapping[str, Any]) -> tuple[KernelAxes, list[int]]:
        """Of a kernel that is stored as a matrix: its axes, and the matrix's shape."""
        try:
            axes = kernel_layout.from_json(entry[kernel_layout.MATRIX_KEY])
        except (TypeError, ValueError, AttributeError) as error:
            raise CorruptDataError(f"{name} in {self.path}: its kernel axes cannot be read ({error})") from None
        stack = entry["shape"][: len(entry["shape"]) - len(axes.shape)]
        if [*stack, *axes.shape] != entry["shape"]:
            raise CorruptDataError(f"{name} in {self.path}: a tensor of shape {entry['shape']} has no axes {axes}")
        return axes, [*stack, *axes.matrix_shape]


def _resolve(format: str | None, entry: Mapping[str, Any], sharding: jax.sharding.Sharding | None) -> str | None:
    """``"auto"`` as the format for the devices that a tensor is sent to."""
    if format != AUTO or sharding is None:
        return format
    device = min(sharding.device_set, key=lambda device: device.id)
    return best_format(np.dtype(entry["dtype"]), device, otherwise=entry["format"])


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a compressed checkpoint; reads its metadata only.

    Raises:
      CheckpointError: there is none at ``path``, or it is not compressed by jaxzip.
      UnsupportedVersionError: a newer jaxzip wrote it.
      CorruptDataError: its metadata is damaged.
    """
    return Checkpoint(Path(path).absolute())


def validate(z: CompressedTensor) -> None:
    """Checks each matrix of a host-side stack before a kernel trusts its offsets.

    Raises:
      CorruptDataError: naming the array and the place.
    """
    fmt, (m, k) = formats.get(z.format), z.matrix_shape
    if set(z.payload) != set(fmt.fields(m, k)):
        raise CorruptDataError(
            f"{fmt.name}: payload arrays are {sorted(z.payload)}, expected {sorted(fmt.fields(m, k))}"
        )
    for index in np.ndindex(z.batch_shape):
        host.validate(host.matrix(z, index), z.format, m, k)


def _kernel(z: CompressedTensor, axes: KernelAxes) -> CompressedKernel:
    # Imported here: jaxzip.modules reads and writes checkpoints.
    from jaxzip.modules.kernel import CompressedKernel

    return CompressedKernel(z, axes)


def _matrix(value: CompressedTensor | CompressedKernel) -> CompressedTensor:
    return value if isinstance(value, CompressedTensor) else value.matrix


def dense(value: Tensor, order: str = checksum.C_ORDER) -> np.ndarray:
    """The array that ``value`` (valid, on the host) stands for; its last two axes swapped with order "swapped".

    C-contiguous, decoded without JAX: a proof of identity should not depend on the kernels that it is for.
    """
    swapped = order == checksum.SWAPPED
    if not isinstance(value, CompressedTensor | np.ndarray):
        value = value.axes.from_matrix(host.dense(value.matrix))
    if isinstance(value, np.ndarray):
        return value.swapaxes(-1, -2) if swapped else value
    return host.dense(value, swapped=swapped)
