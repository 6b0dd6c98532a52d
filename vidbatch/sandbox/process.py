"""One child process as its parent sees it: start, limits, shared memory, end."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vidbatch.errors import InfraError
from vidbatch.sandbox import wire

WINDOW_BYTES = 2**30
"""Address space for one chunk; the child gets the size of its job's, and takes what it writes."""
START_S = 60.0
"""An interpreter with numpy and av is up in 0.2 s; on a busy node in some seconds."""

_BOOT = (
    "import sys, os, json; sys.path[:] = json.loads(sys.argv[1]);"
    "os.environ['OPENBLAS_NUM_THREADS'] = '1';"  # read when numpy loads: no pool of threads
    "from vidbatch.sandbox.child import main; main()"
)
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class Process:
    """A locked-in child, ready for jobs. Make it in a thread that lives as long as the child may:
    the kernel ends the child together with that thread.

    Args:
        modules: see `Sandbox.MODULES`.
        memory_bytes: see `Sandbox`.
        stall_s: what `send` and `receive` wait at most.

    Raises:
        InfraError: it could not be started or locked in on this machine.
    """

    def __init__(self, modules: tuple[str, str], memory_bytes: int, stall_s: float) -> None:
        self.jobs = 0
        self.idle = True
        """Whether no job is under way."""
        self.last_words = ""
        """What it had written to stderr when it ended: untrusted text, printable, short."""
        self._ended = False
        self._stall_s = START_S
        self._shared_bytes = 0
        self._memory_fd = os.memfd_create("vidbatch-chunk", os.MFD_CLOEXEC)
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
            said, _ = self.receive()
            if not isinstance(said, wire.Ready):
                raise wire.BreachError(f"{type(said).__name__} instead of Ready")
        except wire.GoneError as gone:
            self.end()
            raise InfraError(
                f"the decoder process did not start: {gone.what} {self.last_words} — "
                "nothing can be decoded in isolation on this machine — fix the cause, or set "
                "limits.isolate: false for trusted files"
            ) from None
        self._stall_s = stall_s

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._popen.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._popen.poll() is None

    def begin(self, job: Any, cpu_s: float, chunk_bytes: int) -> None:
        """Sends a job, with room for its chunks and `cpu_s` of CPU time. Raises GoneError."""
        if chunk_bytes > self._shared_bytes:
            os.ftruncate(self._memory_fd, chunk_bytes)
            self._shared_bytes = chunk_bytes
        soft = int(self._cpu_s() + cpu_s) + 1
        resource.prlimit(self.pid, resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        self.jobs += 1
        self.idle = False
        self.send(pickle.dumps(job))

    def send(self, payload: bytes = b"") -> None:
        """Sends a message. Raises GoneError."""
        wire.send(self._sock, payload, timeout_s=self._stall_s)

    def receive(self) -> tuple[wire.Said, bytes]:
        """The child's next message and its payload. Raises GoneError."""
        text, payload = wire.receive(self._sock, self._stall_s)
        return wire.load(text), payload

    def take(self, shapes: Sequence[tuple[int, ...]], kind: type[Any]) -> list[npt.NDArray[Any]]:
        """Copies of the arrays that lie one after the other in the shared memory.

        Then the child may write there again: it cannot change what was checked or is in use.

        Raises:
            BreachError: there is no room for arrays of these shapes.
            GoneError: it does not listen.
        """
        total = sum(map(math.prod, shapes)) * np.dtype(kind).itemsize
        if total > self._shared_bytes:
            raise wire.BreachError(f"a chunk of {total} bytes in {self._shared_bytes}")
        arrays = [np.empty(shape, kind) for shape in shapes]
        at = 0
        for array in arrays:
            at += os.preadv(self._memory_fd, [array.data], at)  # at most 1 GiB: never in parts
        self.send()
        return arrays

    def end(self, grace_s: float = 0.0) -> int | None:
        """Ends the process; gives its return code if it ended by itself within `grace_s`."""
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

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
