"""A store as an fsspec file system, read-only: what DuckDB reads tables in buckets through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from vidbatch.errors import VidbatchError
from vidbatch.storage.base import Entry, Store

BLOCK_BYTES = 2**20
"""Read beyond what is asked for: footer and small columns of a file come in one request."""


class StoreFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The objects of one store as `vidbatch://<key>`; only for engines, which need this interface.

    A pattern is listed once, flat: by folders it would be a request per day and model. What was
    listed is remembered, with its version, so that an engine reads one state of each object: make
    a new one to see what came later.
    """

    protocol = "vidbatch"
    cachable = False

    def __init__(self, store: Store) -> None:
        super().__init__(skip_instance_cache=True)
        self.store = store
        self.failure: VidbatchError | None = None
        """What went wrong first: an engine passes on a traceback's text instead of the error."""
        self._entries: dict[str, Entry] = {}
        self._found: dict[str, list[str]] = {}

    def glob(self, path: str, **_: Any) -> list[str]:
        """Keys that match; `*` matches within one level."""
        pattern = self._key(path)
        if pattern not in self._found:
            parts = (".*" if p == "**" else "[^/]*" if p == "*" else re.escape(p)
                     for p in re.split(r"(\*+)", pattern))  # fmt: skip
            matches = re.compile("".join(parts)).fullmatch
            with self.remembering():
                entries = self.store.list(pattern.partition("*")[0])
                found = {e.key: e for e in entries if matches(e.key) and not e.oddity}
            self._entries.update(found)
            self._found[pattern] = list(found)
        return list(self._found[pattern])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and kind of one object. Raises FileNotFoundError."""
        entry = self._entry(path)
        return {"name": entry.key, "size": entry.size_bytes, "type": "file",
                "mtime": entry.modified_at}  # fmt: skip

    def modified(self, path: str) -> Any:
        """When the object was written."""
        return self._entry(path).modified_at

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Everything below a path, without levels."""
        keys = self.glob(f"{self._key(path).rstrip('/')}/**")
        return [self.info(key) for key in keys] if detail else keys

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Keeps the first error of the store in `failure`, and raises it."""
        try:
            yield
        except VidbatchError as error:
            self.failure = self.failure or error
            raise

    def _key(self, path: str) -> str:
        return str(self._strip_protocol(path)).lstrip("/")

    def _entry(self, path: str) -> Entry:
        key = self._key(path)
        with self.remembering():
            entry = self._entries.get(key) or self.store.head(key)
        if entry is None:
            raise FileNotFoundError(self.store.uri_of(key))
        self._entries[key] = entry
        return entry

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"{path}: tables are only read here")
        entry = self._entry(path)
        return _Object(
            self, entry.key, mode, block_size=BLOCK_BYTES, cache_type="readahead",
            size=entry.size_bytes,
        )  # fmt: skip


class _Object(AbstractBufferedFile):  # type: ignore[misc]
    """One object, read by ranges of the version that was listed."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        entry = self.fs._entry(self.path)
        with self.fs.remembering():
            data: bytes = self.fs.store.read_at(
                entry.key, start, end - start, version=entry.etag and entry.version
            )
        return data
