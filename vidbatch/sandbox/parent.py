"""The parent's care for its decoder processes: one warm, one spare, a lease per job, burials."""

from __future__ import annotations

import logging
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, Self

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
from vidbatch.errors import DecoderDied, MediaError, StoreError, UsageError
from vidbatch.sandbox import wire
from vidbatch.sandbox.process import WINDOW_BYTES, Process

_log = logging.getLogger(__name__)

JOBS_PER_PROCESS = 256
"""Then a fresh process: bounds leaks, and how long one that was taken over could stay unseen."""
MAX_RANGES = 1_000_000
"""Clips of one video; more than a year of one-minute clips."""
EXIT_S = 1.0
"""How long the exit code of a process may take whose socket has closed."""
_DIED = {
    wire.OUT_OF_MEMORY: ("decoder_oom", "reached its limit of memory"),
    -signal.SIGKILL: ("decoder_oom", "was killed by the system, most likely for want of memory"),
    -signal.SIGXCPU: ("decoder_timeout", "used up its CPU time"),
}
_ADVICE = {
    "decoder_crash": "the file breaks the decoder: look at it, or exclude it if it happens again",
    "decoder_timeout": "the file takes too long to decode: look at it, or exclude it",
    "decoder_oom": "the picture is too large: lower limits.max_pixels or exclude it",
}
_Turns = dict[type[Any] | None, tuple[type[Any], ...]]
_DECODE: _Turns = {
    None: (VideoInfo,),
    VideoInfo: (wire.Rows, ClipEnd),
    wire.Rows: (wire.Rows, ClipEnd),
    ClipEnd: (wire.Done,),
}
_AUDIO: _Turns = {
    None: (wire.Sound, AudioEnd),
    wire.Sound: (wire.Sound, AudioEnd),
    AudioEnd: (wire.Done,),
}
_PROBE: _Turns = {
    None: (VideoInfo,),
    VideoInfo: (ClipRange, wire.Done),
    ClipRange: (ClipRange, wire.Done),
}
"""What may follow what in the answers to a job; a Failed or a Bug always may."""


