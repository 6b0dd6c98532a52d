"""The made videos of the contract suite: every codec, container and timing that the wheel writes.

Each is some seconds of small pictures that carry their number (`tests.clips`), made once a session.
At ten frames a second 160 of them last long enough to be cut at 3 and at 10 seconds.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

from tests.clips import make_clip, remux, trim_start

SIZE: dict[str, Any] = {"width_px": 96, "height_px": 64}
GOP = 12
LONG: dict[str, Any] = SIZE | {"frames": 160, "rate": Fraction(10), "gop": GOP}
SHORT: dict[str, Any] = SIZE | {"frames": 70, "rate": Fraction(10), "gop": GOP}
"""Of containers that are one clip whatever the length."""

ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}
NO_ALT_REF = {"auto-alt-ref": "0", "lag-in-frames": "0"}
SVT = {"preset": "12", "svtav1-params": "keyint=12:lp=1"}
FIELDS = "tff=1:interlaced=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
SLICED = "slices=4:scenecut=0:keyint=12:min-keyint=12:bframes=2"
PYRAMID = "b-pyramid=normal:bframes=7:b-adapt=0:scenecut=0:keyint=24:min-keyint=24:weightp=0"
REFRESH = "intra-refresh=1:keyint=12:scenecut=0:bframes=0"
WIDE_GOP = "keyint=50:min-keyint=10:scenecut=0:bframes=3:b-adapt=2:open-gop=1"

VFR = [i * 10 + i % 3 * 3 + (400 if i > 60 else 0) for i in range(160)]
"""In hundredths of a second, with a gap of four seconds."""

RECIPES: dict[str, dict[str, Any]] = {
    # containers
    "h264 mp4": LONG,
    "h264 mp4, header last": LONG | {"faststart": False},
    "h264 fragmented mp4": LONG | {"fragmented": True},
    "h264 mov": LONG | {"container": "mov"},
    "h264 3gp": LONG | {"container": "3gp"},
    "h264 mkv": SHORT | {"container": "matroska"},
    "h264 ts": SHORT | {"container": "mpegts"},
    "h264 flv": SHORT | {"container": "flv"},
    "h264 avi": SHORT | {"container": "avi", "b_frames": 0},
    "h264 avi, reordered": SHORT | {"container": "avi"},
    "h264 asf": SHORT | {"container": "asf"},
    "h264 elementary stream": SHORT | {"container": "h264"},
    "h264 with sound": LONG | {"audio_s": 16.0},
    "h264 ts with sound": SHORT | {"container": "mpegts", "audio_s": 7.0},
    # codecs
    "hevc mp4": LONG | {"codec": "libx265"},
    "hevc fragmented mp4": LONG | {"codec": "libx265", "fragmented": True},
    "hevc mkv": SHORT | {"codec": "libx265", "container": "matroska"},
    "hevc ts": SHORT | {"codec": "libx265", "container": "mpegts"},
    "av1 mp4": LONG | {"codec": "libsvtav1", "options": SVT},
    "av1 webm": SHORT | {"codec": "libsvtav1", "options": SVT, "container": "webm"},
    "vp8 webm": SHORT | {"codec": "libvpx", "container": "webm", "options": NO_ALT_REF},
    "vp8 webm, hidden frames": SHORT | {"codec": "libvpx", "container": "webm", "options": ALT_REF},
    "vp9 mp4": LONG | {"codec": "libvpx-vp9"},
    "vp9 webm, hidden frames": SHORT
    | {"codec": "libvpx-vp9", "container": "webm", "options": ALT_REF},
    "mpeg4 mp4": LONG | {"codec": "mpeg4"},
    "mpeg4 avi, no b-frames": SHORT | {"codec": "mpeg4", "container": "avi", "b_frames": 0},
    "mpeg2 ts": SHORT | {"codec": "mpeg2video", "container": "mpegts", "rate": Fraction(25)},
    "mpeg2 ps": SHORT | {"codec": "mpeg2video", "container": "mpeg", "rate": Fraction(25)},
    "mpeg1 ps": SHORT | {"codec": "mpeg1video", "container": "mpeg", "rate": Fraction(25)},
    "mjpeg avi": SHORT | {"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"},
    "mjpeg mov": LONG | {"codec": "mjpeg", "container": "mov", "pix_fmt": "yuvj422p"},
    "prores mov": LONG | {"codec": "prores_ks", "container": "mov", "pix_fmt": "yuv422p10le"},
    "ffv1 mkv": SHORT | {"codec": "ffv1", "container": "matroska", "pix_fmt": "yuv420p"},
    "gif": SHORT | {"codec": "gif", "container": "gif", "pix_fmt": "rgb8"},
    "vfr gif": SHORT
    | {
        "codec": "gif",
        "container": "gif",
        "pix_fmt": "rgb8",
        "pts": VFR[:70],
        "time_base": Fraction(1, 100),
    },
    "flv1 flv": SHORT | {"codec": "flv1", "container": "flv"},
    "huffyuv avi": SHORT | {"codec": "huffyuv", "container": "avi", "pix_fmt": "yuv422p"},
    "utvideo avi": SHORT | {"codec": "utvideo", "container": "avi"},
    "h263 3gp": LONG | {"codec": "h263", "container": "3gp", "width_px": 128, "height_px": 96},
    "msmpeg4 avi": SHORT | {"codec": "msmpeg4", "container": "avi", "b_frames": 0},
    "wmv2 asf": SHORT | {"codec": "wmv2", "container": "asf", "b_frames": 0},
    # groups of pictures
    "h264 open gop": LONG | {"open_gop": True},
    "h264 open gop ts": SHORT | {"open_gop": True, "container": "mpegts"},
    "h264 open gop of its own making": LONG | {"options": {"x264-params": WIDE_GOP}},
    "hevc open gop": LONG | {"codec": "libx265", "open_gop": True, "b_frames": 3},
    "hevc open gop mkv": SHORT
    | {"codec": "libx265", "open_gop": True, "b_frames": 3, "container": "matroska"},
    "one gop": LONG | {"gop": 1000},
    "only keyframes": LONG | {"gop": 1, "b_frames": 0},
    "no b-frames": LONG | {"b_frames": 0},
    "b-frames that others refer to": LONG | {"options": {"x264-params": PYRAMID}},
    "intra refresh": LONG | {"options": {"x264-params": REFRESH}},
    "four slices": LONG | {"options": {"x264-params": SLICED}},
    # timing
    "30000/1001": LONG | {"rate": Fraction(30_000, 1001), "frames": 120},
    "vfr mp4": LONG | {"pts": VFR, "time_base": Fraction(1, 100)},
    "vfr mkv": SHORT | {"pts": VFR[:70], "time_base": Fraction(1, 100), "container": "matroska"},
    "starts late": LONG | {"pts": range(83, 243)},
    "starts late in ts": SHORT | {"pts": range(83, 153), "container": "mpegts"},
    "clock wraps in ts": SHORT
    | {
        "container": "mpegts",
        "pts": [i * 9000 + 2**33 - 90_000 for i in range(70)],
        "time_base": Fraction(1, 90_000),
    },
    "ten hours' gap": LONG | {"pts": [i + (360_000 if i >= 36 else 0) for i in range(160)]},
    "one frame": LONG | {"frames": 1},
    # pictures
    **{
        f"turned {turn}{', mirrored' * mirror}": LONG
        | {"frames": 100, "turn_deg": turn, "mirror": mirror}
        for turn in (0, 90, 180, 270)
        for mirror in (False, True)
        if turn or mirror
    },
    "interlaced h264": LONG | {"options": {"x264-params": FIELDS}},
    "interlaced mpeg2 ts": SHORT
    | {
        "codec": "mpeg2video",
        "container": "mpegts",
        "rate": Fraction(25),
        "options": {"flags": "+ildct+ilme"},
    },
    "10 bit h264": LONG | {"pix_fmt": "yuv420p10le"},
    "10 bit hevc": LONG | {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "10 bit av1": LONG | {"codec": "libsvtav1", "pix_fmt": "yuv420p10le", "options": SVT},
    "4:2:2 h264": LONG | {"pix_fmt": "yuv422p"},
    "4:2:2 mpeg2 ts": SHORT
    | {"codec": "mpeg2video", "container": "mpegts", "rate": Fraction(25), "pix_fmt": "yuv422p"},
    "4:4:4 h264": LONG | {"pix_fmt": "yuv444p"},
    "4:4:4 hevc": LONG | {"codec": "libx265", "pix_fmt": "yuv444p"},
    "4:4:4 vp9": LONG | {"codec": "libvpx-vp9", "pix_fmt": "yuv444p"},
    "rgb h264": LONG | {"codec": "libx264rgb", "pix_fmt": "bgr24"},
    "gray ffv1": SHORT | {"codec": "ffv1", "container": "matroska", "pix_fmt": "gray"},
    "alpha prores": LONG
    | {"frames": 110, "codec": "prores_ks", "container": "mov", "pix_fmt": "yuva444p10le"},
    "alpha ffv1": SHORT | {"codec": "ffv1", "container": "matroska", "pix_fmt": "yuva420p"},
    "odd size h264": LONG | {"width_px": 97, "height_px": 65, "pix_fmt": "yuv444p"},
    "odd size vp9": LONG | {"codec": "libvpx-vp9", "width_px": 97, "height_px": 65},
    "odd size ffv1": SHORT
    | {"codec": "ffv1", "container": "matroska", "width_px": 97, "height_px": 65},
}


def _shift(seconds: float) -> Any:
    """Moves the timestamps of every packet."""

    def change(n: int, packet: Any) -> Any:
        packet.pts += round(seconds / packet.time_base)
        packet.dts += round(seconds / packet.time_base)
        return packet

    return change


def _mark_keys(keys: Any) -> Any:
    """Flags packets as keyframes by their number, whatever they are."""

    def change(n: int, packet: Any) -> Any:
        packet.is_keyframe = keys(n)
        return packet

    return change


def _decode_times(n: int, packet: Any) -> Any:
    packet.pts = packet.dts = packet.dts + 2048
    return packet


def _keep_negative(seconds: float, container: str) -> bytes:
    muxer = {"avoid_negative_ts": "disabled"}
    return remux(
        made("h264 ts" if container == "mpegts" else "h264 mkv"),
        _shift(seconds),
        container=container,
        muxer=muxer,
    )


def _joined(*recipes: dict[str, Any]) -> bytes:
    """Transport streams one after the other, numbers going on."""
    parts, number = [], 0
    for recipe in recipes:
        parts.append(make_clip(**SHORT | {"container": "mpegts", "first_number": number} | recipe))
        number += recipe.get("frames", SHORT["frames"])
    return b"".join(parts)


CHANGED = {
    "negative start ts": lambda: _keep_negative(-3, "mpegts"),
    "negative start mkv": lambda: _keep_negative(-3, "matroska"),
    "first frames trimmed": lambda: trim_start(made("h264 mp4"), 5, 1024),
    "first gop trimmed": lambda: trim_start(made("h264 mp4"), 17, 1024),
    "first frames of an open gop trimmed": lambda: trim_start(made("h264 open gop"), 5, 1024),
    "every packet called a keyframe": lambda: remux(
        made("h264 mp4"), _mark_keys(lambda n: True), container="mp4"
    ),
    "wrong packets called keyframes": lambda: remux(
        made("h264 mp4"), _mark_keys(lambda n: n % 17 == 0), container="mp4"
    ),
    "only the first called a keyframe": lambda: remux(
        made("hevc mp4"), _mark_keys(lambda n: n == 0), container="mp4"
    ),
    "no packet called a keyframe, ts": lambda: remux(
        made("h264 ts"), _mark_keys(lambda n: False), container="mpegts"
    ),
    "decode times as pts, h264": lambda: remux(made("h264 mp4"), _decode_times, container="mp4"),
    "decode times as pts, hevc": lambda: remux(made("hevc mp4"), _decode_times, container="mp4"),
    "joined ts": lambda: _joined({}, {}, {}),
    "joined ts, the second with sound": lambda: _joined({}, {"audio_s": 7.0}),
    "joined ts, other sizes": lambda: _joined({}, {"width_px": 128, "height_px": 96}, {}),
}
"""What no encoder writes and archives hold all the same."""

NAMES = [*RECIPES, *CHANGED]


@cache
def made(name: str) -> bytes:
    """The bytes of a made video."""
    return CHANGED[name]() if name in CHANGED else make_clip(**RECIPES[name])
