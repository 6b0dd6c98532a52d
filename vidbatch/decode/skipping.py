"""The quick path: decodes of each group of pictures (GOP) only what wanted frames need.

A GOP runs from a packet that the bitstream says decoding can start at, with nothing shown across
that border, to the next such packet. Its packets are held until the next one is there: then the
times of all its frames are known, and so is which of them are rows. GOPs without a row are not
decoded; of others the packets up to the last wanted one, without those nothing refers to.

What makes it exact is checked, not assumed: frames carry the number of their packet, the first one
after a fresh start is the GOP's first, pts are those of the packets, all wanted frames come, undamaged.
Whatever differs ends the quick path (SkippingFailedError) and the clip is decoded in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import av
from av.video.frame import VideoFrame

from vidbatch.decode.tally import (
    Mark,
    NumberedPackets,
    Selection,
    Shown,
    SkippingFailedError,
    Tally,
    VideoPacket,
)
from vidbatch.media import Facts, Inspector, OpenVideo
from vidbatch.sampling import Clock

MAX_HELD_BYTES = 64 * 2**20
MAX_HELD_PACKETS = 20_000
"""A GOP beyond these is not held: it is a video with next to no keyframes, decoded in order."""


class _Held(NamedTuple):
    mark: Mark
    pts: int
    packet: VideoPacket
    facts: Facts
    shown: bool


class _Gop:
    """Packets of one group, in decode order."""

    def __init__(self, first: _Held) -> None:
        self.held = [first]
        self.nbytes = first.packet.size
        self.last_pts = first.pts
        self.reorders = False

    def add(self, held: _Held) -> None:
        self.held.append(held)
        self.nbytes += held.packet.size
        self.reorders |= held.pts < self.last_pts
        self.last_pts = max(self.last_pts, held.pts)
        if held.pts < self.held[0].pts:
            raise SkippingFailedError("timestamps step back past a keyframe")
        if self.nbytes > MAX_HELD_BYTES or len(self.held) > MAX_HELD_PACKETS:
            raise SkippingFailedError("keyframes are too far apart to hold what lies between")


def decode_wanted(
    video: OpenVideo,
    packets: NumberedPackets,
    inspect: Inspector,
    selection: Selection,
    clock: Clock,
    first_index: int,
    tally: Tally,
) -> Iterator[Shown]:
    """Decodes what `selection` takes; yields these frames, in display order.

    Args:
        first_index: frame_index of the first frame of `packets`.

    Raises:
        SkippingFailedError: decode in order instead; what was yielded is right.
        StoreError: the bytes could not be had.
    """
    runner = _Runner(video, tally)
    index, taken, ahead = first_index, set[int](), 0
    for gop, following in _gops(packets, inspect, tally):
        places = sorted((h for h in gop.held if h.shown), key=lambda h: h.pts)
        if any(a.pts == b.pts for a, b in pairwise(places)):
            raise SkippingFailedError("timestamps repeat")
        shown = {}
        for i, held in enumerate(places, index):
            time = clock.time(held.pts, i) if i >= index + ahead else clock.largest
            if i >= index + ahead:
                taken.update(selection.push(time, held.mark.key))
            shown[held.mark.number] = Shown(
                index=i, pts=held.pts, time=time, key=held.mark.key, frame=None
            )
        if following is not None:
            end = index + len(places)
            taken.update(selection.push(clock.time(following.pts, end), following.mark.key))
            ahead = 1
        else:
            taken.update(selection.finish(clock.largest + clock.frame_s))
        wanted = {n: s for n, s in shown.items() if s.index in taken}
        taken -= {s.index for s in wanted.values()}
        index += len(places)
        tally.places = index
        yield from runner.decode(gop, wanted)
    yield from runner.drain()


def _gops(
    packets: NumberedPackets, inspect: Inspector, tally: Tally
) -> Iterator[tuple[_Gop, _Held | None]]:
    """Each GOP with the first packet of the next one, which is its first shown too."""
    gop: _Gop | None = None
    entry: _Held | None = None
    for mark, packet in packets:
        tally.packets += 1
        facts = inspect(bytes(packet))
        if facts is None:
            raise SkippingFailedError("a packet is not one whole picture")
        if packet.is_corrupt:
            raise SkippingFailedError("a packet is damaged", entry_holds=True)
        if mark.pts is None:
            if facts.shown:
                raise SkippingFailedError("timestamps are missing")
            mark = mark._replace(pts=gop.last_pts if gop else 0)
        pts = mark.pts or 0
        held = _Held(mark, pts, packet, facts, facts.shown and not packet.is_discard)
        if gop is None:
            if not facts.entry:
                raise SkippingFailedError("the first packet is no keyframe")
            gop = _Gop(held)
            continue
        if entry is not None:
            # Only now is it known that nothing is shown before the keyframe.
            if pts > entry.pts:
                yield gop, entry
                gop = _Gop(entry)
            else:
                gop.add(entry)
            entry = None
        if facts.entry and held.shown and pts > gop.last_pts:
            entry = held
        else:
            gop.add(held)
    if gop is not None and entry is not None:
        yield gop, entry
        gop = _Gop(entry)
    if gop is not None:
        yield gop, None


class _Runner:
    """Feeds the decoder and checks what comes out."""

    def __init__(self, video: OpenVideo, tally: Tally) -> None:
        self._video = video
        self._context = video.stream.codec_context
        self._tally = tally
        self._expected: dict[int, Shown] = {}
        self._running = False
        self._entry: int | None = None
        self._last: int | None = None

    def decode(self, gop: _Gop, wanted: dict[int, Shown]) -> Iterator[Shown]:
        if not wanted:
            yield from self.drain()
            return
        if not self._running:
            self._entry = gop.held[0].mark.number if gop.held[0].shown else None
        self._running = True
        self._expected.update(wanted)
        count = 1 + max(i for i, h in enumerate(gop.held) if h.mark.number in wanted)
        top = max(h.facts.layer for h in gop.held)
        # Decode times in the place of pts show only when nothing is left out.
        doubtful = not gop.reorders and self._context.reorder_depth > 0
        if doubtful:
            count = len(gop.held)
        for held in gop.held[:count]:
            needed = doubtful or held.mark.number in wanted or held.facts.layer < top
            self._context.skip_frame = "DEFAULT" if needed else "NONREF"
            held.packet.opaque = held.mark
            yield from self._check(self._send(held.packet))
        if count < len(gop.held):
            yield from self.drain()

    def drain(self) -> Iterator[Shown]:
        """Brings out what the decoder still holds and empties it."""
        if self._running:
            yield from self._check(self._send(None))
            if self._expected:
                raise SkippingFailedError("a wanted frame did not come out", entry_holds=True)
            self._context.flush_buffers()
            self._running = False

    def _send(self, packet: VideoPacket | None) -> list[VideoFrame]:
        try:
            return self._video.decode(packet)
        except av.FFmpegError as error:
            raise SkippingFailedError("a packet could not be decoded", entry_holds=True) from error

    def _check(self, frames: list[VideoFrame]) -> Iterator[Shown]:
        for frame in frames:
            self._tally.frames += 1
            mark = frame.opaque
            if frame.is_corrupt or not isinstance(mark, Mark) or frame.pts != mark.pts:
                raise SkippingFailedError("a frame came out damaged", entry_holds=True)
            pts = frame.pts
            if self._entry is not None and mark.number != self._entry:
                raise SkippingFailedError("a keyframe does not decode alone")
            self._entry = None
            # Wanted frames wait in display order.
            late = next(iter(self._expected.values()), None)
            if (self._last is not None and pts <= self._last) or (
                late is not None and late.pts is not None and late.pts < pts
            ):
                raise SkippingFailedError("frames come out in another order than timestamps say")
            self._last = pts
            shown = self._expected.pop(mark.number, None)
            if shown is None:
                continue
            yield Shown(
                index=shown.index, pts=shown.pts, time=shown.time, key=shown.key, frame=frame
            )
