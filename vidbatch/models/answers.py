"""Arithmetic on Predictions: floors, cutting and joining by items, and what a spec allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vidbatch.data import BoxRows, Crops, LabelRows, MaskRows, ModelSpec, Predictions
from vidbatch.errors import ModelError

Rows = TypeVar("Rows", LabelRows, BoxRows, MaskRows)


def every_label(scores: npt.NDArray[np.floating[Any]]) -> LabelRows:
    """(B, K) scores → B·K rows, by item, then falling score (ties: the smaller label_id)."""
    b, k = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable")
    return LabelRows(
        item=np.repeat(np.arange(b, dtype=np.int64), k),
        label_id=order.ravel().astype(np.int64),
        score=np.take_along_axis(scores, order, axis=1).ravel().astype(np.float32),
    )


def keep_labels(labels: LabelRows, *, top_k: int = 0, min_score: float = 0.0) -> LabelRows:
    """The rows with score ≥ min_score, at most top_k (0 = all) of the highest per item.

    Rows come out by item, then falling score; ties keep the order they had.
    """
    order = np.lexsort((-labels.score, labels.item))
    item, score = labels.item[order], labels.score[order]
    keep = ~(score < np.float32(min_score))  # NaN stays: check_predictions is to see it
    if top_k and len(item):
        rank = np.arange(len(item)) - np.searchsorted(item, item)  # within its item, from 0
        keep &= (rank < top_k) | np.isnan(score)
    return LabelRows(item=item[keep], label_id=labels.label_id[order][keep], score=score[keep])


def keep_boxes(boxes: BoxRows, *, min_score: float) -> BoxRows:
    """The boxes with score ≥ min_score, as they came."""
    return _pick(boxes, ~(boxes.score < np.float32(min_score)))


def empty_predictions(spec: ModelSpec) -> Predictions:
    """The answer for no items, with the model's widths."""
    return Predictions(
        n=0,
        crops=Crops(item=np.zeros(0, np.int64), detection=np.zeros(0, np.int64))
        if spec.crop
        else None,
        embeddings=np.zeros((0, spec.dim), np.float32),
        features=np.zeros((0, len(spec.features)), np.float32),
    )


def cut_predictions(whole: Predictions, lo: int, hi: int) -> Predictions:
    """The answers for items [lo, hi), counted from 0 again; crops must be in order of items."""
    first, last, crops = lo, hi, whole.crops
    if crops is not None:
        first, last = (int(i) for i in np.searchsorted(crops.item, [lo, hi]))
        crops = Crops(item=crops.item[first:last] - lo, detection=crops.detection[first:last])

    def some(rows: Rows) -> Rows:
        return _pick(rows, (rows.item >= first) & (rows.item < last), -first)

    return Predictions(
        n=hi - lo,
        crops=crops,
        embeddings=whole.embeddings[first:last],
        features=whole.features[first:last],
        labels=some(whole.labels),
        boxes=some(whole.boxes),
        masks=some(whole.masks),
        cuts=whole.cuts[first:last],
    )


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """The answers for the items of all parts (≥ 1) in a row; the inverse of cutting."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(p.n for p in parts)])
    firsts = np.cumsum([0, *(p.num_items for p in parts)])
    crops = [p.crops for p in parts if p.crops is not None]

    def every(of: list[Rows]) -> Rows:
        shifted = [_pick(rows, slice(None), int(k)) for rows, k in zip(of, firsts, strict=False)]
        columns = {
            f.name: _joined([getattr(rows, f.name) for rows in shifted]) for f in fields(of[0])
        }
        return replace(of[0], **columns)

    return Predictions(
        n=int(starts[-1]),
        crops=Crops(
            item=np.concatenate([c.item + k for c, k in zip(crops, starts, strict=False)]),
            detection=np.concatenate([c.detection for c in crops]),
        )
        if crops
        else None,
        embeddings=np.concatenate([p.embeddings for p in parts]),
        features=np.concatenate([p.features for p in parts]),
        labels=every([p.labels for p in parts]),
        boxes=every([p.boxes for p in parts]),
        masks=every([p.masks for p in parts]),
        cuts=np.concatenate([p.cuts for p in parts]),
    )


def _pick(rows: Rows, which: Any, shift: int = 0) -> Rows:
    """Some rows, their items shifted."""
    columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
    some: dict[str, Any] = {
        name: tuple(column[i] for i in np.arange(len(column))[which])
        if isinstance(column, tuple)
        else column[which]
        for name, column in columns.items()
    }
    return replace(rows, **{**some, "item": some["item"] + shift})


def _joined(columns: list[Any]) -> Any:
    if isinstance(columns[0], tuple):
        return tuple(value for column in columns for value in column)
    return np.concatenate(columns)


def check_predictions(spec: ModelSpec, answer: Predictions, n: int) -> None:
    """Holds an answer for `n` items against what the spec allows.

    Raises:
        ModelError: wrong count or width, a number that is not finite, a score or coordinate outside
            0..1, a label id without a label, rows of a kind the spec does not give.
    """

    def fail(what: str) -> ModelError:
        return ModelError(
            f"model {spec.name}: {what}; its rows of these frames are left out; "
            "`vidbatch models bench` runs it alone",
            kind="model_answer",
        )

    if answer.n != n:
        raise fail(f"answered {answer.n} items of {n}")
    widths = {"embeddings": spec.dim, "features": len(spec.features)}
    for name, width in widths.items():
        array = getattr(answer, name)
        if array.shape[1] != width or (width and len(array) != n):
            raise fail(f"{name} is {array.shape}, expected ({n}, {width})")
        bad = ~np.isfinite(array) if name == "embeddings" else np.isinf(array)
        if bad.any():
            raise fail(f"{name} holds {int(bad.sum())} numbers that are not finite")
    for what, tables, rows, score in (
        ("labels", {"labels", "windows", "audio"}, answer.labels, answer.labels.score),
        ("detections", {"detections"}, answer.boxes, answer.boxes.score),
        ("masks", {"masks"}, answer.masks, answer.masks.area),
    ):
        if len(rows.item) and not tables & set(spec.gives):
            raise fail(f"answered {len(rows.item)} {what}, but gives only {list(spec.gives)}")
        if ((rows.label_id < 0) | (rows.label_id >= len(spec.labels))).any():
            raise fail(f"{what} hold a label_id outside 0..{len(spec.labels) - 1}")
        if not ((score >= 0) & (score <= 1)).all():
            raise fail(f"{what} hold a score outside 0..1")
    cuts = answer.cuts
    if len(cuts) != (n if "shots" in spec.gives else 0):
        raise fail(f"answered {len(cuts)} cuts for {n} items and gives {list(spec.gives)}")
    if not (np.isnan(cuts) | ((cuts >= 0) & (cuts <= 1))).all():
        raise fail("cuts hold a score outside 0..1")
    xyxy = answer.boxes.xyxy
    if not ((xyxy >= 0) & (xyxy <= 1)).all():
        raise fail("boxes hold a coordinate outside 0..1 of the frame")
    if (xyxy[:, :2] > xyxy[:, 2:]).any():
        raise fail("boxes hold a minimum that is larger than its maximum")
