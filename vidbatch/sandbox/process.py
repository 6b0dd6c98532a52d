"""One child process as its parent sees it: start, limits, slots of shared memory, end."""

from __future__ import annotations

import json
import mmap
import os
import resource
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vidbatch.data import Pixels
from vidbatch.errors import InfraError
from vidbatch.sandbox import wire

SLOTS = 4
"""Chunks in shared memory: one being written, one on the way, `LENT` with the consumer."""
LENT = 2
"""Slots the consumer may hold as views; a chunk beyond is copied, so the child never starves."""
WINDOW_BYTES = 4 * 2**30
"""Address space for the slots; only what is written takes memory."""
START_S = 60.0
"""An interpreter with numpy and av is up in 0.2 s; on a busy node in some seconds."""

_BOOT = (
    "import sys, os, json; sys.path[:] = json.loads(sys.argv[1]);"
    "os.environ['OPENBLAS_NUM_THREADS'] = '1';"  # read when numpy loads: no pool of threads
    "from vidbatch.sandbox.child import main; main()"
)
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class ChildGoneError(Exception):
    """The child died, hung or broke the protocol; `kind` is a kind of DecoderDied."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


class Process:
    """A locked-in child, ready for jobs. Make it in a thread that lives as long as the child may:
    the kernel ends the child together with that thread.

    Raises:
        InfraError: it could not be started or locked in on this machine.
    """

    def __init__(self, modules: tuple[str, str], memory_bytes: int) -> None:
        self.jobs = 0
        self.idle = True
        """Whether no job is under way."""
        self.slot_bytes = 0
        self.last_words = ""
        """What it had written to stderr when it ended: untrusted text, printable, short."""
        self._ended = False
        self._max_payload_bytes = 0
        self._memory: mmap.mmap | None = None
        self._granted: set[int] = set()
        self._lent: set[int] = set()
        self._returned: deque[int] = deque()
        self._memory_fd = os.memfd_create("vidbatch-frames", os.MFD_CLOEXEC)
        self._stderr, stderr = os.pipe()
        os.set_blocking(self._stderr, False)
        os.set_blocking(stderr, False)  # a child that talks too much loses words, it does not stop
        self._sock, theirs = socket.socketpair()
        with theirs:
            numbers = {
                "parent_pid": os.getpid(),
                "socket_fd": theirs.fileno(),
                "memory_fd": self._memory_fd,
                "window_bytes": WINDOW_BYTES,
                "memory_bytes": memory_bytes,
            }
            paths = [_PACKAGE_ROOT, *(str(Path(p).resolve()) for p in sys.path if p)]
            arguments = [json.dumps(value) for value in (paths, numbers, modules)]
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(theirs.fileno(), self._memory_fd),
                env={},
                cwd="/",
                start_new_session=True,
            )
        os.close(stderr)
        try:
            header, _ = self.receive(START_S)
            if header["op"] != "ready":
                raise ChildGoneError("decoder_crash", f"said {header['op']!r} instead of ready")
        except ChildGoneError as gone:
            self.end()
            raise InfraError(
                f"the decoder process did not start: {gone.what} {self.last_words} — "
                "nothing can be decoded in isolation on this machine — fix the cause, or set "
                "limits.isolate: false for trusted files"
            ) from None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._popen.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._popen.poll() is None

    def fit(self, slot_bytes: int) -> bool:
        """Makes slots of at least `slot_bytes`, once; False if they are there and smaller.

        The size never changes later: a consumer may still look into them.
        """
        if slot_bytes and self._memory is None:  # a probe needs none, and must not fix their size
            self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._memory_fd, SLOTS * self.slot_bytes)
            self._memory = mmap.mmap(self._memory_fd, SLOTS * self.slot_bytes)
        return slot_bytes <= self.slot_bytes

    def begin(
        self, job: wire.Header, cpu_s: float, timeout_s: float, max_payload_bytes: int
    ) -> None:
        """Sends a job with the slots that are free, and renews the limit of CPU time."""
        soft = int(self._cpu_s() + cpu_s) + 1
        resource.prlimit(self.pid, resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        self._max_payload_bytes = max_payload_bytes
        self.jobs += 1
        self.idle = False
        self._granted = set()
        self._take_back()
        self._granted = set(range(SLOTS)) - self._lent
        slots = {"slots": sorted(self._granted), "slot_bytes": self.slot_bytes}
        self.send(job | slots, timeout_s=timeout_s)

    def send(self, header: wire.Header, payload: bytes = b"", *, timeout_s: float) -> None:
        """Sends a message. Raises ChildGoneError."""
        with self._blamed(timeout_s):
            self._sock.settimeout(timeout_s)
            wire.send(self._sock, header, payload)

    def receive(self, timeout_s: float) -> tuple[wire.Header, bytes]:
        """The child's next message. Raises ChildGoneError."""
        with self._blamed(timeout_s):
            return wire.receive(self._sock, self._max_payload_bytes, timeout_s)

    def give_back_slots(self, timeout_s: float) -> None:
        """Tells the child which slots the consumer has let go of. Raises ChildGoneError."""
        for slot in self._take_back():
            self._grant(slot, timeout_s)

    def lend(self, slot: int, used_bytes: int, timeout_s: float) -> Pixels:
        """The bytes of a slot the child has filled; it is the child's again when they are garbage.

        Raises:
            BreachError: the slot was not the child's to fill, or is smaller than that.
            ChildGoneError: it does not listen.
        """
        if self._memory is None or slot not in self._granted or used_bytes > self.slot_bytes:
            raise wire.BreachError(f"{used_bytes} bytes in slot {slot}")
        self._granted.remove(slot)
        # an array of its own: numpy has views of views point at the first array, past those between
        pixels = np.frombuffer(self._memory, np.uint8, used_bytes, slot * self.slot_bytes)
        if len(self._lent) >= LENT:
            pixels = pixels.copy()
            self._grant(slot, timeout_s)
        else:
            self._lent.add(slot)
            # views of `pixels` keep `pixels` alive: the last of them returns the slot
            weakref.finalize(pixels, self._returned.append, slot).atexit = False
        return pixels

    def end(self, grace_s: float = 0.0) -> int | None:
        """Ends the process; gives its return code if it ended by itself within `grace_s`.

        Arrays lent out stay valid.
        """
        code: int | None = None
        if self._ended:
            return code
        self._ended = True
        try:
            code = self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        try:
            words = os.read(self._stderr, 4096).decode("utf-8", "replace").split()
        except BlockingIOError:
            words = []
        self.last_words = wire.printable(" ".join(words)[-300:])
        self._sock.close()
        os.close(self._stderr)
        os.close(self._memory_fd)
        return code

    def _take_back(self) -> list[int]:
        slots = [self._returned.popleft() for _ in range(len(self._returned))]
        self._lent.difference_update(slots)
        return slots

    def _grant(self, slot: int, timeout_s: float) -> None:
        self._granted.add(slot)
        self.send({"op": "free", "slot": slot}, timeout_s=timeout_s)

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def _blamed(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ChildGoneError("decoder_timeout", f"gave no sign for {timeout_s:.3g} s") from None
        except wire.BreachError as breach:
            raise ChildGoneError("decoder_crash", f"broke the protocol: {breach}") from None
        except (wire.ClosedError, OSError):
            raise ChildGoneError("", "ended") from None
