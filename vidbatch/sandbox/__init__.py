"""Runs probe and decode in a child process without credentials, network, files or environment.

The child gets bytes only by asking: `source.read_at` runs here, in the parent, and its errors
surface here. Frames come back through shared memory, and are copied out of it before they are
checked. A video that crashes, hangs or blows up the decoder costs one process and one attempt of
one clip:

    Sandbox ── jobs, bytes ──▶ child (one clip at a time)     ✗ dies → DecoderDied for its clip,
       │   ◀── reads, events ──                                 the spare takes over at once,
       └───────────────────── spare, warm                       the next spare starts meanwhile

`InProcess` has the same methods without any of this, for archives one trusts.
"""

from __future__ import annotations

from typing import Self

from vidbatch.data import ByteSource, ClipRange, DecodeLimits, VideoInfo
from vidbatch.sandbox.parent import Sandbox

__all__ = ["InProcess", "Sandbox"]


class InProcess:
    """Decodes in the calling process: no protection, nothing to start. `limits.isolate: false`."""

    restarts = 0
    last_exit: str | None = None

    def __init__(self) -> None:
        from vidbatch.audio import decode_audio  # PyAV: only where it is used
        from vidbatch.decode import decode_clip

        self.decode = decode_clip
        self.audio = decode_audio

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to end."""

    def probe(
        self, source: ByteSource, *, limits: DecodeLimits, length_s: float, uri: str = "a video"
    ) -> tuple[VideoInfo, list[ClipRange]]:
        """See `probe` and `clip_ranges`."""
        from vidbatch.probe import clip_ranges, probe

        info, table = probe(source, limits=limits)
        return info, list(clip_ranges(info, table, length_s))