class Sandbox:
    """Runs decodes, sound and probes in a child. For one caller at a time, from any thread.

    Args:
        memory_bytes: what decoding one clip may allocate, besides the shared memory.
        cpu_s: CPU time of one clip or probe.
        wall_s: time spent waiting for the child during one clip or probe; reads of the source and
            the consumer's own time do not count.
        stall_s: the longest silence of a child that is not waiting for bytes.

    Raises:
        UsageError: this is no Linux on x86-64 or arm64.
    """

    MODULES: ClassVar[tuple[str, str]] = ("vidbatch.decode", "vidbatch.probe")
    """Where the child finds `decode_clip`, and `probe` and `clip_ranges`; tests put others here."""

    def __init__(
        self,
        *,
        memory_bytes: int = 2 * 2**30,
        cpu_s: float = 4 * 3600.0,
        wall_s: float = 6 * 3600.0,
        stall_s: float = 120.0,
    ) -> None:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise UsageError(
                f"decoding in isolation needs Linux on x86-64 or arm64, not {platform.system()} on "
                f"{platform.machine()} — nothing was decoded — set limits.isolate: false"
            )
        self._memory_bytes, self._cpu_s = memory_bytes, cpu_s
        self._wall_s, self._stall_s = wall_s, stall_s
        self._busy = False
        self._process: Process | None = None
        # one thread that lives as long as the sandbox: the kernel ends children with their thread
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="vidbatch-sandbox")
        self._spare: Future[Process] | None = self._spawn()
        self.restarts = 0
        """Processes lost to crashes, hangs and limits."""
        self.last_exit: str | None = None
        """How the last of them ended, with its last words if there are any."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process that runs or ran the last job; null before the first."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """Ends both processes. Arrays that were handed out stay valid."""
        if self._process is not None:
            self._process.end()
        spare, self._spare = self._spare, None
        if spare is not None and not spare.cancel() and spare.exception() is None:
            spare.result().end()
        self._spawner.shutdown()

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

        The arrays of a Frames are the caller's. The child decodes the next chunk while the caller
        works on one. Closing the iterator early ends the process: the next job takes the spare.

        Raises:
            MediaError: the bytes cannot be decoded (from the child, as it raised it).
            DecoderDied: the child crashed (kind `decoder_crash`), hung or took too long
                (`decoder_timeout`) or ran out of memory (`decoder_oom`).
            StoreError: `source` raised it (as it is; and anything else that it raises).
            InfraError: no process can be started.
            UsageError: one frame of these geometries is larger than the shared memory can be.
        """
        geometries = tuple({g.key: g for g in geometries}.values())
        frame_bytes = sum(g.frame_bytes for g in geometries)
        chunk_bytes = max(limits.chunk_bytes, frame_bytes) + frame_bytes  # a context frame
        arguments = {
            "clip": clip,
            "sample": sample,
            "geometries": geometries,
            "context": context,
            "limits": limits,
            "halo": halo,
            "following": following,
        }

        with self._lease(clip.video.uri) as process:
            job = ("decode", source.size_bytes, arguments)
            for said, payload in self._run(process, source, job, _DECODE, chunk_bytes):
                if isinstance(said, ClipEnd):
                    end = said
                elif isinstance(said, wire.Rows):
                    yield _frames(process, said, payload, geometries)
                else:
                    yield said
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
        chunk_bytes = max([limits.chunk_bytes, *(4 * g.samples for g in grids)])
        arguments = {"clip": clip, "grids": tuple(grids), "start_s": start_s, "limits": limits}
        with self._lease(clip.video.uri) as process:
            job = ("audio", source.size_bytes, arguments)
            for said, payload in self._run(process, source, job, _AUDIO, chunk_bytes):
                if isinstance(said, AudioEnd):
                    end = said
                else:
                    yield _sound(process, said, payload, grids)
        yield end

    def probe(
        self, source: ByteSource, *, limits: DecodeLimits, length_s: float, uri: str = "a video"
    ) -> tuple[VideoInfo, list[ClipRange]]:
        """`probe` and `clip_ranges`, in the child; `uri` only names the video in errors.

        Raises:
            MediaError, DecoderDied, StoreError, InfraError: as `decode` does.
        """
        found: list[Any] = []
        with self._lease(uri) as process:
            job = ("probe", source.size_bytes, {"limits": limits, "length_s": length_s})
            for said, _ in self._run(process, source, job, _PROBE, 0):
                found.append(said)
                if len(found) > MAX_RANGES:
                    raise wire.BreachError(f"more than {MAX_RANGES} clips")
        return found[0], found[1:]

    def _run(
        self, process: Process, source: ByteSource, job: Any, turns: _Turns, chunk_bytes: int
    ) -> Iterator[tuple[Any, bytes]]:
        """Runs a job: answers its reads, yields what it finds in its turn, ends when it is done."""
        if chunk_bytes > WINDOW_BYTES:
            raise UsageError(
                f"a chunk of {chunk_bytes} bytes is more than the {WINDOW_BYTES} that fit into "
                "shared memory — nothing was decoded — use smaller geometries"
            )
        process.begin(job, self._cpu_s, chunk_bytes)
        last: type[Any] | None = None
        waited_s = 0.0
        while last is not wire.Done:
            began_s = time.monotonic()
            said, payload = process.receive()
            waited_s += time.monotonic() - began_s
            if waited_s > self._wall_s:
                raise wire.GoneError("decoder_timeout", f"took longer than {self._wall_s:g} s")
            match said:
                case wire.Read():
                    process.send(_read(source, said))
                case wire.Want():
                    source.want(wire.unpack_extents(payload, source.size_bytes))
                case wire.Failed():
                    process.idle = True
                    raise MediaError(said.message, kind=said.kind, advice=said.advice)
                case wire.Bug():
                    raise wire.GoneError("decoder_crash", f"failed with {said.what}")
                case _:
                    if type(said) not in turns[last]:
                        raise wire.BreachError(f"{type(said).__name__} out of turn")
                    last = type(said)
                    if last is not wire.Done:
                        yield said, payload
        process.idle = True

    @contextmanager
    def _lease(self, uri: str) -> Iterator[Process]:
        """A process for one job; it is ended with a job that is not over, which is rare."""
        if self._busy:
            raise RuntimeError("this sandbox is at work: close its iterator first")
        process = self._claim()
        self._busy = True
        try:
            yield process
        except wire.GoneError as gone:
            kind, what = self._bury(process, gone)
            raise DecoderDied(
                f"the decoder process {what} — {uri} — this attempt of the clip is lost, the run "
                f"goes on with a fresh process — {_ADVICE[kind]}",
                kind=kind,
                advice=_ADVICE[kind],
            ) from None
        finally:
            self._busy = False
            if not process.idle and process is self._process:
                process.end()
                self._process = None

    def _bury(self, process: Process, cause: wire.GoneError) -> tuple[str, str]:
        """Ends a process that has failed; (kind, what happened)."""
        # where only the socket told, the exit code will: it is there a moment later
        code = process.end(grace_s=0.0 if cause.kind else EXIT_S)
        kind, what = cause.kind, cause.what
        if not kind and code is None:
            kind, what = "decoder_crash", "closed its socket"
        elif not kind and code is not None:
            kind, what = _DIED.get(code, ("decoder_crash", _exit_words(code)))
        self._process = None
        self.restarts += 1
        self.last_exit = f"{what} [{process.last_words}]" if process.last_words else what
        _log.warning("decoder process %d %s", process.pid, self.last_exit)
        return kind, what

    def _claim(self) -> Process:
        """The warm process if it can take one more job, else the spare."""
        process = self._process
        if process is not None and not process.alive():
            self._bury(process, wire.GoneError("", ""))
            process = None
        if process is None or process.jobs >= JOBS_PER_PROCESS:
            if process is not None:
                process.end()
            process = self._take_spare()
            if not process.alive():  # it died while it waited, of no clip's doing
                process.end()
                process = self._take_spare()
            self._process = process
        return process

    def _take_spare(self) -> Process:
        spare, self._spare = self._spare or self._spawn(), None
        process = spare.result()
        self._spare = self._spawn()
        return process

    def _spawn(self) -> Future[Process]:
        return self._spawner.submit(Process, self.MODULES, self._memory_bytes, self._stall_s)


