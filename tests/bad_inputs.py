"""Broken, odd and hostile videos, each made by code: name → bytes, for tests of what they come to.

Names begin with the number of the input in the catalogue that `tests/test_inputs.py` checks.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import av

from tests.clips import (
    draw_number,
    flip_bits,
    make_clip,
    media_start,
    mux_silence,
    patch,
    remux,
    trim_start,
)

DAY_MS = 24 * 3600 * 1000
ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00" * 16,
    "encryption_kid": "11" * 16,
}
SDP = (
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    b"m=video 50004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


@cache
def mp4() -> bytes:
    """The sound video that most are made of: 60 frames in GOPs of 12, header first."""
    return make_clip()


@cache
def media() -> int:
    """Where its media bytes begin."""
    return media_start(mp4())


@cache
def late() -> bytes:
    """The same with its header last."""
    return make_clip(faststart=False)


@cache
def mkv() -> bytes:
    """The same in Matroska."""
    return make_clip(container="matroska")


@cache
def ts(**changes: Any) -> bytes:
    """The same as a transport stream."""
    return make_clip(container="mpegts", options={"crf": "5"}, **changes)


def shift(ticks: int) -> Callable[[int, Any], Any]:
    """For `remux`: moves the timestamps of every packet."""
    return jump(0, ticks)


def jump(first: int, ticks: int) -> Callable[[int, Any], Any]:
    """For `remux`: moves the timestamps from packet `first` on."""

    def change(n: int, packet: Any) -> Any:
        if n >= first:
            packet.pts += ticks
            packet.dts += ticks
        return packet

    return change


def drop(number: int) -> Callable[[int, Any], Any]:
    """For `remux`: leaves one packet out."""
    return lambda n, packet: None if n == number else packet


def lose_ts_packets(data: bytes) -> bytes:
    """A transport stream without every 17th of its packets."""
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    return b"".join(p for i, p in enumerate(packets) if i % 17 != 5)


def zeroed(data: bytes, start: int, count: int) -> bytes:
    """The bytes [start, start + count) made zero."""
    return data[:start] + bytes(count) + data[start + count :]


def png(size_px: int) -> bytes:
    """A picture that claims `size_px` squared and has 200 rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", size_px, size_px, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + size_px * 3) * 200, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


def with_cover(container: str) -> bytes:
    """A file whose only video stream is a cover picture."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        sound: Any = None
        if container == "mp3":
            sound = file.add_stream("libmp3lame", rate=16000, layout="mono")
        stream: Any = file.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(draw_number(1), format="rgb24").reformat(
            format="yuvj420p"
        )
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            mux_silence(file, sound, 0.5)
    return out.getvalue()


def sound_only(container: str, codec: str) -> bytes:
    """A file with sound and nothing else."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        mux_silence(file, file.add_stream(codec, rate=16000, layout="mono"), 1.0)
    return out.getvalue()


def no_frames() -> bytes:
    """An MP4 whose writer was stopped before the first frame."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        file.start_encoding()
    return out.getvalue()


def many_streams(count: int) -> bytes:
    """A Matroska file of `count` video streams, one picture each."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as file:
        streams: list[Any] = [file.add_stream("mjpeg", rate=25) for _ in range(count)]
        frame = av.VideoFrame.from_ndarray(draw_number(1), format="rgb24").reformat(
            format="yuvj420p"
        )
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        for stream in streams:
            frame.pts = 0
            file.mux(stream.encode(frame))
    return out.getvalue()


