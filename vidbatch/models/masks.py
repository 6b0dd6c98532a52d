"""Class maps → rows of masks: the share of the frame that each class takes, and run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vidbatch.data import Bools, Ints, MaskRows, ModelSpec, fit_box
from vidbatch.errors import ModelError


def mask_rows(spec: ModelSpec, maps: Any, source_px: Ints, *, rle: bool) -> MaskRows:
    """One row per item and class that is there, by item, then label_id.

    Padding of a letterbox counts for nothing and is no part of a mask; with `fit: crop` a mask is
    of the part that the model saw, its area still the share of the whole upright frame.

    Args:
        maps: (B, h, w) integers, the class of each pixel of the picture the model saw, at any
            resolution; negative where there is none.
        source_px: (B, 2) upright width and height of the frames.

    Raises:
        ModelError: another shape or type, or a class without a label.
    """
    import torch

    classes = torch.as_tensor(maps)
    n, k = len(source_px), len(spec.labels)
    if classes.ndim != 3 or len(classes) != n or classes.is_floating_point():
        raise ModelError(
            f"model {spec.name}: masks is {classes.dtype}{tuple(classes.shape)}, expected integers "
            f"({n}, h, w)",
            kind="model_answer",
        )
    height, width = classes.shape[1:]
    sizes, shares = _seen(spec, width, height, source_px)
    rows = torch.arange(height, device=classes.device)[None, :, None]
    columns = torch.arange(width, device=classes.device)[None, None, :]
    limits = torch.from_numpy(sizes).to(classes.device)
    seen = (columns < limits[:, 0, None, None]) & (rows < limits[:, 1, None, None])
    classes = torch.where(seen & (classes >= 0), classes.long().clamp(max=k), -1)
    first = torch.arange(n, device=classes.device)[:, None, None] * (k + 2) + 1  # of -1, 0 … k
    found = torch.bincount((classes + first).flatten(), minlength=n * (k + 2))
    counts = found.reshape(n, k + 2).cpu().numpy()
    if counts[:, k + 1].any():
        raise ModelError(
            f"model {spec.name}: masks hold a class outside 0..{k - 1}, which has no label",
            kind="model_answer",
        )
    counts = counts[:, 1 : k + 1]
    item, label_id = np.nonzero(counts)
    area = counts[item, label_id] / (sizes[item, 0] * sizes[item, 1]) * shares[item]
    host = classes.cpu().numpy() if rle else None
    return MaskRows(
        item=item,
        label_id=label_id,
        area=np.minimum(area, 1.0).astype(np.float32),
        rle=tuple(
            None if host is None else encode_rle(host[i, : sizes[i, 1], : sizes[i, 0]] == label)
            for i, label in zip(item, label_id, strict=True)
        ),
        size_px=sizes[item],
    )


def _seen(
    spec: ModelSpec, width: int, height: int, source_px: Ints
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Of each item: (width, height) of the map that shows the frame; the frame's share shown."""
    geometry = spec.geometry
    if geometry is None:
        raise ValueError(f"model {spec.name} gives masks of no frames")
    fits = np.array([fit_box(geometry, int(w), int(h)) for w, h in source_px]).reshape(-1, 4)
    size = np.array([geometry.width_px, geometry.height_px])
    shown = np.minimum(fits[:, :2], size)
    sizes = np.maximum(1, np.round(shown * [width, height] / size)).astype(np.int64)
    return sizes, (shown / fits[:, :2]).prod(axis=1)


def encode_rle(mask: Bools) -> bytes:
    """COCO's compressed run lengths of a (h, w) mask.

    Runs go down the columns and alternate, the first of zeros. From the fourth on, each is written
    as its difference to the one two before it; a number is written in groups of five bits, the
    lowest first, as characters from "0" on, the sixth bit telling that more follow.
    """
    flat = mask.ravel(order="F")
    bounds = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    runs = [0] * int(flat[0]) + np.diff(bounds).tolist()
    text = bytearray()
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text.append(48 + group + 32 * more)
    return bytes(text)
