"""Makes small videos whose pixels carry the frame number, and damages them in seeded ways.

Frame i shows its number as 16 black and white blocks (two rows of eight) over a gradient, so that a
decoded picture proves which frame it is, whatever codec, size or turn it went through.
"""

from __future__ import annotations

import io
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from vidbatch.data import Pixels

BITS = 16
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def draw_number(number: int, width_px: int = 64, height_px: int = 64) -> Pixels:
    """(H, W, 3) picture of a frame number: 16 blocks in the upper half, a gradient below."""
    picture = np.zeros((height_px, width_px, 3), np.uint8)
    picture[..., 0] = number * 7 % 256
    picture[..., 1] = np.linspace(0, 255, width_px).astype(np.uint8)[None]
    picture[..., 2] = np.linspace(0, 255, height_px).astype(np.uint8)[:, None]
    for bit in range(BITS):
        rows, columns = _block(bit, width_px, height_px)
        picture[rows, columns] = 235 if number >> bit & 1 else 16
    return picture


def read_number(picture: Pixels) -> int:
    """The number in an upright picture of any size of at least 16x8."""
    height_px, width_px = picture.shape[:2]
    number = 0
    for bit in range(BITS):
        rows, columns = _block(bit, width_px, height_px)
        middle = picture[
            (rows.start + rows.stop) // 2 - 1 : (rows.start + rows.stop) // 2 + 1,
            (columns.start + columns.stop) // 2 - 1 : (columns.start + columns.stop) // 2 + 1,
        ]
        number |= int(middle.mean() > 125) << bit
    return number


