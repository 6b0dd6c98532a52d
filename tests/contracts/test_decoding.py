"""One promise over all made and real videos: clips and skipping give what a plain decode gives.

For each video, each rule and each clip length (one GOP, 3 s, 10 s, whole; cut wherever there is a
packet table) the union of the clips has the rows of a decode from the first packet to the last by
one thread: frame_index, pts, time and every sample of the decoded planes. By default each real
video meets one rule and one length, drawn by its name; with VIDBATCH_EXHAUSTIVE=1 all of them.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.clips import make_clip, remux
from tests.contracts.plain import Plain, decode_plainly, hash_planes
from tests.decoding import ALL, SMALL, Decoded, Row, decode, fps
from tests.made_videos import GOP, NAMES, made
from tests.real_videos import SOUND
from vidbatch.data import ClipRange, DecodeLimits, Sample
from vidbatch.decode.pixels import Scaler
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.probe import clip_ranges, probe
from vidbatch.sampling import sample_name

RULES = [fps("1/2"), fps(1), fps(2), fps(7), Sample(kind="every", every=3)]
LENGTHS_S = (0.01, 3.0, 10.0)
"""Besides the whole video; the first cuts at every keyframe that can be cut at."""

EXHAUSTIVE = os.environ.get("VIDBATCH_EXHAUSTIVE") == "1"


def draw(name: str) -> list[tuple[Sample, tuple[float, ...]]]:
    """Rules and clip lengths for a real video."""
    dice = random.Random(f"{name} 1009")  # at which the long files draw sparse rules
    rule, length_s = dice.choice(RULES), dice.choice(LENGTHS_S)
    return [(rule, LENGTHS_S) for rule in RULES] if EXHAUSTIVE else [(rule, (length_s,))]


REAL = [
    pytest.param(name, rule, lengths_s, id=f"{name}-{sample_name(rule)}")
    for name in SOUND
    for rule, lengths_s in draw(name)
]


@pytest.fixture
def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows carry a hash of their frame's planes in the place of scaled pixels."""

    def scale(self: Scaler, frame: Any, turn: Any) -> dict[str, Any]:
        return {SMALL.key: np.frombuffer(hash_planes(frame), np.uint8).reshape(1, 16, 3)}

    monkeypatch.setattr(Scaler, "scale", scale)


def plans(data: bytes, lengths_s: Sequence[float] = LENGTHS_S) -> list[list[ClipRange]]:
    """The ways to cut a video that differ, but for the whole."""
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    cuts = {len(p): p for p in (clip_ranges(info, table, s) for s in lengths_s)}
    return [parts for count, parts in cuts.items() if count > 1]


def check_plain(got: Decoded, plain: Plain, sample: Sample) -> None:
    """The rows of a whole video are those that the rule takes of a plain decode of it."""
    assert got.end.status == "ok", got.end
    assert (got.end.start_frame, got.end.end_frame) == (0, len(plain.frames))
    assert got.index == plain.rows(sample)
    times = plain.times
    for row in got.rows:
        frame = plain.frames[row.index]
        assert (row.pts, row.time_s) == (frame.pts, float(times[row.index]))
        assert row.pixels == frame.planes
    # Where files were joined the demuxer calls a packet damaged.
    assert sum(row.corrupt for row in got.rows) <= plain.joints


def check_clips(data: bytes, sample: Sample, whole: Sequence[Row], parts: list[ClipRange]) -> None:
    """Clips tile the video and their rows, one after the other, are the rows of the whole."""
    rows: list[Row] = []
    end: int | None = 0
    for part in parts:
        piece = decode(data, sample, part=part, context=True, chunk_frames=16)
        assert piece.end.status == "ok", piece.end
        assert piece.end.start_frame == end
        end = piece.end.end_frame
        own = iter(piece.rows)
        for chunk in piece.chunks:
            assert chunk.context == bool(rows)
            if rows:
                assert int(chunk.frame_index[0]) == rows[-1].index
                assert chunk.pixels[SMALL.key][0].tobytes() == rows[-1].pixels
            rows += islice(own, chunk.num_rows)
    assert rows == list(whole)


