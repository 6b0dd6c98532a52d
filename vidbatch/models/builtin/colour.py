"""`colour`: an HSV histogram as an embedding, for "frames that look like this in colour"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vidbatch.data import Batch
from vidbatch.models.builtin.planes import THUMBNAIL, hue_sixths, split_planes

if TYPE_CHECKING:
    from torch import Tensor

_GREYS = 8
"""Bins by value for pixels whose hue means nothing."""
_MIN_SATURATION = 0.15
_MIN_VALUE = 0.1


class Colour:
    """Embedding: square roots of the shares of pixels in HSV bins; its length is 1 by itself.

    Bins: hues x saturations x values for coloured pixels, and 8 greys by value for pixels with
    saturation < 0.15 or value < 0.1. The cosine of two frames is Σ √(p q), the Bhattacharyya
    coefficient of their histograms: 1 the same colours, 0 no colour in common.
    """

    kind = "colour"
    geometry = THUMBNAIL
    batch = 32

    def __init__(self, hues: int = 12, saturations: int = 3, values: int = 3) -> None:
        if not (1 <= hues <= 90 and 1 <= saturations <= 16 and 1 <= values <= 16):
            raise ValueError("hues is within 1..90, saturations and values within 1..16")
        self.hues, self.saturations, self.values = hues, saturations, values
        self.dim = hues * saturations * values + _GREYS

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, hues·saturations·values + 8) embeddings."""
        import torch

        red, green, blue = split_planes(batch.pixels)
        high = torch.maximum(torch.maximum(red, green), blue)
        spread = high - torch.minimum(torch.minimum(red, green), blue)
        value = high / 255
        saturation = spread / high.clamp(min=1)
        grey = (saturation < _MIN_SATURATION).logical_or_(value < _MIN_VALUE)
        hue = hue_sixths(red, green, blue, high, spread)
        hue = hue.div_(6).remainder_(1)
        greys = _cut(value, _GREYS).add_(self.dim - _GREYS)
        bins = _cut(hue, self.hues).mul_(self.saturations).add_(_cut(saturation, self.saturations))
        bins.mul_(self.values).add_(_cut(value, self.values))  # small whole numbers: exact
        bins = torch.where(grey, greys, bins).to(torch.int32)
        b = len(bins)
        bins += (torch.arange(b, device=bins.device, dtype=torch.int32) * self.dim)[:, None, None]
        counts = torch.bincount(bins.flatten(), minlength=b * self.dim).view(b, self.dim)
        return {"embeddings": (counts.float() / bins[0].numel()).sqrt()}


def _cut(share: Tensor, bins: int) -> Tensor:
    """0..1 → the number of its bin, 0..bins − 1."""
    return (share * bins).floor_().clamp_(max=bins - 1)
