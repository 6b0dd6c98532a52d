"""decode_clip on damaged and malformed videos: what must come out, called by its name."""

from __future__ import annotations

import io
import random
from fractions import Fraction
from typing import Any

import av
import pytest

from tests.clips import draw_number, flip_bits, make_clip, media_start, mux_silence, patch, remux
from tests.decoding import ALL, decode, fps
from vidbatch.data import DecodeLimits, Sample
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.probe import clip_ranges, probe

MP4 = make_clip()
LATE = make_clip(faststart=False)
MKV = make_clip(container="matroska")
AVI = make_clip(container="avi", codec="mpeg4", b_frames=0)
TS = make_clip(container="mpegts", options={"crf": "5"})
FRAGMENTS = make_clip(fragmented=True)
MEDIA = media_start(MP4)


def shift(ticks: int) -> Any:
    """Moves the timestamps of every packet."""

    def change(n: int, packet: Any) -> Any:
        packet.pts += ticks
        packet.dts += ticks
        return packet

    return change


def drop(number: int) -> Any:
    """Leaves one packet out."""
    return lambda n, packet: None if n == number else packet


def lose_ts_packets(data: bytes) -> bytes:
    """A transport stream without every 17th of its packets."""
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    return b"".join(p for i, p in enumerate(packets) if i % 17 != 5)


def with_cover() -> bytes:
    """An MP4 whose only video stream is a cover picture."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream: Any = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(draw_number(1), format="rgb24")
        frame = picture.reformat(format="yuvj420p")
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def no_video() -> bytes:
    """An MP4 with sound alone."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        mux_silence(container, container.add_stream("aac", rate=16000, layout="mono"), 1.0)
    return out.getvalue()


ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00" * 16,
    "encryption_kid": "11" * 16,
}
HOUR_DAY = 24 * 3600

