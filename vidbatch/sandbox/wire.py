"""What parent and child say to each other, checked on arrival.

    message = length of the text (u32) | length of the payload (u32) | text | payload

    parent → child: payload only       child → parent: text = JSON [name of the class, its fields]
      a job, pickled                     Ready, then for each job any of the classes of `Said`
      the answer to a Read                 in the order the job has, last Done, Failed or Bug
      nothing: Rows, Sound was taken

The child asks and waits, or tells; the parent never speaks unasked. It trusts nothing that comes
back: after an exploited codec the child is an attacker. What comes from it is never unpickled;
every value is rebuilt from type hints and bounds.
"""

from __future__ import annotations

import functools
import json
import math
import socket
import struct
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from vidbatch.data import AudioEnd, ClipEnd, ClipRange, Frames, VideoInfo

_PREFIX = struct.Struct("<II")
MAX_TEXT_BYTES = 64 * 1024
"""Room for any message; too little for a JSON bomb."""
MAX_PAYLOAD_BYTES = 16 * 2**20
"""Also of one read, as large as the ranges that the reader of a clip fetches."""
OUT_OF_MEMORY = 77
"""Exit code of a child that could not allocate."""
_MAX_TEXT = 2000
_MAX_INT = 2**63 - 1

_ROW = np.dtype(
    [
        ("frame_index", "<i8"),
        ("pts", "<i8"),
        ("has_pts", "u1"),
        ("time_s", "<f8"),
        ("covers_s", "<f8"),
        ("is_keyframe", "u1"),
        ("is_corrupt", "u1"),
        ("source_px", "<i8", (2,)),
        ("ordinal", "<i8"),
    ]
)
"""What the payload of Rows holds of each frame; bytes stand for truth values."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Imports are done, the child is locked in."""


@dataclass(frozen=True, slots=True)
class Read:
    """Asks for bytes of the object."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Want:
    """Says what will be read; payload: pairs of offsets (`pack_extents`)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Frames; payload: the columns. The pixels of each geometry stand in the shared memory."""

    n: int
    context: bool
    halo: int


@dataclass(frozen=True, slots=True)
class Sound:
    """Windows of a grid of the job; payload: the keys. The samples stand in the shared memory."""

    grid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended with a MediaError."""

    message: str
    kind: str
    advice: str


@dataclass(frozen=True, slots=True)
class Bug:
    """The job ended with another exception."""

    what: str


@dataclass(frozen=True, slots=True)
class Done:
    """The job has been done."""


Said = (
    Ready | Read | Want | Rows | Sound | Failed | Bug | Done
    | VideoInfo | ClipRange | ClipEnd | AudioEnd
)  # fmt: skip
_KINDS: dict[Any, Any] = {kind.__name__: kind for kind in typing.get_args(Said)}


class GoneError(Exception):
    """The other side closed, hung or broke the protocol.

    `kind` is a kind of DecoderDied, or empty where only its exit code can tell.
    """

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what


class BreachError(GoneError):
    """The other side said something that the protocol does not allow."""

    def __init__(self, what: str) -> None:
        super().__init__("decoder_crash", f"broke the protocol: {what}")


def send(
    sock: socket.socket,
    payload: bytes | memoryview = b"",
    text: bytes = b"",
    timeout_s: float | None = None,
) -> None:
    """Sends one message; the payload is handed to the kernel as it is, without a copy of ours.

    Raises:
        GoneError: the other side has closed, or does not listen for `timeout_s`.
    """
    with _patience(timeout_s):
        if timeout_s is not None:  # a locked-in child may not even make the call
            sock.settimeout(timeout_s)
        sock.sendall(_PREFIX.pack(len(text), len(payload)) + text)
        if len(payload):
            sock.sendall(payload)


