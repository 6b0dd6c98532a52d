"""What headers say, and where videos are cut."""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest

from tests.clips import make_clip, remux
from vidbatch.data import ClipRange, DecodeLimits
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource, PacketTable
from vidbatch.probe import clip_ranges, probe

LIMITS = DecodeLimits()


def ranges(data: bytes, length_s: float) -> tuple[list[ClipRange], PacketTable | None]:
    info, table = probe(BytesSource(data), limits=LIMITS)
    return clip_ranges(info, table, length_s), table


def test_the_headers_of_a_plain_video() -> None:
    info, table = probe(BytesSource(make_clip(audio_s=1.0, pts=range(50, 110))), limits=LIMITS)
    assert table is not None and len(table.order) == 60
    assert info.container.startswith("mov,mp4") and info.codec == "h264"
    assert (info.width_px, info.height_px, info.rotation_deg) == (64, 64, 0)
    assert (info.rate, info.time_base) == (Fraction(25), Fraction(1, 12_800))
    assert (info.start_s, info.duration_s, info.frame_count) == (2.0, 2.4, 60)
    assert (info.audio_codec, info.audio_rate_hz) == ("aac", 16_000)


def test_what_headers_do_not_say_is_null() -> None:
    info, table = probe(BytesSource(make_clip(container="h264")), limits=LIMITS)
    assert table is None
    assert (info.start_s, info.duration_s, info.frame_count) == (None, None, None)
    assert (info.audio_codec, info.audio_rate_hz) == (None, None)


def test_an_empty_object_is_no_video() -> None:
    with pytest.raises(MediaError) as error:
        probe(BytesSource(b""), limits=LIMITS)
    assert error.value.kind == "empty"


def test_a_title_that_is_no_utf8_is_nobodys_business() -> None:
    """PyAV reads all tags on opening, and by default refuses the file for one."""
    made = io.BytesIO()
    with av.open(io.BytesIO(make_clip())) as source, av.open(made, "w", format="mp4") as copy:
        copy.metadata["title"] = "A PLAIN TITLE"
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = made.getvalue().replace(b"A PLAIN TITLE", b"\xff\xfe\xe9 PLAIN \x80\x81\x82")
    with pytest.raises(UnicodeDecodeError), av.open(io.BytesIO(data)):
        pass
    info, table = probe(BytesSource(data), limits=LIMITS)
    assert info.codec == "h264" and table is not None and len(table.order) == 60


def test_a_matrix_that_turns_nothing_is_no_rotation() -> None:
    """FFmpeg calls the angle of a display matrix of zeros not a number, PyAV -2147483648."""
    data = make_clip()
    at = data.index(b"tkhd") + 44  # after version, times, id and volume of a version 0 header
    assert data[at : at + 4] == b"\x00\x01\x00\x00"
    data = data[:at] + bytes(36) + data[at + 36 :]
    with av.open(io.BytesIO(data)) as container:
        assert next(container.decode(video=0)).rotation == -(2**31)
    info, _ = probe(BytesSource(data), limits=LIMITS)
    assert (info.rotation_deg, info.width_px, info.height_px) == (0, 64, 64)


@pytest.mark.parametrize("length_s", [0.01, 0.4, 0.5, 1.0, 1.3, 1000.0])
@pytest.mark.parametrize("recipe", [{}, {"fragmented": True}, {"pts": [i * 2 for i in range(120)]}])
def test_clips_tile_the_video(recipe: dict[str, Any], length_s: float) -> None:
    parts, table = ranges(make_clip(frames=120, **recipe), length_s)
    assert table is not None
    assert (parts[0].first_keyframe, parts[0].start_frame, parts[0].start_s) == (0, 0, 0.0)
    assert (parts[-1].end_keyframe, parts[-1].end_frame, parts[-1].end_s) == (None, None, None)
    for before, after in pairwise(parts):
        assert before.end_keyframe == after.first_keyframe
        assert before.end_frame == after.start_frame
        assert before.end_s == after.start_s
        assert after.start_s - before.start_s >= length_s - 1e-9
    assert sum(p.frames for p in parts) == 120
    assert sum(p.packet_bytes for p in parts) == table.size.sum()
    closed = set(table.closed_keyframes().tolist())
    assert {p.first_keyframe for p in parts} <= closed


def test_a_short_rest_stays_with_the_last_clip() -> None:
    # Keyframes at 0, 0.48, … 4.32 s; the last frame is at 4.76 s.
    data = make_clip(frames=120)
    assert [p.start_frame for p in ranges(data, 1.9)[0]] == [0, 48]
    assert [p.start_frame for p in ranges(data, 1.5)[0]] == [0, 48, 96]
    assert [p.frames for p in ranges(data, 3.0)[0]] == [120]


def test_open_keyframes_are_no_place_to_cut() -> None:
    for codec in ("libx264", "libx265"):
        parts, table = ranges(make_clip(codec=codec, open_gop=True, b_frames=3), 0.01)
        assert table is not None and len(parts) == 1
        assert parts[0].frames == 60 and parts[0].packet_bytes == table.size.sum()


def lying(n: int, packet: Any) -> Any:
    """Gives decode times as pts."""
    packet.pts = packet.dts
    return packet


@pytest.mark.parametrize(
    "data",
    [
        make_clip(container="matroska"),
        make_clip(container="mpegts"),
        make_clip(codec="mpeg4"),
        make_clip()[:-10],
        remux(make_clip(), lying, container="mp4"),
    ],
    ids=["mkv", "ts", "mpeg4", "cut off", "decode times as pts"],
)
def test_a_video_without_a_trusted_table_is_one_clip(data: bytes) -> None:
    parts, table = ranges(data, 0.01)
    assert table is None
    assert parts == [
        ClipRange(
            first_keyframe=0,
            end_keyframe=None,
            start_s=0.0,
            end_s=None,
            start_frame=0,
            end_frame=None,
            packet_bytes=0,
            frames=parts[0].frames,
        )
    ]


def test_two_hours_are_cut_in_no_time() -> None:
    n, gop = 2 * 3600 * 30, 30
    pts = np.arange(n, dtype=np.int64) * 512
    table = PacketTable(
        time_base=Fraction(1, 15_360),
        rate=Fraction(30),
        pts=pts,
        dts=pts,
        pos=np.arange(n, dtype=np.int64) * 20_000,
        size=np.full(n, 20_000, np.int64),
        key=np.arange(n) % gop == 0,
        ordinal=np.arange(n, dtype=np.int64),
        order=np.arange(n, dtype=np.int64),
    )
    info, _ = probe(BytesSource(make_clip(frames=2)), limits=LIMITS)
    parts = clip_ranges(info, table, 60.0)
    assert len(parts) == 120 and {p.frames for p in parts} == {1800}
    assert [p.start_s for p in parts] == [60.0 * i for i in range(120)]
