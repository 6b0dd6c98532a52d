"""The plain path: every packet is decoded, every frame gets its place. The truth others must equal.

A frame's index is its ordinal in display order; a packet the decoder failed on keeps its place (a
hole), so that damage never shifts what comes after it. With a packet table the index is the table's.
Without one it is the number of places before, and a packet that silently gives no frame (an alt-ref,
a packed picture, a picture that refers to what was before the file began) has no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import av
from av.video.frame import VideoFrame

from vidbatch.decode.tally import IndexMismatchError, Mark, NumberedPackets, Shown, Tally
from vidbatch.media import OpenVideo, PacketTable
from vidbatch.sampling import Clock


class Numbering(Protocol):
    """Gives places to frames as they come out, in display order."""

    def sent(self, mark: Mark) -> None:
        """A packet goes into the decoder."""
        ...

    def failed(self, mark: Mark) -> None:
        """The decoder failed on it."""
        ...

    def came(self, mark: Mark) -> list[tuple[int, Mark]] | None:
        """A frame came out: holes that lie before it, then itself; None if its place is passed."""
        ...

    def rest(self) -> list[tuple[int, Mark]]:
        """Holes after the last frame."""
        ...


class CountedPlaces:
    """Places without a packet table."""

    def __init__(self) -> None:
        self._next = 0
        self._failed: dict[int, Mark] = {}
        self._leading: list[Mark] | None = []

    def sent(self, mark: Mark) -> None:
        if self._leading is not None:
            self._leading.append(mark)

    def failed(self, mark: Mark) -> None:
        self._failed[mark.number] = mark

    def came(self, mark: Mark) -> list[tuple[int, Mark]]:
        self._failed.pop(mark.number, None)
        holes = [m for m in self._failed.values() if _before(m, mark)]
        if self._leading is not None:
            if holes:
                # Nothing came out because the first picture was damaged: all were to be shown.
                holes = [m for m in self._leading if m.number != mark.number and _before(m, mark)]
            self._leading = None
        for hole in holes:
            self._failed.pop(hole.number, None)
        return self._places([*sorted(holes, key=_display), mark])

    def rest(self) -> list[tuple[int, Mark]]:
        return self._places(sorted(self._failed.values(), key=_display))

    def _places(self, marks: list[Mark]) -> list[tuple[int, Mark]]:
        first = self._next
        self._next += len(marks)
        return list(enumerate(marks, first))


class TablePlaces:
    """Places of a packet table, from frame `first` to before frame `end`."""

    def __init__(self, table: PacketTable, first: int, end: int) -> None:
        self._table = table
        self._next = first
        self._end = end

    def sent(self, mark: Mark) -> None:
        pass

    def failed(self, mark: Mark) -> None:
        pass

    def came(self, mark: Mark) -> list[tuple[int, Mark]] | None:
        index = int(self._table.ordinal[mark.number])
        if not self._next <= index < self._end:
            return None
        places = [*self._holes(index), (index, mark)]
        self._next = index + 1
        return places

    def rest(self) -> list[tuple[int, Mark]]:
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
    video: OpenVideo, packets: NumberedPackets, numbering: Numbering, clock: Clock, tally: Tally
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
        numbering.sent(mark)
        if packet.is_corrupt:
            damaged.add(mark.number)
        try:
            frames = video.decode(packet)
        except av.FFmpegError:
            tally.errors += 1
            numbering.failed(mark)
            continue
        yield from _place(frames, mark, damaged, numbering, clock, tally)
    if mark is not None:
        try:
            frames = video.decode(None)
        except av.FFmpegError:
            tally.errors += 1
            frames = []
        yield from _place(frames, mark, damaged, numbering, clock, tally)
    for index, hole in numbering.rest():
        tally.places = index + 1
        time = clock.time(hole.pts, index)
        yield Shown(index=index, pts=hole.pts, time=time, key=hole.key, frame=None)


def _place(
    frames: list[VideoFrame],
    sent: Mark,
    damaged: set[int],
    numbering: Numbering,
    clock: Clock,
    tally: Tally,
) -> Iterator[Shown]:
    for frame in frames:
        # A decoder that loses the mark gives one frame per packet: it is the latest packet's.
        mark = frame.opaque if isinstance(frame.opaque, Mark) else sent
        suspect = mark.number in damaged
        damaged.discard(mark.number)
        corrupt = tally.note(frame, suspect=suspect)
        places = numbering.came(mark)
        if places is None:
            if not tally.errors and not tally.corrupt:
                raise IndexMismatchError
            tally.corrupt += not corrupt
            continue
        for index, place in places:
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
