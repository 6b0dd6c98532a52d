"""Guards, reader, stream choice and packet table of the door to FFmpeg."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import av
import numpy as np
import pytest

from tests.clips import draw_number, make_clip, media_start, mux_silence, patch, remux, trim_start
from vidbatch.errors import MediaError, StoreError
from vidbatch.media import (
    BytesSource,
    SourceReader,
    declared_bytes,
    inspector,
    open_video,
    read_packet_table,
)

MAX_PIXELS = 2**24
MP4 = make_clip(audio_s=1.0)


def png(size: int) -> bytes:
    """A PNG that claims size x size pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((1 + size * 3) * 2))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    b"m=video 50004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
REFUSED = {
    "nothing": (b"", "empty"),
    "zeros": (bytes(65_536), "not_media"),
    "noise": (np.random.default_rng(0).bytes(65_536), "not_media"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not_media"),
    "hls": (HLS, "format_refused"),
    "hls of a file": (HLS.replace(b"http://127.0.0.1:9/x.ts", b"/etc/passwd"), "format_refused"),
    "ffconcat": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "format_refused"),
    "sdp": (SDP, "format_refused"),
    "dash": (b'<?xml version="1.0"?>\n<MPD type="static"></MPD>', "not_media"),
    "png": (png(30_000), "format_refused"),
    "header at the end, cut": (make_clip(faststart=False)[:-900], "truncated"),
    "cut inside the header": (MP4[:600], "truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_video_is_refused_by_name(name: str) -> None:
    data, kind = REFUSED[name]
    with pytest.raises(MediaError) as error, open_video(BytesSource(data), max_pixels=MAX_PIXELS):
        pass
    assert error.value.kind == kind
    assert error.value.advice and "\n" not in error.value.message


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Any:
    return open_video(BytesSource(data), max_pixels=max_pixels)


def test_the_first_stream_that_is_no_cover_is_taken() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        streams: list[Any] = [container.add_stream(c, rate=25) for c in ("mjpeg", "mpeg4")]
        for stream, pix_fmt in zip(streams, ("yuvj420p", "yuv420p"), strict=True):
            stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        streams[0].disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for number, stream in enumerate(streams):
            picture = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            frame = picture.reformat(format=stream.pix_fmt)
            frame.pts = 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        mux_silence(container, sound, 0.5)
    with opened(out.getvalue()) as video:
        assert len(video.container.streams.video) == 2 and video.codec == "mpeg4"
        info = video.info(upright=None, start_pts=0)
    assert (info.audio_codec, info.audio_rate_hz) == ("aac", 16000)
    assert (info.width_px, info.height_px, info.codec) == (64, 64, "mpeg4")


def test_the_decoder_has_one_thread_and_a_bound() -> None:
    with opened(MP4, max_pixels=64 * 64 - 1) as video:
        context = video.stream.codec_context
        assert context.thread_count == 1 and context.thread_type.value == 0
        with pytest.raises(av.FFmpegError):
            for packet in video.packets():
                video.decode(packet)
        assert video.too_large


def test_frames_carry_what_their_packets_were_given() -> None:
    with opened(MP4) as video:
        marks = []
        for number, packet in enumerate(video.packets()):
            packet.opaque = (number, packet.pts)
            marks += [(frame.opaque, frame.pts) for frame in video.decode(packet)]
    assert all(mark[1] == pts for mark, pts in marks)
    assert [m[0][0] for m in marks] != sorted(m[0][0] for m in marks)


class Overflowing(BytesSource):
    """Gives more than it is asked for: passed on, that overruns FFmpeg's buffer."""

    def read_at(self, offset: int, length: int) -> bytes:
        return super().read_at(offset, length + 4096)


def test_the_reader_never_gives_more_than_asked_for() -> None:
    reader = SourceReader(Overflowing(bytes(range(256)) * 64))
    assert not hasattr(reader, "name")
    assert reader.read(10) == bytes(range(10)) and reader.tell() == 10
    assert reader.seek(-5, 2) == 256 * 64 - 5 and len(reader.read(100)) == 5
    assert reader.read(1) == b"" and reader.seek(-1) < 0 and reader.seek(0) == 0
    with open_video(Overflowing(MP4), max_pixels=MAX_PIXELS) as video:
        assert len(list(video.packets())) == 60


class Short(BytesSource):
    """Ends early without a word, as a broken connection does."""

    def read_at(self, offset: int, length: int) -> bytes:
        return super().read_at(offset, min(length, max(0, 3000 - offset)))


def test_a_short_read_is_an_error_and_no_end() -> None:
    reader = SourceReader(Short(MP4))
    with pytest.raises(StoreError) as error:
        reader.read(4096)
    assert error.value.kind == "short_read" and error.value.retryable
    assert reader.read(10) == b""
    with pytest.raises(StoreError), open_video(Short(MP4), max_pixels=MAX_PIXELS) as video:
        list(video.packets())


TABLED: dict[str, dict[str, Any]] = {
    "mp4": {},
    "header last": {"faststart": False},
    "sound": {"audio_s": 2.4},
    "fragments": {"fragmented": True},
    "hevc": {"codec": "libx265"},
    "hevc open gop": {"codec": "libx265", "open_gop": True, "b_frames": 3},
    "vfr": {"pts": [i * 2 + i % 2 for i in range(60)]},
    "late": {"pts": range(208, 268)},
    "no b-frames": {"b_frames": 0},
    "vp9": {"codec": "libvpx-vp9"},
    "prores": {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuv422p10le"},
}


class Watched(BytesSource):
    """Refuses to give media bytes."""

    def __init__(self, data: bytes, media: range) -> None:
        super().__init__(data)
        self._media = media

    def read_at(self, offset: int, length: int) -> bytes:
        # A box header is looked for in 16 bytes, of which it may need but 8.
        assert offset + length <= self._media.start + 8 or offset >= self._media.stop
        return super().read_at(offset, length)


@pytest.mark.parametrize(
    ("name", "trim"),
    [*((name, 0) for name in TABLED), ("mp4", 5), ("header last", 5), ("hevc", 5)],
)
def test_the_table_is_what_a_demuxer_says_and_reads_no_media(name: str, trim: int) -> None:
    data = make_clip(**TABLED[name])
    data = trim_start(data, trim) if trim else data
    start = media_start(data)
    size = int.from_bytes(data[start - 8 : start - 4], "big")
    fragmented = "fragmented" in TABLED[name]
    source = BytesSource(data) if fragmented else Watched(data, range(start, start - 8 + size))
    table, why = read_packet_table(source, max_pixels=MAX_PIXELS)
    assert table is not None, why
    with opened(data) as video:
        packets = list(video.packets())
        assert table.rate == video.rate and table.time_base == video.time_base
    assert table.pts.tolist() == [p.pts for p in packets]
    assert table.dts.tolist() == [p.dts for p in packets]
    assert table.pos.tolist() == [p.pos for p in packets]
    assert table.size.tolist() == [p.size for p in packets]
    assert table.key.tolist() == [p.is_keyframe for p in packets]
    shown = sorted((p.pts, n) for n, p in enumerate(packets) if not p.is_discard)
    assert table.order.tolist() == [n for _, n in shown]
    assert table.ticks.tolist() == [pts - shown[0][0] for pts, _ in shown]
    assert (table.ordinal[table.order] == np.arange(len(shown))).all()
    assert (table.ordinal < 0).sum() == sum(p.is_discard for p in packets)


def lying(n: int, packet: Any) -> Any:
    """Gives decode times as pts, as muxers that know no reordering do."""
    packet.pts = packet.dts
    return packet


def stuck(n: int, packet: Any) -> Any:
    """Gives two packets one time."""
    if n in (4, 5):
        packet.pts = packet.dts = 4 * 512
    return packet


UNTRUSTED = {
    "no index": (make_clip(container="matroska"), "no index"),
    "cut off": (MP4[:-20], "cut off"),
    "not one picture a packet": (make_clip(codec="mpeg4"), "mpeg4 is decoded in order"),
    "interlaced": (make_clip(options={"x264-params": "tff=1:interlaced=1"}), "interlaced"),
    "4:4:4": (make_clip(pix_fmt="yuv444p"), "4:4:4"),
    "no reordering": (
        remux(make_clip(codec="libx265"), lying, container="mp4"),
        "do not reorder",
    ),
    "count": (patch(MP4, b"stts", 8, 2**31 - 1), "where the header says 2147483647"),
    "wild offset": (patch(MP4, b"stco", 8, 0xFFFFFFF0), "where the header says 60"),
    "no first keyframe": (
        remux(make_clip(), lambda n, p: p if n else None, container="mp4"),
        "no keyframe",
    ),
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_a_table_that_cannot_be_trusted_is_none_and_says_why(name: str) -> None:
    data, why = UNTRUSTED[name]
    table, reason = read_packet_table(BytesSource(data), max_pixels=MAX_PIXELS)
    assert table is None and why in reason


def test_closed_keyframes_are_those_nothing_crosses() -> None:
    for open_gop, closed in ((False, [0, 1, 2, 3, 4]), (True, [0])):
        data = make_clip(codec="libx265", b_frames=3, open_gop=open_gop)
        table, _ = read_packet_table(BytesSource(data), max_pixels=MAX_PIXELS)
        assert table is not None
        assert len(table.keyframes) == 5
        assert table.closed_keyframes().tolist() == closed


ENTRIES: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 12, 24, 36, 48]),
    ({"container": "mpegts"}, [0, 12, 24, 36, 48]),
    ({"container": "h264"}, [0, 12, 24, 36, 48]),
    ({"open_gop": True}, [0]),
    ({"codec": "libx265"}, [0, 12, 24, 36, 48]),
    ({"codec": "libx265", "container": "mpegts"}, [0, 12, 24, 36, 48]),
    ({"codec": "libvpx", "container": "webm"}, [0, 12, 24, 36, 48]),
    ({"codec": "libvpx-vp9", "container": "webm"}, [0, 12, 24, 36, 48]),
    ({"codec": "libsvtav1", "options": {"svtav1-params": "keyint=12"}}, [0, 12, 24, 36, 48]),
    ({"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"}, list(range(60))),
]


@pytest.mark.parametrize(("recipe", "entries"), ENTRIES)
def test_the_bitstream_says_where_decoding_can_start(
    recipe: dict[str, Any], entries: list[int]
) -> None:
    with opened(make_clip(**recipe)) as video:
        inspect, why = inspector(video.codec, video.stream.codec_context.extradata)
        assert inspect is not None, why
        facts = [inspect(bytes(p)) for p in video.packets()]
    assert [n for n, f in enumerate(facts) if f and f.entry] == entries
    assert sum(bool(f and f.shown) for f in facts) == 60


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9", "av1"])
def test_inspectors_bear_any_bytes(codec: str) -> None:
    dice = np.random.default_rng(0)
    inspect, _ = inspector(codec, b"")
    assert inspect is not None and inspect(b"") is None
    for size in (1, 2, 5, 64, 300):
        for _ in range(100):
            inspect(dice.bytes(size))
            inspector(codec, dice.bytes(size))
            inspector(codec, b"\x01" + dice.bytes(size))


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi", "mpegts"])
def test_containers_declare_where_they_end(container: str) -> None:
    data = make_clip(container=container, codec="mpeg4")
    assert declared_bytes(BytesSource(data)) == len(data)
    cut = declared_bytes(BytesSource(data[:-100]))
    assert cut is not None and cut > len(data) - 100
    assert declared_bytes(BytesSource(b"plain text")) is None
