"""Which leaves of a parameter tree are compressed and how, and the report of what came of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxzip import formats
from jaxzip.compress import AUTO, check_output_axis, compress, format_for
from jaxzip.errors import with_name
from jaxzip.formats import auto
from jaxzip.tensor import KERNEL_AXIS, TABLE_AXIS, CompressedTensor

COMPRESSIBLE_DTYPES = auto.DTYPES
#: A tensor that keeps more of its bytes than this "hardly shrinks", and its report says so.
HARDLY = 0.85


@dataclasses.dataclass(frozen=True)
class CompressionRule:
    """How to compress the leaves whose '/'-joined path matches ``module_path`` (``re.fullmatch``).

    Attributes:
      module_path: regular expression over the whole path, for instance ``r".*mlp.*"``.
      format: a format's name, ``"auto"``, or ``"raw"`` to leave matching leaves as they are. With a format of bf16's,
        fp16, fp32 and fp8 leaves get the format of their dtype.
      output_axis: axis of output features, -1 for kernels ``[K, M]``, -2 for tables ``[M, K]``.
      min_size: leaves with fewer elements stay as they are.

    Raises:
      ValueError: unknown ``format``, or ``output_axis`` is neither -1 nor -2.
      re.error: ``module_path`` is no regular expression.
    """

    module_path: str = ".*"
    format: str = AUTO
    output_axis: int = KERNEL_AXIS
    min_size: int = 4096

    def __post_init__(self):
        if self.format != AUTO:
            formats.get(self.format)
        re.compile(self.module_path)
        check_output_axis(self.output_axis, type(self).__name__)

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.module_path, path) is not None


#: Every bf16, fp16, fp32 or fp8 leaf of rank >= 2 and 4096 elements or more; embedding tables are rows [V, D].
DEFAULT_RULES = (CompressionRule(r"(.*/)?embedding", output_axis=TABLE_AXIS), CompressionRule())


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One leaf of a compressed tree. ``escapes`` is ``None`` where the format has no window.

    ``note`` says why raw, how little a dtype shrinks, and what has no fused kernel.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    format: str
    original_bytes: int
    stored_bytes: int
    escapes: int | None
    note: str = ""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / max(self.size, 1)

    @property
    def coverage(self) -> float | None:
        """Share of the elements inside the exponent window."""
        return None if self.escapes is None else 1 - self.escapes / self.size


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What :func:`compress_params` did, leaf by leaf and in total."""

    tensors: tuple[TensorReport, ...]
    unused_rules: tuple[CompressionRule, ...] = ()

    @property
    def original_bytes(self) -> int:
        return sum(t.original_bytes for t in self.tensors)

    @property
    def stored_bytes(self) -> int:
        return sum(t.stored_bytes for t in self.tensors)

    @property
    def ratio(self) -> float:
        """Stored bytes over original bytes: 0.71 is 29% smaller."""
        return self.stored_bytes / max(self.original_bytes, 1)

    def __str__(self) -> str:
        rows = [
            f"{t.path}  {'x'.join(map(str, t.shape))} {t.dtype}  {t.format}  {t.bits_per_weight:.2f} bits"
            + (f"  ({t.note})" if t.note else "")
            for t in self.tensors
        ]
        rows += [
            f"{dtype}: {size['tensors']} tensors, {size['original_bytes']} -> {size['stored_bytes']} bytes, "
            f"{size['bits_per_weight']:.2f} bits"
            for dtype, size in sizes_by_dtype(self.tensors).items()
        ]
        rows.append(f"total {self.original_bytes} -> {self.stored_bytes} bytes, ratio {self.ratio:.4f}")
        rows += [f"rule matched nothing: {rule}" for rule in self.unused_rules]
        return "\n".join(rows)


def path_name(path: Sequence[Any]) -> str:
    """The '/'-joined name of a tree path; the ``value`` that Flax's Variables put at its end is left out."""
    parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
    if parts and parts[-1] == "value" and isinstance(path[-1], jax.tree_util.GetAttrKey):
        parts = parts[:-1]
    return "/".join(parts)


def rule_for(path: str, shape: Sequence[int], dtype: Any, rules: Sequence[CompressionRule]) -> CompressionRule | str:
    """The first rule that matches, or the reason why the leaf stays as it is.

    A leaf that a rule names but that cannot be compressed (dtype, rank, size) stays; the first matching rule decides.
    """
    rule = next((r for r in rules if r.matches(path)), None)
    if rule is None:
        return "no rule matches"
    if rule.format == "raw":
        return "rule says raw"
    if dtype not in COMPRESSIBLE_DTYPES:
        return f"dtype {dtype} is not compressed"
    if len(shape) < 2:
        return f"rank {len(shape)} is below 2"
    size = np.prod(shape, dtype=np.int64)
    if size == 0:
        return "no elements"
    if size < rule.min_size:
        return f"fewer than {rule.min_size} elements"
    return rule


