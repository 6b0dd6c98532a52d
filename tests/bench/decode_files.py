"""The videos of `make bench-decode`: the same 1080p pictures in every codec, made once and kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vidbatch.data import Pixels

RATE = 30
WIDTH, HEIGHT = 1920, 1080
SCENE_FRAMES = 6 * RATE

SCENES = (
    "moviepy__sintel-trailer-480p_second_vid",
    "sam2__01_dog",
    "gpmf__hero7",
    "mdn__flower",
    "sam2__05_default_juggle",
    "moviepy__video_for_blend_modes",
    "moviepy__chaplin",
    "sam2__bedroom",
)
"""Of the shared real videos: film, and cameras that move."""

# As cameras write them: no keyframes but every 31 frames, which are no whole second.
_MADE: dict[str, tuple[int, str, dict[str, str]]] = {
    "h264": (
        60,
        "libx264",
        {"preset": "veryfast", "bf": "2", "b": "4500000", "sc_threshold": "0"},
    ),
    "hevc": (
        30,
        "libx265",
        {"preset": "fast", "b": "3000000", "x265-params": "log-level=none:open-gop=0"},
    ),
    "vp9": (
        30,
        "libvpx-vp9",
        {
            "deadline": "realtime",
            "cpu-used": "5",
            "lag-in-frames": "16",
            "auto-alt-ref": "1",
            "b": "3000000",
        },
    ),
    "av1": (30, "libsvtav1", {"preset": "9", "crf": "38"}),
}
"""Codec → seconds, encoder, its options."""


def bench_videos(cache: Path, real: Path | None, codecs: list[str]) -> dict[str, Path]:
    """Name → file of each codec asked for, and the shared slide talk as its camera wrote it."""
    cache.mkdir(parents=True, exist_ok=True)
    kind = "real" if real is not None else "drawn"
    files = {}
    for codec in codecs:
        path = cache / f"{kind}-{codec}.mp4"
        if not path.exists():
            print(f"making {path} (once) …", flush=True)
            _encode(codec, _pictures(real), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        files[codec] = path
    if real is not None and "h264" in codecs:
        files["h264 slides"] = real / "v2d__test_video.mp4"
    return files


def _encode(codec: str, pictures: Iterator[av.VideoFrame], path: Path) -> None:
    seconds, encoder, options = _MADE[codec]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = RATE + 1
        for i, frame in enumerate(itertools.islice(pictures, seconds * RATE)):
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _pictures(real: Path | None) -> Iterator[av.VideoFrame]:
    """Scenes of six seconds, each of its own video, one after another without end."""
    if real is None:
        yield from _drawn()
        return
    for name in itertools.cycle(SCENES):
        left = SCENE_FRAMES
        while left:
            with av.open(str(real / f"{name}.mp4")) as container:
                for frame in itertools.islice(container.decode(video=0), left):
                    left -= 1
                    yield _plain(frame)


def _drawn() -> Iterator[av.VideoFrame]:
    """Pans over clouds of every size, under the noise of a sensor."""
    rng = np.random.default_rng(0)
    for scene in itertools.count():
        clouds = _clouds(rng)
        dx, dy = int(rng.integers(-6, 7)), int(rng.integers(-3, 4))
        for i in range(SCENE_FRAMES):
            noise = rng.integers(-4, 5, (HEIGHT, WIDTH, 1))
            moved = np.roll(clouds, (i * dy, i * dx), (0, 1))[:HEIGHT, :WIDTH]
            tinted = np.roll(moved, scene % 3, axis=2) + noise
            yield _plain(av.VideoFrame.from_ndarray(tinted.clip(0, 255).astype(np.uint8), "rgb24"))


def _clouds(rng: np.random.Generator) -> Pixels:
    """(2048, 2048, 3): noise whose amplitude falls with its frequency, as that of photographs."""
    fy, fx = np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048)[None]
    falling = 1 / np.maximum(np.hypot(fx, fy), 1 / 2048)
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((2048, 2048))) * falling)
        planes.append(128 + 50 * plane / plane.std())
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def _plain(frame: av.VideoFrame) -> av.VideoFrame:
    plain = frame.reformat(WIDTH, HEIGHT, "yuv420p", interpolation="BICUBIC")
    plain.pict_type = av.video.frame.PictureType.NONE
    return plain
