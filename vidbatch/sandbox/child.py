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
import pkgutil
import resource
import signal
import socket
import sys
import traceback
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import av
import numpy as np

from vidbatch.audio import decode_audio
from vidbatch.data import (
    AudioEnd,
    AudioGrid,
    Clip,
    DecodeLimits,
    Frames,
    Geometry,
    Pixels,
    Sample,
    VideoInfo,
)
from vidbatch.errors import MediaError, StoreError
from vidbatch.sandbox import confine, wire

BLOCK_BYTES = 256 * 2**10
"""FFmpeg asks for 64 KiB at a time; sources fetch in pages of this size, the rest is held."""
BLOCKS = 32


class AbandonedError(StoreError):
    """The parent wants no more of this job; a StoreError because decoders let those pass."""


class ParentSource:
    """The ByteSource of a job: whatever it gives, the parent has read."""

    def __init__(self, sock: socket.socket, size_bytes: int, free: deque[int]) -> None:
        self.size_bytes = size_bytes
        self._sock = sock
        self._free = free
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._borders: list[int] = []
        """Of what was said to be read: the parent has it byte for byte, so no block goes across."""
        self._unsaid: list[tuple[int, int]] = []
        self._say_at = 0
        """Where reading has come to the end of what was said."""
        self._abandoned = False

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, min(offset+length, size)). Raises AbandonedError."""
        end = min(offset + length, self.size_bytes)
        if offset >= end:
            return b""
        parts = []
        while offset < end:
            if end - offset >= BLOCK_BYTES:
                part = self._ask(offset, min(end - offset, wire.MAX_READ_BYTES))
            else:
                start, block = self._block(offset)
                part = block[offset - start : end - start]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Tells the parent; of a long list the beginning, and the rest when it has been read."""
        self._borders = [border for extent in extents for border in extent]
        self._blocks.clear()
        self._unsaid = list(extents)
        self._say()

    def _say(self) -> None:
        count = wire.EXTENTS_PER_MESSAGE
        said, self._unsaid = self._unsaid[:count], self._unsaid[count:]
        self._say_at = said[-1][1] if said else 0
        if not self._abandoned:
            wire.send(self._sock, {"op": "want", "extents": said})

    def take_slot(self) -> int:
        """The number of a slot that nobody reads; waits for one. Raises AbandonedError."""
        while not self._free:
            self._wait("free")
        return self._free.popleft()

    def _block(self, offset: int) -> tuple[int, bytes]:
        """A block that holds this byte, and where it begins."""
        for start, block in self._blocks.items():
            if start <= offset < start + len(block):
                self._blocks.move_to_end(start)
                return start, block
        i = bisect_right(self._borders, offset)
        stop = (offset // BLOCK_BYTES + 1) * BLOCK_BYTES
        stop = min([stop, self.size_bytes, *self._borders[i : i + 1]])
        block = self._ask(offset, stop - offset)
        self._blocks[offset] = block
        if len(self._blocks) > BLOCKS:
            self._blocks.popitem(last=False)
        return offset, block

    def _ask(self, offset: int, length: int) -> bytes:
        if self._abandoned:
            raise AbandonedError("the job was abandoned")
        if self._unsaid and offset >= self._say_at:
            self._say()
        try:
            wire.send(self._sock, {"op": "read", "offset": offset, "length": length})
            data = self._wait("bytes")
        except MemoryError:
            _end_without_memory()  # no exception to be swallowed between here and PyAV's caller
        if len(data) != length:
            raise RuntimeError(f"{len(data)} bytes for a read of {length}")
        return data

    def _wait(self, wanted: str) -> bytes:
        while not self._abandoned:
            header, payload = wire.receive(self._sock, wire.MAX_READ_BYTES)
            if header["op"] == "free":
                self._free.append(header["slot"])
            elif header["op"] == "abandon":
                self._abandoned = True
                break
            if header["op"] == wanted:
                return payload
        raise AbandonedError("the job was abandoned")


class Child:
    """The loop over jobs. `window` is the memory shared with the parent, mapped once."""

    def __init__(self, sock: socket.socket, window: Pixels, decode: Any, probe: Any) -> None:
        self._sock = sock
        self._window = window
        self._decode = decode
        self._probe = probe

    def serve(self) -> NoReturn:
        """Runs jobs for ever. Raises ClosedError when the parent has closed the socket."""
        wire.send(self._sock, {"op": "ready"})
        jobs: dict[str, Callable[[wire.Header], None]] = {
            "decode": self._run_decode,
            "audio": self._run_audio,
            "probe": self._run_probe,
        }
        while True:
            header, _ = wire.receive(self._sock, 0)
            if header["op"] in jobs:  # a late free or abandon belongs to a job that is over
                wire.send(self._sock, self._outcome(jobs[header["op"]], header))

    def _outcome(self, run: Callable[[wire.Header], None], header: wire.Header) -> wire.Header:
        try:
            run(header)
        except AbandonedError:
            return {"op": "abandoned"}
        except MediaError as error:
            words = {"message": error.message, "kind": error.kind, "advice": error.advice}
            return {"op": "error"} | {name: text[:1500] for name, text in words.items()}
        except (MemoryError, wire.ClosedError, wire.BreachError):
            raise
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{at.filename.rpartition('/')[2]}:{at.lineno}"
            return {"op": "bug", "what": f"{type(error).__name__} at {place}: {error}"[:500]}
        return {"op": "done"}

    def _run_decode(self, job: wire.Header) -> None:
        geometries = tuple(wire.unpack_list(Geometry, job["geometries"]))
        free = deque(job["slots"])
        source = ParentSource(self._sock, job["size_bytes"], free)
        events = self._decode.decode_clip(
            source,
            wire.unpack(Clip, job["clip"]),
            sample=wire.unpack(Sample, job["sample"]),
            geometries=geometries,
            context=job["context"],
            halo=job["halo"],
            following=job["following"] and wire.unpack(Clip, job["following"]),
            limits=wire.unpack(DecodeLimits, job["limits"]),
        )
        for event in events:
            if isinstance(event, Frames):
                self._send_frames(event, source.take_slot(), job["slot_bytes"], geometries)
            else:
                op = "info" if isinstance(event, VideoInfo) else "end"
                wire.send(self._sock, {"op": op, "value": wire.pack(event)})

    def _send_frames(
        self, frames: Frames, slot: int, slot_bytes: int, geometries: tuple[Geometry, ...]
    ) -> None:
        n = len(frames)
        room = self._window[slot * slot_bytes : (slot + 1) * slot_bytes]
        for key, view in wire.pixel_views(room, geometries, n):
            np.copyto(view, frames.pixels[key], casting="no")
        head = {
            "op": "frames",
            "slot": slot,
            "n": n,
            "context": frames.context,
            "halo": frames.halo,
        }
        wire.send(self._sock, head, wire.pack_columns(frames))

    def _run_audio(self, job: wire.Header) -> None:
        grids = wire.unpack_list(AudioGrid, job["grids"])
        source = ParentSource(self._sock, job["size_bytes"], deque(job["slots"]))
        events = decode_audio(
            source,
            wire.unpack(Clip, job["clip"]),
            grids=grids,
            start_s=job["start_s"],
            limits=wire.unpack(DecodeLimits, job["limits"]),
        )
        for event in events:
            if isinstance(event, AudioEnd):
                wire.send(self._sock, {"op": "end", "value": wire.pack(event)})
                continue
            slot = source.take_slot()
            start = slot * job["slot_bytes"]
            room = self._window[start : start + event.nbytes].view(np.float32)
            np.copyto(room, event.samples.reshape(-1))
            head = {"op": "sound", "slot": slot, "grid": grids.index(event.grid)}
            wire.send(self._sock, head, event.keys.astype("<i8").tobytes())

    def _run_probe(self, job: wire.Header) -> None:
        source = ParentSource(self._sock, job["size_bytes"], deque())
        info, table = self._probe.probe(source, limits=wire.unpack(DecodeLimits, job["limits"]))
        ranges = self._probe.clip_ranges(info, table, job["length_s"])
        wire.send(self._sock, {"op": "info", "value": wire.pack(info)})
        for first in range(0, len(ranges), wire.RANGES_PER_MESSAGE):
            some = ranges[first : first + wire.RANGES_PER_MESSAGE]
            wire.send(self._sock, {"op": "ranges", "value": wire.pack(list(some))})


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
    except (wire.ClosedError, ConnectionError):
        os._exit(0)  # the parent has closed, or is gone: nothing to clean up, nobody to tell
