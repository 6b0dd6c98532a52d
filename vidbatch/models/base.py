"""What a person writes as a model, and what stands around it: floors, geometry, checks.

A *plain* model is any class with a `predict`; its facts are class attributes or are set by
`__init__` from `what.params` (see `Facts`). `configs/models/redness.py` is one of ten lines.
`PlainAdapter` makes a `data.Model` of it. Knows no files and no fingerprints: see `registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vidbatch.data import (
    Batch,
    BoxRows,
    Geometry,
    Ints,
    LabelRows,
    ModelSpec,
    Predictions,
    Singles,
    fit_box,
)
from vidbatch.errors import ModelError, UsageError


class PlainModel(Protocol):
    """What a person writes; everything but `predict` may be left out (defaults: `Facts`)."""

    def predict(self, batch: Batch) -> Predictions | Mapping[str, Any]:
        """Answers for every item, as Predictions or as a mapping with any of

        - `features`: (B, F) array or tensor in the order of `features`; NaN = no row
        - `embeddings`: (B, D) array or tensor; brought to length 1 unless `normalised = False`
        - `scores`: (B, K) array or tensor, 0..1 in the order of `labels`
        - `boxes`: BoxRows, coordinates 0..1 of the upright frame (see `undo_fit`)
        """
        ...


class Facts:
    """The attributes of a plain model and what holds where one is missing."""

    geometry: Geometry
    """No default: the size and fit of the frames it wants."""
    kind = ""
    """A word for the table `models`; derived from what it gives when empty."""
    labels: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dim = 0
    detects = False
    """Whether its labels name boxes (table `detections`) and not frames (table `labels`)."""
    normalised = True
    context = 0
    """1: `batch.previous` holds the sampled frame before each item."""
    batch = 64
    top_k = 0
    """Labels kept per frame, 0 = all; `what.top_k` overrides."""
    min_score = 0.0
    """Labels and boxes below it are dropped; `what.min_score` overrides."""
    on_host = False
    """Whether it wants CPU tensors whatever the device of the predictor is."""
    semantics = 1
    """Counted up when the same pixels give other rows; part of the fingerprint."""


def fact(plain: object, name: str) -> Any:
    """The attribute of a plain model, or the default of `Facts`."""
    return getattr(plain, name, getattr(Facts, name, None))


class PlainAdapter:
    """A `data.Model` around a plain model: device, floors, tensors → Predictions, errors."""

    def __init__(self, spec: ModelSpec, plain: Any, *, top_k: int, min_score: float) -> None:
        self._spec, self.plain = spec, plain
        self._top_k, self._min_score = top_k, min_score
        self.on_host: bool = bool(fact(plain, "on_host"))

    @property
    def spec(self) -> ModelSpec:
        """Facts that need no weights in memory."""
        return self._spec

    def load(self, device: str) -> None:
        """Calls the plain model's `load(device)` if it has one. Raises ModelError."""
        load = getattr(self.plain, "load", None)
        if load is None:
            return
        try:
            load(device)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model {self._spec.name}: load on {device} raised {type(error).__name__}: {error}"
                "; it can answer no frame; `vidbatch try` runs it alone",
                kind="model_load",
            ) from error

    def predict(self, batch: Batch) -> Predictions:
        """Answers for every item of the batch, floors applied; what it raises passes as it is."""
        n = len(batch.source_px)
        answer = self.plain.predict(batch)
        if not isinstance(answer, Predictions):
            answer = self._collect(n, answer)
        return Predictions(
            n=answer.n,
            embeddings=answer.embeddings,
            features=answer.features,
            labels=keep_labels(answer.labels, top_k=self._top_k, min_score=self._min_score),
            boxes=_keep_boxes(answer.boxes, self._min_score),
        )

    def close(self) -> None:
        """Calls the plain model's `close()` if it has one."""
        close = getattr(self.plain, "close", None)
        if close is not None:
            close()

    def _collect(self, n: int, answer: Mapping[str, Any]) -> Predictions:
        unknown = set(answer) - {"features", "embeddings", "scores", "boxes"}
        if unknown:
            raise ModelError(
                f"model {self._spec.name}: predict returned {sorted(unknown)}; known: features, "
                "embeddings, scores, boxes",
                kind="model_answer",
            )
        widths = {
            "features": len(self._spec.features),
            "embeddings": self._spec.dim,
            "scores": len(self._spec.labels),
        }
        found = {key: answer[key] for key in widths if key in answer}
        for key, value in found.items():
            if tuple(value.shape) != (n, widths[key]):
                raise ModelError(
                    f"model {self._spec.name}: {key} is {tuple(value.shape)}, expected "
                    f"({n}, {widths[key]})",
                    kind="model_answer",
                )
        arrays = _to_host(found, normalise=self._spec.normalised)
        rows: dict[str, Any] = {k: arrays[k] for k in ("features", "embeddings") if k in arrays}
        if "scores" in arrays:
            rows["labels"] = every_label(arrays["scores"])
        if "boxes" in answer:
            rows["boxes"] = answer["boxes"]
        return Predictions(n=n, **rows)


