"""Rows on their way out: scaled, waiting for covers_s, gathered into bounded chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from vidbatch.data import DecodeLimits, Frames, Pixels
from vidbatch.decode.pixels import Scaler, orientation
from vidbatch.decode.tally import ContextLostError, Shown, Tally


@dataclass(slots=True, kw_only=True)
class _Row:
    index: int
    pts: int | None
    time_s: float
    key: bool
    corrupt: bool
    ordinal: int
    source_px: tuple[int, int]
    pixels: dict[str, Pixels]
    covers_s: float = 0.0


class RowBuffer:
    """Takes frames that are rows, gives Frames chunks; survives a change from skipping to plain.

    Rows of indices below `first` are context: the latest of them precedes the first row. Those
    from `end` on are halo.

    Args:
        ordinals: frame_index → position among the video's samples; None: they are counted.
    """

    def __init__(
        self,
        scaler: Scaler,
        limits: DecodeLimits,
        *,
        first: int,
        context: bool,
        end: int | None = None,
        ordinals: Mapping[int, int] | None = None,
    ) -> None:
        self._scaler = scaler
        self._first, self._end = first, end
        self._ordinals = ordinals
        self._context = context
        size = (
            limits.chunk_bytes // scaler.frame_bytes if scaler.frame_bytes else limits.chunk_frames
        )
        self._capacity = max(1, min(limits.chunk_frames, size) - context)
        self._rows: list[_Row] = []
        self._ready = 0
        self._covers: dict[int, float] = {}
        self._previous: _Row | None = None
        self._given = set[int]()
        self._last_given = -1
        self._kept = self._repeated = 0
        self.samples = 0
        """Of the video, up to the last frame added or found missing."""
        self.found = 0
        """Rows added since the start or `start_over`, those already given out among them."""
        self.announced = False
        """Whether the video's VideoInfo was given out."""

    def start_over(self, *, planned: bool) -> None:
        """The clip is decoded again from its beginning: what was given out is not given again."""
        self.samples = 0
        if not planned:
            self._ordinals = None
        self._rows.clear()
        self._covers.clear()
        self._ready = self._repeated = self.found = 0
        self._kept = len(self._given)

    @property
    def consistent(self) -> bool:
        """Whether all rows given out before `start_over` were rows again."""
        return self._repeated == self._kept

    def require_context(self) -> None:
        """Raises ContextLostError if no frame has come that precedes the first row."""
        if self._previous is None:
            raise ContextLostError

    def add(self, shown: Shown, tally: Tally) -> None:
        """A frame that is a row (or context, or halo); a hole is none."""
        frame = shown.frame
        ordinal = self.samples if self._ordinals is None else self._ordinals[shown.index]
        self.samples = max(self.samples, ordinal + 1)
        if frame is None:
            return
        if shown.index <= self._last_given:
            repeated = shown.index in self._given
            self._repeated += repeated
            self.found += repeated and (self._end is None or shown.index < self._end)
            return
        turn = orientation(frame)
        try:
            pixels = self._scaler.scale(frame, turn)
        except MemoryError:
            raise  # FFmpeg's is one of its errors too, but no damage
        except av.FFmpegError:
            tally.errors += 1
            return
        row = _Row(
            index=shown.index,
            pts=shown.pts,
            time_s=float(shown.time),
            key=shown.key,
            corrupt=shown.corrupt,
            ordinal=ordinal,
            source_px=turn.size(frame.width, frame.height),
            pixels=pixels,
        )
        if row.index < self._first:
            self._previous = row
        else:
            self._rows.append(row)
            self.found += self._end is None or row.index < self._end

    def settle(self, settled: Sequence[tuple[int, Fraction | float]]) -> None:
        """covers_s of rows, before or after they are added."""
        for index, covers in settled:
            self._covers[index] = float(covers)

    def chunks(self, *, end: bool = False) -> Iterator[Frames]:
        """Full chunks; at the end the rest too."""
        while self._ready < len(self._rows) and self._rows[self._ready].index in self._covers:
            row = self._rows[self._ready]
            row.covers_s = self._covers.pop(row.index)
            self._ready += 1
        while self._ready >= self._capacity or (end and self._ready):
            n = min(self._ready, self._capacity)
            rows, self._rows = self._rows[:n], self._rows[n:]
            self._ready -= n
            self._given.update(r.index for r in rows)
            self._last_given = rows[-1].index
            yield self._frames(rows)

    def _frames(self, rows: list[_Row]) -> Frames:
        context = self._context and self._previous is not None
        items = [self._previous, *rows] if context and self._previous is not None else rows
        self._previous = rows[-1]
        return Frames(
            frame_index=np.array([r.index for r in items], np.int64),
            pts=np.array([r.pts or 0 for r in items], np.int64),
            has_pts=np.array([r.pts is not None for r in items], np.bool_),
            time_s=np.array([r.time_s for r in items], np.float64),
            covers_s=np.array([r.covers_s for r in items], np.float64),
            is_keyframe=np.array([r.key for r in items], np.bool_),
            is_corrupt=np.array([r.corrupt for r in items], np.bool_),
            source_px=np.array([r.source_px for r in items], np.int64).reshape(-1, 2),
            ordinal=np.array([r.ordinal for r in items], np.int64),
            pixels={key: np.stack([r.pixels[key] for r in items]) for key in items[0].pixels},
            context=context,
            halo=0 if self._end is None else sum(r.index >= self._end for r in rows),
        )
