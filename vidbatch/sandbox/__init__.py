"""Runs probe and decode in a child process without credentials, network, files or environment.

The child gets bytes only by asking: `source.read_at` runs here, in the parent, and its errors
surface here. Frames come back through shared memory. A video that crashes, hangs or blows up the
decoder costs one process and one attempt of one clip:

    Sandbox ── jobs, bytes ──▶ child (one clip at a time)     ✗ dies → DecoderDied for its clip,
       │   ◀── reads, events ──                                 the spare takes over at once,
       └───────────────────── spare, warm                       the next spare starts meanwhile

`InProcess` has the same methods without any of this, for archives one trusts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from vidbatch.data import (
    Audio,
    AudioEnd,
    AudioGrid,
    ByteSource,
    Clip,
    ClipRange,
    DecodeEvent,
    DecodeLimits,
    Geometry,
    Sample,
    VideoInfo,
)
from vidbatch.sandbox.parent import Sandbox

__all__ = ["InProcess", "Sandbox"]


class InProcess:
    """Decodes in the calling process: no protection, nothing to start. `limits.isolate: false`."""

    restarts = 0
    last_exit: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to end."""

    def decode(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        sample: Sample,
        geometries: Sequence[Geometry],
        context: bool,
        limits: DecodeLimits,
        halo: int = 0,
        following: Clip | None = None,
    ) -> Iterator[DecodeEvent]:
        """See `decode_clip`."""
        from vidbatch.decode import decode_clip  # PyAV: only where it is used

        return decode_clip(
            source,
            clip,
            sample=sample,
            geometries=geometries,
            context=context,
            limits=limits,
            halo=halo,
            following=following,
        )

    def audio(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        grids: Sequence[AudioGrid],
        start_s: float,
        limits: DecodeLimits,
    ) -> Iterator[Audio | AudioEnd]:
        """See `decode_audio`."""
        from vidbatch.audio import decode_audio

        return decode_audio(source, clip, grids=grids, start_s=start_s, limits=limits)

    def probe(
        self, source: ByteSource, *, limits: DecodeLimits, length_s: float, uri: str = "a video"
    ) -> tuple[VideoInfo, list[ClipRange]]:
        """See `probe` and `clip_ranges`."""
        from vidbatch.probe import clip_ranges, probe

        info, table = probe(source, limits=limits)
        return info, list(clip_ranges(info, table, length_s))
