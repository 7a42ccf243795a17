"""``KernelRule``: a compression rule that also says how a kernel is used, for modules that do not say it themselves."""

from __future__ import annotations

import dataclasses

from jaxzip.modules import equation
from jaxzip.rules import CompressionRule


@dataclasses.dataclass(frozen=True)
class KernelRule(CompressionRule):
    """A CompressionRule for the weights of your own modules, which are multiplied by ``jaxzip.einsum``.

    Attributes:
      einsum: the equation that the weight is the second operand of, for instance ``"btd,dnh->btnh"``. The weight is
        stored so that this product runs fused; any other use decodes it first.
    """

    einsum: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.einsum is not None and equation.kernel_axes(self.einsum) is None:
            raise ValueError(
                f'KernelRule: {self.einsum!r} is no product of an input and a kernel; write it as "btd,dnh->btnh", '
                "the kernel second, with an index that is summed over and an index of output features"
            )

    @property
    def kernel_ndim(self) -> int:
        """Rank of the kernel in the equation."""
        return len(self.einsum.replace(" ", "").partition("->")[0].partition(",")[2])
