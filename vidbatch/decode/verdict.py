"""How a clip went. Completeness is judged from outside: FFmpeg ends broken files in silence."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from vidbatch.data import ByteSource
from vidbatch.decode.tally import Tally
from vidbatch.errors import MediaError
from vidbatch.media import OpenVideo, declared_bytes
from vidbatch.sampling import Clock

SLACK_S = 1.0
SLACK_SHARE = 0.02
"""By how much a video may end before its header says: headers round, and count last frames."""


STATED_DURATION = frozenset({"matroska", "flv", "asf", "avi", "mp4"})
"""Formats whose header states a duration; FFmpeg guesses that of others from the file's end."""


class Verdict(NamedTuple):
    """Why a clip is partial."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known from outside when the last packet has been read."""

    tally: Tally
    size_bytes: int
    declared_bytes: int | None
    """Size of the whole object as its container declares it."""
    demux_error: str | None
    joints: int
    """Places where the clock steps back: files joined end to end, no damage by itself."""
    too_large: bool
    """Whether the decoder refused pictures for their size."""
    expected_packets: int | None
    """Packets that the header or the packet table promises for what was read."""
    ended_s: float | None
    """Where the last packet of any stream ends, on the clock of `duration_s`."""
    duration_s: float | None
    """Of a header that states it; null where it is only guessed from the file's end."""

    @property
    def cut_off(self) -> str | None:
        """The sentence that says bytes are missing at the end."""
        declared = self.declared_bytes
        if declared is not None and declared > self.size_bytes:
            return f"the object ends after {self.size_bytes} of {declared} bytes"
        return None


def gather(
    source: ByteSource,
    video: OpenVideo,
    tally: Tally,
    *,
    expected_packets: int | None,
    whole: bool,
    clock: Clock,
) -> Evidence:
    """Collects what is known from outside; under a packet table, which has stood its own checks,
    only errors count.

    Args:
        clock: The clock of the pass, after the last frame.
    """
    duration = ended = None
    formats = video.container.format.name.split(",")
    if whole and expected_packets is None and not STATED_DURATION.isdisjoint(formats):
        # Some writers count the duration from zero, some from the first timestamp.
        duration = video.duration_s
        ended = float(max(clock.start, Fraction(0)) + clock.largest + clock.frame_s)
        ended = max(ended, video.other_end_s or 0.0)
    return Evidence(
        tally=tally,
        size_bytes=source.size_bytes,
        declared_bytes=declared_bytes(source) if whole else None,
        demux_error=video.demux_error,
        joints=clock.discontinuities,
        too_large=video.too_large,
        expected_packets=expected_packets,
        ended_s=ended,
        duration_s=duration,
    )


def judge(evidence: Evidence) -> Verdict | None:
    """None if nothing speaks against the clip being whole and sound; else the gravest finding."""
    tally = evidence.tally
    expected = evidence.expected_packets
    missing = expected is not None and tally.packets < expected
    if missing and evidence.cut_off:
        return Verdict(
            "truncated", f"{evidence.cut_off}; {tally.packets} of {expected} packets are there"
        )
    if evidence.demux_error is not None:
        return Verdict(
            "truncated", f"reading stopped after {tally.packets} packets: {evidence.demux_error}"
        )
    if evidence.cut_off:
        return Verdict("truncated", f"{evidence.cut_off}; {tally.packets} packets are there")
    if evidence.too_large:
        return Verdict(
            "too_large",
            f"pictures over the limit of pixels were refused: {tally.errors} of {tally.packets}",
        )
    corrupt = tally.corrupt + max(0, tally.suspect - evidence.joints)
    if tally.errors or corrupt:
        return Verdict(
            "corrupt",
            f"{tally.errors} packets could not be decoded and {corrupt} frames are damaged,"
            f" of {tally.packets} packets",
        )
    if tally.silent:
        return Verdict(
            "missing_reference",
            f"{tally.silent} of {tally.packets} pictures refer to others that are not there",
        )
    if missing:
        return Verdict(
            "count_mismatch", f"{tally.packets} packets where the header says {expected}"
        )
    if evidence.duration_s is not None and evidence.ended_s is not None:
        slack = SLACK_S + SLACK_SHARE * evidence.duration_s
        if evidence.ended_s < evidence.duration_s - slack:
            return Verdict(
                "duration_mismatch",
                f"it ends at {evidence.ended_s:.2f} s, the header says {evidence.duration_s:.2f} s",
            )
    return None


def nothing_decoded(evidence: Evidence, codec: str) -> MediaError:
    """The error for a clip of which no row can come."""
    tally = evidence.tally
    if evidence.too_large:
        return MediaError(
            "no frame: its pictures have more pixels than the limit",
            kind="too_large",
            advice="raise limits.max_pixels if the file is meant to be that large",
        )
    upload = "upload the whole file again"
    if evidence.cut_off or evidence.demux_error:
        return MediaError(
            f"no frame: {evidence.cut_off or evidence.demux_error}", kind="truncated", advice=upload
        )
    if tally.errors or tally.frames:
        return MediaError(
            f"no usable frame: {codec} failed on {tally.errors} of {tally.packets} packets",
            kind="undecodable",
            advice=upload,
        )
    expected = evidence.expected_packets
    promised = f" where the header says {expected}" if expected else ""
    return MediaError(
        f"no frame came out of {tally.packets} packets of {codec}{promised}",
        kind="zero_frames",
        advice="the file holds a header and no pictures; upload it again or exclude it",
    )