@lru_cache(maxsize=2)
def cuts_of(name: str) -> tuple[bytes, Plain, list[list[ClipRange]]]:
    """A made video, its plain decode and the ways to cut it."""
    data = made(name)
    return data, decode_plainly(data), plans(data)


@pytest.mark.parametrize("name", NAMES)
def test_made_videos_are_decoded_exactly(name: str, unscaled: None) -> None:
    data, plain, cuts = cuts_of(name)
    assert plain.errors == 0 and plain.frames
    check_plain(decode(data, ALL), plain, ALL)
    for sample in RULES:
        whole = decode(data, sample)
        check_plain(whole, plain, sample)
        for parts in cuts:
            check_clips(data, sample, whole.rows, parts)


@lru_cache(maxsize=1)
def plain_of(path: Path, keep: frozenset[int] | None) -> Plain:
    """A plain decode of a file, with the planes of some frames or of all."""
    return decode_plainly(path.read_bytes(), keep)


@pytest.mark.parametrize(("name", "sample", "lengths_s"), REAL)
def test_real_videos_are_decoded_exactly(
    shared_videos: Path, name: str, sample: Sample, lengths_s: Sequence[float], unscaled: None
) -> None:
    data = (shared_videos / name).read_bytes()
    whole = decode(data, sample, context=True, chunk_frames=16)
    plain = plain_of(shared_videos / name, None if EXHAUSTIVE else frozenset(whole.index))
    assert plain.errors == 0
    check_plain(whole, plain, sample)
    for parts in plans(data, lengths_s):
        check_clips(data, sample, whole.rows, parts)


DAMAGED = {
    "h264 mp4": "mp4 matroska flv",
    "h264 fragmented mp4": "mp4",
    "h264 mov": "mov",
    "h264 ts": "mpegts",
    "h264 open gop": "mp4 matroska",
    "hevc mp4": "mp4 matroska",
    "hevc ts": "mpegts",
    "hevc open gop": "mp4",
    "av1 mp4": "mp4",
    "vp8 webm": "webm",
    "vp9 mp4": "mp4",
    "vp9 webm, hidden frames": "webm",
    "mpeg4 mp4": "mp4",
    "mpeg4 avi, no b-frames": "avi",
    "mpeg2 ts": "mpegts",
    "prores mov": "mov",
}
"""Made videos and the containers in which their packets are damaged."""


