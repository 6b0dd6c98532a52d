"""Boxes of one model cut out of the staged frames for another: crops on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vidbatch.data import CropRule, Geometry, Ints, Singles, fit_box

if TYPE_CHECKING:
    import torch


def crop_boxes(
    rule: CropRule, geometry: Geometry, xyxy: Singles, source_px: Ints
) -> tuple[Ints, Ints]:
    """Where crops lie in the pictures of a geometry.

    The box with its margin, as far as the frame goes, out to whole pixels; at least one pixel, also
    of a box outside the part that `fit: crop` shows.

    Args:
        xyxy: (M, 4) boxes, 0..1 of the upright frame.
        source_px: (M, 2) upright width and height of the frame each box is of.

    Returns:
        (M, 4) x_min, y_min, x_max, y_max in pixels, half-open; (M, 2) width and height of the
        crops in pixels of the upright frame.
    """
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 2, 2)
    extra = rule.margin * (boxes[:, 1] - boxes[:, 0])
    boxes = np.clip(np.stack([boxes[:, 0] - extra, boxes[:, 1] + extra], axis=1), 0.0, 1.0)
    fits = np.array([fit_box(geometry, int(w), int(h)) for w, h in source_px], np.int64)
    fits = fits.reshape(-1, 2, 2)
    scaled, offset = fits[:, :1], fits[:, 1:]
    shown = np.minimum(scaled - offset, [geometry.width_px, geometry.height_px])
    pixels = boxes * scaled - offset
    low = np.clip(np.floor(pixels[:, :1]), 0, shown - 1)
    high = np.clip(np.ceil(pixels[:, 1:]), low + 1, shown)
    size = np.maximum(1, np.rint((boxes[:, 1] - boxes[:, 0]) * source_px)).astype(np.int64)
    return np.concatenate([low, high], axis=1).astype(np.int64).reshape(-1, 4), size


def cut_crops(frames: torch.Tensor, rows: Ints, boxes: Ints, size: Geometry) -> torch.Tensor:
    """Cuts and scales (bilinear, antialiased) one crop after the other.

    One by one, so that a crop is the same to the bit whatever else is in the batch.

    Args:
        frames: uint8 (N, H, W, 3).
        rows: (M,) which of them each crop is of.
        boxes: (M, 4) of `crop_boxes`.

    Returns:
        uint8 (M, height, width, 3) on the device of the frames.
    """
    import torch

    crops = frames.new_empty((len(rows), size.height_px, size.width_px, 3))
    for i, (row, (x_min, y_min, x_max, y_max)) in enumerate(
        zip(rows.tolist(), boxes.tolist(), strict=True)
    ):
        picture = frames[row, y_min:y_max, x_min:x_max].permute(2, 0, 1)[None].float()
        scaled = torch.nn.functional.interpolate(
            picture, (size.height_px, size.width_px), mode="bilinear", antialias=True
        )
        crops[i] = scaled[0].round_().clamp_(0, 255).permute(1, 2, 0)  # to uint8 as it is written
    return crops
