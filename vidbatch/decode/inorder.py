"""The plain path: every packet is decoded, every frame gets its place. The truth others must equal.

A frame's index is its ordinal in display order; a packet the decoder failed on keeps its place (a
hole), so that damage never shifts what comes after it. With a packet table the index is the
table's. Without one it is the number of places before, and a packet that silently gives no frame
(an alt-ref, a packed picture, one that refers to what was before the file began) has no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

import av
from av.video.frame import VideoFrame

from vidbatch.decode.tally import (
    IndexMismatchError,
    Mark,
    NumberedPackets,
    Shown,
    Tally,
    VideoPacket,
)
from vidbatch.media import EntryRefusedError, Inspector, OpenVideo, PacketTable
from vidbatch.sampling import Clock


class Places(Protocol):
    """Gives places to frames as they come out, in display order."""

    def sent(self, mark: Mark, packet: VideoPacket) -> None:
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
    """Places without a packet table: those of the frames that come out and of failed packets.

    A packet that gives no frame in silence has a place only if it comes after one that the decoder
    failed on. Before the first frame all have, if it is the first picture that was damaged.

    Args:
        inspect: Where each packet is one picture: knows those that are not shown.
    """

    def __init__(self, inspect: Inspector | None) -> None:
        self._inspect = inspect
        self._next = 0
        self._failed = set[int]()
        self._holes = set[int]()
        self._waiting: dict[int, Mark] = {}
        self.due = set[int]()
        """Packets each of which is a picture that has to be shown and was not so far."""

    def sent(self, mark: Mark, packet: VideoPacket) -> None:
        """Waits for its frame, if it is a picture that is shown."""
        facts = None
        if self._inspect is not None:
            with suppress(EntryRefusedError):
                facts = self._inspect(bytes(packet))
        if not packet.is_discard and (facts is None or facts.shown):
            self._waiting[mark.number] = mark
            if facts is not None and not facts.leading:
                self.due.add(mark.number)

    def failed(self, mark: Mark) -> None:
        """What follows it may be lost with it."""
        self._failed.add(mark.number)

    def came(self, mark: Mark) -> list[tuple[int, Mark]] | None:
        """What was lost of the pictures shown before this one, then this one."""
        if mark.number in self._holes:
            return None
        self._waiting.pop(mark.number, None)
        self.due.discard(mark.number)
        passed = [m for m in self._waiting.values() if _before(m, mark)]
        for lost in passed:
            del self._waiting[lost.number]
        taken = self._taken(passed)
        self._holes.update(m.number for m in taken)
        if not self._next and not taken:
            self.due = {n for n in self.due if n > mark.number}
        return self._places([*taken, mark])

    def rest(self) -> list[tuple[int, Mark]]:
        """What was lost after the last frame."""
        return self._places(self._taken(list(self._waiting.values())))

    def _taken(self, passed: list[Mark]) -> list[Mark]:
        started = self._next > 0
        lost = [
            m.number
            for m in passed
            if m.number in self._failed or (not started and m.key and self._inspect is not None)
        ]
        if not lost:
            return []
        return sorted((m for m in passed if not started or m.number >= min(lost)), key=_display)

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

    def sent(self, mark: Mark, packet: VideoPacket) -> None:
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
        places.sent(mark, packet)
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
