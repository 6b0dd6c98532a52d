"""The files of a model: found in a folder or under a prefix, hashed, staged once per node.

    open_weights("s3://models/faces") ─▶ WeightStore: names, sizes
      .find(names, pinned)            ─▶ small files as bytes, large ones as WeightFile (no content)
    staged(weights, small)            ─▶ a folder with all of them, sha256 checked while reading

What is large is fetched where the model is loaded, by the first process of a node that needs it;
the others wait for it. Staged files lie by their sha256 in `cache_folder()` and outlive the run.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidbatch.data import digest
from vidbatch.errors import ModelError, NotFoundInStore, StoreError, UsageError
from vidbatch.storage import Entry, Store, StoreSettings, open_store

SMALL_BYTES = 2**20
"""Files up to this size travel with the job; larger ones as name, size and sha256 alone."""

_READ_BYTES = 32 * 2**20
"""Of one ranged read: a few requests a second on a fast network, little memory beside a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A file that is fetched where it is needed."""

    name: str
    """As the model knows it."""
    uri: str
    """Of its folder: an absolute path or s3://bucket/prefix; its key there is `name`."""
    size_bytes: int
    sha256: str
    store: StoreSettings = field(default_factory=StoreSettings)


class WeightStore:
    """The folder that holds a model's files, on disk or in a store.

    Args:
        names: look for these files alone; the folder may be any.

    Raises:
        UsageError: there is no such folder, or nothing in it (one of `names` missing is no error).
    """

    def __init__(
        self, uri: str, settings: StoreSettings, where: str, names: Iterable[str] | None = None
    ) -> None:
        self._store: Store = open_store(uri, settings)
        self._where = where
        self._local = "://" not in self._store.uri
        try:
            # what lies deeper is no part of a model: other formats, checkpoints of its training
            if names is None:
                found = [e for e in self._store.list() if not e.oddity and "/" not in e.key]
            else:
                found = [e for e in map(self._store.head, names) if e is not None and not e.oddity]
        except StoreError as error:
            raise UsageError(f"{where}: {error.message}") from error
        if not found and names is None:
            raise UsageError(f"{where}: {self._store.uri} holds no files; no model is there")
        self.entries: dict[str, Entry] = {e.key: e for e in found}

    @property
    def uri(self) -> str:
        """The folder, absolute."""
        return self._store.uri

    def read(self, name: str) -> bytes:
        """A whole file. Raises UsageError."""
        try:
            return self._store.get(name)
        except StoreError as error:
            raise UsageError(f"{self._where}: {error.message}") from error

    def find(
        self, names: Iterable[str], pinned: Mapping[str, Any]
    ) -> tuple[tuple[tuple[str, bytes], ...], tuple[WeightFile, ...]]:
        """(small files with their content, large ones) of those names, by name.

        The sha256 of a large file in a store is the pinned one, which is checked when it is staged:
        reading gigabytes to look at a job file would be too slow. On disk it is computed.

        Raises:
            UsageError: a large file in a store is not pinned, or cannot be read.
        """
        small, large = [], []
        for name in sorted(names):
            entry = self.entries[name]
            if entry.size_bytes <= SMALL_BYTES:
                small.append((name, self.read(name)))
                continue
            sha256 = str(pinned[name]).lower() if name in pinned else ""
            if self._local:
                sha256 = self._hash(entry)
            elif not sha256:
                raise UsageError(
                    f"{self._where}: {self._store.uri_of(name)} has no entry under `sha256:`, so a "
                    f"changed file would not be noticed; `vidbatch models fetch {self.uri}` prints "
                    "the hashes"
                )
            large.append(
                WeightFile(
                    name=name,
                    uri=self.uri,
                    size_bytes=entry.size_bytes,
                    sha256=sha256,
                    store=self._store.settings,
                )
            )
        return tuple(small), tuple(large)

    def hash(self, name: str) -> str:
        """The sha256 of a file, read to its end. Raises UsageError."""
        found = hashlib.sha256()
        try:
            for block in _blocks(self._store, self.entries[name]):
                found.update(block)
        except StoreError as error:
            raise UsageError(f"{self._where}: {error.message}") from error
        return found.hexdigest()

    def _hash(self, entry: Entry) -> str:
        """Of a file on disk, remembered by its place, size and time: it is read once, not at every
        look at a job file. What is staged is checked in any case."""
        key = digest([self._store.uri_of(entry.key), entry.version])
        memory = cache_folder() / "hashes" / key
        if memory.is_file() and len(known := memory.read_text()) == 64:
            return known
        found = self.hash(entry.key)
        with _replacing(memory) as file:
            file.write(found.encode())
        return found


