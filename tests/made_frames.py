"""Pictures → `Frames`, scaled as the decoder would, for tests of models and batches."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from vidbatch.data import Frames, Geometry, Pixels, fit_box


def fit_picture(picture: Pixels, geometry: Geometry) -> Pixels:
    """One (h, w, 3) picture in the geometry."""
    height, width = picture.shape[:2]
    scaled_w, scaled_h, left, top = fit_box(geometry, width, height)
    scaled = cv2.resize(picture, (scaled_w, scaled_h), interpolation=cv2.INTER_AREA)
    seen = scaled[top : top + geometry.height_px, left : left + geometry.width_px]
    out = np.full((geometry.height_px, geometry.width_px, 3), geometry.pad, np.uint8)
    out[: seen.shape[0], : seen.shape[1]] = seen
    return out


def make_frames(
    pictures: Iterable[Pixels],
    geometries: Iterable[Geometry],
    *,
    context: bool = False,
    first: int = 0,
) -> Frames:
    """A chunk of these pictures, item 0 the context frame if `context`; pixels are read-only."""
    pictures = list(pictures)
    n = len(pictures)
    pixels = {}
    for g in geometries:
        array = np.zeros((n, g.height_px, g.width_px, 3), np.uint8)
        for i, picture in enumerate(pictures):
            array[i] = fit_picture(picture, g)
        array.setflags(write=False)  # as they come out of Ray's object store
        pixels[g.key] = array
    index = np.arange(first, first + n, dtype=np.int64)
    no = np.zeros(n, np.bool_)
    return Frames(
        frame_index=index,
        pts=index,
        has_pts=~no,
        time_s=index / 25,
        covers_s=np.full(n, 0.04),
        is_keyframe=no,
        is_corrupt=no,
        source_px=np.array([p.shape[1::-1] for p in pictures], np.int64).reshape(n, 2),
        ordinal=index,
        pixels=pixels,
        context=context,
    )
