"""URI → store."""

from __future__ import annotations

import re

from vidbatch.errors import UsageError
from vidbatch.storage.base import DEFAULTS, Store, StoreSettings
from vidbatch.storage.local import LocalStore


def open_store(uri: str, settings: StoreSettings = DEFAULTS) -> Store:
    """The store of a URI; nothing is connected or checked before the first request.

    Args:
        uri: `s3://bucket/prefix` (also s3a, s3n), a local path (`~` is expanded, `file://` may
            stand before it, nothing is unquoted), or any URL that fsspec knows.

    Raises:
        UsageError: the URI names no store.
    """
    scheme, found, rest = uri.partition("://")
    if not found:
        if not uri:
            raise UsageError("an empty URI names no store — give a path or s3://bucket/prefix")
        return LocalStore(uri, settings)
    if scheme == "file":
        return LocalStore(rest.removeprefix("localhost"), settings)
    if scheme in ("s3", "s3a", "s3n"):
        from vidbatch.storage.s3 import S3Store

        bucket, _, prefix = rest.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", bucket):
            raise UsageError(f"{uri} names no bucket — write s3://bucket/prefix")
        return S3Store(bucket, prefix.rstrip("/"), settings)
    from vidbatch.storage.anyfs import AnyStore

    return AnyStore(uri, settings)