@contextmanager
def staged(weights: Iterable[WeightFile], small: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with all files of a model, for as long as it is being loaded.

    Raises:
        ModelError: a file cannot be read (kind "weights_unreadable"), or is not the one that was
            planned (kind "weights_changed").
    """
    with tempfile.TemporaryDirectory(prefix="vidbatch-model-") as place:
        folder = Path(place)
        for name, content in small.items():
            (folder / name).write_bytes(content)
        for weight in weights:
            (folder / weight.name).symlink_to(stage_file(weight))
        yield folder


def stage_file(weight: WeightFile) -> Path:
    """Where this node has the file; fetches it if it is not here yet. Raises ModelError.

    A file on disk is checked and used where it lies.
    """
    try:
        if "://" not in weight.uri:
            path = Path(weight.uri, weight.name)
            _check(weight, str(path), _file_sha256(path))
            return path
        path = cache_folder() / "files" / weight.sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a node fetches, the others wait
            if not (path.is_file() and _file_sha256(path) == weight.sha256):
                _fetch(weight, path)
    except (OSError, StoreError) as error:
        text = error.message if isinstance(error, StoreError) else str(error)
        advice = (
            "loading is tried again while the run lasts"
            if "://" in weight.uri
            else "a path must be readable on every worker, else put the model into the object store"
        )
        raise ModelError(
            f"{weight.name} cannot be staged: {text}; {advice}",
            kind="weights_unreadable",
            advice=advice,
        ) from error
    return path


def _fetch(weight: WeightFile, path: Path) -> None:
    store = open_store(weight.uri, weight.store)
    entry = store.head(weight.name)
    if entry is None:
        raise NotFoundInStore(f"{store.uri_of(weight.name)} is not there", kind="not_found")
    found = hashlib.sha256()
    with _replacing(path) as file:
        for block in _blocks(store, entry):
            found.update(block)
            file.write(block)
        _check(weight, store.uri_of(weight.name), found.hexdigest())


def _check(weight: WeightFile, uri: str, found: str) -> None:
    if found != weight.sha256:
        advice = "bring the file back, or plan again with its new sha256"
        raise ModelError(
            f"{uri} is not the file that was planned: its sha256 is {found}, planned was "
            f"{weight.sha256}; the model is not loaded; {advice}",
            kind="weights_changed",
            advice=advice,
        )


def cache_folder() -> Path:
    """Where this node keeps staged files: $VIDBATCH_CACHE, else $XDG_CACHE_HOME/vidbatch, else
    ~/.cache/vidbatch, else (no home that can be written to) a folder of this user in /tmp."""
    if named := os.environ.get("VIDBATCH_CACHE"):
        return Path(named)
    home = os.path.expanduser("~/.cache")  # noqa: PTH111 - raises nothing where there is no home
    folder = Path(os.environ.get("XDG_CACHE_HOME") or home) / "vidbatch"
    with suppress(OSError):  # a read-only or missing home, as in many containers
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    return Path(tempfile.gettempdir()) / f"vidbatch-{os.getuid()}"


@contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A new file beside `path` that takes its place when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _blocks(store: Store, entry: Entry) -> Iterator[bytes]:
    for offset in range(0, entry.size_bytes, _READ_BYTES):
        yield store.read_at(entry.key, offset, _READ_BYTES, version=entry.version)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