def spoil(packets: set[int], how: str, dice: random.Random) -> Any:
    """Replaces the content of some packets, and leaves the container whole."""

    def change(n: int, packet: Any) -> Any:
        if n not in packets:
            return packet
        content = bytearray(bytes(packet))
        if how == "zeros":
            content = bytearray(len(content))
        elif how == "cut":
            del content[len(content) // 2 :]
        else:
            # Behind the header: a flipped bit there may just say that it is not shown.
            for _ in range(max(4, len(content) // 10)):
                content[dice.randrange(len(content) // 2, len(content))] = dice.randrange(256)
        return copy_packet(packet, bytes(content))

    return change


def copy_packet(packet: Any, content: bytes) -> Any:
    """A packet like another one, with other bytes."""
    copy = av.Packet(content)
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
        setattr(copy, name, getattr(packet, name))
    return copy


@pytest.mark.parametrize(
    ("name", "container", "how"),
    [
        (name, container, how)
        for name, containers in DAMAGED.items()
        for container in containers.split()
        for how in ("zeros", "cut", "noise")
        # Without a table an empty packet may be none, and AV1 cannot be written otherwise.
        if (container in {"mp4", "mov"} if how == "zeros" else name != "av1 mp4")
        # FFmpeg's demuxer drops it.
        and (name, how) != ("vp9 mp4", "zeros")
    ],
)
def test_damage_leaves_holes_and_shifts_nothing(
    name: str, container: str, how: str, unscaled: None
) -> None:
    sound = decode(remux(made(name), lambda n, p: p, container=container), ALL).rows
    dice = random.Random(f"{name} {container} {how}")
    later = set(dice.sample(range(GOP, len(sound)), 3))
    # Where pictures are numbered as they come out, a file may as well begin behind its first one.
    counted = container == "mpegts" or name.startswith("mpeg")
    for spoiled in [later] if counted else [{0}, later]:
        data = remux(made(name), spoil(spoiled, how, dice), container=container)
        got = decode(data, ALL)
        of_pts = {row.pts: row for row in sound}
        for row in got.rows:
            # FFmpeg finds the packets of a transport stream by their content: some vanish.
            vanished = of_pts[row.pts].index - row.index
            assert vanished == 0 or (vanished > 0 and container == "mpegts")
            row = replace(row, index=row.index + vanished)
            # Beside a keyframe pictures of one group may refer to the other.
            if not {(row.index + d) // GOP for d in (-GOP, -3, 3)} & {n // GOP for n in spoiled}:
                assert replace(row, covers_s=0) == replace(of_pts[row.pts], covers_s=0)
        # Noise in coded pixels cannot always be told from pixels.
        assert got.end.status == "partial" or len(got.rows) == len(sound)
        for sample in (fps(2), Sample(kind="every", every=3)):
            whole = decode(data, sample).rows
            for parts in plans(data, (0.01,)):
                rows = []
                for part in parts:
                    # A clip of nothing but damage has no rows, and says so.
                    with suppress(MediaError):
                        rows += decode(data, sample, part=part).rows
                assert rows == whole
            if container == "mpegts":
                continue
            by_index = {row.index: row for row in got.rows}
            kept = [(r.index, r.pts, r.pixels) for r in whole]
            assert kept == [(i, by_index[i].pts, by_index[i].pixels) for i, _, _ in kept]


def by_an_old_x264() -> bytes:
    """4:4:4 H.264 that says it comes of a version with a bug, which FFmpeg makes up for: here,
    where the bug is not, by spoiling the pictures."""
    params = "crf=20:8x8dct=1:keyint=12:min-keyint=12:scenecut=0:bframes=0"
    data = make_clip(pix_fmt="yuv444p", b_frames=0, options={"x264-params": params})
    return re.sub(rb"x264 - core \d+", b"x264 - core 148", data)


def with_parameter_sets_inside(data: bytes) -> bytes:
    """An MP4 whose H.264 parameter sets come with its keyframes, none with its header."""
    at = data.index(b"avcC") + 4
    length = int.from_bytes(data[at + 6 : at + 8], "big")
    sets = [data[at + 8 : at + 8 + length]]
    at += 8 + length
    sets.append(data[at + 3 : at + 3 + int.from_bytes(data[at + 1 : at + 3], "big")])
    prefix = b"".join(len(s).to_bytes(4, "big") + s for s in sets)

    def prepend(n: int, packet: Any) -> Any:
        return copy_packet(packet, prefix + bytes(packet)) if packet.is_keyframe else packet

    moved = bytearray(remux(data, prepend, container="mp4"))
    at = moved.index(b"avcC") + 4
    moved[at + 5 : at + 7] = b"\xe0\0"
    return bytes(moved)


@pytest.mark.parametrize("inside", [False, True])
def test_what_decodes_differently_from_the_middle_is_decoded_from_the_start(
    inside: bool, unscaled: None
) -> None:
    data = by_an_old_x264()
    data = with_parameter_sets_inside(data) if inside else data
    plain = decode_plainly(data)
    cold = decode_plainly(remux(data, lambda n, p: p if n >= 24 else None, container="mp4"))
    assert len(cold.frames) == 36 and plain.errors == cold.errors == 0
    assert all(a.planes != b.planes for a, b in zip(plain.frames[24:], cold.frames, strict=True))
    assert bool(plans(data)) == inside
    for sample in (fps(5), Sample(kind="every", every=3)):
        whole = decode(data, sample)
        assert "4:4:4" in (whole.end.fallback or "")
        expected = [(i, plain.frames[i].planes) for i in plain.rows(sample)]
        for parts in [[None], *plans(data)]:
            rows = [row for part in parts for row in decode(data, sample, part=part).rows]
            assert [(row.index, row.pixels) for row in rows] == expected
