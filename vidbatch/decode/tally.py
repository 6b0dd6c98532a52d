"""What one decode counts, and the types that its parts hand to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol, TypeAlias

from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream


class SkippingFailedError(Exception):
    """Skipping cannot be proven exact here, and why: decode everything in order instead."""

    def __init__(self, why: str, *, by_codec: bool = False) -> None:
        super().__init__(why)
        self.by_codec = by_codec
        """Whether nothing is wrong: skipping is not known for this codec."""


class ContextLostError(Exception):
    """The frame before the clip's first row is damaged: an earlier one is wanted."""


class IndexMismatchError(Exception):
    """The packets that come are not those of the packet table."""


class Mark(NamedTuple):
    """What a packet tells its frame: FFmpeg carries it through the decoder and its reordering."""

    number: int
    """Of the packet in the stream, in decode order."""
    pts: int | None
    key: bool


VideoPacket: TypeAlias = "Packet[VideoStream]"
NumberedPackets: TypeAlias = Iterable[tuple[Mark, VideoPacket]]


@dataclass(slots=True)
class Tally:
    """Counters of one pass over a clip."""

    packets: int = 0
    shown: int = 0
    """Packets that the container wants displayed, of those decoded in order."""
    frames: int = 0
    """Frames that came out of the decoder."""
    errors: int = 0
    """Packets on which the decoder failed."""
    corrupt: int = 0
    """Frames that came out damaged."""
    silent: int = 0
    """Pictures that did not come out, without an error."""
    suspect: int = 0
    """Sound frames of packets called damaged by the demuxer, as it does where files were joined."""
    places: int = 0
    """One past the index of the last place in display order."""

    def note(self, frame: VideoFrame, *, suspect: bool) -> bool:
        """Counts a frame that came out; whether it is to be called corrupt."""
        self.frames += 1
        self.corrupt += bool(frame.is_corrupt)
        self.suspect += suspect and not frame.is_corrupt
        return suspect or bool(frame.is_corrupt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One place in display order; `frame` is null where the packet there could not be decoded."""

    index: int
    pts: int | None
    time: Fraction
    key: bool
    frame: VideoFrame | None
    corrupt: bool = False


class Selection(Protocol):
    """Which frames become rows: `sampling.Sampler`, or `Planned` where all times are known."""

    @property
    def held(self) -> set[int]:
        """Indices that may still be taken although `push` did not name them yet."""
        ...

    def push(self, time: Fraction, is_keyframe: bool) -> list[int]:
        """The next frame in display order; returns the indices that are now rows."""
        ...

    def finish(self, end: Fraction) -> list[int]:
        """The video is over; returns the last indices that are rows."""
        ...

    def settle(self) -> Sequence[tuple[int, Fraction | float]]:
        """Rows whose covers_s is final, each once."""
        ...