def compress_params(
    params: Any, rules: Sequence[CompressionRule] = DEFAULT_RULES, *, on_host: bool = False
) -> tuple[Any, CompressionReport]:
    """Compresses the leaves of ``params`` that ``rules`` name; everything else is passed through untouched.

    Args:
      params: any pytree of arrays (nested dicts, ``nnx.State``, ...).
      rules: the first rule whose ``module_path`` matches a leaf's '/'-joined path decides.
      on_host: keep the payloads in NumPy arrays.

    Returns:
      The tree with CompressedTensors in place of the compressed leaves, and a report; ``report.unused_rules`` lists
      rules that matched no leaf.

    Raises:
      TypeError: a rule's format does not take a leaf's dtype, or a leaf that a rule takes is traced; names the leaf.
    """
    rows: list[TensorReport] = []
    used: set[int] = set()

    def convert(path, leaf):
        name = path_name(path)
        if isinstance(leaf, CompressedTensor) or not hasattr(leaf, "dtype"):
            return leaf
        used.update(i for i in [next((i for i, r in enumerate(rules) if r.matches(name)), None)] if i is not None)
        rule = rule_for(name, leaf.shape, leaf.dtype, rules)
        if isinstance(rule, str):
            rows.append(dense_report(name, leaf, rule))
            return leaf
        try:
            format = format_for(leaf.dtype, rule.format)
            z = compress(leaf, format=format, output_axis=rule.output_axis, on_host=on_host)
        except (TypeError, ValueError) as error:
            raise with_name(name, error) from error
        if z.format == "raw":
            rows.append(dense_report(name, leaf, not_smaller(z)))
            return leaf
        rows.append(tensor_report(name, z))
        return z

    tree = jax.tree_util.tree_map_with_path(convert, params, is_leaf=lambda leaf: isinstance(leaf, CompressedTensor))
    unused = tuple(rule for i, rule in enumerate(rules) if i not in used)
    return tree, CompressionReport(tuple(rows), unused)


def not_smaller(z: CompressedTensor) -> str:
    """Why a tensor that a rule names came out raw."""
    if z.size > np.iinfo(np.uint32).max:
        return "more elements than the format can address"
    return "encoding would not be smaller"


def tensor_report(path: str, z: CompressedTensor) -> TensorReport:
    """The report of one compressed tensor."""
    fmt, escapes = formats.get(z.format), None
    if z.format != "raw":
        m, k = z.matrix_shape
        arrays = {n: np.asarray(a) for n, a in z.payload.items()}
        stack = np.ndindex(z.batch_shape)
        escapes = sum(fmt.coverage({n: a[i] for n, a in arrays.items()}, m, k).escapes for i in stack)
    original = z.size * z.dtype.itemsize
    return TensorReport(path, z.shape, str(z.dtype), z.format, original, z.nbytes, escapes, _size_note(z, original))


def _size_note(z: CompressedTensor, original_bytes: int) -> str:
    """What a user should know about a tensor that no fused kernel multiplies by, and about its size."""
    if z.format == "raw":
        return ""
    notes = []
    if z.nbytes > HARDLY * original_bytes:
        bits = 8 * z.dtype.itemsize
        notes.append(f"hardly shrinks: {z.bits_per_weight:.2f} of {bits} bits")
    if z.dtype != auto.BF16:
        notes.append(f"no fused kernel for {z.dtype}: decoded before it is multiplied")
    return "; ".join(notes)


def sizes_by_dtype(tensors: Iterable[TensorReport]) -> dict[str, dict[str, Any]]:
    """Tensors, bytes, ratio and bits per weight of each dtype, those that stay raw included; largest dtype first."""
    groups: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    sizes = {}
    for dtype, rows in sorted(groups.items(), key=lambda item: -sum(row.original_bytes for row in item[1])):
        original, stored = sum(row.original_bytes for row in rows), sum(row.stored_bytes for row in rows)
        sizes[dtype] = {
            "tensors": len(rows),
            "compressed": sum(row.format != "raw" for row in rows),
            "original_bytes": original,
            "stored_bytes": stored,
            "ratio": stored / max(original, 1),
            "bits_per_weight": 8 * stored / max(sum(row.size for row in rows), 1),
        }
    return sizes


def dense_report(path: str, leaf: Any, note: str) -> TensorReport:
    """The report of a leaf that stays as it is; it may have a dtype that NumPy does not know: a typed PRNG key's."""
    nbytes = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    return TensorReport(path, tuple(leaf.shape), str(leaf.dtype), "raw", nbytes, nbytes, None, note)