def _block(bit: int, width_px: int, height_px: int) -> tuple[slice, slice]:
    row, column = divmod(bit, 8)
    return (
        slice(row * height_px // 4, (row + 1) * height_px // 4),
        slice(column * width_px // 8, (column + 1) * width_px // 8),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a video; the defaults are a plain H.264 MP4 of 60 frames in GOPs of 12."""

    frames: int = 60
    first_number: int = 0
    """Number drawn into the first frame."""
    width_px: int = 64
    height_px: int = 64
    codec: str = "libx264"
    container: str = "mp4"
    pix_fmt: str = "yuv420p"
    rate: Fraction = Fraction(25)
    gop: int = 12
    b_frames: int = 2
    open_gop: bool = False
    pts: Sequence[int] | None = None
    """Of each frame in `time_base`; None counts frames."""
    time_base: Fraction | None = None
    turn_deg: int = 0
    """Clockwise turn that a player has to make; the pictures are stored turned the other way."""
    mirror: bool = False
    """Whether the stored picture is flipped left to right as well (before the turn)."""
    fragmented: bool = False
    faststart: bool = True
    audio_s: float = 0.0
    options: dict[str, str] = field(default_factory=dict)
    """More options for the encoder."""
    muxer: dict[str, str] = field(default_factory=dict)
    """More options for the container."""


def make_clip(recipe: Recipe | None = None, **changes: Any) -> bytes:
    """Encodes a recipe: `make_clip(gop=30, container="matroska")`."""
    recipe = recipe or Recipe(**changes)
    with tempfile.TemporaryDirectory() as folder:
        # The MP4 muxer opens its output a second time to move the header to the front.
        path = Path(folder) / "clip"
        _write_clip(str(path), recipe)
        return path.read_bytes()


def _write_clip(path: str, recipe: Recipe) -> None:
    with av.open(path, "w", format=recipe.container, options=_muxer(recipe)) as container:
        stream = container.add_stream(
            recipe.codec, rate=recipe.rate, options=_encoder(recipe) | recipe.options
        )
        stored = _stored(recipe, draw_number(0, recipe.width_px, recipe.height_px))
        stream.height, stream.width = stored.shape[:2]
        stream.pix_fmt = recipe.pix_fmt
        stream.codec_context.thread_count = 1
        if recipe.codec not in {"gif", "mjpeg", "ffv1", "prores_ks"}:
            stream.codec_context.gop_size = recipe.gop
        base = recipe.time_base or 1 / recipe.rate
        stream.codec_context.time_base = stream.time_base = base
        if recipe.turn_deg or recipe.mirror:
            stream.set_display_matrix(_matrix(recipe))
        sound = container.add_stream("aac", rate=16000, layout="mono") if recipe.audio_s else None
        for i in range(recipe.frames):
            picture = draw_number(recipe.first_number + i, recipe.width_px, recipe.height_px)
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(_stored(recipe, picture)), format="rgb24"
            ).reformat(format=recipe.pix_fmt, threads=1, interpolation=EXACT)
            frame.pts = recipe.pts[i] if recipe.pts is not None else i
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            mux_silence(container, sound, recipe.audio_s)


def _encoder(recipe: Recipe) -> dict[str, str]:
    if recipe.codec == "libx264":
        params = (
            f"scenecut=0:b-adapt=0:bframes={recipe.b_frames}:open-gop={int(recipe.open_gop)}"
            f":keyint={recipe.gop}:min-keyint={recipe.gop}:weightp=0"
            # With it one encode in fifty differs in some bytes.
            ":mbtree=0"
        )
        return {"preset": "veryfast", "x264-params": params}
    if recipe.codec == "libx265":
        params = (
            f"log-level=none:scenecut=0:b-adapt=0:bframes={recipe.b_frames}"
            f":open-gop={int(recipe.open_gop)}:keyint={recipe.gop}:min-keyint={recipe.gop}"
            ":pools=none:frame-threads=1"
        )
        return {"preset": "ultrafast", "x265-params": params}
    if recipe.codec in {"libvpx", "libvpx-vp9"}:
        return {"deadline": "good", "cpu-used": "5", "crf": "10", "b": "2M"}
    if recipe.codec in {"mpeg4", "mpeg2video"}:
        return {"b": "2M", "bf": str(recipe.b_frames)}
    return {}


def _muxer(recipe: Recipe) -> dict[str, str]:
    options = {"fflags": "+bitexact"}
    if recipe.container in {"mp4", "mov"}:
        if recipe.fragmented:
            options["movflags"] = "frag_keyframe+empty_moov"
        elif recipe.faststart:
            options["movflags"] = "faststart"
    return options | recipe.muxer


def _stored(recipe: Recipe, upright: Pixels) -> Pixels:
    """The picture as it is coded: undoing the turn, then the mirror."""
    picture = np.rot90(upright, recipe.turn_deg // 90)
    return picture[:, ::-1] if recipe.mirror else picture


def _matrix(recipe: Recipe) -> list[int]:
    """The display matrix of (mirror, then turn clockwise)."""
    one = 1 << 16
    a, b, c, d = {
        0: (one, 0, 0, one),
        90: (0, one, -one, 0),
        180: (-one, 0, 0, -one),
        270: (0, -one, one, 0),
    }[recipe.turn_deg]
    if recipe.mirror:
        a, b = -a, -b
    return [a, b, 0, c, d, 0, 0, 0, 1 << 30]


def mux_silence(container: Any, stream: Any, seconds: float) -> None:
    """Writes silence at 16 kHz, mono."""
    for i in range(int(seconds * 16000) // 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        frame.pts = i * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def remux(
    data: bytes,
    change: Callable[[int, Any], Any | None],
    *,
    container: str,
    muxer: dict[str, str] | None = None,
) -> bytes:
    """Copies video packets: `change(n, packet)` gives the packet to write or None to drop it."""
    out = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(out, "w", format=container, options=muxer or {}) as target,
    ):
        # As it is: the library that decodes AV1 cannot encode it.
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = (p for p in source.demux(video=0) if p.dts is not None)
        for n, packet in enumerate(packets):
            changed = change(n, packet)
            if changed is not None:
                changed.stream = stream
                target.mux(changed)
    return out.getvalue()


def patch(data: bytes, name: bytes, offset: int, value: int, fmt: str = ">I") -> bytes:
    """Writes a big-endian number `offset` bytes after the first four-character code `name`."""
    out = bytearray(data)
    struct.pack_into(fmt, out, data.index(name) + 4 + offset, value)
    return bytes(out)


def trim_start(data: bytes, frames: int, ticks: int = 512) -> bytes:
    """An MP4 whose edit list leaves out the first frames (they are decoded, not shown)."""
    at = data.index(b"elst") + 4 + 12
    (media_time,) = struct.unpack_from(">i", data, at)
    return patch(data, b"elst", 12, media_time + frames * ticks, ">i")


def flip_bits(data: bytes, start: int, end: int, count: int, seed: int) -> bytes:
    """Flips `count` bits of the bytes [start, end)."""
    out, dice = bytearray(data), random.Random(seed)
    for _ in range(count):
        out[dice.randrange(start, end)] ^= 1 << dice.randrange(8)
    return bytes(out)


def media_start(data: bytes) -> int:
    """Where the first media byte of an MP4 lies."""
    return data.index(b"mdat") + 4
