"""Any other store that fsspec knows (`memory://`, `gs://`, `abfs://`, …): enough to read archives.

Creating works where the file system honours `mode="create"`; `probe_create_only` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from vidbatch.errors import (
    ExistsInStore,
    ForbiddenByStore,
    NotFoundInStore,
    StoreError,
    UsageError,
)
from vidbatch.storage.base import (
    Entry,
    Store,
    StoreSettings,
    changed,
    check_put,
    persist,
    shown,
    utc,
)

_ETAGS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")


class AnyStore(Store):
    """Objects under a URL of fsspec; of the settings only `endpoint_url` is passed on."""

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        self.uri, self.settings = uri.rstrip("/"), settings

    def __reduce__(self) -> tuple[Any, ...]:
        return AnyStore, (self.uri, self.settings)

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        scheme = self.uri.partition("://")[0]
        url = self.settings.endpoint_url
        try:
            return fsspec.filesystem(
                scheme, use_listings_cache=False, **({"endpoint_url": url} if url else {})
            )
        except ImportError as error:
            raise UsageError(f"{self.uri}: {error}") from error
        except ValueError as error:
            raise UsageError(
                f"{self.uri}: no store is known for {scheme}:// — write s3://bucket/prefix, a path,"
                " or a URL that fsspec knows"
            ) from error

    def _path(self, key: str) -> str:
        return str(self._fs._strip_protocol(self.uri)).rstrip("/") + "/" + key

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`; holds one folder at a time."""
        folder, _, start = prefix.rpartition("/")
        return self._walk(f"{folder}/" if folder else "", start)

    def _walk(self, prefix: str, start: str) -> Iterator[Entry]:
        path = self._path(prefix).rstrip("/") or "/"
        try:
            found = self._ask(prefix, partial(self._fs.ls, path, detail=True))
        except NotFoundInStore:
            return
        names = []
        for info in found:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if info["type"] == "directory":
                names.append((f"{name}/", info))
            elif str(info["name"]).rstrip("/") != path:
                names.append((name, info))
        for name, info in sorted(names, key=lambda pair: pair[0].encode("utf-8", "surrogatepass")):
            if name.startswith(start):
                if name.endswith("/"):
                    yield from self._walk(prefix + name, "")
                else:
                    yield _entry(prefix + name, info)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        data: bytes = self._ask(key, lambda: self._fs.cat_file(self._path(key)))
        return data

    def head(self, key: str) -> Entry | None:
        """See `Store.head`."""
        try:
            info = self._ask(key, lambda: self._fs.info(self._path(key)))
        except NotFoundInStore:
            return None
        return None if info["type"] == "directory" else _entry(key, info)

    def metadata(self, key: str) -> dict[str, str]:
        """Always {}; NotFoundInStore when the object is not there."""
        self._ask(key, lambda: self._fs.info(self._path(key)))
        return {}

    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        """See `Store.read_at`; the version is compared before and after the read."""
        entry = self._seen(key, version)
        end = min(offset + length, entry.size_bytes)
        if end <= offset:
            return b""

        def read() -> bytes:
            data: bytes = self._fs.cat_file(self._path(key), start=offset, end=end)
            if len(data) != end - offset:
                what = f"the store sent {len(data)} of {end - offset} bytes"
                raise StoreError(f"{shown(self.uri_of(key))}: {what}", kind="short_body")
            return data

        data: bytes = self._ask(key, read)
        self._seen(key, version)
        return data

    def _seen(self, key: str, version: str | None) -> Entry:
        entry = self.head(key)
        if entry is None:
            raise NotFoundInStore(f"{shown(self.uri_of(key))} is not there", kind="not_found")
        if version not in (None, entry.version):
            raise changed(self.uri_of(key))
        return entry

    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        """See `Store.put_new`; the metadata are dropped."""
        check_put(self.uri_of(key), data, metadata)
        self._ask(key, lambda: self._fs.pipe_file(self._path(key), data, mode="create"))

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        if self.head(key) is not None:
            self._ask(key, lambda: self._fs.rm_file(self._path(key)))

    def _ask(self, key: str, call: Any) -> Any:
        def once() -> Any:
            try:
                return call()
            except (OSError, ValueError, NotImplementedError) as error:
                raise _translate(error, self.uri_of(key)) from error

        return persist(once)


def _entry(key: str, info: Mapping[str, Any]) -> Entry:
    etag = next((str(info[k]).strip('"') for k in _ETAGS if info.get(k)), None)
    said = next((info[k] for k in _TIMES if info.get(k)), 0)
    if isinstance(said, str):
        said = datetime.fromisoformat(said)
    seconds = said.timestamp() if isinstance(said, datetime) else float(said)
    mtime_ns = round(seconds * 10**6) * 1000
    return Entry(
        key=key,
        size_bytes=int(info["size"] or 0),
        etag=etag,
        modified_at=utc(mtime_ns),
        mtime_ns=mtime_ns,
    )


def _translate(error: Exception, uri: str) -> StoreError | ExistsInStore:
    why = " ".join(str(error).split()) or type(error).__name__
    uri = shown(uri)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundInStore(f"{uri} is not there", kind="not_found")
    if isinstance(error, FileExistsError):
        return ExistsInStore(f"{uri} exists: another attempt was first", kind="exists")
    if isinstance(error, PermissionError):
        return ForbiddenByStore(f"{uri}: {why}", kind="access_denied")
    if isinstance(error, TimeoutError | ConnectionError):
        return StoreError(f"{uri}: the store did not answer ({why})", kind="unreachable")
    return StoreError(f"{uri}: {why}", kind="refused")
