"""Proves that a store honours create-only, which the whole commit protocol stands on."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vidbatch.errors import ExistsInStore, RefusedError
from vidbatch.storage.base import Store

PROBE = "_vidbatch/probe"
WRITERS = 16
RACES = 3
"""A race without a winner (each PUT's answer was lost and sent again) is run again."""


def probe_create_only(store: Store) -> dict[str, Any]:
    """Creates an object twice, then races WRITERS threads for one name; leaves both objects.

    Returns:
        {"create_only": True, "second_put": "refused", "writers": 16, "winners": 1}, for JSON.

    Raises:
        RefusedError: the store let an object be overwritten, or had several winners.
        StoreError: the store failed otherwise.
    """
    name = f"{PROBE}/{uuid.uuid4().hex}"
    _put(store, f"{name}-twice", b"first")
    if _put(store, f"{name}-twice", b"second") or store.get(f"{name}-twice") != b"first":
        raise _refused(store, "let a second PUT of one name through")
    for race in range(RACES):
        key = f"{name}-race-{race}"
        bodies = [b"writer %d" % i for i in range(WRITERS)]
        barrier = threading.Barrier(WRITERS)

        def write(body: bytes, key: str = key, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return _put(store, key, body)

        with ThreadPoolExecutor(WRITERS) as pool:
            won = [body for body, w in zip(bodies, pool.map(write, bodies), strict=True) if w]
        if len(won) > 1 or (won and store.get(key) != won[0]):
            raise _refused(store, f"gave {len(won)} of {WRITERS} writers of one name the win")
        if won:
            return {
                "create_only": True,
                "second_put": "refused",
                "writers": WRITERS,
                "winners": len(won),
            }
    raise _refused(store, f"gave no writer of one name the win in {RACES} races")


def _put(store: Store, key: str, body: bytes) -> bool:
    try:
        store.put_new(key, body)
    except ExistsInStore:
        return False
    return True


def _refused(store: Store, what: str) -> RefusedError:
    advice = "use a store that honours If-None-Match on PUT (S3, Ceph, MinIO, R2, a local disk)"
    return RefusedError(
        f"{store.uri} {what}, so two runs could overwrite each other's rows; nothing is written"
        f" there — {advice}",
        kind="no_create_only",
        advice=advice,
    )
