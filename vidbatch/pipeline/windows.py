"""Frames of a clip → temporal windows on a grid that is anchored at the video.

samples     0  1  2  3  4  5  6  7  8  9         2 frames, stride 2, hop 3
window 0    █     █                              window k begins at sample k·hop
window 1             █     █
window 2                      █     █
clips       A ──────── ▏ B ────────────          window 1 is A's, for it begins there:
                         ░  ░                    A also gets the samples ░, its halo
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from vidbatch.data import Frames, Ints, WindowGrid, Windows, chunk_rows


class WindowCutter:
    """Makes the windows that begin in one clip out of its chunks of frames.

    A window with a frame that cannot be decoded is left out.

    Args:
        geometries: keys of the pixels that windows carry.
    """

    def __init__(self, grid: WindowGrid, geometries: Collection[str]) -> None:
        self._grid, self._geometries = grid, frozenset(geometries)
        self._parts: deque[Frames] = deque()
        self._starts: deque[int] = deque()
        """Samples that windows not yet cut begin with."""
        self._seen = 0
        """Samples looked at, from the beginning of the video."""

    def feed(self, frames: Frames) -> Windows | None:
        """Takes a chunk, halo and all; the windows that are complete with it."""
        if not len(frames):
            return None
        own = frames.ordinal[chunk_rows(frames)]
        self._starts.extend(own[own % self._grid.step == 0].tolist())
        self._parts.append(frames)
        self._seen = int(frames.ordinal[-1]) + 1
        due = []
        while self._starts and self._starts[0] + self._grid.span <= self._seen:
            due.append(self._samples_of(self._starts.popleft()))
        return self._cut(due)

    def finish(self, samples: int) -> Windows | None:
        """The one window of a video that is shorter than it, its last frame repeated.

        Args:
            samples: that were looked at from the beginning of the video, halo included.
        """
        samples = max(samples, self._seen)
        if not self._starts or self._starts[0] != 0 or samples >= self._grid.span:
            return None
        self._starts.clear()
        return self._cut([np.minimum(self._samples_of(0), samples - 1)])

    def _samples_of(self, start: int) -> Ints:
        return start + np.arange(self._grid.frames, dtype=np.int64) * self._grid.stride

    def _cut(self, windows: Sequence[Ints]) -> Windows | None:
        """The windows whose samples are all here; what no later one needs is let go."""
        here = np.concatenate([p.ordinal[int(p.context) :] for p in self._parts])
        whole = [w for w in windows if np.isin(w, here).all()]
        found = None
        if whole:
            used = np.unique(np.stack(whole))
            parts = [
                p.pick(np.flatnonzero(np.isin(p.ordinal, used) & _not_context(p)), self._geometries)
                for p in self._parts
            ]
            items = np.searchsorted(used, np.stack(whole))
            found = Windows(frames=Frames.join(parts), items=items)
        needed = self._starts[0] if self._starts else self._seen
        while self._parts and int(self._parts[0].ordinal[-1]) < needed:
            self._parts.popleft()
        return found


def _not_context(frames: Frames) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """All items but the context frame, which the chunk before has too."""
    return np.arange(len(frames)) >= int(frames.context)
