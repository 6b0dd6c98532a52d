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
        """Mean over every sixteenth pixel, L2-normalised."""
        mean = batch.pixels[:, ::4, ::4].float().mean(dim=(1, 2)) / 255
        unit = mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-9)
        return Predictions(n=len(unit), embeddings=unit.cpu().numpy().astype(np.float32))
