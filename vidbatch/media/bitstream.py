"""What the first bytes of a packet say, for codecs where each packet is one picture.

Container flags lie in real files; the bitstream does not. For H.264, HEVC, VP8, VP9, AV1 and codecs
that have nothing but intra pictures this tells from which packet decoding can start with an empty
decoder, whether a packet is shown at all, and whether anything can refer to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

INTRA_CODECS = frozenset(
    ["cfhd", "dnxhd", "dvvideo", "huffyuv", "mjpeg", "prores", "rawvideo", "utvideo"]
)
"""Every packet stands alone."""

_HIGH_PROFILES = frozenset({44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244})


class Facts(NamedTuple):
    """What one packet is."""

    entry: bool
    """Decoding can start here with an empty decoder."""
    shown: bool
    """A picture of it is displayed (not an alt-ref, not a frame kept for later)."""
    layer: int
    """Temporal layer; a non-reference picture below the top layer may still be referred to."""
    leading: bool = False
    """It refers to what is before the keyframe it follows: without that it is left out."""


class EntryRefusedError(Exception):
    """From here on the stream must not be entered in the middle; says why."""


Inspector = Callable[[bytes], Facts | None]
"""Facts of a packet; None where the bytes are not what the codec allows.

Raises EntryRefusedError."""


def inspector(codec: str, extradata: bytes | None) -> tuple[Inspector | None, str]:
    """How to inspect the packets of a stream; (None, why) where packets are not pictures."""
    extradata = extradata or b""
    if codec in INTRA_CODECS:
        return (lambda data: Facts(True, True, 0)), ""
    if codec == "hevc":
        boxed = len(extradata) > 22 and extradata[0] == 1
        return _Hevc((extradata[21] & 3) + 1 if boxed else 0), ""
    if codec == "h264":
        boxed = len(extradata) > 6 and extradata[0] == 1
        sets = _avcc_sets(extradata) if boxed else _nals(extradata, 0)
        reasons = [_refuse_sps(nal) for nal in sets if nal[:1] and nal[0] & 31 == 7]
        why = next((r for r in reasons if r), "")
        length = (extradata[4] & 3) + 1 if boxed else 0
        return (None, why) if why else (_Avc(length, bool(reasons)), "")
    simple = {"vp8": _vp8, "vp9": _vp9, "av1": _av1}.get(codec)
    return simple, "" if simple else f"{codec} is decoded in order"


def _nals(data: bytes, length: int) -> Iterator[bytes]:
    """The NAL units of a packet, cut to their first 64 bytes; `length` 0 means start codes."""
    at = 0
    if length:
        while at + length < len(data):
            size = int.from_bytes(data[at : at + length], "big")
            at += length
            if size:
                yield data[at : at + min(size, 64)]
            at += size
        return
    at = data.find(b"\0\0\1")
    while at >= 0:
        yield data[at + 3 : at + 67]
        at = data.find(b"\0\0\1", at + 3)


def _avcc_sets(extradata: bytes) -> Iterator[bytes]:
    at = 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[at : at + 2], "big")
        yield extradata[at + 2 : at + 2 + size]
        at += 2 + size


class _Bits:
    """Reads the bits of a NAL unit, without its emulation prevention bytes; zeros past the end."""

    def __init__(self, nal: bytes) -> None:
        data = nal.replace(b"\0\0\3", b"\0\0")
        self._value = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def take(self, n: int) -> int:
        self._left -= n
        shift = self._left
        return (self._value >> shift if shift >= 0 else 0) & ((1 << n) - 1)

    def golomb(self) -> int:
        zeros = 0
        while zeros < 32 and self._left > 0 and not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + (self.take(zeros) if zeros else 0)

    def signed(self) -> int:
        code = self.golomb()
        return (code + 1) // 2 if code & 1 else -(code // 2)


def _refuse_sps(nal: bytes) -> str:
    """Why an H.264 sequence may not be entered in the middle; empty if it may."""
    bits = _Bits(nal[1:])
    profile = bits.take(8)
    bits.take(16)
    bits.golomb()
    if profile in _HIGH_PROFILES:
        chroma = bits.golomb()
        if chroma == 3:
            # FFmpeg repairs a bug of old x264 by the version in the very first packet only.
            return "4:4:4 H.264 decodes differently when entered in the middle"
        bits.golomb()
        bits.golomb()
        bits.take(1)
        if bits.take(1):
            for i in range(8):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if i < 6 else 64)
    bits.golomb()
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        for _ in range(min(bits.golomb(), 255)):
            bits.signed()
    bits.golomb()
    bits.take(1)
    bits.golomb()
    bits.golomb()
    return "" if bits.take(1) else "fields may be packets of their own (interlaced H.264)"


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed()) % 256
        last = following or last


class _Avc:
    def __init__(self, length: int, known: bool) -> None:
        self._length = length
        self._known = known

    def __call__(self, data: bytes) -> Facts | None:
        for nal in _nals(data, self._length):
            kind = nal[0] & 31 if nal else 0
            if kind == 7:
                if why := _refuse_sps(nal):
                    raise EntryRefusedError(why)
                self._known = True
            if kind in {1, 2, 5}:
                return Facts(kind == 5 and self._known, True, 0)
        return None


class _Hevc:
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, data: bytes) -> Facts | None:
        for nal in _nals(data, self._length):
            kind = nal[0] >> 1 & 63 if len(nal) > 1 else 63
            if kind < 32:
                return Facts(16 <= kind <= 21, True, nal[1] & 7, leading=kind in {8, 9})
        return None


def _vp8(data: bytes) -> Facts | None:
    if not data or (not data[0] & 1 and data[3:6] != b"\x9d\x01\x2a"):
        return None
    return Facts(not data[0] & 1, bool(data[0] & 16), 0)


def _vp9(data: bytes) -> Facts | None:
    if not data:
        return None
    sizes = [len(data)]
    marker = data[-1]
    if marker & 0xE0 == 0xC0:
        count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
        start = len(data) - 2 - count * width
        if start >= 0 and data[start] == marker:
            at = start + 1
            sizes = [
                int.from_bytes(data[at + i * width : at + (i + 1) * width], "little")
                for i in range(count)
            ]
    at, entry, shown = 0, False, 0
    for i, size in enumerate(sizes):
        if not size or at >= len(data):
            continue
        byte = data[at]
        if byte >> 6 != 2:
            return None
        flags = byte if byte & 0x30 != 0x30 else byte << 1
        existing = flags & 8
        entry = entry or (i == 0 and not existing and not flags & 4)
        shown += bool(existing or flags & 2)
        at += size
    return Facts(entry, bool(shown), 0) if shown <= 1 else None


def _av1(data: bytes) -> Facts | None:
    at, sequence = 0, False
    while at < len(data):
        header = data[at]
        kind = header >> 3 & 15
        at += 2 if header & 4 else 1
        size = len(data) - at
        if header & 2:
            size = shift = 0
            while at < len(data) and shift < 56:
                byte = data[at]
                size |= (byte & 127) << shift
                shift += 7
                at += 1
                if byte < 128:
                    break
        sequence = sequence or kind == 1
        if kind in {3, 6} and at < len(data):
            # show_existing_frame, frame_type (0: key), show_frame
            first = data[at]
            return Facts(sequence and first >> 4 == 1, True, 0)
        at += size
    return None
