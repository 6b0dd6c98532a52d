"""Headers → VideoInfo, and where a video may be cut into clips."""

from __future__ import annotations

import numpy as np

from vidbatch.data import ByteSource, ClipRange, DecodeLimits, VideoInfo
from vidbatch.media import PacketTable, open_video, read_packet_table


def probe(source: ByteSource, *, limits: DecodeLimits) -> tuple[VideoInfo, PacketTable | None]:
    """What the headers say, and the packet table where there is one that can be trusted.

    Reads no media bytes of an MP4; of others what FFmpeg needs to find out about the streams.

    Raises:
        MediaError: the video cannot be opened.
        StoreError: the source failed.
    """
    table, _ = read_packet_table(source, max_pixels=limits.max_pixels)
    with open_video(source, max_pixels=limits.max_pixels) as video:
        if table is not None and table.denies_reordering(video.stream.codec_context.reorder_depth):
            table = None
        start = int(table.pts[table.order[0]]) if table is not None else None
        return video.info(upright=None, start_pts=start), table


def clip_ranges(info: VideoInfo, table: PacketTable | None, length_s: float) -> list[ClipRange]:
    """Cuts a video into clips of at least `length_s` that tile it; one range without a table.

    Cuts lie only at closed keyframes: all packets before are shown before it, none after it is
    shown before it. A rest shorter than half of `length_s` stays with the last clip.
    """
    if table is None:
        return [
            ClipRange(
                first_keyframe=0,
                end_keyframe=None,
                start_s=0.0,
                end_s=None,
                start_frame=0,
                end_frame=None,
                packet_bytes=0,
                frames=info.frame_count or 0,
            )
        ]
    keyframes, ticks = table.keyframes, table.ticks
    base = float(table.time_base)
    shown = table.pts[table.order]
    closed = table.closed_keyframes()
    closed = closed[closed > 0]
    frames = np.searchsorted(shown, table.pts[keyframes[closed]])
    inside = frames < len(shown)
    closed, frames = closed[inside], frames[inside]
    times = ticks[frames] * base
    end_s = float(ticks[-1] * base)
    cuts = [(0, 0, 0.0)]
    while True:
        at = int(np.searchsorted(times, cuts[-1][2] + length_s))
        if at >= len(times) or end_s - times[at] < length_s / 2:
            break
        cuts.append((int(closed[at]), int(frames[at]), _seconds(table, int(frames[at]))))
    ranges = []
    for i, (keyframe, frame, start) in enumerate(cuts):
        following = cuts[i + 1] if i + 1 < len(cuts) else None
        packets = slice(
            int(keyframes[keyframe]) if keyframe else 0,
            int(keyframes[following[0]]) if following else None,
        )
        ranges.append(
            ClipRange(
                first_keyframe=keyframe,
                end_keyframe=following[0] if following else None,
                start_s=start,
                end_s=following[2] if following else None,
                start_frame=frame,
                end_frame=following[1] if following else None,
                packet_bytes=int(table.size[packets].sum()),
                frames=(following[1] if following else len(shown)) - frame,
            )
        )
    return ranges


def _seconds(table: PacketTable, frame: int) -> float:
    return float(int(table.ticks[frame]) * table.time_base)
