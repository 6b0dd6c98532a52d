"""A model of one's own: see python-example.yaml."""

import torch

from vidbatch.data import Batch, Geometry


class Redness:
    """How red a frame is."""

    geometry = Geometry(width_px=64, height_px=36)
    features = ("red",)
    labels = ("reddish",)

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        red = batch.pixels[..., 0].float().mean(dim=(1, 2)) / 255  # (B, H, W, 3) uint8 → (B,)
        return {"features": red[:, None], "scores": (red > self.threshold).float()[:, None]}
