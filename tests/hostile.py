"""Decoders that misbehave, run by the child of a sandbox in tests; the clip's uri says how."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vidbatch.data import (
    ByteSource,
    Clip,
    ClipEnd,
    DecodeEvent,
    DecodeLimits,
    Frames,
    Geometry,
    Sample,
    VideoInfo,
)
from vidbatch.errors import MediaError
from vidbatch.sandbox import wire

INFO = VideoInfo(
    container="mov,mp4",
    codec="h264",
    width_px=640,
    height_px=480,
    rotation_deg=90,
    time_base=Fraction(1, 12800),
    rate=Fraction(30000, 1001),
    start_s=-0.25,
    duration_s=None,
    frame_count=300,
    audio_codec="aac",
    audio_rate_hz=48_000,
)
END = ClipEnd(
    status="partial",
    reason="3 of 9 packets are damaged",
    kind="corrupt",
    start_s=0.1,
    end_s=1 / 3,
    start_frame=0,
    end_frame=9,
    frames_decoded=9,
    decode_errors=3,
    corrupt_frames=1,
    fallback=None,
)


def make_frames(first: int, n: int, geometries: Sequence[Geometry], context: bool) -> Frames:
    """A chunk whose pixels are `first` modulo 251, with every column telling of its row."""
    index = np.arange(first, first + n, dtype=np.int64)
    return Frames(
        frame_index=index,
        pts=index * 512 - 2**40,
        has_pts=index % 2 == 0,
        time_s=index / 30,
        covers_s=np.full(n, 1 / 3),
        is_keyframe=index % 3 == 0,
        is_corrupt=index % 5 == 0,
        source_px=np.stack([index + 640, index + 480], axis=1),
        ordinal=index,
        pixels={
            g.key: np.full((n, g.height_px, g.width_px, 3), first % 251, np.uint8)
            for g in geometries
        },
        context=context,
    )


def decode_clip(
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
    """Does what the last part of the clip's uri names, between the info and the end."""
    yield INFO
    began_s = time.monotonic()
    deed, _, argument = clip.video.uri.rpartition("/")[2].partition("-")
    match deed:
        case "frames":
            for k in range(int(argument)):
                yield make_frames(10 * k, 10, geometries, context and k > 0)
        case "sum":
            step = int(argument)
            total = sum(sum(source.read_at(at, step)) for at in range(0, source.size_bytes, step))
            yield make_frames(total, 1, geometries, False)
        case "want":
            parts = [(at, at + 9) for at in range(0, source.size_bytes, int(argument))]
            source.want(parts)
            for start, stop in parts:
                assert source.read_at(start, 100)[: stop - start] == bytes(9)
        case "sieve":  # many small reads, to and fro
            for at in range(0, source.size_bytes, 997):
                assert source.read_at(at, 100) == source.read_at(at, 5000)[:100]
        case "kill":
            os.kill(os.getpid(), signal.SIGTERM)  # refused: the process may not signal
        case "segv":
            ctypes.string_at(0)
        case "abort":
            ctypes.CDLL(None).abort()
        case "exit":
            os._exit(int(argument))
        case "sleep":
            time.sleep(float(argument))
        case "burn":
            while time.monotonic() - began_s < float(argument):
                pass
        case "spin":
            while True:
                pass
        case "bomb":
            held = []
            while True:
                held.append(np.ones(2**24, np.uint8))
        case "media":
            raise MediaError(
                f"no video stream\x1b — {clip.video.uri}", kind="no_video", advice="none"
            )
        case "bug":
            raise KeyError("a mistake of ours")
        case "fat":  # a chunk larger than the decoder may make
            frames = make_frames(0, 200, geometries, False)
            columns = wire.pack_columns(frames)
            _say('["Rows",{"n":200,"context":false,"halo":0}]', columns)
        case "raw":
            _say(*LIES[argument] if isinstance(LIES[argument], tuple) else (LIES[argument],))
        case "attack":
            report = "; ".join(f"{name}: {_try(attack)}" for name, attack in ATTACKS.items())
            yield ClipEnd(
                **{f: getattr(END, f) for f in END.__slots__ if f != "reason"}, reason=report
            )
            return
    yield END


def probe(source: ByteSource, *, limits: DecodeLimits) -> tuple[VideoInfo, Any]:
    """Knows the info of every video; the table is the source's size."""
    if source.read_at(0, 4) == b"bad!":
        raise MediaError("no video here", kind="no_video", advice="none")
    return INFO, source.size_bytes


