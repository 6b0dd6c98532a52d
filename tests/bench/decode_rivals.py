"""The same samples by torchcodec, decord and OpenCV: one thread each, frames of 224 x 224 RGB.

Each is asked the way its manual asks for frames out of a file, with its own resizing, and gets the
frame numbers from us: finding out which ones a rule takes is no part of their time.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vidbatch.data import Pixels, Singles

SIZE = 224

Rival = Callable[[Path, list[int]], Pixels]
"""(file, rising frame numbers) → (N, 224, 224, 3)."""


def prepare(packages: Path) -> None:
    """Starts this process anew, once, where the loader finds PyAV's FFmpeg under its plain names.

    torchcodec brings no FFmpeg: so it has the very build that we decode with. `packages` is where
    `pip install --target` has put the rivals.
    """
    import av

    libraries = Path(av.__file__).parents[1] / "av.libs"
    names = packages.parent / "ffmpeg"
    if os.environ.get("VIDBATCH_BENCH_LIBS") == str(names):
        sys.path.append(str(packages))
        return
    names.mkdir(parents=True, exist_ok=True)
    for library in libraries.glob("lib*-*.so.*"):
        parts = re.fullmatch(r"(lib(?:av|sw)\w+)-\w+\.so\.(\d+)\..*", library.name)
        if parts:
            link = names / f"{parts[1]}.so.{parts[2]}"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    os.environ |= {
        "VIDBATCH_BENCH_LIBS": str(names),
        "LD_LIBRARY_PATH": f"{names}:{libraries}",
        "OPENCV_FFMPEG_CAPTURE_OPTIONS": "threads;1",
        "OMP_NUM_THREADS": "1",
    }
    os.execv(sys.executable, [sys.executable, "-m", "tests.bench.decode", *sys.argv[1:]])


def torchcodec(path: Path, frames: list[int]) -> Pixels:
    """VideoDecoder in its exact mode, which resizes with FFmpeg itself."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(
        str(path), dimension_order="NHWC", num_ffmpeg_threads=1, transforms=[Resize((SIZE, SIZE))]
    )
    pixels: Pixels = decoder.get_frames_at(frames).data.numpy()
    return pixels


def decord(path: Path, frames: list[int]) -> Pixels:
    """VideoReader of the size wanted."""
    from decord import VideoReader, cpu

    reader = VideoReader(str(path), ctx=cpu(0), width=SIZE, height=SIZE, num_threads=1)
    pixels: Pixels = reader.get_batch(frames).asnumpy()
    return pixels


def opencv(path: Path, frames: list[int]) -> Pixels:
    """Grabs every frame up to the last one wanted, retrieves and shrinks those that are."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    wanted = set(frames)
    pixels = []
    for n in range(frames[-1] + 1):
        if not capture.grab():
            break
        if n in wanted:
            _, picture = capture.retrieve()
            small = cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            pixels.append(cv2.cvtColor(small, cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(pixels)


RIVALS: dict[str, Rival] = {"torchcodec": torchcodec, "decord": decord, "OpenCV": opencv}


def wrong_frames(pixels: Pixels, frames: list[int], truth: Pixels) -> int:
    """How many pictures look more like a neighbour (±3) of the frame asked for than like itself.

    Resizing and colours differ by a grey level or two from library to library: pictures are
    compared by what they show, at one brightness and contrast (fades change these), and one that
    stands still is never wrong.

    Args:
        truth: (all frames of the file, 224, 224, 3) as we scale them.
    """
    wrong = abs(len(frames) - len(pixels))
    for picture, n in zip(pixels, frames, strict=False):
        near = range(max(0, n - 3), min(len(truth), n + 4))
        off = {m: float(np.abs(_level(picture) - _level(truth[m])).mean()) for m in near}
        wrong += off[n] > min(off.values()) + 0.05
    return wrong


def _level(picture: Pixels) -> Singles:
    grey: Singles = picture.mean(axis=2, dtype=np.float32)
    return (grey - grey.mean()) * (50 / max(1.0, float(grey.std())))
