"""The quick path: decodes of each group of pictures (GOP) only what wanted frames need.

A GOP runs from a packet that the bitstream says decoding can start at, with nothing shown across
that border, to the next such packet. Its packets are held until the next one is there: then the
times of all its frames are known, and so is which of them are rows. GOPs without a row are not
decoded; of others the packets up to the last wanted one, without those nothing refers to.

What makes it exact is checked, not assumed: frames carry the number of their packet, the first one
is the GOP's first, pts are those of the packets, all wanted frames come, in order and undamaged. A
GOP in which something is damaged is decoded whole, by a decoder without a past, so that its rows
are the same however the video is cut. Timestamps or flags that cannot be relied on end the quick
path (SkippingFailedError): then everything is decoded in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
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
from vidbatch.media import EntryRefusedError, Facts, Inspector, OpenVideo
from vidbatch.sampling import Clock

_DISORDER = "frames come out in another order than pts say"

MAX_PROOFS = 2
"""GOPs decoded a second time because a codec that can reorder does not, by its timestamps."""

MAX_HELD_BYTES = 64 * 2**20
MAX_HELD_PACKETS = 20_000
"""A GOP beyond these is not held: it is a video with next to no keyframes, decoded in order."""


Reopen = Callable[[], AbstractContextManager[OpenVideo]]


class _DamagedError(Exception):
    """This GOP does not decode as it should."""


class Held(NamedTuple):
    """A packet that waits until all of its GOP is known."""

    mark: Mark
    pts: int
    packet: VideoPacket
    facts: Facts
    shown: bool
    readable: bool
    """Whether its bytes are what the codec allows."""


class _Sound(NamedTuple):
    number: int
    pts: int


def _pts(shown: Shown) -> int:
    return shown.pts or 0


class Gop:
    """Packets of one group, in decode order."""

    def __init__(self, first: Held) -> None:
        self.held = [first]
        self.nbytes = first.packet.size
        self.last_pts = first.pts
        self.reorders = False
        """Whether pictures are shown in another order than they are decoded in."""
        self.damaged = set[int]()
        """Packets known to be damaged before they are decoded."""
        self._note(first)

    def add(self, held: Held) -> None:
        """The next packet. Raises SkippingFailedError if it cannot belong to a GOP held."""
        self.held.append(held)
        self._note(held)
        self.nbytes += held.packet.size
        self.reorders |= held.pts < self.last_pts
        self.last_pts = max(self.last_pts, held.pts)
        if held.pts < self.held[0].pts:
            raise SkippingFailedError("timestamps step back past a keyframe")
        if self.nbytes > MAX_HELD_BYTES or len(self.held) > MAX_HELD_PACKETS:
            raise SkippingFailedError("keyframes are too far apart to hold what lies between")

    def _note(self, held: Held) -> None:
        if not held.readable or held.packet.is_corrupt:
            self.damaged.add(held.mark.number)


def choose(
    gops: Iterable[tuple[Gop, Held | None]], selection: Selection, clock: Clock, tally: Tally
) -> Iterator[tuple[Gop, dict[int, Shown]]]:
    """Each GOP with its wanted frames by their packets' numbers, where no packet table knows them.

    Raises:
        SkippingFailedError: timestamps cannot tell which frames are wanted.
    """
    index, taken, ahead = 0, set[int](), 0
    for gop, following in gops:
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
        yield gop, wanted


def read_gops(
    packets: NumberedPackets, inspect: Inspector, tally: Tally, tabled: bool
) -> Iterator[tuple[Gop, Held | None]]:
    """Each GOP with the first packet of the next one, which is its first shown too.

    Args:
        tabled: Whether a packet table vouches for every packet being one picture.

    Raises:
        SkippingFailedError: this is no stream of such groups.
        StoreError: the bytes could not be had.
    """
    gop: Gop | None = None
    entry: Held | None = None
    for mark, packet in packets:
        tally.packets += 1
        try:
            read = inspect(bytes(packet))
        except EntryRefusedError as refused:
            raise SkippingFailedError(str(refused), by_codec=True) from refused
        if read is None and not tabled:
            raise SkippingFailedError("a packet is not one whole picture")
        # The table says that it is a picture; a clip may begin at it if it is a keyframe.
        facts = read or Facts(entry=mark.key, shown=True, layer=0)
        if mark.pts is None:
            if facts.shown:
                raise SkippingFailedError("timestamps are missing")
            mark = mark._replace(pts=gop.last_pts if gop else 0)
        pts = mark.pts or 0
        shown = facts.shown and not packet.is_discard
        held = Held(mark, pts, packet, facts, shown, readable=read is not None)
        if gop is None:
            if not facts.entry:
                raise SkippingFailedError("the first packet is no keyframe")
            gop = Gop(held)
            continue
        if entry is not None:
            # Only now is it known that nothing is shown before the keyframe.
            if pts > entry.pts:
                yield gop, entry
                gop = Gop(entry)
            else:
                gop.add(entry)
            entry = None
        if facts.entry and held.shown and pts > gop.last_pts:
            entry = held
        else:
            gop.add(held)
    if gop is not None and entry is not None:
        yield gop, entry
        gop = Gop(entry)
    if gop is not None:
        yield gop, None


class Runner:
    """Feeds the decoder one GOP at a time, from empty to empty, and checks what comes out.

    Args:
        reopen: Opens the same video once more, for a decoder without a past.
        tabled: Whether a packet table vouches for every packet being one picture.
        proven: Whether it is known that timestamps follow the codec's reordering.
    """

    def __init__(
        self, video: OpenVideo, reopen: Reopen, tally: Tally, *, tabled: bool, proven: bool
    ) -> None:
        self._video = video
        self._reopen = reopen
        self._context = video.stream.codec_context
        self._tally = tally
        self._tabled = tabled
        self._doubts = 0 if proven else MAX_PROOFS

    def decode(self, gop: Gop, wanted: dict[int, Shown]) -> Iterator[Shown]:
        """The wanted frames of a GOP, given with their packets' numbers, and holes, in display
        order.

        Raises:
            SkippingFailedError: decode in order instead; what was yielded is right.
            StoreError: the bytes could not be had.
        """
        if not wanted:
            return
        done = -1
        try:
            if gop.damaged:
                raise _DamagedError
            doubtful = not gop.reorders and len(gop.held) > 2 and self._context.reorder_depth > 0
            if doubtful and self._doubts:
                self._doubts -= 1
                self._prove_order(gop)
            for shown in self._quick(gop, wanted):
                done = shown.index
                yield shown
        except _DamagedError:
            rest = {n: s for n, s in wanted.items() if s.index > done}
            yield from self._thorough(gop, rest)

    def _quick(self, gop: Gop, wanted: dict[int, Shown]) -> Iterator[Shown]:
        count = 1 + max(i for i, h in enumerate(gop.held) if h.mark.number in wanted)
        top = max(h.facts.layer for h in gop.held)
        expected = deque(wanted.values())
        entry = gop.held[0].mark.number if gop.held[0].shown else None
        last: int | None = None
        for held in [*gop.held[:count], None]:
            if held is not None:
                needed = held.mark.number in wanted or held.facts.layer < top
                self._context.skip_frame = "DEFAULT" if needed else "NONREF"
            for mark, frame in self._sound(held):
                if entry is not None and mark.number != entry:
                    raise self._silently("a keyframe does not decode alone")
                entry = None
                if last is not None and mark.pts <= last:
                    raise self._silently(_DISORDER)
                last = mark.pts
                if expected and _pts(expected[0]) < last:
                    raise self._silently("a wanted frame did not come out", gop)
                if mark.number in wanted:
                    yield replace(expected.popleft(), frame=frame)
        if expected:
            raise self._silently("a wanted frame did not come out", gop)
        self._context.flush_buffers()

    def _silently(self, what: str, gop: Gop | None = None) -> Exception:
        """Something is amiss without an error: damage if a table vouches for the timestamps, or if
        they reorder pictures, which decode times in their place never do."""
        sound = self._tabled or (gop is not None and gop.reorders)
        return _DamagedError(what) if sound else SkippingFailedError(what)

    def _prove_order(self, gop: Gop) -> None:
        """Decodes a whole GOP for nothing but the order.

        Decode times in the place of pts look sound as long as the pictures that would come out of
        order are left out, so nothing may be left out.
        """
        self._context.skip_frame = "DEFAULT"
        last: int | None = None
        count = 0
        for held in [*gop.held, None]:
            for mark, _ in self._sound(held):
                if last is not None and mark.pts <= last:
                    raise SkippingFailedError(_DISORDER)
                last = mark.pts
                count += 1
        if count != sum(h.shown for h in gop.held):
            raise SkippingFailedError("packets and frames do not match one to one")
        self._context.flush_buffers()

    def _sound(self, held: Held | None) -> Iterator[tuple[_Sound, VideoFrame]]:
        """Undamaged frames that come out. Raises _DamagedError at the first that is not."""
        for frame in _send(self._video, held):
            self._tally.frames += 1
            mark = frame.opaque
            if not isinstance(mark, Mark) or mark.pts is None or frame.is_corrupt:
                raise _DamagedError
            if frame.pts != mark.pts:
                raise SkippingFailedError("frames do not carry the pts of their packets")
            yield _Sound(mark.number, mark.pts), frame

    def _thorough(self, gop: Gop, wanted: dict[int, Shown]) -> Iterator[Shown]:
        """A GOP that holds damage, whole: what does not come out is a hole, a Shown without frame.

        A decoder of its own does it: what stands in for lost pixels must not depend on what was
        decoded before, for that depends on how the video is cut.
        """
        last = None
        missing = sum(h.shown for h in gop.held)
        holes = deque(wanted.values())
        with self._reopen() as video:
            for held in [*gop.held, None]:
                try:
                    frames = _send(video, held)
                except _DamagedError:
                    self._tally.errors += 1
                    missing -= 1
                    continue
                missing -= len(frames)
                for frame in frames:
                    mark = frame.opaque if isinstance(frame.opaque, Mark) else None
                    suspect = mark is None or mark.number in gop.damaged
                    corrupt = self._tally.note(frame, suspect=suspect)
                    # A frame that comes late has lost its place, whichever frames are wanted.
                    if mark is None or mark.pts is None or (last is not None and mark.pts <= last):
                        self._tally.corrupt += not corrupt
                        continue
                    last = mark.pts
                    if mark.number in wanted:
                        while holes[0].pts != mark.pts:
                            yield holes.popleft()
                        yield replace(holes.popleft(), frame=frame, corrupt=corrupt)
            self._video.too_large |= video.too_large
        yield from holes
        self._tally.silent += max(0, missing)
        self._context.flush_buffers()


def _send(video: OpenVideo, held: Held | None) -> list[VideoFrame]:
    if held is not None:
        # A new object every time: PyAV keeps it by its address, and forgets it with the first frame
        # that had it, though a second decode of the packet may still carry it.
        held.packet.opaque = Mark(*held.mark)
    try:
        return video.decode(held.packet if held is not None else None)
    except av.FFmpegError as error:
        raise _DamagedError from error
