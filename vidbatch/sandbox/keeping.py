"""The parent's care for its decoder processes: one warm, one spare, a lease per job, burials."""

from __future__ import annotations

import logging
import platform
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, Self

from vidbatch.data import ByteSource
from vidbatch.errors import DecoderDied, MediaError, StoreError, UsageError
from vidbatch.sandbox import wire
from vidbatch.sandbox.process import ChildGoneError, Process

_log = logging.getLogger(__name__)

JOBS_PER_PROCESS = 256
"""Then a fresh process: bounds leaks, and how long one that was taken over could stay unseen."""
ABANDON_S = 1.0
"""How long an abandoned job may take to notice before its process is ended."""
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


class Leased:
    """A warm decoder process and a warm spare. For one caller at a time, from any thread.

    Args:
        memory_bytes: what decoding one clip may allocate, besides the shared slots.
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
        self._spare: Future[Process] | None = self._spawner.submit(
            Process, self.MODULES, memory_bytes
        )
        self.restarts = 0
        """Processes lost to crashes, hangs and limits, or ended because they would not stop."""
        self.last_exit: str | None = None
        """How the last of them ended, with its last words if there are any."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process that runs or ran the last job; null before the first."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """Ends both processes. Arrays that were handed out stay valid."""
        if self._process is not None:
            self._process.end()
        spare = self._spare
        if spare is not None and not spare.cancel() and spare.exception() is None:
            spare.result().end()
        self._spare = None
        self._spawner.shutdown()

    def _converse(
        self, process: Process, source: ByteSource, job: wire.Header, max_frames: int
    ) -> Iterator[tuple[wire.Header, bytes]]:
        """Runs a job: answers its reads, yields what it finds, ends when it is done."""
        job = job | {"size_bytes": source.size_bytes}
        process.begin(job, self._cpu_s, self._stall_s, max_frames * wire.ROW_BYTES)
        waited_s = 0.0
        while True:
            process.give_back_slots(self._stall_s)
            began_s = time.monotonic()
            header, payload = process.receive(self._stall_s)
            waited_s += time.monotonic() - began_s
            if waited_s > self._wall_s:
                raise ChildGoneError("decoder_timeout", f"took longer than {self._wall_s:g} s")
            match header["op"]:
                case "read":
                    data = _read(source, header)
                    process.send({"op": "bytes"}, data, timeout_s=self._stall_s)
                case "want":
                    source.want(wire.unpack_extents(header.get("extents"), source.size_bytes))
                case "info" | "frames" | "ranges" | "sound" | "end":
                    yield header, payload
                case "done":
                    process.idle = True
                    return
                case "error":
                    message, kind, advice = (
                        wire.unpack(str, header.get(n)) for n in ("message", "kind", "advice")
                    )
                    process.idle = True
                    raise MediaError(message, kind=kind, advice=advice)
                case "bug":
                    what = wire.unpack(str, header.get("what"))
                    raise ChildGoneError("decoder_crash", f"failed with {what}")
                case op:
                    raise wire.BreachError(f"{op[:40]!r} in a job")

    @contextmanager
    def _lease(self, uri: str, slot_bytes: int) -> Iterator[Process]:
        """A process for one job, whatever way the job ends."""
        if self._busy:
            raise RuntimeError("this sandbox is at work: close its iterator first")
        process = self._claim(slot_bytes)
        self._busy = True
        try:
            yield process
        except (ChildGoneError, wire.BreachError) as error:
            kind, what = self._bury(process, error)
            raise DecoderDied(
                f"the decoder process {what} — {uri} — this attempt of the clip is lost, the run "
                f"goes on with a fresh process — {_ADVICE[kind]}",
                kind=kind,
                advice=_ADVICE[kind],
            ) from None
        finally:
            self._busy = False
            if not process.idle and process is self._process:
                self._abandon(process)

    def _abandon(self, process: Process) -> None:
        """Stops a job whose result nobody wants: asks, then ends the process."""
        until_s = time.monotonic() + ABANDON_S
        try:
            process.send({"op": "abandon"}, timeout_s=ABANDON_S)
            while (left_s := until_s - time.monotonic()) > 0:
                header, _ = process.receive(left_s)
                if header["op"] in ("done", "error", "abandoned"):
                    process.idle = True
                    return
        except ChildGoneError as gone:
            if gone.kind != "decoder_timeout":
                self._bury(process, gone)
                return
        self._bury(process, ChildGoneError("decoder_timeout", "did not stop when asked to"))

    def _bury(self, process: Process, cause: ChildGoneError | wire.BreachError) -> tuple[str, str]:
        """Ends a process that has failed; (kind, what happened)."""
        if isinstance(cause, wire.BreachError):
            cause = ChildGoneError("decoder_crash", f"broke the protocol: {cause}")
        # where only the socket told, the exit code will: it is there a moment later
        code = process.end(grace_s=0.0 if cause.kind else ABANDON_S)
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

    def _claim(self, slot_bytes: int) -> Process:
        """The warm process if it can take one more job of this size, else the spare."""
        process = self._process
        if process is not None and not process.alive():
            self._bury(process, ChildGoneError("", ""))
            process = None
        if process is None or process.jobs >= JOBS_PER_PROCESS or not process.fit(slot_bytes):
            if process is not None:
                process.end()
            process = self._take_spare()
            if not process.alive():  # it died while it waited, of no clip's doing
                process.end()
                process = self._take_spare()
            process.fit(slot_bytes)
            self._process = process
        return process

    def _take_spare(self) -> Process:
        spare = self._spare or self._spawner.submit(Process, self.MODULES, self._memory_bytes)
        self._spare = None
        process = spare.result()
        self._spare = self._spawner.submit(Process, self.MODULES, self._memory_bytes)
        return process


def _read(source: ByteSource, header: wire.Header) -> bytes:
    """What the source answers to a read of the child."""
    offset, length = (wire.unpack(int, header.get(name)) for name in ("offset", "length"))
    if not (0 <= offset < source.size_bytes and 0 < length <= wire.MAX_READ_BYTES):
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
