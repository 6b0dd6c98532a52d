"""What parent and child say to each other: framed JSON headers with raw bytes, checked on arrival.

    message = header length (u32) | payload length (u32) | header (a JSON object) | payload

    parent → child                            child → parent
      decode, audio, probe   a job              ready            imports done, locked in
      bytes           answer to a read          read             offset, length
      free            a slot may be reused      want             extents that will be read
      abandon         stop the job              info             VideoInfo
                                                frames           slot, n; payload: the columns
                                                sound            slot, grid; payload: the keys
                                                ranges           some ClipRanges
                                                end              ClipEnd, or AudioEnd
                                                done, error, bug, abandoned   the job is over

The parent trusts nothing that comes back: after an exploited codec the child is an attacker.
Nothing is ever unpickled; every value is rebuilt from its type hints and bounds.
"""

from __future__ import annotations

import functools
import json
import math
import socket
import struct
import time
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from fractions import Fraction
from typing import Any, Literal, TypeVar, Union

import numpy as np
import numpy.typing as npt

from vidbatch.data import Frames, Geometry, Pixels

T = TypeVar("T")
Header = dict[str, Any]

_PREFIX = struct.Struct("<II")
MAX_HEADER_BYTES = 64 * 1024
"""Room for a job with a 1,024-byte key and many geometries; too little for a JSON bomb."""
MAX_READ_BYTES = 16 * 2**20
"""Of one read request, as large as the ranges that the reader of a clip fetches."""
RANGES_PER_MESSAGE = 128
EXTENTS_PER_MESSAGE = 1024
"""Of 64-bit numbers they fit a header; each stands for a MiB of the object or more."""
OUT_OF_MEMORY = 77
"""Exit code of a child that could not allocate."""
_MAX_TEXT = 2000
_MAX_INT = 2**63 - 1
_ALIGN_BYTES = 64
"""Each geometry's array in a slot starts on a cache line."""

COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("frame_index", "<i8", 1),
    ("pts", "<i8", 1),
    ("has_pts", "|u1", 1),
    ("time_s", "<f8", 1),
    ("covers_s", "<f8", 1),
    ("is_keyframe", "|u1", 1),
    ("is_corrupt", "|u1", 1),
    ("source_px", "<i8", 2),
    ("ordinal", "<i8", 1),
)
"""(name, type, width) of what a frames message carries besides the pixels, column after column."""
ROW_BYTES = sum(np.dtype(kind).itemsize * width for _, kind, width in COLUMNS)


class ClosedError(Exception):
    """The other side has closed, or is gone."""


class BreachError(Exception):
    """The other side said something that the protocol does not allow."""


