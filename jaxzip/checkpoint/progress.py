"""How a long checkpoint operation tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

#: ``callback(done_bytes, total_bytes, tensor)`` in bytes of the original; ``tensor`` was just finished. The first call
#: has no tensor and, after an interruption, the bytes that earlier runs had done, so that a rate can be told from them.
ProgressCallback = Callable[[int, int, str], None]


class Tracker:
    """Counts bytes and calls the callback, if there is one."""

    def __init__(self, callback: ProgressCallback | None, total_bytes: int, done_bytes: int = 0):
        self._callback, self._total, self._done = callback, total_bytes, done_bytes
        self.advance("", 0)

    def advance(self, name: str, nbytes: int) -> None:
        """One more tensor is finished."""
        self._done += nbytes
        if self._callback is not None:
            self._callback(self._done, self._total, name)
