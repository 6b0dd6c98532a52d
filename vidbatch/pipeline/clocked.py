"""A source whose reads count as reading, not as the decoding that asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidbatch.data import ByteSource
from vidbatch.progress import StageClock


class ClockedSource:
    """A `ByteSource` around another one, for the thread that the clock belongs to."""

    def __init__(self, inner: ByteSource, clock: StageClock) -> None:
        self._inner, self._clock = inner, clock
        self.size_bytes = inner.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """See `ByteSource.read_at`."""
        with self._clock.stage("read"):
            return self._inner.read_at(offset, length)

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """See `ByteSource.want`."""
        self._inner.want(extents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
