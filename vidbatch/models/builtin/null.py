"""`null`: answers 0 for every frame; what an engine costs without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from vidbatch.data import Batch, Geometry


class Null:
    """One feature, always 0, from the smallest frames."""

    kind = "null"
    geometry = Geometry(width_px=16, height_px=16)
    features = ("null",)
    batch = 256

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Zeros, (B, 1)."""
        return {"features": np.zeros((len(batch.source_px), 1), np.float32)}
