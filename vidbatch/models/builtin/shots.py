"""`shots`: where one shot ends and the next begins, between consecutive sampled frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vidbatch.data import Batch
from vidbatch.models.builtin.planes import THUMBNAIL, hue_sixths, split_planes

if TYPE_CHECKING:
    from torch import Tensor


class Shots:
    """A shot begins at a sample whose picture is not that of the sample before.

        content  = mean of |ΔH|, |ΔS|, |ΔV| over the pixels: hue 0..180, the others 0..255
                   (the content score of PySceneDetect, whose usual threshold is 27)
        a cut    = content ≥ threshold, and the picture is not dark
        a fade   = the picture is not dark and the one before was: mean luma against `dark`

    Black between two shots belongs to the first. The score is content / 255, at least threshold
    / 255. A sparse sample sees more change between its frames than there is between neighbours:
    at fewer than about 5 frames a second raise the threshold, or a pan becomes many shots.
    """

    kind = "shots"
    geometry = THUMBNAIL
    batch = 32
    context = 1
    cuts = True

    def __init__(self, threshold: float = 27.0, dark: float = 12.0) -> None:
        if not (0 < threshold < 255 and 0 <= dark < 255):
            raise ValueError("threshold is within 0..255, dark within 0..255")
        self.threshold, self.dark = threshold, dark

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B,) cuts."""
        import torch

        (now, light), (before, was_light) = self._hsv(batch.pixels), self._hsv(batch.previous)
        content = (now - before).abs_().mean(dim=(0, 2, 3))
        begins = light & ((content >= self.threshold) | ~was_light) & batch.has_previous
        score = content.clamp(min=self.threshold).div_(255)
        return {"cuts": torch.where(begins, score, torch.full_like(score, float("nan")))}

    def _hsv(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(3, B, H, W) hue, saturation, value in OpenCV's 8-bit scale; (B,) whether it is light."""
        import torch

        red, green, blue = split_planes(pixels)
        high = torch.maximum(torch.maximum(red, green), blue)
        spread = high - torch.minimum(torch.minimum(red, green), blue)
        saturation = (spread * 255 / high.clamp(min=1)).round_()
        hue = hue_sixths(red, green, blue, high, spread).remainder_(6).mul_(30).round_()
        mean = (red + green + blue).div_(3).mean(dim=(1, 2))
        return torch.stack([hue, saturation, high]), mean >= self.dark
