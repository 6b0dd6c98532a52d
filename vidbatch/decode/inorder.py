"""The plain path: every packet is decoded, every frame gets its place. The truth others must equal.

A frame's index is its ordinal in display order; a packet the decoder failed on keeps its place (a
hole), so that damage never shifts what comes after it. With a packet table the index is the
table's. Without one it is the number of places before, and a packet that silently gives no frame
(an alt-ref, a packed picture, one that refers to what was before the file began) has no place.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

import av
from av.video.frame import VideoFrame

from vidbatch.decode.tally import IndexMismatchError, Mark, NumberedPackets, Shown, Tally
from vidbatch.media import OpenVideo, PacketTable
from vidbatch.sampling import Clock


class Places(Protocol):
    """Gives places to frames as they come out, in display order."""

    def sent(self, mark: Mark) -> None:
        """Takes note: this packet goes into the decoder."""
        ...

    def failed(self, mark: Mark) -> None:
        """Takes note: the decoder failed on this packet."""
        ...

    def came(self, mark: Mark) -> list[tuple[int, Mark]] | None:
        """A frame came out: holes that lie before it, then itself; None if its place is passed."""
        ...

    def rest(self) -> list[tuple[int, Mark]]:
        """Holes after the last frame."""
        ...


class CountedPlaces:
    """Places without a packet table: as many as there were frames and failed packets before."""

    def __init__(self) -> None:
        self._next = 0
        self._failed: dict[int, Mark] = {}
        self._order: list[tuple[bool, int, int]] = []
        self._leading: list[Mark] | None = []

    def sent(self, mark: Mark) -> None:
        """Keeps what goes in until the first frame is out."""
        if self._leading is not None:
            self._leading.append(mark)

    def failed(self, mark: Mark) -> None:
        """Keeps a packet that may turn out to be a hole."""
        self._failed[mark.number] = mark
        heapq.heappush(self._order, _display(mark))

    def came(self, mark: Mark) -> list[tuple[int, Mark]]:
        """Failed packets that should have been shown before this one, then this one."""
        self._failed.pop(mark.number, None)
        holes = []
        while self._order:
            failed = self._failed.get(self._order[0][-1])
            if failed is not None and not _before(failed, mark):
                break
            heapq.heappop(self._order)
            if failed is not None:
                holes.append(self._failed.pop(failed.number))
        if self._leading is not None:
            if holes:
                # Nothing came out because the first picture was damaged: all were to be shown.
                holes = [m for m in self._leading if m.number != mark.number and _before(m, mark)]
                holes.sort(key=_display)
            self._leading = None
        return self._places([*holes, mark])

    def rest(self) -> list[tuple[int, Mark]]:
        """Failed packets after the last frame."""
        return self._places(sorted(self._failed.values(), key=_display))

    def _places(self, marks: list[Mark]) -> list[tuple[int, Mark]]:
        first = self._next
        self._next += len(marks)
        return list(enumerate(marks, first))


class TablePlaces:
    """Places of a packet table, from frame 0 to before frame `end`."""

    def __init__(self, table: PacketTable, end: int) -> None:
        self._table = table
        self._next = 0
        self._end = end

    def sent(self, mark: Mark) -> None:
        """Nothing: the table knows."""

    def failed(self, mark: Mark) -> None:
        """Nothing: what does not come out is a hole."""

    def came(self, mark: Mark) -> list[tuple[int, Mark]] | None:
        """Frames of the table that did not come out before this one, then this one."""
        index = int(self._table.ordinal[mark.number])
        if not self._next <= index < self._end:
            return None
        places = [*self._holes(index), (index, mark)]
        self._next = index + 1
        return places

    def rest(self) -> list[tuple[int, Mark]]:
        """Frames of the table after the last one that came out."""
        return self._holes(self._end)

    def _holes(self, until: int) -> list[tuple[int, Mark]]:
        table = self._table
        numbers = table.order[self._next : until].tolist()
        marks = [Mark(n, int(table.pts[n]), bool(table.key[n])) for n in numbers]
        return list(enumerate(marks, self._next))


def _before(one: Mark, other: Mark) -> bool:
    if one.pts is None or other.pts is None:
        return one.number < other.number
    return one.pts < other.pts


def _display(mark: Mark) -> tuple[bool, int, int]:
    return (mark.pts is None, mark.pts or 0, mark.number)


def decode_in_order(
    video: OpenVideo, packets: NumberedPackets, places: Places, clock: Clock, tally: Tally
) -> Iterator[Shown]:
    """Decodes every packet; yields one Shown per place, in display order.

    Raises:
        IndexMismatchError: sound frames come out in another order than the packet table says.
        StoreError: the bytes could not be had.
    """
    damaged: set[int] = set()
    mark = None
    for mark, packet in packets:
        tally.packets += 1
        tally.shown += not packet.is_discard
        packet.opaque = mark
        places.sent(mark)
        if packet.is_corrupt:
            damaged.add(mark.number)
        try:
            frames = video.decode(packet)
        except av.FFmpegError:
            tally.errors += 1
            if not packet.is_discard:
                places.failed(mark)
            continue
        yield from _place(frames, mark, damaged, places, clock, tally)
    if mark is not None:
        try:
            frames = video.decode(None)
        except av.FFmpegError:
            tally.errors += 1
            frames = []
        yield from _place(frames, mark, damaged, places, clock, tally)
    for index, hole in places.rest():
        tally.places = index + 1
        time = clock.time(hole.pts, index)
        yield Shown(index=index, pts=hole.pts, time=time, key=hole.key, frame=None)


def _place(
    frames: list[VideoFrame],
    sent: Mark,
    damaged: set[int],
    places: Places,
    clock: Clock,
    tally: Tally,
) -> Iterator[Shown]:
    for frame in frames:
        # A decoder that loses the mark gives one frame per packet: it is the latest packet's.
        mark = frame.opaque if isinstance(frame.opaque, Mark) else sent
        suspect = mark.number in damaged
        damaged.discard(mark.number)
        corrupt = tally.note(frame, suspect=suspect)
        passed = places.came(mark)
        if passed is None:
            if not tally.errors and not tally.corrupt:
                raise IndexMismatchError
            tally.corrupt += not corrupt
            continue
        for index, place in passed:
            own = place is mark
            tally.places = index + 1
            pts = frame.pts if own else place.pts
            yield Shown(
                index=index,
                pts=pts,
                time=clock.time(pts, index),
                key=place.key,
                frame=frame if own else None,
                corrupt=own and corrupt,
            )
