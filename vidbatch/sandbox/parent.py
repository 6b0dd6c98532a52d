"""What the decoder processes are asked to do: decode, sound, probe; and what they may answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vidbatch.data import (
    Audio,
    AudioEnd,
    AudioGrid,
    ByteSource,
    Clip,
    ClipEnd,
    ClipRange,
    DecodeEvent,
    DecodeLimits,
    Frames,
    Geometry,
    Sample,
    VideoInfo,
)
from vidbatch.errors import UsageError
from vidbatch.sandbox import wire
from vidbatch.sandbox.keeping import Leased
from vidbatch.sandbox.process import SLOTS, WINDOW_BYTES, Process

MAX_RANGES = 1_000_000
"""Clips of one video; more than a year of one-minute clips."""


class Sandbox(Leased):
    """Runs decodes, sound and probes in the child. For one caller at a time, from any thread."""

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
        """`decode_clip`, in the child: one VideoInfo, any number of Frames, one ClipEnd.

        The arrays of a Frames are the caller's for as long as it keeps them. As long as it keeps
        no more than two chunks, their pixels are views of the memory the child wrote; beyond
        that they are copies. The child decodes ahead while the caller works, until the slots are
        full. An iterator that is closed early stops its child; the sandbox can then be used again.

        Raises:
            MediaError: the bytes cannot be decoded (from the child, as it raised it).
            DecoderDied: the child crashed (kind `decoder_crash`), hung or took too long
                (`decoder_timeout`) or ran out of memory (`decoder_oom`).
            StoreError: `source` raised it (as it is; and anything else that it raises).
            InfraError: no process can be started.
            UsageError: one frame of these geometries is larger than a slot can be.
        """
        geometries = tuple({g.key: g for g in geometries}.values())
        frame_bytes = wire.pixel_bytes(geometries, 1)
        slot_bytes = max(limits.chunk_bytes, frame_bytes) + 2 * frame_bytes  # a context frame, gaps
        if slot_bytes > WINDOW_BYTES // SLOTS:
            raise UsageError(
                f"a chunk of {slot_bytes} bytes is more than the {WINDOW_BYTES // SLOTS} that fit "
                f"into shared memory — {clip.video.uri} was not decoded — use smaller geometries"
            )
        job = {
            "op": "decode",
            "clip": wire.pack(clip),
            "sample": wire.pack(sample),
            "geometries": wire.pack(geometries),
            "context": context,
            "halo": halo,
            "following": wire.pack(following),
            "limits": wire.pack(limits),
        }
        max_frames = limits.chunk_frames + 1
        with self._lease(clip.video.uri, slot_bytes) as process:
            expected: tuple[str, ...] = ("info",)
            end: ClipEnd | None = None
            for header, payload in self._converse(process, source, job, max_frames):
                if header["op"] not in expected:
                    raise wire.BreachError(f"{header['op']!r} out of turn")
                expected = ("frames", "end")
                if header["op"] == "info":
                    yield wire.unpack(VideoInfo, header.get("value"))
                elif header["op"] == "frames":
                    yield self._frames(process, header, payload, geometries, max_frames)
                else:
                    end, expected = wire.unpack(ClipEnd, header.get("value")), ()
            if end is None:
                raise wire.BreachError("done before the end")
        yield end  # the sandbox is free again: who stops here need not close the iterator

    def audio(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        grids: Sequence[AudioGrid],
        start_s: float,
        limits: DecodeLimits,
    ) -> Iterator[Audio | AudioEnd]:
        """`decode_audio`, in the child: any number of Audio, one AudioEnd.

        Raises:
            As `decode` does.
        """
        slot_bytes = max(limits.chunk_bytes, *(4 * g.samples for g in grids))
        job = {
            "op": "audio",
            "clip": wire.pack(clip),
            "grids": wire.pack(tuple(grids)),
            "start_s": start_s,
            "limits": wire.pack(limits),
        }
        most = slot_bytes // 4
        end: AudioEnd | None = None
        with self._lease(clip.video.uri, slot_bytes) as process:
            for header, payload in self._converse(process, source, job, most):
                if end is not None or header["op"] not in ("sound", "end"):
                    raise wire.BreachError(f"{header['op']!r} out of turn")
                if header["op"] == "end":
                    end = wire.unpack(AudioEnd, header.get("value"))
                else:
                    yield self._sound(process, header, payload, grids)
            if end is None:
                raise wire.BreachError("done before the end")
        yield end

    def _sound(
        self, process: Process, header: wire.Header, payload: bytes, grids: Sequence[AudioGrid]
    ) -> Audio:
        which = wire.unpack(int, header.get("grid"))
        keys = np.frombuffer(payload, "<i8").astype(np.int64)
        if not 0 <= which < len(grids) or not len(keys) or not (np.diff(keys) > 0).all():
            raise wire.BreachError(f"sound windows of grid {which} out of order")
        grid = grids[which]
        used = 4 * len(keys) * grid.samples
        slot = process.lend(wire.unpack(int, header.get("slot")), used, self._stall_s)
        samples = slot.view(np.float32).reshape(len(keys), grid.samples)
        if not np.isfinite(samples).all():
            raise wire.BreachError("sound that is not finite")
        return Audio(grid=grid, keys=keys, samples=samples)

    def probe(
        self, source: ByteSource, *, limits: DecodeLimits, length_s: float, uri: str = "a video"
    ) -> tuple[VideoInfo, list[ClipRange]]:
        """`probe` and `clip_ranges`, in the child; `uri` only names the video in errors.

        Raises:
            MediaError, DecoderDied, StoreError, InfraError: as `decode` does.
        """
        job = {"op": "probe", "limits": wire.pack(limits), "length_s": length_s}
        info: VideoInfo | None = None
        ranges: list[ClipRange] = []
        with self._lease(uri, 0) as process:
            for header, _ in self._converse(process, source, job, 0):
                if header["op"] == "info" and info is None:
                    info = wire.unpack(VideoInfo, header.get("value"))
                elif header["op"] == "ranges" and len(ranges) < MAX_RANGES:
                    ranges += wire.unpack_list(ClipRange, header.get("value"))
                else:
                    raise wire.BreachError(f"{header['op']!r} in a probe")
            if info is None:
                raise wire.BreachError("a probe without info")
        return info, ranges

    def _frames(
        self,
        process: Process,
        header: wire.Header,
        payload: bytes,
        geometries: Sequence[Geometry],
        max_frames: int,
    ) -> Frames:
        n = wire.unpack(int, header.get("n"))
        if not 0 <= n <= max_frames:
            raise wire.BreachError(f"a chunk of {n} frames")
        columns = wire.unpack_columns(payload, n)
        context = wire.unpack(bool, header.get("context"))
        halo = wire.unpack(int, header.get("halo"))
        if not 0 <= halo <= n - context:
            raise wire.BreachError(f"a halo of {halo} in {n} frames")
        slot = process.lend(
            wire.unpack(int, header.get("slot")), wire.pixel_bytes(geometries, n), self._stall_s
        )
        pixels = dict(wire.pixel_views(slot, geometries, n))
        return Frames(**columns, pixels=pixels, context=context, halo=halo)
