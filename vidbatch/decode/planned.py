"""Where a packet table is there: which frames of the clip are rows, and which packets they need."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from vidbatch.data import Clip, Sample
from vidbatch.decode.skipping import Gop
from vidbatch.decode.tally import IndexMismatchError, Mark, NumberedPackets, Shown
from vidbatch.errors import MediaError
from vidbatch.media import OpenVideo, PacketTable
from vidbatch.media.opening import READ_BYTES
from vidbatch.sampling import DEFAULT_RATE, take

GAP_BYTES = 2**20
"""Unwanted packets of fewer bytes are read with their neighbours: a request costs more."""
NEXT_BYTES = 8 * 2**20
"""Of the clip that comes next: fetched while this one decodes, so that it need not wait."""
SEEKS = 3
"""Times to look for a packet one keyframe further back before the table is given up."""


class Plan:
    """A clip's rows and packets, from the table of its whole video."""

    def __init__(
        self, table: PacketTable, clip: Clip, sample: Sample, context: bool, halo: int = 0
    ) -> None:
        self.table = table
        self._rule = (sample, context, halo)
        self._shown = table.pts[table.order]
        self._ticks = table.ticks
        n = len(self._ticks)
        step = int(self._ticks[-1] - self._ticks[-2]) if n > 1 else 0
        frame_s = step * table.time_base or 1 / (table.rate or DEFAULT_RATE)
        self.end = int(self._ticks[-1]) * table.time_base + frame_s
        """When the last frame of the video leaves the screen."""
        keyframes, first, last = table.keyframes, clip.first_keyframe, clip.end_keyframe
        inside = first < len(keyframes) and (last is None or first < last < len(keyframes))
        self.packets = slice(
            int(keyframes[first]) if inside and first else 0,
            int(keyframes[last]) if inside and last is not None else len(table.pts),
        )
        self.first_frame = self._frame_at(self.packets.start)
        self.end_frame = self._frame_at(self.packets.stop)
        """One past the clip's last frame."""
        expected = (clip.start_frame, n if clip.end_frame is None else clip.end_frame)
        if not inside or (self.first_frame, self.end_frame) != expected:
            raise MediaError(
                f"frames {expected} of the clip are {(self.first_frame, self.end_frame)} in the"
                " object; the clip is not written",
                kind="index_mismatch",
                advice="plan the video again",
            )
        taken = take(sample, self._ticks, table.time_base, table.keys, self.end)
        index = taken.frame_index
        lo, hi = (int(np.searchsorted(index, f)) for f in (self.first_frame, self.end_frame))
        beyond = min(hi + halo, len(index)) if hi > lo else hi
        self.rows = hi - lo
        """Sampled frames of the clip itself."""
        self.covers = dict(
            zip(index[lo:beyond].tolist(), taken.covers_s[lo:beyond].tolist(), strict=True)
        )
        """covers_s by frame_index: the rows of the clip, then its halo."""
        self._before = index[:lo].tolist() if context and hi > lo else []
        self.context: list[int] = self._before[-1:]
        """Sampled frames before the clip's first row: the last, or more if that was damaged."""
        self.ordinals = {int(index[i]): i for i in range(max(lo - 1, 0), beyond)}
        """frame_index → position among the video's samples."""
        self.reorders = bool((np.diff(table.pts) < 0).any())
        """Whether timestamps reorder pictures, which decode times in their place never do."""
        self.last_frame = int(index[beyond - 1]) + 1 if beyond > hi else self.end_frame
        """One past the last frame that is wanted, or the clip's."""
        self.stop = self.packets.stop
        """One past the last packet that may be read: those of the halo included."""
        if beyond > hi:
            closed = table.keyframes[table.closed_keyframes()]
            later = closed[np.searchsorted(self._shown, table.pts[closed]) >= self.last_frame]
            self.stop = int(later[0]) if len(later) else len(table.pts)

    def look_back(self) -> bool:
        """Wants eight times as many frames before the clip; whether there are more."""
        more = self._before[-8 * len(self.context) :] if self.context else []
        found = len(more) > len(self.context)
        last = len(self._before)
        self.context = more
        self.ordinals |= {more[-i]: last - i for i in range(1, len(more) + 1)}
        return found

    @property
    def origin_pts(self) -> int:
        """pts of frame 0."""
        return int(self._shown[0])

    def time_of(self, frame: int) -> float:
        """Seconds from frame 0; one past the last frame is when that leaves the screen."""
        if frame >= len(self._ticks):
            return float(self.end)
        return float(int(self._ticks[frame]) * self.table.time_base)

    def wanted(self, gop: Gop) -> dict[int, Shown]:
        """The wanted frames of a GOP by their packets' numbers, in display order.

        Raises:
            IndexMismatchError: a packet that the table gives a frame is not shown.
        """
        table = self.table
        places = sorted((int(table.ordinal[h.mark.number]), h.mark.number) for h in gop.held)
        if sum(i >= 0 for i, _ in places) != sum(h.shown for h in gop.held):
            raise IndexMismatchError
        return {
            n: Shown(
                index=i,
                pts=int(table.pts[n]),
                time=int(self._ticks[i]) * table.time_base,
                key=bool(table.key[n]),
                frame=None,
            )
            for i, n in places
            if i in self.covers or i in self.context
        }

    def segments(self) -> list[slice]:
        """Runs of packets that hold all wanted frames.

        Each begins at a closed keyframe (or packet 0); what lies between two of them is not read,
        unless it is little.
        """
        table = self.table
        closed = table.keyframes[table.closed_keyframes()]
        entries = np.append(0, closed[(closed > 0) & (closed < self.stop)])
        frames = np.searchsorted(self._shown, table.pts[entries])
        frames[0] = 0
        stops = np.append(entries[1:], self.stop)
        wanted = [*self.context, *self.covers]
        read = np.concatenate(([0], np.cumsum(table.size)))
        runs: list[slice] = []
        for i in np.unique(np.searchsorted(frames, wanted, side="right") - 1):
            start, stop = int(entries[i]), int(stops[i])
            if runs and read[start] - read[runs[-1].stop] < GAP_BYTES:
                runs[-1] = slice(runs[-1].start, stop)
            else:
                runs.append(slice(start, stop))
        return runs

    def extents(
        self, size_bytes: int, following: Clip | None, *, skip: bool
    ) -> list[tuple[int, int]]:
        """The bytes that decoding the clip reads of the object, in rising half-open ranges.

        Args:
            following: The clip decoded next; up to NEXT_BYTES of what it reads come last.
            skip: Whether only segments are read, not all from the beginning.
        """
        packets = self.segments() if skip else [slice(0, self.stop)]
        found = self._extents(packets, size_bytes)
        if following is None:
            return found
        try:
            later = Plan(self.table, following, *self._rule).extents(size_bytes, None, skip=True)
        except MediaError:
            return found  # it will be said when the clip's turn comes
        at, left = found[-1][1] if found else 0, NEXT_BYTES
        for start, stop in later:
            start, stop = max(start, at), min(stop, max(start, at) + left)
            if start < stop:
                found.append((start, stop))
                left -= stop - start
        return found

    def _extents(self, packets: list[slice], size_bytes: int) -> list[tuple[int, int]]:
        """Where these packets lie; gaps of less than GAP_BYTES are read with them."""
        if not packets:
            return []
        table = self.table
        chosen = np.concatenate([np.arange(s.start, s.stop) for s in packets])
        chosen = chosen[np.argsort(table.pos[chosen], kind="stable")]
        starts = table.pos[chosen]
        stops = np.maximum.accumulate(starts + table.size[chosen])
        cuts = np.flatnonzero(starts[1:] - stops[:-1] >= GAP_BYTES) + 1
        bounds = zip(
            starts[np.append(0, cuts)].tolist(),
            stops[np.append(cuts, len(stops)) - 1].tolist(),
            strict=True,
        )
        ranges = [(start, min(stop + READ_BYTES, size_bytes)) for start, stop in bounds]
        return [(start, stop) for start, stop in ranges if start < stop]

    def _frame_at(self, packet: int) -> int:
        """Frames shown before this packet's."""
        if packet >= len(self.table.pts):
            return len(self._shown)
        return int(np.searchsorted(self._shown, self.table.pts[packet])) if packet else 0


