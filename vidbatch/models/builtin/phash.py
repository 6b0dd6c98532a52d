"""`phash`: a 64-bit perceptual hash, for near-duplicates."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from vidbatch.data import Batch
from vidbatch.models.builtin.planes import THUMBNAIL, luma

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 32
"""The picture is averaged to 32 x 32 first: scale and fine noise go."""
_FLAT = 0.25
"""Coefficients smaller than this (luma levels) count as 0: a flat frame hashes to one value."""


class PerceptualHash:
    """Embedding of 64 values ±1/8: positive iff that DCT frequency is above the median of all 64.

    Luma is averaged to 32 x 32 and transformed (DCT-II, orthonormal); the 64 lowest frequencies
    without the constant one, ordered by u² + v², make the bits. The vector has length 1 and
    cosine = 1 − 2·hamming/64, so that any engine finds near-duplicates; in DuckDB:

        SELECT a.uri, a.time_s, b.uri, b.time_s,
               round(32 * (1 - list_dot_product(a.embedding, b.embedding)))::INT AS hamming
        FROM embeddings_phash a JOIN embeddings_phash b ON a.video_id < b.video_id
        WHERE list_dot_product(a.embedding, b.embedding) >= 1 - 2 * 8 / 64  -- ≤ 8 bits differ

    Scaling, recompression and mild colour changes flip a few bits; ≤ 8 is usually the same picture.
    """

    kind = "phash"
    geometry = THUMBNAIL
    batch = 32
    dim = 64

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, 64) embeddings."""
        import torch

        small = torch.nn.functional.adaptive_avg_pool2d(luma(batch.pixels), _SIDE)
        basis = _cosines().to(small.device)
        spectrum = basis @ small @ basis.T
        u, v = _lowest()
        low = spectrum[:, u, v]
        low = torch.where(low.abs() < _FLAT * _SIDE, 0.0, low)
        median = low.sort(dim=1).values[:, 31:33].mean(dim=1, keepdim=True)
        return {"embeddings": torch.where(low > median, 0.125, -0.125)}


@cache
def _cosines() -> Tensor:
    """(32, 32) orthonormal DCT-II basis, a frequency per row."""
    import torch

    k = torch.arange(_SIDE, dtype=torch.float64)
    basis = torch.cos(math.pi / _SIDE * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / _SIDE)
    basis[0] /= math.sqrt(2)
    return basis.float()


@cache
def _lowest() -> tuple[list[int], list[int]]:
    """Rows and columns of the 64 lowest frequencies without the constant one."""
    pairs = [(u, v) for u in range(_SIDE) for v in range(_SIDE) if u or v]
    pairs.sort(key=lambda p: (p[0] ** 2 + p[1] ** 2, p))
    return [u for u, _ in pairs[:64]], [v for _, v in pairs[:64]]