def receive(sock: socket.socket, timeout_s: float | None = None) -> tuple[bytes, bytes]:
    """(text, payload) of the next message, all of it within `timeout_s`.

    Raises:
        GoneError: the other side has closed, is too slow, or says more than is allowed.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _patience(timeout_s):
        text_bytes, payload_bytes = _PREFIX.unpack(_read(sock, _PREFIX.size, deadline))
        if text_bytes > MAX_TEXT_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise BreachError(f"a message of {text_bytes} + {payload_bytes} bytes")
        return _read(sock, text_bytes, deadline), _read(sock, payload_bytes, deadline)


@contextmanager
def _patience(timeout_s: float | None) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise GoneError("decoder_timeout", f"gave no sign for {timeout_s:.3g} s") from None
    except OSError:
        raise GoneError("", "ended") from None


def _read(sock: socket.socket, count: int, deadline: float | None) -> bytes:
    # MSG_WAITALL lets one call on a blocking socket fill one bytes object: no join, no second copy
    parts: list[bytes] = []
    while count:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        part = sock.recv(count, socket.MSG_WAITALL)
        if not part:
            raise GoneError("", "ended")
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def dump(said: Said) -> bytes:
    """The text of a message."""
    pair = [type(said).__name__, asdict(said)]
    return json.dumps(pair, default=str, separators=(",", ":"), allow_nan=False).encode("ascii")


def load(text: bytes) -> Said:
    """Rebuilds what `dump` took, checking every value against its type hint.

    Integers fit 64 bits, floats are finite, texts are short and printable (other characters
    are replaced).

    Raises:
        BreachError: the text is not one that `dump` makes.
    """
    try:
        name, values = json.loads(text, parse_int=_int, parse_float=_float, parse_constant=_float)
        kind = _KINDS[name]
        hints = _hints(kind)
        if values.keys() != hints.keys():
            raise ValueError("other fields")
        said: Said = kind(**{field: _checked(hints[field], values[field]) for field in hints})
    except (
        ValueError,
        ArithmeticError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        what = printable(f"{text[:60].decode('latin-1')}: {e}"[:200])
        raise BreachError(f"{type(e).__name__} in {what}") from None
    return said


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _checked(hint: Any, value: Any) -> Any:
    """The value if it is of a scalar type, of a Literal or of an optional one of these."""
    allowed = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        allowed = allowed if type(value) is str and value in allowed else ()
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) is str and Fraction in allowed:
        over, _, under = value.partition("/")  # not by Fraction, which knows "1e999999999"
        return Fraction(_int(over), _int(under or "1"))
    if type(value) is str and (str in allowed or value in allowed) and len(value) <= _MAX_TEXT:
        return printable(value)
    if type(value) in allowed and type(value) in (int, float, bool, type(None)):
        return value
    raise ValueError(f"{str(value)[:60]!r} is no {hint}")


def _int(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > _MAX_INT:
        raise ValueError(f"{text[:30]} is no 64-bit integer")
    return number


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:30]} is not finite")
    return number


def printable(text: str) -> str:
    """The text with control characters and the like replaced: fit for a log line or a table."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "�" for c in text)


def pack_extents(extents: Sequence[tuple[int, int]]) -> bytes:
    """The payload of Want: as many of these half-open ranges as fit, a million."""
    return np.array(extents[: MAX_PAYLOAD_BYTES // 16], "<i8").tobytes()


def unpack_extents(payload: bytes, size_bytes: int) -> list[tuple[int, int]]:
    """Half-open ranges of bytes inside an object, rising and apart. Raises BreachError."""
    if len(payload) % 16:
        raise BreachError(f"{len(payload)} bytes of extents")
    extents: list[tuple[int, int]] = []
    at = 0
    for start, stop in struct.iter_unpack("<qq", payload):
        if not at <= start < stop <= size_bytes:
            raise BreachError(f"the extent {start}:{stop} after {at} of {size_bytes}")
        extents.append((start, stop))
        at = stop
    return extents


def pack_columns(frames: Frames) -> bytes:
    """The payload of Rows: the columns of a chunk, without its pixels."""
    rows = np.empty(len(frames), _ROW)
    for name in rows.dtype.fields or ():
        rows[name] = getattr(frames, name)
    return rows.tobytes()


def unpack_columns(payload: bytes, n: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of `n` frames, by name: fresh writable arrays of the types that `Frames` names.

    Raises:
        BreachError: the payload is not as long as `n` frames need, or a value is out of bounds.
    """
    if n < 0 or len(payload) != n * _ROW.itemsize:
        raise BreachError(f"{len(payload)} bytes of columns for {n} frames")
    rows = np.frombuffer(payload, _ROW)
    views = {name: rows[name] for name in rows.dtype.fields or ()}
    columns = {k: v.astype(bool if v.dtype == np.uint8 else v.dtype) for k, v in views.items()}
    index = columns["frame_index"]
    if not (index >= 0).all() or not (index[1:] > index[:-1]).all():
        raise BreachError("frame ordinals that do not grow")
    if not (np.isfinite(columns["time_s"]).all() and np.isfinite(columns["covers_s"]).all()):
        raise BreachError("frame times that are not finite")
    return columns
