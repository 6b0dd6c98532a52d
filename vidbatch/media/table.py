"""The packet table of an MP4, MOV or 3GP, from its header alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vidbatch.data import Bools, ByteSource, Ints
from vidbatch.media.bitstream import inspector
from vidbatch.media.boxes import MP4_BOXES, Box, scan_boxes
from vidbatch.media.opening import OpenVideo, open_container, open_video

NO_REORDERING = "timestamps do not reorder pictures although the codec does"

MAX_TABLE_PACKETS = 20_000_000
"""A table costs 50 bytes a packet: a day of video at 240 frames a second."""


class _Outline:
    """A ByteSource that serves every box but `mdat` truly and zeros for the media."""

    def __init__(self, source: ByteSource, boxes: list[Box]) -> None:
        self.size_bytes = source.size_bytes
        self._source = source
        media = [(b.payload, b.end) for b in boxes if b.name == b"mdat"]
        self._starts = [start for start, _ in media]
        self._ends = [end for _, end in media]

    def read_at(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size_bytes)
        out = bytearray(max(0, end - offset))
        at = offset
        while at < end:
            i = bisect.bisect_right(self._starts, at) - 1
            if i >= 0 and at < self._ends[i]:
                at = min(end, self._ends[i])
                continue
            until = min(end, self._starts[i + 1]) if i + 1 < len(self._starts) else end
            out[at - offset : until - offset] = self._source.read_at(at, until - at)
            at = until
        return bytes(out)

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: there is nothing to fetch but the header, which has been asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PacketTable:
    """Every packet of an MP4 video stream, from its header alone; only where it can be trusted.

    Packets are in decode order (P of them), frames in display order (N displayable ones).
    """

    time_base: Fraction
    rate: Fraction | None
    """Average frame rate as the header says."""
    pts: Ints
    """(P,)"""
    dts: Ints
    """(P,) 0 where the container has none."""
    pos: Ints
    """(P,) first byte."""
    size: Ints
    """(P,) bytes."""
    key: Bools
    """(P,) sync flag of the container's index."""
    ordinal: Ints
    """(P,) frame_index of the packet's frame, -1 for one that is decoded but not displayed."""
    order: Ints
    """(N,) packet of each frame: the inverse of `ordinal`."""

    @property
    def ticks(self) -> Ints:
        """(N,) pts of each frame from frame 0, in time_base."""
        shown = self.pts[self.order]
        ticks: Ints = shown - shown[0]
        return ticks

    @property
    def keys(self) -> Bools:
        """(N,) sync flag of each frame."""
        return self.key[self.order]

    @property
    def keyframes(self) -> Ints:
        """(K,) packet number of each keyframe: what Clip.first_keyframe counts."""
        return np.flatnonzero(self.key).astype(np.int64)

    def denies_reordering(self, depth: int) -> bool:
        """Whether pts rise from packet to packet although the codec reorders by `depth` pictures.

        Decode times in the place of pts look like this, and they say nothing about display order.
        A decoder that has seen pictures may know a larger depth than the header says.
        """
        return 0 < depth < len(self.pts) - 1 and bool((np.diff(self.pts) > 0).all())

    def closed_keyframes(self) -> Ints:
        """Which keyframes (positions in `keyframes`) nothing crosses: all packets before are shown
        before it, none after it is shown before it."""
        at = self.keyframes
        before = np.maximum.accumulate(self.pts)[at - 1]
        after = np.minimum.accumulate(self.pts[::-1])[::-1][at]
        closed = (after == self.pts[at]) & ((at == 0) | (before < self.pts[at]))
        return np.flatnonzero(closed).astype(np.int64)


def read_packet_table(source: ByteSource, *, max_pixels: int) -> tuple[PacketTable | None, str]:
    """The packet table of an MP4, MOV or 3GP without reading media; (None, why) if untrusted.

    Raises:
        MediaError: the video cannot be opened.
        StoreError: the source failed.
    """
    boxes = scan_boxes(source) if source.read_at(4, 4) in MP4_BOXES else []
    if not any(b.name == b"moov" for b in boxes):
        return None, "the container has no index"
    if boxes[-1].end > source.size_bytes:
        return None, "the object is cut off"
    source.want([(b.start, b.end) for b in boxes if b.name == b"moov"])
    with open_video(_Outline(source, boxes), max_pixels=max_pixels) as video:
        _, why = inspector(video.codec, video.stream.codec_context.extradata)
        if why:
            return None, why
        rows: list[tuple[int, int, int, int, bool, bool]] = []
        for packet in video.packets():
            if packet.pts is None or packet.pos is None or packet.is_corrupt:
                return None, "packets without timestamp, position or end"
            if len(rows) >= MAX_TABLE_PACKETS:
                return None, f"more than {MAX_TABLE_PACKETS} packets"
            flags = (packet.is_keyframe, packet.is_discard)
            rows.append((packet.pts, packet.dts or 0, packet.pos, packet.size, *flags))
        depth = video.stream.codec_context.reorder_depth
        sync = {e.pos: e.is_keyframe for e in video.stream.index_entries}
        header_count = promised_packets(source, video)
        time_base, rate = video.time_base, video.rate
    if not rows or (header_count and header_count > len(rows)):
        return None, f"{len(rows)} packets where the header says {header_count}"
    columns = list(zip(*rows, strict=True))
    pts, dts, pos, size = (np.array(c, np.int64) for c in columns[:4])
    key = np.array([sync.get(p, k) for p, k in zip(columns[2], columns[4], strict=True)], np.bool_)
    discard = np.array(columns[5], np.bool_)
    order = np.argsort(pts, kind="stable")
    order = order[~discard[order]]
    if int((pos + size).max()) > source.size_bytes:
        return None, "packets lie beyond the end of the object"
    if not key[0] or not len(order):
        return None, "the first packet is no keyframe"
    if len(order) > 1 and int(np.diff(pts[order]).min()) == 0:
        return None, "timestamps repeat"
    ordinal = np.full(len(pts), -1, np.int64)
    ordinal[order] = np.arange(len(order))
    table = PacketTable(
        time_base=time_base,
        rate=rate,
        pts=pts,
        dts=dts,
        pos=pos,
        size=size,
        key=key,
        ordinal=ordinal,
        order=order,
    )
    return (None, NO_REORDERING) if table.denies_reordering(depth) else (table, "")


def promised_packets(source: ByteSource, video: OpenVideo) -> int | None:
    """How many packets the header of an MP4 promises; None where it does not say.

    It counts those too that an edit list leaves out: they are looked for only if some are missing.
    """
    count, listed = video.stream.frames, len(video.stream.index_entries)
    if not video.is_mp4 or not count:
        return None
    if listed < count:
        outline = _Outline(source, scan_boxes(source))
        with open_container(outline, max_pixels=video.max_pixels, edited=False) as (container, _):
            count -= max(0, len(container.streams[video.stream.index].index_entries) - listed)
    return count
