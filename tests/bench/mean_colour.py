"""A model as small as they get, so that a bench measures everything but the model."""

from __future__ import annotations

import numpy as np

from vidbatch.data import Batch, Geometry, Predictions


class MeanColour:
    """The mean colour of a frame, as a unit vector of three."""

    geometry = Geometry(width_px=224, height_px=224)
    gives = ("embeddings",)
    dim = 3

    def predict(self, batch: Batch) -> Predictions:
        """Mean over the pixels, L2-normalised."""
        import torch

        total = batch.pixels.flatten(1, 2).sum(dim=1, dtype=torch.int32)
        mean = total.float() / (255 * self.geometry.width_px * self.geometry.height_px)
        unit = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-9)
        return Predictions(n=len(unit), embeddings=unit.cpu().numpy().astype(np.float32))
