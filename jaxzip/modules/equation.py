"""Einsum equations of an input and a kernel as the axes of a dot_general."""

from __future__ import annotations

import dataclasses
import functools
import string


@dataclasses.dataclass(frozen=True)
class Product:
    """An equation as ``lax.dot_general`` and a transpose.

    Attributes:
      contract: ``(axes of x, axes of w)`` that are summed over.
      batch: ``(axes of x, axes of w)`` that both have and the result, too; in the order of the kernel's axes.
      output_order: the permutation that brings dot_general's result into the equation's order.
    """

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    output_order: tuple[int, ...]

    @property
    def dimension_numbers(self):
        return self.contract, self.batch


@functools.cache
def parse(equation: str, x_ndim: int, w_ndim: int) -> Product | None:
    """The product that ``equation`` is for an input and a kernel of these ranks; ``None`` if it is none.

    Args:
      equation: explicit ("...->..."); the input's part may have an ellipsis, which the result has, too.

    Raises:
      ValueError: the equation does not fit the ranks.
    """
    equation = equation.replace(" ", "")
    operands, arrow, out = equation.partition("->")
    if not arrow or operands.count(",") != 1:
        return None
    x, w = operands.split(",")
    if "..." in w:
        return None
    if "..." in x:
        spare = iter(c for c in string.ascii_letters if c not in equation)
        count = x_ndim - len(x.replace("...", ""))
        letters = "".join(next(spare) for _ in range(max(count, 0)))
        x, out = x.replace("...", letters), out.replace("...", letters)
    if len(x) != x_ndim or len(w) != w_ndim:
        raise ValueError(f"einsum {equation!r} does not fit an input of rank {x_ndim} and a kernel of rank {w_ndim}")
    if any(len(set(part)) != len(part) for part in (x, w, out)):
        return None
    batch = [c for c in w if c in x and c in out]
    contract = [c for c in w if c in x and c not in out]
    result = batch + [c for c in x if c not in w] + [c for c in w if c not in x]
    if sorted(result) != sorted(out):  # an index is summed over in one operand, or the result has an unknown one
        return None
    return Product(
        (tuple(map(x.index, contract)), tuple(map(w.index, contract))),
        (tuple(map(x.index, batch)), tuple(map(w.index, batch))),
        tuple(map(result.index, out)),
    )


def kernel_axes(equation: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """``(contract, batch)``: the kernel's axes that an equation sums over, and those that it keeps from both operands.

    ``None`` where no matrix product is seen from the equation alone.
    """
    operands, _, out = equation.replace(" ", "").partition("->")
    x, _, w = operands.partition(",")
    letters = x.replace("...", "")
    ellipsis = 1 if "..." in x else 0
    if "..." in w or len(set(letters)) != len(letters):
        return None
    product = parse(equation, len(letters) + ellipsis, len(w))
    if product is None or not product.contract[1] or len(product.contract[1]) + len(product.batch[1]) == len(w):
        return None
    return product.contract[1], product.batch[1]
