"""Videos as long and as large as one likes, made of a few coded pictures and filler."""

from __future__ import annotations

import tempfile
from pathlib import Path

import av

from tests.clips import make_clip

RATE = 25
LOOP = 50
"""Pictures that are coded; a long video repeats them."""


def make_long(
    seconds: int,
    packet_bytes: int = 22_500,
    *,
    container: str = "mp4",
    faststart: bool = True,
    gop: int = RATE,
) -> bytes:
    """H.264 with B-frames at 25 frames/s, each packet filled up with a NAL unit of filler.

    The default is what 1080p commonly has: 4.5 Mbit/s and a keyframe a second.
    """
    coded = make_clip(frames=LOOP, gop=gop)
    options = {"movflags": "faststart"} if container == "mp4" and faststart else {}
    with tempfile.TemporaryDirectory() as folder:
        path, short = Path(folder) / "long", Path(folder) / "short"
        short.write_bytes(coded)
        with (
            av.open(str(short)) as source,
            av.open(
                str(path), "w", format=container, options=options | {"fflags": "+bitexact"}
            ) as target,
        ):
            stream = source.streams.video[0]
            copy = target.add_stream_from_template(stream)
            packets = [p for p in source.demux(stream) if p.size]
            ticks = int(LOOP / RATE / stream.time_base)
            for n in range(seconds * RATE // LOOP):
                for old in packets:
                    packet = av.Packet(_filled(bytes(old), packet_bytes))
                    packet.pts, packet.dts = old.pts + n * ticks, old.dts + n * ticks
                    packet.duration, packet.time_base = old.duration, stream.time_base
                    packet.is_keyframe, packet.stream = old.is_keyframe, copy
                    target.mux(packet)
        return path.read_bytes()


def _filled(data: bytes, size_bytes: int) -> bytes:
    """A picture with a filler unit (type 12) behind it."""
    room = size_bytes - len(data) - 6
    if room < 0:
        return data
    return data + (room + 2).to_bytes(4, "big") + b"\x0c" + b"\xff" * room + b"\x80"
