"""Frames → a small H.264 file, for the demo: the only place that encodes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av

from vidbatch.data import Pixels


def write_video(path: Path, frames: Iterable[Pixels], *, rate: int) -> None:
    """Encodes RGB frames (H, W, 3) at a constant rate into an MP4 file, header first.

    Args:
        frames: at least one; all of the same even width and height.
    """
    options = {"movflags": "faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = rate
        for i, pixels in enumerate(frames):
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
