"""`motion`: how much changed since the sampled frame before."""

from __future__ import annotations

from typing import Any

from vidbatch.data import Batch
from vidbatch.models.builtin.planes import THUMBNAIL, luma


class Motion:
    """Feature `motion` = mean |luma − luma of the previous sample| / 255, 0..1.

    The first sample of a video has none (NaN, no row). It measures change between *samples*: a
    sparser sampling rule gives larger values for the same scene.
    """

    kind = "motion"
    geometry = THUMBNAIL
    batch = 32
    features = ("motion",)
    context = 1

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, 1) features."""
        change = (luma(batch.pixels) - luma(batch.previous)).abs_().mean(dim=(1, 2)) / 255
        change = change.masked_fill(~batch.has_previous, float("nan"))
        return {"features": change[:, None]}
