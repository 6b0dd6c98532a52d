"""Where a container says that it ends, and where an MP4's boxes lie: no FFmpeg, no media bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vidbatch.data import ByteSource

MAX_BOXES = 1_000_000
"""Top-level boxes of an MP4: half of them are fragments, so 5 days at one a second."""
MP4_BOXES = frozenset(b"ftyp styp moov moof mdat free skip wide sidx pnot uuid emsg prft".split())

TS_PACKET_BYTES = 188

_HEADER = struct.Struct(">I4s")


@dataclass(frozen=True, slots=True)
class Box:
    """A top-level box of an MP4: [start, end) with its payload at `payload`."""

    name: bytes
    start: int
    payload: int
    end: int


def scan_boxes(source: ByteSource) -> list[Box]:
    """The top-level boxes; the last may end beyond the object if that is cut off."""
    boxes: list[Box] = []
    offset = 0
    while offset + 8 <= source.size_bytes and len(boxes) < MAX_BOXES:
        head = source.read_at(offset, 16)
        size, name = _HEADER.unpack_from(head)
        payload = offset + 8
        if size == 1 and len(head) == 16:
            size, payload = int.from_bytes(head[8:16], "big"), offset + 16
        end = source.size_bytes if size == 0 else offset + size
        if end < payload or not name.isascii():
            break
        boxes.append(Box(name, offset, payload, end))
        offset = end
    return boxes


def declared_bytes(source: ByteSource) -> int | None:
    """The size of the whole object as its container declares it; None where it does not.

    MP4 boxes, the RIFF chunk of an AVI and the segment of a Matroska file carry their length, and a
    transport stream consists of whole packets: a file that was cut off later is found out by it,
    where FFmpeg reads to the end in silence.
    """
    head = source.read_at(0, 4 * TS_PACKET_BYTES)
    for start in range(min(TS_PACKET_BYTES, len(head) - 2 * TS_PACKET_BYTES)):
        if (
            head[start]
            == head[start + TS_PACKET_BYTES]
            == head[start + 2 * TS_PACKET_BYTES]
            == 0x47
        ):
            return start + -(-(source.size_bytes - start) // TS_PACKET_BYTES) * TS_PACKET_BYTES
    if head[4:8] in MP4_BOXES:
        boxes = scan_boxes(source)
        return boxes[-1].end if boxes else None
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"\x1a\x45\xdf\xa3":
        ebml = _ebml_size(head, 4)
        if ebml is None or ebml[0] is None:
            return None
        at = ebml[1] + ebml[0]
        head = source.read_at(at, 16)
        segment = _ebml_size(head, 4) if head[:4] == b"\x18\x53\x80\x67" else None
        if segment is None or segment[0] is None:
            return None
        return at + segment[1] + segment[0]
    return None


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int] | None:
    """(size or None for unknown, where the payload begins) of an element with its size at `at`."""
    if at >= len(data) or not data[at]:
        return None
    length = 9 - data[at].bit_length()
    if at + length > len(data):
        return None
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), at + length