REFUSED: dict[str, tuple[bytes, str]] = {
    "header at the end, cut": (LATE[: len(LATE) // 2], "truncated"),
    "cut in the first frame": (MP4[: MEDIA + 404], "truncated"),
    "header only": (MP4[:MEDIA], "truncated"),
    "media zeroed": (MP4[:MEDIA] + bytes(len(MP4) - MEDIA), "undecodable"),
    "parameter sets zeroed": (
        MP4[: (at := MP4.index(b"avcC") + 4)] + bytes(36) + MP4[at + 36 :],
        "undecodable",
    ),
    "wild chunk offset": (patch(MP4, b"stco", 8, 0xFFFFFFF0), "zero_frames"),
    "wild sample count": (patch(MP4, b"stsz", 8, 0x7FFFFFFF), "not_media"),
    "empty track": (patch(MP4, b"trak", -8, 8), "not_media"),
    "unknown codec": (MP4.replace(b"avc1", b"zzzz"), "codec_refused"),
    "sound only": (no_video(), "no_video"),
    "cover picture only": (with_cover(), "no_video"),
    "encrypted": (make_clip(faststart=False, muxer=ENCRYPTION), "encrypted"),
}

PARTIAL: dict[str, tuple[bytes, str, range]] = {
    "cut in half": (MP4[: len(MP4) // 2], "truncated", range(5, 30)),
    "last byte missing": (MP4[:-1], "truncated", range(59, 60)),
    "matroska cut": (MKV[: len(MKV) // 2], "truncated", range(5, 35)),
    "avi cut": (AVI[: len(AVI) // 2], "truncated", range(1, 35)),
    "ts cut inside a packet": (TS[: len(TS) // 2 + 37], "truncated", range(20, 40)),
    "fragments cut": (FRAGMENTS[: len(FRAGMENTS) * 2 // 3], "truncated", range(20, 45)),
    "bits flipped": (flip_bits(MP4, MEDIA + 8, len(MP4), 5, 2), "corrupt", range(40, 61)),
    "matroska with a hole": (
        MKV[: len(MKV) // 2] + bytes(1000) + MKV[len(MKV) // 2 + 1000 :],
        *("corrupt duration_mismatch", range(5, 60)),
    ),
    "lost transport packets": (lose_ts_packets(TS), "corrupt", range(30, 60)),
    "wild time-to-sample count": (
        patch(MP4, b"stts", 8, 0x7FFFFFFF),
        *("count_mismatch", range(60, 61)),
    ),
    "first keyframe missing": (
        remux(MP4, drop(0), container="mp4"),
        *("missing_reference", range(48, 49)),
    ),
    "keyframe missing": (
        remux(MP4, drop(24), container="mp4"),
        *("missing_reference corrupt", range(36, 60)),
    ),
    "negative times": (
        remux(MP4, shift(-12_800), container="mp4", muxer={"avoid_negative_ts": "disabled"}),
        *("count_mismatch", range(35, 36)),
    ),
}
"""With the kinds it may be called by and how many rows of the rule `all` come of it."""

SOUND: dict[str, tuple[bytes, int, str]] = {
    "unaligned transport stream": (b"\x47zz" + TS, 60, ""),
    "garbage after": (MP4 + b"\xff" * 5000, 60, ""),
    "two files in one": (MP4 + MP4, 60, ""),
    "lying track size": (patch(MP4, b"avc1", 24, 0xFFFFFFFF), 60, ""),
    "a day in the header": (patch(MP4, b"mvhd", 16, HOUR_DAY * 1000), 60, ""),
    "time-to-sample zero": (patch(MP4, b"stts", 12, 0), 25, "step back"),
    "negative times in ts": (remux(TS, shift(-180_000), container="mpegts"), 60, ""),
    "times near the end of the clock": (remux(MKV, shift(2**50), container="matroska"), 48, "keyf"),
    "coarse clock": (
        make_clip(
            codec="ffv1", container="matroska", rate=Fraction(10**6), frames=10, pix_fmt="bgr0"
        ),
        *(10, ""),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_row_fails_by_name(name: str) -> None:
    data, kind = REFUSED[name]
    for sample in (ALL, fps(5)):
        with pytest.raises(MediaError) as error:
            decode(data, sample)
        assert error.value.kind == kind and error.value.advice


@pytest.mark.parametrize("name", PARTIAL)
def test_what_is_broken_gives_its_good_rows_and_says_so(name: str) -> None:
    data, kinds, rows = PARTIAL[name]
    got = decode(data, ALL)
    assert got.end.status == "partial" and got.end.kind in kinds.split()
    assert len(got.rows) in rows and len(set(got.index)) == len(got.rows)
    assert any(c.isdigit() for c in got.end.reason or "")
    sparse = decode(data, fps(5))
    assert sparse.end.kind in kinds.split() and set(sparse.index) <= set(got.index)


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_broken_is_ok(name: str) -> None:
    data, rows, why = SOUND[name]
    got = decode(data, fps(1000))
    assert got.end.status == "ok", got.end
    assert got.end.end_frame == rows
    assert why in (got.end.fallback or "") and bool(why) <= bool(got.end.fallback)


def test_damage_leaves_a_hole_never_a_shift() -> None:
    for container in ("mp4", "matroska"):
        whole = make_clip(container=container, codec="mpeg4", b_frames=0, gop=1)
        broken = remux(whole, blank(7), container=container)
        got = decode(broken, ALL)
        expected = [i for i in range(60) if i != 7]
        assert got.index == got.numbers() == expected, container
        assert (got.end.kind, got.end.end_frame) == ("corrupt", 60)


def blank(number: int) -> Any:
    """Replaces the content of one packet by zeros."""

    def change(n: int, packet: Any) -> Any:
        if n != number:
            return packet
        empty = av.Packet(bytes(packet.size))
        empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
        empty.duration, empty.is_keyframe = packet.duration, packet.is_keyframe
        return empty

    return change


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_damaged_first_picture_keeps_its_place(codec: str, container: str) -> None:
    broken = remux(make_clip(codec=codec), blank(0), container=container)
    got = decode(broken, ALL)
    assert got.index and got.index == got.numbers()
    assert got.end.end_frame == 60 and got.end.kind == "corrupt"


@pytest.mark.parametrize("seed", range(6))
def test_damaged_rows_are_the_same_however_the_video_is_cut(seed: int) -> None:
    data = make_clip(frames=96)
    data = flip_bits(data, media_start(data) + 8, len(data), 12, seed)
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    assert table is not None
    for sample in (ALL, fps(5), Sample(kind="keyframes")):
        whole = decode(data, sample)
        assert whole.rows == decode(data, sample).rows
        for length_s in (0.01, 1.0):
            rows = []
            for part in clip_ranges(info, table, length_s):
                try:
                    rows += decode(data, sample, part=part).rows
                except MediaError as error:
                    assert error.kind == "undecodable"
            assert rows == whole.rows


@pytest.mark.parametrize("data", [MP4, LATE, MKV, AVI, FRAGMENTS], ids=["mp4", "late", *"kaf"])
def test_no_cut_goes_unnoticed(data: bytes) -> None:
    dice = random.Random(0)
    for _ in range(25):
        cut = data[: dice.randrange(1, len(data))]
        try:
            end = decode(cut, fps(5)).end
        except MediaError as error:
            assert error.kind in {"truncated", "not_media", "zero_frames", "format_refused"}
        else:
            assert (end.status, end.kind) == ("partial", "truncated")


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
def test_random_damage_ends_in_an_outcome(container: str) -> None:
    data = make_clip(container=container, frames=24, b_frames=0)
    for seed in range(25):
        broken = flip_bits(data, 0, len(data), 30, seed)
        try:
            got = decode(broken, fps(5))
        except MediaError as error:
            assert error.kind and error.advice
        else:
            assert got.end.frames_decoded and (got.end.status == "ok") == (got.end.kind is None)
