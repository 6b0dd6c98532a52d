"""Frames → a small H.264 file, for the demo: the only place that encodes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av

from vidbatch.data import Pixels, Singles

SOUND_HZ = 16_000


def write_video(
    path: Path, frames: Iterable[Pixels], *, rate: int, sound: Singles | None = None
) -> None:
    """Encodes RGB frames (H, W, 3) at a constant rate into an MP4 file, header first.

    Args:
        frames: at least one; all of the same even width and height.
        sound: mono samples at SOUND_HZ, -1..1; None leaves the sound track out.
    """
    options = {"movflags": "faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "23", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = rate
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=SOUND_HZ, layout="mono")
            track.codec_context.bit_rate = 32_000
        for i, pixels in enumerate(frames):
            if i == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and sound is not None:
            size = track.codec_context.frame_size or 1024  # known once the encoder is open
            for at in range(0, len(sound) - size + 1, size):
                part = av.AudioFrame.from_ndarray(sound[None, at : at + size], "fltp", "mono")
                part.sample_rate, part.pts, part.time_base = SOUND_HZ, at, Fraction(1, SOUND_HZ)
                container.mux(track.encode(part))
            container.mux(track.encode(None))
