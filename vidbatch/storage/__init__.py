"""The only door to stores: list, pinned ranged reads, `put_new` (create-only), errors translated.

open_store("s3://bucket/prefix")  →  Store      base.py: the contract; local.py, s3.py, anyfs.py
probe_create_only(store)          →  verdict    probe.py: one winner per key, or refused
open_source(store, uri, …)        →  ByteSource source.py: read-ahead over one pinned object
"""

from __future__ import annotations

from vidbatch.storage.base import Entry, Store, StoreSettings
from vidbatch.storage.opening import open_store
from vidbatch.storage.probe import probe_create_only
from vidbatch.storage.source import Source, open_source

__all__ = [
    "Entry",
    "Source",
    "Store",
    "StoreSettings",
    "open_source",
    "open_store",
    "probe_create_only",
]
