"""The objects of clips, opened one ahead: while a clip decodes, the next one's bytes come in.

clips     a.0        a.1        b          c
take      opens a    has a      has b      has c          one source for all clips of a video,
prepare              b          c          d: next task   so its header is fetched once
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from vidbatch.data import Clip
from vidbatch.errors import StoreError
from vidbatch.storage import Source, Store, open_source

AHEAD = 2
"""Sources opened ahead: for the next clip of this task, and for the first of the next task."""

WHOLE_BYTES = 8 * 2**20
"""A video of at most so many bytes is fetched with one request, whatever is wanted of it."""
HEAD_BYTES = 2**18
"""Of a larger MP4: its header, or what says where that is, and hardly more than is wanted."""
STREAM_HEAD_BYTES = 2 * 2**20
"""Of any other: enough to tell its streams. It is read to the end anyway."""
MP4_NAMES = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2")


@dataclass(slots=True, eq=False)
class _Opened:
    key: tuple[str, str]
    source: Source
    bytes_told: int = 0
    gets_told: int = 0

    def spent(self) -> tuple[int, int]:
        """Bytes and requests since the last call."""
        total = self.source.bytes_read, self.source.gets
        found = total[0] - self.bytes_told, total[1] - self.gets_told
        self.bytes_told, self.gets_told = total
        return found


class Sources:
    """Sources of the videos of `store`, one under work and AHEAD opened ahead. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._now: _Opened | None = None
        self._ahead: dict[tuple[str, str], _Opened] = {}  # the oldest first
        self._unused = (0, 0)

    def take(self, clip: Clip) -> Source:
        """The source for a clip, valid until one for another video is taken.

        Raises:
            StoreError: a local file is gone or another one (stores say so on reading).
        """
        key = _key(clip)
        with self._lock:
            if self._now is None or self._now.key != key:
                opened = self._ahead.pop(key, None) or self._open(clip)
                if self._now is not None:
                    self._close(self._now)
                self._now = opened
            return self._now.source

    def prepare(self, clip: Clip) -> None:
        """Opens the source of a clip that comes soon and fetches its first bytes. Never waits."""
        key = _key(clip)
        with self._lock:
            if key in self._ahead or (self._now is not None and self._now.key == key):
                return
            try:
                self._ahead[key] = self._open(clip)
            except StoreError:
                return  # `take` will say so when the clip's turn comes
            while len(self._ahead) > AHEAD:
                self._close(self._ahead.pop(next(iter(self._ahead))))

    def spent(self) -> tuple[int, int]:
        """Bytes and requests since the last call: of the source under work, and of closed ones."""
        with self._lock:
            n_bytes, gets = self._now.spent() if self._now is not None else (0, 0)
            found = self._unused[0] + n_bytes, self._unused[1] + gets
            self._unused = (0, 0)
            return found

    def close(self) -> None:
        """Closes all sources."""
        with self._lock:
            for opened in (*self._ahead.values(), *([self._now] if self._now else ())):
                self._close(opened)
            self._ahead.clear()
            self._now = None

    def _open(self, clip: Clip) -> _Opened:
        video = clip.video
        source = open_source(
            self._store, video.uri, size_bytes=video.size_bytes, version=video.version
        )
        head_bytes = STREAM_HEAD_BYTES
        if clip.whole and video.size_bytes <= WHOLE_BYTES:
            head_bytes = WHOLE_BYTES
        elif video.uri.lower().endswith(MP4_NAMES) or not clip.whole:
            head_bytes = HEAD_BYTES
        if video.size_bytes:
            source.want([(0, min(head_bytes, video.size_bytes))])
        return _Opened(_key(clip), source)

    def _close(self, opened: _Opened) -> None:
        opened.source.close()
        n_bytes, gets = opened.spent()
        self._unused = self._unused[0] + n_bytes, self._unused[1] + gets


def _key(clip: Clip) -> tuple[str, str]:
    return clip.video.uri, clip.video.version
