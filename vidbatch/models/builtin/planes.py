"""Colour planes and luma of uint8 frames, and the geometry that the builtin models share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidbatch.data import Geometry

if TYPE_CHECKING:
    from torch import Tensor

THUMBNAIL = Geometry(width_px=160, height_px=90)
"""Stretched, so that no border is invented; 43 kB a frame. At 256x144 the blur label told sharp
from blurred frames no better (30 real videos) and every kernel costs 2.5 times as much. 32 of them
stay in a CPU's cache: one core is a quarter faster than with 64."""


def split_planes(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (B, H, W, 3) → red, green, blue, each float32 (B, H, W), 0..255."""
    import torch

    planes = pixels.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes[0], planes[1], planes[2]


def luma_of(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """(77 R + 150 G + 29 B) / 256, float32 (B, H, W), 0..255: Rec. 601 in 8 bits.

    Exact in float32 (the sum has 16 bits), hence equal on every device and for every batch size.
    """
    return (red * 77).add_(green, alpha=150).add_(blue, alpha=29).div_(256)


def luma(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) → float32 (B, H, W), 0..255; see `luma_of`."""
    return luma_of(*split_planes(pixels))


def hue_sixths(red: Tensor, green: Tensor, blue: Tensor, high: Tensor, spread: Tensor) -> Tensor:
    """Hue in sixths of a turn from red, −1..5, of planes with their maximum and max − min."""
    import torch

    spread = spread.clamp(min=1)
    return torch.where(
        high == red,
        (green - blue).div_(spread),
        torch.where(
            high == green,
            (blue - red).div_(spread).add_(2),
            (red - green).div_(spread).add_(4),
        ),
    )