def _pairs(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


_END = '["ClipEnd",' + json.dumps(asdict(END)) + "]"
LIES: dict[str, str | tuple[str, bytes]] = {
    "pickle": "\x80\x04K\x01.",
    "nested": "[" * 50_000,
    "list": "[]",
    "noname": '[5,{"n":1}]',
    "listed": '[["Read"],{"n":1}]',
    "fields": '["Read",["offset","length"]]',
    "nan": '["Sound",{"grid":NaN}]',
    "infinite": _END.replace("0.1,", "1e999,"),
    "vast": _END.replace("0.1,", "1" * 400 + ","),
    "unknown": '["\\u0000",{}]',
    "long": '["Bug",{"what":"' + "x" * 70_000 + '"}]',
    "end": '["ClipEnd",{"status":"ok"}]',
    "read": '["Read",{"offset":0,"length":99999999999}]',
    "negative": '["Read",{"offset":-5,"length":3}]',
    "want": ('["Want",{}]', _pairs(0, 50001)),
    "falling": ('["Want",{}]', _pairs(10, 20, 19, 30)),
    "nothing": ('["Want",{}]', _pairs(10, 10)),
    "triple": ('["Want",{}]', _pairs(1, 2, 3)),
    "flood": ('["Want",{}]', bytes(2**24 + 1)),
    "many": '["Rows",{"n":1000000,"context":false,"halo":0}]',
    "negative_rows": '["Rows",{"n":-1,"context":false,"halo":0}]',
    "short": '["Rows",{"n":10,"context":false,"halo":0}]',
    "halo": ('["Rows",{"n":0,"context":true,"halo":0}]'),
    "sound": ('["Sound",{"grid":0}]', _pairs(1)),
    "early": '["Done",{}]',
    "ready": '["Ready",{}]',
    "twice": '["VideoInfo",{}]',
    "range": '["ClipRange",{}]',
}


def _say(text: str, payload: bytes = b"") -> None:
    """Writes to the parent over the child's own socket what a taken-over child could write."""
    sock = json.loads(sys.argv[2])["socket_fd"]
    raw = text.encode("latin-1")
    os.write(sock, struct.pack("<II", len(raw), len(payload)) + raw + payload)
    time.sleep(60)


def _try(attack: Any) -> str:
    try:
        return f"DONE {attack()!r}"[:80]
    except Exception as error:
        return type(error).__name__


def _first(names: set[str]) -> str:
    return sorted(names)[0]


def _write_file() -> None:
    with Path("/tmp/vidbatch-escaped").open("w") as file:
        file.write("x")


def _call(name: str, *arguments: int) -> int:
    """A function of the C library, which answers -1 where the kernel refuses."""
    answer = getattr(ctypes.CDLL(None, use_errno=True), name)(*map(ctypes.c_long, arguments))
    if answer < 0:
        raise OSError(ctypes.get_errno(), name)
    return int(answer)


def _read_parent_memory() -> int:
    word = ctypes.create_string_buffer(8)
    pairs = (ctypes.c_void_p * 2)(ctypes.addressof(word), 8)
    answer = ctypes.CDLL(None, use_errno=True).process_vm_readv(os.getppid(), pairs, 1, pairs, 1, 0)
    if answer < 0:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return int(answer)


ATTACKS = {
    "env": lambda: _first(os.environ.keys() - {"OPENBLAS_NUM_THREADS", "LC_CTYPE"}),
    "parent_env": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "parent_memory": _read_parent_memory,
    "write_file": _write_file,
    "read_file": lambda: Path("/etc/hostname").read_text(),
    "list": lambda: list(Path("/").iterdir()),
    "delete": lambda: Path("/tmp/vidbatch-canary").unlink(),
    "socket": lambda: socket.socket(socket.AF_INET),
    "unix_socket": lambda: socket.socketpair(),
    "run": lambda: subprocess.run([sys.executable, "-c", "1"], check=True),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "fork": lambda: os.fork(),
    "signal_parent": lambda: os.kill(os.getppid(), 0),
    "raise_limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    "pipe": lambda: os.pipe(),
    "memory_file": lambda: os.memfd_create("x"),
    "parent_limits": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1)),
    "trace_parent": lambda: _call("ptrace", 16, os.getppid(), 0, 0),
    "new_namespace": lambda: _call("unshare", 0x10000000),
    "io_uring": lambda: _call("syscall", 425, 8, 0),
    "open_tree": lambda: _call("syscall", 428, -100, 0, 0),
}