def _to_host(found: Mapping[str, Any], *, normalise: bool) -> dict[str, Singles]:
    """float32 numpy arrays of (B, width) tensors or arrays, with one copy from the device."""
    import torch

    parts = {key: torch.as_tensor(value).float() for key, value in found.items()}
    if normalise and "embeddings" in parts:
        parts["embeddings"] = torch.nn.functional.normalize(parts["embeddings"], dim=1)
    if not parts:
        return {}
    joined = torch.cat(list(parts.values()), dim=1).cpu().numpy()
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    return {
        key: np.ascontiguousarray(joined[:, end - part.shape[1] : end])
        for (key, part), end in zip(parts.items(), ends, strict=True)
    }


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


def _keep_boxes(boxes: BoxRows, min_score: float) -> BoxRows:
    return _pick_boxes(boxes, ~(boxes.score < np.float32(min_score)))


def _pick_boxes(boxes: BoxRows, rows: Any, shift: int = 0) -> BoxRows:
    return BoxRows(
        item=boxes.item[rows] + shift,
        label_id=boxes.label_id[rows],
        score=boxes.score[rows],
        xyxy=boxes.xyxy[rows],
    )


def _pick_labels(labels: LabelRows, rows: Any, shift: int = 0) -> LabelRows:
    return LabelRows(
        item=labels.item[rows] + shift, label_id=labels.label_id[rows], score=labels.score[rows]
    )


def undo_fit(geometry: Geometry, xyxy_px: Any, source_px: Ints) -> Singles:
    """Boxes in pixels of the model's picture → 0..1 of the upright frame, cut to the frame.

    `xyxy_px` is (M, 4) x_min, y_min, x_max, y_max; `source_px` (M, 2) the width and height of the
    frame each box was found in. The inverse of `data.fit_box`.
    """
    boxes = np.asarray(xyxy_px, np.float64).reshape(-1, 4)
    fits = np.array([fit_box(geometry, int(w), int(h)) for w, h in source_px], np.float64).reshape(
        -1, 4
    )
    scaled, offset = fits[:, [0, 1, 0, 1]], fits[:, [2, 3, 2, 3]]
    return np.clip((boxes + offset) / scaled, 0.0, 1.0).astype(np.float32)


def empty_predictions(spec: ModelSpec) -> Predictions:
    """The answer for no items, with the model's widths."""
    return Predictions(
        n=0,
        embeddings=np.zeros((0, spec.dim), np.float32),
        features=np.zeros((0, len(spec.features)), np.float32),
    )


def cut_predictions(whole: Predictions, lo: int, hi: int) -> Predictions:
    """The answers for items [lo, hi), counted from 0 again."""
    labels, boxes = whole.labels, whole.boxes
    return Predictions(
        n=hi - lo,
        embeddings=whole.embeddings[lo:hi],
        features=whole.features[lo:hi],
        labels=_pick_labels(labels, (labels.item >= lo) & (labels.item < hi), -lo),
        boxes=_pick_boxes(boxes, (boxes.item >= lo) & (boxes.item < hi), -lo),
    )


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """The answers for the items of all parts (≥ 1) in a row; the inverse of cutting."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(p.n for p in parts)])
    labels = [
        _pick_labels(p.labels, slice(None), int(s)) for p, s in zip(parts, starts, strict=False)
    ]
    boxes = [_pick_boxes(p.boxes, slice(None), int(s)) for p, s in zip(parts, starts, strict=False)]
    return Predictions(
        n=int(starts[-1]),
        embeddings=np.concatenate([p.embeddings for p in parts]),
        features=np.concatenate([p.features for p in parts]),
        labels=LabelRows(
            item=np.concatenate([x.item for x in labels]),
            label_id=np.concatenate([x.label_id for x in labels]),
            score=np.concatenate([x.score for x in labels]),
        ),
        boxes=BoxRows(
            item=np.concatenate([x.item for x in boxes]),
            label_id=np.concatenate([x.label_id for x in boxes]),
            score=np.concatenate([x.score for x in boxes]),
            xyxy=np.concatenate([x.xyxy for x in boxes]),
        ),
    )


def check_predictions(spec: ModelSpec, answer: Predictions, n: int) -> None:
    """Holds an answer for `n` items against what the spec allows.

    Raises:
        ModelError: wrong count or width, a number that is not finite, a score or coordinate outside
            0..1, a label id without a label, rows of a kind the spec does not give.
    """

    def fail(what: str) -> ModelError:
        return ModelError(
            f"model {spec.name}: {what}; its rows of these frames are left out; "
            "`vidbatch try` shows what it answers",
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
    rows: LabelRows | BoxRows
    for table, rows in (("labels", answer.labels), ("detections", answer.boxes)):
        if len(rows.item) and table not in spec.gives:
            raise fail(f"answered {len(rows.item)} {table}, but gives only {list(spec.gives)}")
        if ((rows.label_id < 0) | (rows.label_id >= len(spec.labels))).any():
            raise fail(f"{table} hold a label_id outside 0..{len(spec.labels) - 1}")
        if not ((rows.score >= 0) & (rows.score <= 1)).all():
            raise fail(f"{table} hold a score outside 0..1")
    xyxy = answer.boxes.xyxy
    if not ((xyxy >= 0) & (xyxy <= 1)).all():
        raise fail("boxes hold a coordinate outside 0..1 of the frame")
    if (xyxy[:, :2] > xyxy[:, 2:]).any():
        raise fail("boxes hold a minimum that is larger than its maximum")


def unknown_name(where: str, what: str, name: object, known: Sequence[str]) -> UsageError:
    """The error for a name that nobody knows: says the nearest and all known ones."""
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"{where}: unknown {what} {name!r}; {hint}known: {', '.join(sorted(known))}")