def _frames(
    process: Process, said: wire.Rows, payload: bytes, geometries: Sequence[Geometry]
) -> Frames:
    columns = wire.unpack_columns(payload, said.n)
    if not 0 <= said.halo <= said.n - said.context:
        raise wire.BreachError(f"a halo of {said.halo} in {said.n} frames")
    shapes = [(said.n, g.height_px, g.width_px, 3) for g in geometries]
    arrays = process.take(shapes, np.uint8)
    pixels = {g.key: array for g, array in zip(geometries, arrays, strict=True)}
    return Frames(**columns, pixels=pixels, context=said.context, halo=said.halo)


def _sound(process: Process, said: wire.Sound, payload: bytes, grids: Sequence[AudioGrid]) -> Audio:
    keys = np.frombuffer(payload[: len(payload) // 8 * 8], "<i8").astype(np.int64)
    if not 0 <= said.grid < len(grids) or not len(keys) or not (keys[1:] > keys[:-1]).all():
        raise wire.BreachError(f"sound windows of grid {said.grid} out of order")
    grid = grids[said.grid]
    (samples,) = process.take([(len(keys), grid.samples)], np.float32)
    if not np.isfinite(samples).all():
        raise wire.BreachError("sound that is not finite")
    return Audio(grid=grid, keys=keys, samples=samples)


def _read(source: ByteSource, asked: wire.Read) -> bytes:
    """What the source answers to a read of the child."""
    offset, length = asked.offset, asked.length
    if not (0 <= offset < source.size_bytes and 0 < length <= wire.MAX_PAYLOAD_BYTES):
        raise wire.BreachError(f"a read of {length} bytes at {offset} of {source.size_bytes}")
    length = min(length, source.size_bytes - offset)
    data = source.read_at(offset, length)
    if len(data) != length:
        raise StoreError(
            f"a read of {length} bytes at {offset} gave {len(data)} — the clip is not decoded from "
            "a short body — try again",
            kind="short_body",
            advice="try again",
        )
    return data


def _exit_words(code: int) -> str:
    known = {-s: s.name for s in signal.Signals}
    return f"died of {known[code]}" if code in known else f"exited with code {code}"
