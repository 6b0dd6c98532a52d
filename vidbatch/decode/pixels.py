"""From a decoded frame to upright RGB arrays, one per geometry.

The coded picture is scaled to the (turned) size first and then turned, so that turning costs
little; the arithmetic of the fits is `data.fit_box`. Colour matrix and range are the frame's own,
HDR is not tone mapped, sample aspect ratios other than 1 and interlacing are left as coded, alpha
is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from vidbatch.data import Geometry, Pixels, fit_box

_KERNELS = {
    "bilinear": Interpolation.BILINEAR,
    "bicubic": Interpolation.BICUBIC,
    "area": Interpolation.AREA,
}
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
"""Without full chroma swscale goes by tables that make pictures 1 to 2 grey levels too dark and
halve the colour's resolution; it costs 0 to 0.3 ms a frame (720p to 224 x 224)."""
_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
"""Colour matrices that swscale knows; others (YCgCo, ICtCp …) are taken for BT.601."""


@dataclass(frozen=True, slots=True)
class Orientation:
    """How a coded picture becomes upright: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def rotation_deg(self) -> int:
        """The clockwise turn; of a mirrored picture the one that follows a horizontal mirror."""
        if self.transpose:
            return 90 if self.mirror_x else 270
        return 180 if self.mirror_y else 0

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after turning."""
        return (height, width) if self.transpose else (width, height)

    def apply(self, picture: Pixels) -> Pixels:
        """A view of (H, W, 3) turned upright."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.mirror_y:
            picture = picture[::-1]
        return picture[:, ::-1] if self.mirror_x else picture


UPRIGHT = Orientation()
_TURNS = (
    UPRIGHT,
    Orientation(True, True, False),
    Orientation(False, True, True),
    Orientation(True, False, True),
)
"""By quarter turns, clockwise."""


def orientation(frame: VideoFrame) -> Orientation:
    """The frame's display matrix as one of the eight right-angled ones; others are upright."""
    try:
        data: Any = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV has no name for another kind of side data and then gives none of them.
        turns = {0: 0, -90: 1, 180: 2, -180: 2, 90: 3}.get(frame.rotation, 0)
        return _TURNS[turns]
    if data is None:
        return UPRIGHT
    matrix = np.frombuffer(memoryview(data), np.int32)
    if len(matrix) != 9:
        return UPRIGHT
    a, b, _, c, d = (int(v) for v in matrix[:5])
    if min(abs(a), abs(d)) > 4 * max(abs(b), abs(c)):
        return Orientation(False, a < 0, d < 0)
    if min(abs(b), abs(c)) > 4 * max(abs(a), abs(d)):
        return Orientation(True, c < 0, b < 0)
    return UPRIGHT


class Scaler:
    """Makes the arrays of all geometries: one swscale context each, one thread."""

    def __init__(self, geometries: Sequence[Geometry]) -> None:
        unique = {g.key: g for g in geometries}
        self._geometries = list(unique.values())
        self._contexts = {key: VideoReformatter() for key in unique}

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in all geometries."""
        return sum(g.frame_bytes for g in self._geometries)

    def scale(self, frame: VideoFrame, turn: Orientation) -> dict[str, Pixels]:
        """Geometry key → (H, W, 3) uint8 RGB, C-contiguous.

        Raises:
            av.FFmpegError: swscale cannot convert this frame.
        """
        return {g.key: self._one(frame, turn, g) for g in self._geometries}

    def _one(self, frame: VideoFrame, turn: Orientation, geometry: Geometry) -> Pixels:
        upright = turn.size(frame.width, frame.height)
        upright_w, upright_h, left, top = fit_box(geometry, *upright)
        width, height = turn.size(upright_w, upright_h)
        matrix = None if frame.colorspace in _MATRICES else Colorspace.ITU601
        scaled = self._contexts[geometry.key].reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            interpolation=_KERNELS[geometry.interpolation] | _EXACT,
            threads=1,
        )
        plane = scaled.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        picture = turn.apply(rows[:height, : width * 3].reshape(height, width, 3))
        if geometry.fit == "letterbox":
            out = np.full((geometry.height_px, geometry.width_px, 3), geometry.pad, np.uint8)
            out[:upright_h, :upright_w] = picture
            return out
        return np.ascontiguousarray(
            picture[top : top + geometry.height_px, left : left + geometry.width_px]
        )
