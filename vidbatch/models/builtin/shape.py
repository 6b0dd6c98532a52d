"""`shape`: orientation histograms of edges as an embedding, for "frames laid out like this"."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from vidbatch.data import Batch
from vidbatch.models.builtin.planes import THUMBNAIL, luma

if TYPE_CHECKING:
    from torch import Tensor

_CLIP = 0.2
"""One strong edge must not outweigh the rest: entries are clipped, then length 1 is restored."""
_EPSILON = 1e-2
"""Mean gradient (luma levels per pixel) added to each entry: a flat frame gives the even vector."""


class Shape:
    """Embedding of rows x columns cells x orientations: where edges of which direction are.

    Gradients are central differences of luma; a pixel adds its magnitude to the nearest of
    `orientations` directions in [0, π) (light-to-dark or dark-to-light is the same) of its cell.
    The vector is brought to length 1, clipped at 0.2, brought to length 1 again.
    """

    kind = "shape"
    geometry = THUMBNAIL
    batch = 32

    def __init__(self, rows: int = 4, columns: int = 4, orientations: int = 8) -> None:
        if not (1 <= rows <= 16 and 1 <= columns <= 16 and 2 <= orientations <= 36):
            raise ValueError("rows and columns are within 1..16, orientations within 2..36")
        self.rows, self.columns, self.orientations = rows, columns, orientations
        self.dim = rows * columns * orientations

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, rows·columns·orientations) embeddings."""
        import torch

        y = luma(batch.pixels)
        dx = y[:, 1:-1, 2:] - y[:, 1:-1, :-2]
        dy = y[:, 2:, 1:-1] - y[:, :-2, 1:-1]
        size = torch.hypot(dx, dy).mul_(0.5)
        n = self.orientations
        nearest = torch.atan2(dy, dx).mul_(n / math.pi).round_().remainder_(n)
        down = _pooling(self.rows, y.shape[1] - 2).to(y.device)
        across = _pooling(self.columns, y.shape[2] - 2).to(y.device).T
        cells = torch.stack([down @ (size * (nearest == k)) @ across for k in range(n)], dim=-1)
        vector = torch.nn.functional.normalize(cells.flatten(1) + _EPSILON, dim=1)
        return {"embeddings": vector.clamp_(max=_CLIP)}  # the adapter brings it to length 1


@cache
def _pooling(cells: int, pixels: int) -> Tensor:
    """(cells, pixels): the mean over each cell as a matrix, so that pooling is one exact order."""
    import torch

    matrix = torch.zeros(cells, pixels)
    for k in range(cells):
        lo, hi = k * pixels // cells, max((k + 1) * pixels // cells, k * pixels // cells + 1)
        matrix[k, lo:hi] = 1 / (hi - lo)
    return matrix
