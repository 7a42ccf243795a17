"""What a long checkpoint operation tells its caller while it runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Progress:
    """A moment of a conversion, verification or restoration.

    Attributes:
      name: the tensor that was just finished ("" at the beginning).
      index, count: tensors finished, and in all.
      done_bytes, total_bytes: the same in bytes of the original.
      resumed_bytes: part of ``done_bytes`` that an earlier run had done.
      elapsed: seconds of this run.
    """

    name: str
    index: int
    count: int
    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    elapsed: float

    @property
    def bytes_per_second(self) -> float:
        return (self.done_bytes - self.resumed_bytes) / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go at this run's rate; ``None`` before anything was done."""
        rate = self.bytes_per_second
        return (self.total_bytes - self.done_bytes) / rate if rate else None


ProgressCallback = Callable[[Progress], None]


class Tracker:
    """Counts tensors and bytes and calls the callback, if there is one."""

    def __init__(self, callback: ProgressCallback | None, count: int, total_bytes: int):
        self._callback, self._count, self._total = callback, count, total_bytes
        self._index = self._done = self._resumed = 0
        self._start = time.monotonic()
        self._tell("")

    def advance(self, name: str, nbytes: int, *, resumed: bool = False) -> None:
        """One more tensor is finished."""
        self._index += 1
        self._done += nbytes
        self._resumed += nbytes if resumed else 0
        self._tell(name)

    def _tell(self, name: str) -> None:
        if self._callback is not None:
            elapsed = time.monotonic() - self._start
            self._callback(
                Progress(name, self._index, self._count, self._done, self._total, self._resumed, elapsed)
            )
