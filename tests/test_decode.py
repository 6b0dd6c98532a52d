"""decode_clip on made videos: the picture itself proves which frame a row is."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.clips import draw_number, make_clip, read_number, remux, trim_start
from tests.decoding import ALL, SMALL, Row, decode, decode_plainly, fps
from vidbatch.data import DecodeLimits, Geometry, Sample, fit_box
from vidbatch.decode import planned, skipping
from vidbatch.errors import MediaError, StoreError
from vidbatch.media import BytesSource
from vidbatch.probe import clip_ranges, probe

VFR = [i * 4 + i % 3 + (400 if i > 30 else 0) for i in range(60)]
INTERLACED = "tff=1:interlaced=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
ARF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
SVT = {"preset": "10", "svtav1-params": "keyint=12"}

VIDEOS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mp4, header last": {"faststart": False},
    "fragmented mp4": {"fragmented": True},
    "mkv": {"container": "matroska"},
    "ts": {"container": "mpegts"},
    "flv": {"container": "flv"},
    "hevc": {"codec": "libx265"},
    "hevc ts": {"codec": "libx265", "container": "mpegts"},
    "open gop": {"open_gop": True},
    "open gop ts": {"open_gop": True, "container": "mpegts"},
    "hevc open gop": {"codec": "libx265", "open_gop": True, "b_frames": 3},
    "hevc open gop mkv": {
        "codec": "libx265",
        "open_gop": True,
        "b_frames": 3,
        "container": "matroska",
    },
    "vp8": {"codec": "libvpx", "container": "webm"},
    "vp8 alt-ref": {"codec": "libvpx", "container": "webm", "options": ARF},
    "vp9 alt-ref": {"codec": "libvpx-vp9", "container": "webm", "options": ARF},
    "av1": {"codec": "libsvtav1", "options": SVT},
    "mjpeg": {"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"},
    "prores alpha": {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuva444p10le"},
    "ten bit": {"pix_fmt": "yuv420p10le"},
    "odd size": {"codec": "libvpx-vp9", "container": "webm", "width_px": 65, "height_px": 63},
    "vfr": {"pts": VFR, "time_base": Fraction(1, 100)},
    "starts late": {"pts": range(208, 268)},
    "clock wraps": {
        "container": "mpegts",
        "pts": [i * 3600 + 2**33 - 90_000 for i in range(60)],
        "time_base": Fraction(1, 90_000),
    },
    "ten hours' gap": {"pts": [i + (900_000 if i >= 36 else 0) for i in range(60)]},
    "one keyframe": {"gop": 1000},
    "only keyframes": {"gop": 1, "b_frames": 0},
    "one frame": {"frames": 1},
    "audio": {"audio_s": 3.0},
}
"""What is skipped in without a fallback."""

IN_ORDER: dict[str, tuple[dict[str, Any], str]] = {
    "no pts": ({"container": "h264"}, "60 timestamps are missing"),
    "decode times as pts": ({"container": "avi"}, "another order"),
    "4:4:4": ({"pix_fmt": "yuv444p"}, "4:4:4"),
    "interlaced": ({"options": {"x264-params": INTERLACED}}, "interlaced"),
    "mpeg4": ({"codec": "mpeg4"}, "mpeg4 is decoded in order"),
    "mpeg2 ts": ({"codec": "mpeg2video", "container": "mpegts"}, "mpeg2video is"),
    "gray": ({"codec": "ffv1", "container": "matroska", "pix_fmt": "gray"}, "ffv1 is"),
    "gif": ({"codec": "gif", "container": "gif", "pix_fmt": "rgb8"}, "gif is"),
}
"""What is decoded in order, and the words that say why."""

RULES = [ALL, fps(5), fps("30/7"), Sample(kind="every", every=7), Sample(kind="keyframes")]


def check_rows(data: bytes, sample: Sample) -> Any:
    """Rows carry the right pictures, pts and times, and are those of a plain decode."""
    reference = decode_plainly(data, keep=lambda i: False)
    got = decode(data, sample)
    assert got.end.status == "ok", got.end
    assert got.numbers() == got.index
    assert all(row.pts == reference.pts[row.index] for row in got.rows)
    assert not any(row.corrupt for row in got.rows)
    assert (got.end.start_frame, got.end.end_frame) == (0, len(reference.pts))
    if sample.kind == "all":
        assert got.index == list(range(len(reference.pts)))
    if sample.kind == "every":
        assert got.index == list(range(0, len(reference.pts), sample.every or 1))
    if sample.fps and reference.rises:
        assert got.index == reference.fps_rows(sample.fps)
    assert sum(r.covers_s for r in got.rows) == pytest.approx(got.end.end_s, abs=1.01)
    return got


@pytest.mark.parametrize("name", VIDEOS)
def test_rows_are_the_frames_they_say(name: str) -> None:
    data = make_clip(**VIDEOS[name])
    for sample in RULES:
        assert check_rows(data, sample).end.fallback is None


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_cannot_be_skipped_in_is_decoded_in_order_and_says_why(name: str) -> None:
    recipe, why = IN_ORDER[name]
    data = make_clip(**recipe)
    for sample in RULES[1:]:
        assert why in (check_rows(data, sample).end.fallback or "")


def test_decode_times_in_an_mp4_do_not_number_frames() -> None:
    def lie(n: int, packet: Any) -> Any:
        packet.pts = packet.dts = packet.dts + 1024
        return packet

    for codec in ("libx264", "libx265"):
        data = remux(make_clip(codec=codec), lie, container="mp4")
        for sample in (ALL, fps(5), Sample(kind="every", every=7)):
            got = decode(data, sample)
            assert got.numbers() == got.index and got.end.status == "ok"
            assert got.end.end_frame == 60 and "another order" in (got.end.fallback or "")


def test_skipping_decodes_less() -> None:
    data = make_clip(frames=120)
    decoded = {r: decode(data, fps(r)).end.frames_decoded for r in (25, 5, 1)}
    assert decoded[25] == 120 and decoded[5] < 90 and decoded[1] < 40
    assert decode(data, Sample(kind="keyframes")).end.frames_decoded == 10


@pytest.mark.parametrize("turn_deg", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_pictures_are_upright(turn_deg: int, mirror: bool) -> None:
    data = make_clip(frames=12, turn_deg=turn_deg, mirror=mirror, width_px=96, height_px=64)
    got = decode(data, ALL, geometries=[Geometry(width_px=48, height_px=32)])
    assert got.numbers(Geometry(width_px=48, height_px=32)) == list(range(12))
    assert (got.info.width_px, got.info.height_px) == (96, 64)
    assert got.info.rotation_deg == turn_deg
    assert got.chunks[0].source_px.tolist() == [[96, 64]] * 12


FITS = [
    Geometry(width_px=64, height_px=64),
    Geometry(width_px=64, height_px=64, fit="crop", interpolation="area"),
    Geometry(width_px=64, height_px=64, fit="letterbox", interpolation="bicubic", pad=7),
    Geometry(width_px=30, height_px=90, fit="crop"),
    Geometry(width_px=30, height_px=90, fit="letterbox"),
]


@pytest.mark.parametrize("turn_deg", [0, 90])
def test_geometries_fit_as_the_arithmetic_says(turn_deg: int) -> None:
    data = make_clip(
        frames=1, width_px=128, height_px=64, turn_deg=turn_deg, pix_fmt="yuv444p", gop=1
    )
    got = decode(data, ALL, geometries=FITS)
    picture = draw_number(0, 128, 64).astype(np.int64)
    for geometry in FITS:
        pixels = got.chunks[0].pixels[geometry.key][0]
        assert pixels.shape == (geometry.height_px, geometry.width_px, 3)
        assert pixels.flags.c_contiguous
        wide, high, left, top = fit_box(geometry, 128, 64)
        y, x = np.mgrid[0 : geometry.height_px, 0 : geometry.width_px]
        inside = (x < wide) & (y < high)
        from_x = np.minimum((x + left + 0.5) * 128 / wide, 127).astype(int)
        from_y = np.minimum((y + top + 0.5) * 64 / high, 63).astype(int)
        error = np.abs(pixels[inside] - picture[from_y, from_x][inside])
        assert np.median(error) <= 6, geometry
        if geometry.fit == "letterbox":
            assert not inside.all() and (pixels[~inside] == geometry.pad).all()


def test_equal_geometries_are_made_once_and_none_gives_rows_without_pixels() -> None:
    data = make_clip(frames=12)
    assert list(decode(data, ALL, geometries=[SMALL, SMALL]).chunks[0].pixels) == [SMALL.key]
    got = decode(data, ALL, geometries=[])
    assert got.index == list(range(12)) and got.chunks[0].pixels == {}


def test_chunks_are_bounded() -> None:
    data = make_clip()
    by_count = decode(data, ALL, chunk_frames=7)
    assert [len(c) for c in by_count.chunks] == [7] * 8 + [4]
    by_bytes = decode(data, ALL, chunk_bytes=5 * SMALL.frame_bytes + 1, context=True)
    assert all(c.nbytes <= 5 * SMALL.frame_bytes for c in by_bytes.chunks)
    tiny = decode(data, ALL, chunk_bytes=1)
    assert [len(c) for c in tiny.chunks] == [1] * 60
    assert by_count.rows == by_bytes.rows == tiny.rows


@pytest.mark.parametrize(
    "recipe", [{}, {"codec": "libx265", "open_gop": True}, {"fragmented": True}]
)
@pytest.mark.parametrize("length_s", [0.01, 1.0])
def test_parts_add_up_to_the_whole(recipe: dict[str, Any], length_s: float) -> None:
    data = make_clip(frames=90, **recipe)
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    parts = clip_ranges(info, table, length_s)
    for sample in [*RULES, fps(2, "1/4"), fps(1, "1/2"), fps("1/2")]:
        whole = decode(data, sample, context=True, chunk_frames=4)
        pieces = [decode(data, sample, part=p, context=True, chunk_frames=4) for p in parts]
        assert [r for p in pieces for r in p.rows] == whole.rows
        before = dict(zip(whole.index, [None, *whole.rows], strict=False))
        for piece, part in zip(pieces, parts, strict=True):
            assert piece.info == whole.info and piece.end.fallback is None
            assert (piece.end.start_frame, piece.end.start_s) == (part.start_frame, part.start_s)
            assert piece.end.end_frame == (part.end_frame or 90)
            for chunk in piece.chunks:
                first = int(chunk.frame_index[int(chunk.context)])
                check_context(chunk, before[first])


def check_context(chunk: Any, row: Row | None) -> None:
    """A chunk begins with the sampled frame before its first row, if there is one."""
    assert chunk.context == (row is not None)
    if row is not None:
        assert int(chunk.frame_index[0]) == row.index
        assert chunk.pixels[SMALL.key][0].tobytes() == row.pixels


def test_a_part_without_a_sampled_frame_has_no_rows_and_is_ok() -> None:
    data = make_clip(frames=90)
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    part = clip_ranges(info, table, 0.01)[2]
    got = decode(data, Sample(kind="every", every=1000), part=part)
    assert (got.rows, got.end.status, got.end.frames_decoded) == ([], "ok", 0)
    assert got.end.start_frame == 24


def test_a_trimmed_start_is_decoded_but_not_shown() -> None:
    data = trim_start(make_clip(), 5)
    got = decode(data, ALL)
    assert got.index == list(range(55)) and got.numbers() == list(range(5, 60))
    assert got.end.status == "ok" and got.info.frame_count == 60
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    parts = [decode(data, fps(5), part=p) for p in clip_ranges(info, table, 0.01)]
    assert [r for p in parts for r in p.rows] == decode(data, fps(5)).rows


def test_joined_files_go_on_in_time() -> None:
    parts = [make_clip(container="mpegts", first_number=n) for n in (0, 60)]
    got = decode(b"".join(parts), ALL)
    assert got.numbers() == got.index == list(range(120))
    assert [r.pts for r in got.rows[:60]] == [r.pts for r in got.rows[60:]]
    assert [r.time_s for r in got.rows] == pytest.approx([i / 25 for i in range(120)])
    assert got.end.status == "ok" and "step back" in (got.end.fallback or "")
    assert decode(b"".join(parts), fps(5)).index == list(range(0, 120, 5))


def test_the_size_may_change_on_the_way() -> None:
    small = make_clip(container="mpegts", frames=24)
    # The muxer moves only the first file by the two frames of its decoding delay.
    later: dict[str, Any] = {"first_number": 24, "pts": range(26, 50)}
    large = make_clip(container="mpegts", frames=24, width_px=128, height_px=96, **later)
    got = decode(small + large, ALL)
    assert got.numbers() == list(range(48))
    sizes = [tuple(s) for c in got.chunks for s in c.source_px.tolist()]
    assert sizes == [(64, 64)] * 24 + [(128, 96)] * 24
    refused = decode(small + large, ALL, max_pixels=5000)
    assert refused.index == list(range(24))
    assert (refused.end.status, refused.end.kind) == ("partial", "too_large")


def test_a_file_that_begins_inside_a_gop_starts_at_what_decodes() -> None:
    data = remux(make_clip(), lambda n, p: p if n else None, container="mpegts")
    got = decode(data, ALL)
    assert got.index == list(range(48)) and got.numbers() == list(range(12, 60))
    assert got.end.status == "ok" and got.end.fallback == "the first packet is no keyframe"
    assert got.rows[0].time_s == 0.0


def test_a_part_of_a_video_without_a_table_is_refused() -> None:
    data = make_clip()
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    part = clip_ranges(info, table, 0.01)[1]
    with pytest.raises(MediaError) as error:
        decode(make_clip(container="matroska"), ALL, part=part)
    assert error.value.kind == "index_mismatch"
    with pytest.raises(MediaError) as error:
        decode(make_clip(gop=20), ALL, part=part)
    assert error.value.kind == "index_mismatch"


class CountingSource(BytesSource):
    """Notes what is read, and fails at one read if told to."""

    def __init__(self, data: bytes, fail_at: int | None = None, short: bool = False) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []
        self._fail_at = fail_at
        self._short = short

    def read_at(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        if self._fail_at is not None and offset <= self._fail_at < offset + length:
            if self._short:
                return super().read_at(offset, self._fail_at - offset)
            raise StoreError("the store is gone", kind="gone")
        return super().read_at(offset, length)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("short", [False, True])
def test_a_failing_store_is_no_end_of_file(container: str, short: bool) -> None:
    data = make_clip(container=container, frames=300, options={"crf": "1"})
    for fail_at in (5, len(data) // 2, len(data) - 5):
        source = CountingSource(data, fail_at, short)
        with pytest.raises(StoreError):
            decode(data, ALL, source=source)


def test_far_frames_are_read_without_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_clip(frames=600, gop=60, options={"crf": "1"}, width_px=128, height_px=128)
    sample = Sample(kind="every", every=180)
    everything = decode(data, sample)
    monkeypatch.setattr(planned, "GAP_BYTES", 0)
    # FFmpeg reads on rather than seek over less than its buffer and 32 KiB.
    monkeypatch.setattr("vidbatch.media.opening.READ_BYTES", 4096)
    source = CountingSource(data)
    got = decode(data, sample, source=source)
    assert got.rows == everything.rows and got.numbers() == [0, 180, 360, 540]
    assert sum(length for _, length in source.reads) < len(data) * 0.6


def test_gops_too_large_to_hold_are_decoded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "MAX_HELD_PACKETS", 20)
    got = decode(make_clip(gop=30), fps(5))
    assert got.index == list(range(0, 60, 5)) == got.numbers()
    assert "too far apart" in (got.end.fallback or "")


def test_numbers_survive_drawing() -> None:
    for number in (0, 1, 255, 256, 65_535):
        for size in ((64, 64), (32, 32), (48, 64), (65, 63)):
            assert read_number(draw_number(number, *size)) == number
