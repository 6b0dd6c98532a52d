"""Local disk as a store: listing by scandir, pinned reads by pread, create-only by hard link.

put_new:  write <root>/_vidbatch/tmp/<random> → fsync → link to the name → fsync its folder
                                                         │
                                                         └─ atomic, fails if the name is taken
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from vidbatch.errors import (
    ExistsInStore,
    ForbiddenByStore,
    NotFoundInStore,
    StoreError,
)
from vidbatch.storage.base import (
    DEFAULTS,
    Entry,
    Oddity,
    Store,
    StoreSettings,
    changed,
    check_put,
    shown,
    utc,
)

TMP = "_vidbatch/tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalStore(Store):
    """Files under one folder. Keeps no metadata: the object itself has to say what it is."""

    def __init__(self, folder: str, settings: StoreSettings = DEFAULTS) -> None:
        self.uri = os.path.abspath(os.path.expanduser(folder))  # noqa: PTH100, PTH111
        self.settings = settings

    def path_of(self, key: str) -> str:
        """The file of a key. Raises ValueError for a key that would leave the root."""
        if ".." in key.split("/") or "\0" in key:
            raise ValueError(f"{key!r} is not a key")
        return self.uri_of(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`. Links are followed, each folder at most once on any path."""
        folder, _, start = prefix.rpartition("/")
        path = self.path_of(folder) if folder else self.uri
        return self._walk(path, f"{folder}/" if folder else "", start, ())

    def _walk(
        self, path: str, prefix: str, start: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[Entry]:
        try:
            here = os.stat(path)  # noqa: PTH116
            if (here.st_dev, here.st_ino) in above:
                yield _odd(prefix, "link_loop")
                return
            with os.scandir(path) as items:  # names only: a folder may hold a million
                names = [i.name + ("/" if _is_folder(i) else "") for i in items]
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            yield _odd(prefix, "unreadable")
            return
        except OSError as error:
            raise _translate(error, path) from error
        names.sort(key=os.fsencode)  # with the slash on: the order of the keys, as S3 has it
        for name in names:
            if not name.startswith(start):
                continue
            if name.endswith("/"):
                above_it = (*above, (here.st_dev, here.st_ino))
                yield from self._walk(f"{path}/{name[:-1]}", prefix + name, "", above_it)
            else:
                entry = _entry(f"{path}/{name}", prefix + name)
                if entry is not None:
                    yield entry

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        with OpenFile(self.path_of(key), None) as file:
            return file.read_at(0, file.size_bytes)

    def head(self, key: str) -> Entry | None:
        """See `Store.head`; None also for folders and special files."""
        entry = _entry(self.path_of(key), key)
        return None if entry is None or entry.oddity else entry

    def metadata(self, key: str) -> dict[str, str]:
        """Always {}; NotFoundInStore when the file is not there."""
        if self.head(key) is None:
            raise _translate(FileNotFoundError(errno.ENOENT, "not there"), self.path_of(key))
        return {}

    def read_at(self, key: str, offset: int, length: int, *, version: str | None = None) -> bytes:
        """See `Store.read_at`."""
        with OpenFile(self.path_of(key), version) as file:
            return file.read_at(offset, length)

    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        """See `Store.put_new`; the metadata are dropped."""
        path = self.path_of(key)
        check_put(path, data, metadata)
        try:
            if os.path.lexists(path) or not self._create(path, data):
                raise ExistsInStore(
                    f"{shown(path)} exists: another attempt was first", kind="exists"
                )
        except OSError as error:
            raise _translate(error, path) from error

    def _create(self, path: str, data: bytes) -> bool:
        """False when somebody else was first."""
        folder = Path(self.uri) / TMP
        _make_folder(folder)
        _make_folder(Path(path).parent)
        tmp = folder / uuid.uuid4().hex
        try:
            with tmp.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(tmp, path)
            except FileExistsError:
                return False
        finally:
            tmp.unlink(missing_ok=True)
        _sync_folder(Path(path).parent)
        return True

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        path = self.path_of(key)
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            raise _translate(error, path) from error


class OpenFile:
    """One open regular file, pinned to a version; reads by `pread`, from any thread.

    Raises:
        SourceChanged: on opening or reading, when size or mtime are not those of `version`.
    """

    def __init__(self, path: str, version: str | None) -> None:
        self.path, self.version = path, version
        try:  # not blocking: opening a fifo without a writer would wait for ever
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _translate(error, path) from error
        try:
            self._check()
        except StoreError:
            self.close()
            raise

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        seen = os.fstat(self._file)
        self.size_bytes = seen.st_size
        if not stat.S_ISREG(seen.st_mode):
            raise NotFoundInStore(f"{shown(self.path)} is not a file", kind="not_regular")
        if self.version not in (None, f"{seen.st_size}-{seen.st_mtime_ns}"):
            raise changed(self.path)

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, min(offset + length, size)). Raises SourceChanged, StoreError."""
        pieces: list[bytes] = []
        try:
            while length > 0:  # one pread gives 2 GiB at most
                piece = os.pread(self._file, length, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
        except OSError as error:
            raise _translate(error, self.path) from error
        self._check()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Closes the file; a second time is allowed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _entry(path: str, key: str) -> Entry | None:
    try:
        seen = os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return _odd(key, "broken_link") if os.path.islink(path) else None  # noqa: PTH114
    except OSError as error:
        if error.errno == errno.ELOOP:
            return _odd(key, "link_loop")
        if isinstance(error, PermissionError):
            return _odd(key, "unreadable")
        raise _translate(error, path) from error
    return Entry(
        key=key,
        size_bytes=seen.st_size,
        etag=None,
        modified_at=utc(seen.st_mtime_ns),
        mtime_ns=seen.st_mtime_ns,
        oddity="" if stat.S_ISREG(seen.st_mode) else "not_regular",
    )


def _odd(key: str, oddity: Oddity) -> Entry:
    return Entry(key=key, size_bytes=0, etag=None, modified_at=utc(0), mtime_ns=0, oddity=oddity)


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads in a circle, or where this user may not look
        return False


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _translate(error: OSError, path: str) -> StoreError:
    why = error.strerror or str(error)
    path = shown(path)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundInStore(f"{path} is not there", kind="not_found")
    if error.errno in _NO_LINKS and error.filename2 is not None:
        advice = "use a disk with hard links, or an S3 store"
        return StoreError(
            f"{path}: this disk makes no hard links ({why}), so nothing can be created"
            f" without a race — {advice}",
            kind="no_links",
            advice=advice,
        )
    if error.errno == errno.EXDEV:
        advice = "keep the output on one disk"
        return StoreError(
            f"{path} lies on another disk than the output's {TMP} — {advice}",
            kind="other_disk",
            advice=advice,
        )
    if isinstance(error, PermissionError):
        advice = "give this user the right, or run as its owner"
        return ForbiddenByStore(f"{path}: {why} — {advice}", kind="access_denied", advice=advice)
    if error.errno in _FULL:
        advice = "free some room and submit the same command"
        return StoreError(
            f"{path} was not written: {why} — {advice}", kind="disk_full", advice=advice
        )
    return StoreError(f"{path}: {why}", kind="io_error")
