"""The child's side: takes jobs off its socket and runs them, locked in, with nothing but bytes.

Started as `python -I -S -c …` with an empty environment; all it knows comes on its command line
(no secrets: numbers and import paths) and over the socket.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import mmap
import os
import pickle
import pkgutil
import resource
import signal
import socket
import sys
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import av
import numpy as np
import numpy.typing as npt

from vidbatch.audio import decode_audio
from vidbatch.data import Audio, Frames, Pixels
from vidbatch.errors import MediaError
from vidbatch.sandbox import confine, wire

BLOCK_BYTES = 256 * 1024
"""Asked for at once, within what is wanted: one question costs as much CPU as 100 KB of answer."""


class ParentSource:
    """The ByteSource of a job: whatever it gives, the parent has read."""

    def __init__(self, sock: socket.socket, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._sock = sock
        self._wanted: Sequence[tuple[int, int]] = ()
        self._at, self._block = 0, b""
        """The last bytes asked for, and where they begin."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, min(offset+length, size))."""
        end = min(offset + length, self.size_bytes)
        if not self._at <= offset <= end <= self._at + len(self._block):
            i = bisect_right(self._wanted, (offset, self.size_bytes)) - 1
            least = min(offset + BLOCK_BYTES, self._wanted[i][1]) if i >= 0 else 0
            self._at, self._block = offset, self._fetch(offset, max(end, least))
        return self._block[offset - self._at : end - self._at]

    def _fetch(self, offset: int, end: int) -> bytes:
        steps = range(offset, end, wire.MAX_PAYLOAD_BYTES)
        parts = [self._ask(at, min(end - at, wire.MAX_PAYLOAD_BYTES)) for at in steps]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Tells the parent."""
        self._wanted = extents
        wire.send(self._sock, wire.pack_extents(extents), wire.dump(wire.Want()))

    def _ask(self, offset: int, length: int) -> bytes:
        try:
            wire.send(self._sock, text=wire.dump(wire.Read(offset, length)))
            return wire.receive(self._sock)[1]
        except MemoryError:
            _end_without_memory()  # no exception to be swallowed between here and PyAV's caller


class Child:
    """The loop over jobs. `window` is the memory shared with the parent, mapped once."""

    def __init__(self, sock: socket.socket, window: Pixels, decode: Any, probe: Any) -> None:
        self._sock = sock
        self._window = window
        self._probe_module = probe
        self._jobs: dict[str, Callable[..., Iterator[Any]]] = {
            "decode": decode.decode_clip,
            "audio": decode_audio,
            "probe": self._probe,
        }

    def serve(self) -> NoReturn:
        """Runs jobs for ever. Raises GoneError when the parent has closed the socket."""
        self._say(wire.Ready())
        while True:
            job, size_bytes, arguments = pickle.loads(wire.receive(self._sock)[1])
            self._say(self._outcome(job, size_bytes, arguments))

    def _say(self, said: wire.Said, payload: bytes = b"") -> None:
        wire.send(self._sock, payload, wire.dump(said))

    def _outcome(self, job: str, size_bytes: int, arguments: dict[str, Any]) -> wire.Said:
        try:
            for event in self._jobs[job](ParentSource(self._sock, size_bytes), **arguments):
                if isinstance(event, Frames):
                    pixels = [event.pixels[g.key] for g in arguments["geometries"]]
                    rows = wire.Rows(len(event), event.context, event.halo)
                    self._give(rows, wire.pack_columns(event), pixels)
                elif isinstance(event, Audio):
                    sound = wire.Sound(arguments["grids"].index(event.grid))
                    self._give(sound, event.keys.astype("<i8").tobytes(), [event.samples])
                else:
                    self._say(event)
        except MediaError as error:
            return wire.Failed(*(t[:1500] for t in (error.message, error.kind, error.advice)))
        except (MemoryError, wire.GoneError):
            raise
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{at.filename.rpartition('/')[2]}:{at.lineno}"
            return wire.Bug(f"{type(error).__name__} at {place}: {error}"[:500])
        return wire.Done()

    def _give(self, said: wire.Said, payload: bytes, arrays: list[npt.NDArray[Any]]) -> None:
        """Arrays one after the other in shared memory; returns when the parent has taken them."""
        at = 0
        for array in arrays:
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._window[at : at + len(flat)] = flat
            at += len(flat)
        self._say(said, payload)
        wire.receive(self._sock)

    def _probe(self, source: ParentSource, *, length_s: float, limits: Any) -> Iterator[Any]:
        info, table = self._probe_module.probe(source, limits=limits)
        yield info
        yield from self._probe_module.clip_ranges(info, table, length_s)


def _map(fd: int, size_bytes: int) -> Pixels:
    """Shared memory as an array, beyond what the file holds now: the parent will make it grow.

    Not by `mmap.mmap`, which refuses that and keeps a duplicate of the descriptor.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size, nowhere, start = ctypes.c_size_t(size_bytes), ctypes.c_void_p(), ctypes.c_long(0)
    address = libc.mmap(nowhere, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, start)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap of the shared memory")
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


def _end_without_memory() -> NoReturn:
    """Ends the process on the spot: an exception might be swallowed on its way up."""
    os._exit(wire.OUT_OF_MEMORY)


def _judge_enomem(memory_bytes: int) -> Callable[..., Exception]:
    """What stands for the class of FFmpeg's error ENOMEM.

    FFmpeg also says it of a size in a broken file that no memory could hold (170 of 20,000
    mutated files): that is damage and stays an error. Where a quarter of the memory has ever been
    used, or is not to be had now, the process ends: a decoder would count the packet as damaged.
    """
    error_class = av.error.classes[errno.ENOMEM]
    much_bytes = max(mmap.PAGESIZE, memory_bytes // 4)
    peak_bytes = _peak_bytes()

    def judge(*args: Any) -> Exception:
        try:
            mmap.mmap(-1, much_bytes).close()
        except (OSError, MemoryError):
            _end_without_memory()
        if _peak_bytes() - peak_bytes > much_bytes:
            _end_without_memory()
        error: Exception = error_class(*args)
        return error

    return judge


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> NoReturn:
    """Entry of the child process; ends only by exit or signal."""
    numbers, modules = json.loads(sys.argv[2]), json.loads(sys.argv[3])
    confine.die_with(numbers["parent_pid"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    decode, probe = (importlib.import_module(name) for name in modules)
    for name in ("ma", "linalg", "fft", "rec", "strings"):
        importlib.import_module(f"numpy.{name}")  # numpy imports these on first use
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)  # PyAV imports lazily; locked in it could not
    window = _map(numbers["memory_fd"], numbers["window_bytes"])
    os.close(numbers["memory_fd"])  # no descriptor left to resize the parent's view with
    sock = socket.socket(fileno=numbers["socket_fd"])
    av.error.classes[errno.ENOMEM] = _judge_enomem(numbers["memory_bytes"])
    confine.lock(numbers["memory_bytes"])
    try:
        Child(sock, window, decode, probe).serve()
    except MemoryError:
        _end_without_memory()
    except wire.GoneError:
        os._exit(0)  # the parent has closed, or is gone: nothing to clean up, nobody to tell
