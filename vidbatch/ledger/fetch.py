"""Many small objects read side by side: latency, not work, is what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidbatch.storage import Store

READERS = 8
"""Requests under way; a store serves several threads."""


def fetch(store: Store, keys: Sequence[str], *, ahead: int = 64) -> Iterator[bytes]:
    """The bodies of `keys`, in their order, at most `ahead` of them in memory.

    Raises:
        StoreError: one of them cannot be had.
    """
    if len(keys) < READERS:  # not worth the threads
        yield from map(store.get, keys)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(keys), ahead):
            yield from pool.map(store.get, keys[start : start + ahead])