def flat(width_px: int, height_px: int, codec: str, container: str, pix_fmt: str) -> bytes:
    """One grey picture of any size: the large ones compress to next to nothing."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, pix_fmt
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame(width_px, height_px, pix_fmt)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def repeated(times: int) -> bytes:
    """A long video of tiny pictures: 50 frames of 16x16 again and again."""
    source = make_clip(codec="ffv1", container="matroska", pix_fmt="gray", frames=50, width_px=16,
                       height_px=16)  # fmt: skip
    out = io.BytesIO()
    with av.open(io.BytesIO(source)) as file, av.open(out, "w", format="matroska") as target:
        stream = target.add_stream_from_template(file.streams.video[0])
        packets = [bytes(p) for p in file.demux(video=0) if p.size]
        for n in range(times * len(packets)):
            packet: Any = av.Packet(packets[n % len(packets)])
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * n
            packet.is_keyframe = True
            target.mux(packet)
    return out.getvalue()


def tagged(container: str) -> bytes:
    """A video with a title of 10 MiB, bytes that are no text, and a NUL, in its tags."""
    out = io.BytesIO()
    with av.open(io.BytesIO(mp4())) as source, av.open(out, "w", format=container) as target:
        target.metadata["title"] = "canary-title " + "x" * (10 * 2**20)
        target.metadata["comment"] = "canary-comment ~~~~"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue().replace(b"~~~~", b"\xff\xfe\x00\xc3")


def outside_reference(location: str, *, alias: bool = False) -> bytes:
    """A MOV whose samples lie elsewhere, by its data reference: a URL, or an alias of a path."""
    data = make_clip(container="mov", faststart=False)
    if alias:  # one level up from here, one down to the target
        path = location.replace("/", ":").encode()
        path = b":" * (len(path) % 2) + path  # of even length, whatever folder it lies in
        levels = struct.pack(">HH16xHH", 1, 1, 2, len(path))
        record = bytes(10 + 28 + 12 + 64 + 16) + levels + path + b"\xff\xff\0\0"
    else:
        record = location.encode() + b"\0"
    entry = struct.pack(">I4sI", 12 + len(record), b"alis" if alias else b"url ", 0) + record
    at = data.index(b"dref")
    old = data[at - 4 : at + 24]
    new = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    out = bytearray(data.replace(old, new))
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        start = out.index(name) - 4
        size = struct.unpack_from(">I", out, start)[0]
        struct.pack_into(">I", out, start, size + len(new) - len(old))
    return bytes(out)


def gif_bomb() -> bytes:
    """A GIF of 65535 squared with one picture of two bytes."""
    screen = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    picture = b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + screen + picture + b"\x3b"


def ivf_bomb() -> bytes:
    """A VP9 stream whose header claims 65535 squared."""
    data = bytearray(make_clip(codec="libvpx-vp9", container="ivf", frames=2))
    data[12:16] = b"\xff\xff\xff\xff"
    at = data.index(b"\x49\x83\x42")  # the sync code; behind it colour, then two sizes less one
    data[at + 3 : at + 8] = b"\x0f\xff\xff\xff\xff"
    return bytes(data)


def _noise() -> bytes:
    return random.Random(3).randbytes(65_536)


def _boxed(name: bytes, offset: int, value: int) -> Callable[[], bytes]:
    return lambda: patch(mp4(), name, offset, value)


def _clip(**recipe: Any) -> Callable[[], bytes]:
    return lambda: make_clip(**recipe)


def _remuxed(
    change: Callable[[int, Any], Any], container: str, **muxer: str
) -> Callable[[], bytes]:
    return lambda: remux(mp4(), change, container=container, muxer=muxer)


def _vfr(i: int) -> int:
    return i * 4 + i % 3 + (400 if i > 30 else 0)


def _x265(params: str) -> dict[str, str]:
    return {"x265-params": f"log-level=none:pools=none:frame-threads=1:{params}"}


MADE: dict[str, Callable[[], bytes]] = {
    "01 empty.mp4": lambda: b"",
    "02 zeros.mp4": lambda: bytes(65_536),
    "03 random.mp4": _noise,
    "04 text.mp4": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "05 header last, cut.mp4": lambda: late()[: len(late()) // 2],
    "06 cut in half.mp4": lambda: mp4()[: len(mp4()) // 2],
    "07 cut in the first frame.mp4": lambda: mp4()[: media() + 404],
    "08 header only.mp4": lambda: mp4()[: media()],
    "09 last byte missing.mp4": lambda: mp4()[:-1],
    "10 matroska cut.mkv": lambda: mkv()[: len(mkv()) // 2],
    "11 ts cut in a packet.ts": lambda: ts()[: len(ts()) // 2 + 37],
    "12 fragments cut.mp4": lambda: (f := make_clip(fragmented=True))[: len(f) * 2 // 3],
    "12b avi cut.avi": lambda: (f := make_clip(container="avi", codec="mpeg4"))[: len(f) // 2],
    "15 bits flipped.mp4": lambda: flip_bits(mp4(), media() + 8, len(mp4()), 40, 1),
    "16 media zeroed.mp4": lambda: zeroed(mp4(), media(), len(mp4()) - media()),
    "17 header flipped.mp4": lambda: flip_bits(mp4(), 40, media() - 8, 12, 3),
    "18 ts flipped.ts": lambda: flip_bits(ts(), 0, len(ts()), 200, 1),
    "19 matroska header flipped.mkv": lambda: mkv().replace(b"V_MPEG4/ISO", b"V_MPEG4/ISN"),
    "20 matroska with a hole.mkv": lambda: zeroed(mkv(), len(mkv()) // 2, 2000),
    "21 ts packets lost.ts": lambda: lose_ts_packets(ts()),
    "22 ts from mid-gop.ts": lambda: ts()[188 * 40 :],
    "23 ts unaligned.ts": lambda: b"\x47zz" + ts(),
    "24 wild sample count.mp4": _boxed(b"stsz", 8, 0x7FFFFFFF),
    "25 wild time-to-sample count.mp4": _boxed(b"stts", 8, 0x7FFFFFFF),
    "26 time-to-sample zero.mp4": _boxed(b"stts", 12, 0),
    "27 wild chunk offset.mp4": _boxed(b"stco", 8, 0xFFFFFFF0),
    "28a moov size 2^32.mp4": lambda: patch(late(), b"moov", -8, 0),  # 0: up to the end
    "28b moov size 2^32-1.mp4": lambda: patch(late(), b"moov", -8, 0xFFFFFFFF),
    "29 empty track.mp4": _boxed(b"trak", -8, 8),
    "30 a day in the header.mp4": lambda: patch(
        patch(mp4(), b"mvhd", 16, DAY_MS), b"mdhd", 16, 24 * 3600 * 12_800
    ),
    "31 wild picture size.mp4": _boxed(b"avc1", 24, 0xFFFFFFFF),
    "32 parameter sets zeroed.mp4": lambda: zeroed(mp4(), mp4().index(b"avcC") + 4, 36),
    "33 unknown codec.mp4": lambda: mp4().replace(b"avc1", b"zzzz"),
    "34 garbage before.mp4": lambda: b"GARBAGE!" * 64 + mp4(),
    "35 garbage after.mp4": lambda: mp4() + b"\xff" * 5000,
    "36 two files in one.mp4": lambda: mp4() + mp4(),
    "37 no frames.mp4": no_frames,
    "38 one frame.mp4": _clip(frames=1),
    "39a sound only.mp4": lambda: sound_only("mp4", "aac"),
    "39b mp3.mp4": lambda: sound_only("mp3", "libmp3lame"),
    "40a cover.mp4": lambda: with_cover("mp4"),
    "40b mp3 with cover.mp4": lambda: with_cover("mp3"),
    "42a is an mp4.avi": mp4,
    "44 variable rate.mp4": _clip(pts=[_vfr(i) for i in range(60)], time_base=Fraction(1, 100)),
    "45 starts at 8.32 s.mp4": _clip(pts=range(208, 268)),
    "46 edit list trims 5.mp4": lambda: trim_start(mp4(), 5),
    "47 first keyframe missing.mp4": _remuxed(drop(0), "mp4"),
    "47b a later keyframe missing.mp4": _remuxed(drop(24), "mp4"),
    "48 negative times.mp4": _remuxed(shift(-12_800), "mp4", avoid_negative_ts="disabled"),
    "49 negative times.ts": lambda: remux(ts(), shift(-180_000), container="mpegts"),
    "50 clock wraps.ts": lambda: ts(
        pts=range(2**33 - 90_000, 2**33 + 60 * 3600 - 90_000, 3600), time_base=Fraction(1, 90_000)
    ),
    "51 clock starts again.ts": lambda: ts() + ts(first_number=60),
    "52 ten hours in between.mp4": _remuxed(jump(36, 36_000 * 12_800), "mp4"),
    "53 no timestamps.h264": _clip(container="h264"),
    "54 b-frames in avi.avi": _clip(container="avi"),
    "55 coarse clock.mkv": _clip(
        codec="ffv1", container="matroska", rate=Fraction(10**6), frames=10, pix_fmt="bgr0"
    ),
    "56a open gop.mp4": _clip(open_gop=True),
    "56b open gop hevc.mp4": _clip(codec="libx265", open_gop=True, b_frames=3),
    "57 one keyframe in 300.mp4": _clip(frames=300, gop=100_000),
    "58a interlaced h264.mp4": _clip(
        options={"x264-params": "interlaced=1:tff=1:keyint=12:bframes=0:scenecut=0"}
    ),
    "58b interlaced mpeg-2.ts": _clip(
        codec="mpeg2video", container="mpegts", options={"flags": "+ildct+ilme"}
    ),
    **{f"59 turned {t}.mp4": _clip(turn_deg=t) for t in (90, 180, 270)},
    "59 mirrored.mp4": _clip(mirror=True),
    "60a ten bits.mp4": _clip(pix_fmt="yuv420p10le"),
    "60b 4:4:4.mp4": _clip(pix_fmt="yuv444p"),
    "60c hdr.mp4": _clip(
        codec="libx265",
        pix_fmt="yuv420p10le",
        options=_x265("colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc:hdr10=1"),
    ),
    "61a odd size vp9.webm": _clip(
        codec="libvpx-vp9", container="webm", width_px=65, height_px=63, frames=24
    ),
    "61b odd size ffv1.mkv": _clip(
        codec="ffv1", container="matroska", width_px=65, height_px=63, frames=24
    ),
    "62a 1x1.mkv": lambda: flat(1, 1, "ffv1", "matroska", "gray"),
    "62b 2x2.mp4": lambda: flat(2, 2, "libx264", "mp4", "yuv420p"),
    "62c 16384x16.mp4": lambda: flat(16_384, 16, "libx264", "mp4", "yuv420p"),
    "63a gray.mkv": _clip(codec="ffv1", container="matroska", pix_fmt="gray"),
    "63b alpha.mov": _clip(
        codec="prores_ks", container="mov", pix_fmt="yuva444p10le", options={"profile": "4444"}
    ),
    "63c palette.gif": _clip(codec="gif", container="gif", pix_fmt="rgb8", frames=24),
    "64 size changes.ts": lambda: ts() + ts(width_px=128, height_px=96, first_number=60),
    "65 300 video streams.mkv": lambda: many_streams(300),
    "66a png 15000.mp4": lambda: png(15_000),
    "66b png 30000.mp4": lambda: png(30_000),
    "67a gif 65535.gif": gif_bomb,
    "67b y4m 30000.mp4": lambda: b"YUV4MPEG2 W30000 H30000 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(99),
    "67c ivf 65535.ivf": ivf_bomb,
    "69 encrypted.mp4": lambda: make_clip(faststart=False, muxer=ENCRYPTION),
    "85a tags of 10 MiB.mp4": lambda: tagged("mp4"),
    "85b tags of 10 MiB.mkv": lambda: tagged("matroska"),
    "86a times near the limit.mkv": lambda: remux(mkv(), shift(2**50), container="matroska"),
    "86b ticks of 1 in 2^31.mp4": _clip(
        time_base=Fraction(1, 2**31 - 1), pts=[i * (2**31 - 1) // 25 for i in range(60)]
    ),
}  # fmt: skip
"""All that are files whose bytes matter; other inputs of the catalogue are keys and stores."""


@cache
def made(name: str) -> bytes:
    """The bytes of one of them."""
    return MADE[name]()