def send(sock: socket.socket, header: Header, payload: bytes | memoryview = b"") -> None:
    """Sends one message; the payload is handed to the kernel as it is, without a copy of ours."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is over {MAX_HEADER_BYTES}")
    sock.sendall(_PREFIX.pack(len(text), len(payload)) + text)
    if len(payload):
        sock.sendall(payload)


def receive(
    sock: socket.socket, max_payload_bytes: int, timeout_s: float | None = None
) -> tuple[Header, bytes]:
    """The next message, all of it within `timeout_s`.

    Raises:
        ClosedError: the other side has closed.
        BreachError: it is no message, or larger than allowed.
        TimeoutError, OSError: from the socket.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    header_bytes, payload_bytes = _PREFIX.unpack(_read(sock, _PREFIX.size, deadline))
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise BreachError(f"a message of {header_bytes} + {payload_bytes} bytes")
    try:
        header = json.loads(_read(sock, header_bytes, deadline), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise BreachError("a header that is no JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("op"), str):
        raise BreachError("a header without op")
    return header, _read(sock, payload_bytes, deadline)


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _read(sock: socket.socket, count: int, deadline: float | None) -> bytes:
    # MSG_WAITALL lets one call on a blocking socket fill one bytes object: no join, no second copy
    parts: list[bytes] = []
    while count:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(count, socket.MSG_WAITALL)
        if not part:
            raise ClosedError
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pack(value: Any) -> Any:
    """A frozen dataclass of numbers, texts, fractions and times as plain JSON values."""
    if is_dataclass(value):
        return {f.name: pack(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [pack(item) for item in value]
    return value


def unpack(kind: type[T], value: Any) -> T:
    """Rebuilds what `pack` made of a `kind`, checking every value against its type hint.

    Integers fit 64 bits, floats are finite, texts are short and printable (other characters
    are replaced).

    Raises:
        BreachError: the value is not one of that kind.
    """
    return typing.cast(T, _unpack(kind, value))


def unpack_list(kind: type[T], value: Any) -> list[T]:
    """Rebuilds a list of `kind`. Raises BreachError."""
    if not isinstance(value, list):
        raise BreachError("a list that is none")
    return [unpack(kind, item) for item in value]


def unpack_extents(value: Any, size_bytes: int) -> list[tuple[int, int]]:
    """Half-open ranges of bytes inside an object, rising and apart. Raises BreachError."""
    if not isinstance(value, list) or len(value) > EXTENTS_PER_MESSAGE:
        raise BreachError("extents that are no short list")
    extents: list[tuple[int, int]] = []
    at = 0
    for pair in value:
        start, stop = pair if isinstance(pair, list) and len(pair) == 2 else (-1, -1)
        if not at <= _int(start) < _int(stop) <= size_bytes:
            raise BreachError(f"the extent {str(pair)[:60]} after {at} of {size_bytes}")
        extents.append((start, stop))
        at = stop
    return extents


def _unpack(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(hint)
        if value.keys() == hints.keys():
            try:
                return hint(**{name: _unpack(hints[name], value[name]) for name in hints})
            except ValueError as error:  # the class's own validation
                raise BreachError(str(error)) from None
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _unpack(inner, value)
    elif origin is Literal and isinstance(value, str | int) and value in arguments:
        return value
    elif origin is tuple and isinstance(value, list):
        return tuple(_unpack(arguments[0], item) for item in value)
    elif hint in _SCALARS:
        return _SCALARS[hint](value)
    raise BreachError(f"{str(value)[:60]!r} is no {hint}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) > _MAX_INT:
        raise BreachError(f"{str(value)[:60]!r} is no 64-bit integer")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise BreachError(f"{str(value)[:60]!r} is no finite number")
    return float(value)


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise BreachError(f"{str(value)[:60]!r} is no truth value")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > _MAX_TEXT:
        raise BreachError("a text that is none, or too long")
    return printable(value)


def printable(text: str) -> str:
    """The text with control characters and the like replaced: fit for a log line or a table."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def _fraction(value: Any) -> Fraction:
    over, _, under = _text(value).partition("/")
    try:
        return Fraction(_int(int(over)), _int(int(under)))
    except (ValueError, ZeroDivisionError):
        raise BreachError(f"{value[:60]!r} is no fraction") from None


def _time(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(_text(value))
    except ValueError:
        raise BreachError(f"{value[:60]!r} is no time") from None


_SCALARS: dict[Any, Any] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _text,
    Fraction: _fraction,
    datetime: _time,
}


def pixel_bytes(geometries: Sequence[Geometry], n: int) -> int:
    """Bytes that the pixels of `n` frames take in a slot."""
    return sum(_aligned(n * g.frame_bytes) for g in geometries)


def pixel_views(
    slot: Pixels, geometries: Sequence[Geometry], n: int
) -> Iterator[tuple[str, Pixels]]:
    """(geometry key, (n, H, W, 3) view) of each geometry, one after the other in a slot."""
    start = 0
    for g in geometries:
        end = start + n * g.frame_bytes
        yield g.key, slot[start:end].reshape(n, g.height_px, g.width_px, 3)
        start = _aligned(end)


def _aligned(count: int) -> int:
    return -(-count // _ALIGN_BYTES) * _ALIGN_BYTES


def pack_columns(frames: Frames) -> bytes:
    """The columns of a chunk, without its pixels, as the payload of a frames message."""
    return b"".join(
        np.ascontiguousarray(getattr(frames, name), dtype=kind).tobytes()
        for name, kind, _ in COLUMNS
    )


def unpack_columns(payload: bytes, n: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of `n` frames, by name: fresh writable arrays of the types that `Frames` names.

    Raises:
        BreachError: the payload is not as long as `n` frames need, or a value is out of bounds.
    """
    if len(payload) != n * ROW_BYTES:
        raise BreachError(f"{len(payload)} bytes of columns for {n} frames")
    columns: dict[str, npt.NDArray[Any]] = {}
    offset = 0
    for name, kind, width in COLUMNS:
        raw = np.frombuffer(payload, kind, n * width, offset)
        offset += raw.nbytes
        native = raw.astype(bool) if kind == "|u1" else raw.astype(raw.dtype.newbyteorder("="))
        columns[name] = native.reshape(n, width) if width > 1 else native
    index = columns["frame_index"]
    if n and (index[0] < 0 or not (np.diff(index) > 0).all()):
        raise BreachError("frame ordinals that do not grow")
    if not (np.isfinite(columns["time_s"]).all() and np.isfinite(columns["covers_s"]).all()):
        raise BreachError("frame times that are not finite")
    return columns