class Planned:
    """The Selection of a plan, for all frames from the first of the video."""

    def __init__(self, plan: Plan) -> None:
        self._wanted = plan.covers.keys() | set(plan.context)
        self._next = 0
        self._settled = list(plan.covers.items())

    @property
    def held(self) -> set[int]:
        """Nothing: all is decided."""
        return set()

    def push(self, time: Fraction, is_keyframe: bool) -> list[int]:
        """The next frame's index if it is a row or the context frame."""
        index = self._next
        self._next += 1
        return [index] if index in self._wanted else []

    def finish(self, end: Fraction) -> list[int]:
        """Nothing more."""
        return []

    def settle(self) -> list[tuple[int, float]]:
        """All rows with their covers_s, once."""
        settled, self._settled = self._settled, []
        return settled


def number_packets(
    video: OpenVideo, table: PacketTable | None, packets: slice | None
) -> NumberedPackets:
    """The packets of a range, numbered; by the table's positions where there is one.

    Raises:
        IndexMismatchError: what comes is not what the table says.
        StoreError: the bytes could not be had.
    """
    if table is None or packets is None:
        for number, packet in enumerate(video.packets()):
            yield Mark(number, packet.pts, packet.is_keyframe), packet
        return
    for number, packet in _located(video, table, packets.start):
        if number >= len(table.pts) or (packet.pts, packet.pos) != (
            int(table.pts[number]),
            int(table.pos[number]),
        ):
            raise IndexMismatchError
        if number >= packets.start:
            yield Mark(number, packet.pts, bool(table.key[number])), packet
        if number + 1 >= packets.stop:
            return
    raise IndexMismatchError


def _located(
    video: OpenVideo, table: PacketTable, first: int
) -> Iterator[tuple[int, Packet[VideoStream]]]:
    """(number, packet) from `first` or a little before it."""
    if first == 0:
        yield from enumerate(video.packets())
        return
    back = table.keyframes[table.keyframes <= first][::-1][: SEEKS + 1].tolist()
    for target in back:
        video.container.seek(int(table.pts[target]), stream=video.stream)
        number = -1
        for packet in video.packets():
            if number < 0:
                at = np.flatnonzero(table.pos == (packet.pos if packet.pos is not None else -1))
                number = int(at[0]) if len(at) else len(table.pts)
                if number > first:
                    break
            else:
                number += 1
            yield number, packet
        else:
            return
        continue
    raise IndexMismatchError
