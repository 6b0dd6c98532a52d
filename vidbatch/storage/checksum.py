"""Whether the bytes that came are those that the store holds, by the etag that came with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

_MD5 = re.compile("[0-9a-f]{32}")

_is_md5: dict[str, bool] = {}
"""Bucket → whether etags that look like MD5 are; the first that can be told decides."""
_seen_other: set[tuple[str, bytes]] = set()
"""Etags, and what came under them instead."""


def is_damaged(bucket: str, data: bytes, answer: Mapping[str, Any]) -> bool:
    """Whether a whole object came with a bit changed, so that it should be read again.

    Most etags are the MD5 of their object. Where one is not, the bytes come a second time as they
    came the first: they are what the store has. If that is how a bucket begins, its etags are
    something else and are asked no more.

    Args:
        answer: of GetObject.
    """
    etag, found = answer["ETag"].strip('"'), hashlib.md5(data, usedforsecurity=False)
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256"
    if encrypted or not _MD5.fullmatch(etag) or not _is_md5.get(bucket, True):
        return False
    if found.hexdigest() == etag:
        _is_md5[bucket] = True
        return False
    if (etag, found.digest()) in _seen_other:
        _is_md5.setdefault(bucket, False)
        return False
    _seen_other.add((etag, found.digest()))
    return True
