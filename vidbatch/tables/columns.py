"""What a model says of one chunk → columns of each table it fills; `at` is the row of the chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from vidbatch.data import (
    Chunk,
    Clip,
    Frames,
    Ints,
    ModelSpec,
    Output,
    Predictions,
    Singles,
    Windows,
    chunk_rows,
    rank_rows,
)
from vidbatch.errors import ModelError
from vidbatch.tables.schemas import SCHEMAS

Columns = dict[str, Any]
"""Column → array; `at` is the position of the row's frame or window in the chunk."""


def key_columns(chunk: Chunk) -> Columns:
    """The columns that a table takes from the chunk itself, one item per row of it."""
    if isinstance(chunk, Frames):
        return _frame_key(chunk, np.arange(len(chunk))[chunk_rows(chunk)])
    if isinstance(chunk, Windows):
        frames, first, last = chunk.frames, chunk.items[:, 0], chunk.items[:, -1]
        key = _frame_key(frames, first)
        return key | {
            "start_frame": key["frame_index"],
            "end_frame": frames.frame_index[last] + 1,
            "start_s": key["time_s"],
            "end_s": frames.time_s[last] + frames.covers_s[last],
        }
    starts = [int(k) * chunk.grid.hop_s for k in chunk.keys]
    return {
        "start_s": np.array([float(s) for s in starts]),
        "end_s": np.array([float(s + chunk.grid.window_s) for s in starts]),
    }


def _frame_key(frames: Frames, items: Ints) -> Columns:
    return {name: getattr(frames, name)[items] for name in ("frame_index", "has_pts", "time_s")} | {
        "pts": pa.array(frames.pts[items], mask=~frames.has_pts[items])
    }


def frame_columns(frames: Frames) -> Columns:
    """The columns of `frames` after the key."""
    rows = chunk_rows(frames)
    return {
        "at": np.arange(frames.num_rows),
        "covers_s": np.array(frames.covers_s[rows], np.float64),
        "is_keyframe": np.array(frames.is_keyframe[rows], np.bool_),
        "is_corrupt": np.array(frames.is_corrupt[rows], np.bool_),
    }


class Answer:
    """One model's answer for one chunk of a clip, as columns.

    Args:
        predictions: of the chunk's rows, or of a context frame before them as well.
        opens: whether the chunk's first row is the first sampled frame of its video.

    Raises:
        ModelError: from every method: it is not what the model's spec allows.
    """

    def __init__(
        self, output: Output, clip: Clip, chunk: Chunk, predictions: Predictions, *, opens: bool
    ) -> None:
        assert output.spec is not None
        self._output, self._spec, self._clip, self._opens = output, output.spec, clip, opens
        self._said, self._chunk = predictions, chunk
        self._skip = predictions.n - chunk.num_rows
        if self._skip not in (0, int(isinstance(chunk, Frames) and chunk.context)):
            raise self._refused(f"{predictions.n} answers for {chunk.num_rows} rows")

    def columns(self) -> dict[str, Columns]:
        """Table → columns, for every table of the spec."""
        ways: dict[str, Callable[[], Columns]] = {
            "labels": self._labels,
            "windows": self._labels,
            "detections": self._boxes,
            "embeddings": self._embeddings,
            "features": self._features,
            "masks": self._masks,
            "audio": self._audio,
            "shots": self._shots,
        }
        return {name: ways[name]() for name in self._spec.gives}

    def _labels(self) -> Columns:
        labels = self._said.labels
        order, ordinal = self._ranked(labels.item, labels.label_id, labels.score)
        label_id = labels.label_id[order]
        return self._of(labels.item[order]) | {
            "rank": (ordinal + 1).astype(np.int32),
            "label": self._names(label_id),
            "label_id": label_id.astype(np.int32),
            "score": labels.score[order].astype(np.float32),
        }

    def _boxes(self) -> Columns:
        boxes = self._said.boxes
        if not np.isfinite(boxes.xyxy).all():
            raise self._refused("a box that is not finite")
        order, ordinal = self._ranked(boxes.item, boxes.label_id, boxes.score)
        label_id, xyxy = boxes.label_id[order], boxes.xyxy[order].astype(np.float32)
        columns = {
            "at": boxes.item[order] - self._skip,
            "detection_id": ordinal.astype(np.int32),
            "label": self._names(label_id),
            "label_id": label_id.astype(np.int32),
            "score": boxes.score[order].astype(np.float32),
        }
        corners = enumerate(("x_min", "y_min", "x_max", "y_max"))
        return columns | {name: xyxy[:, i] for i, name in corners}

    def _embeddings(self) -> Columns:
        n, dim, vectors = self._said.num_items, self._spec.dim, self._said.embeddings
        if vectors.shape != (n, dim):
            raise self._refused(f"embeddings {vectors.shape}, not ({n}, {dim})")
        if not np.isfinite(vectors).all():
            raise self._refused("an embedding that is not finite")
        items = np.arange(n)[self._skip if self._said.crops is None else 0 :]
        vectors = np.array(vectors[items], np.float32, order="C")
        offsets = np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(dim)
        kind = SCHEMAS["embeddings"].field("embedding").type
        flat = pa.array(vectors.reshape(-1))
        return self._of(items) | {"embedding": pa.ListArray.from_arrays(offsets, flat, type=kind)}

    def _features(self) -> Columns:
        at, names, values = self._scalars()
        return {"at": at, "feature": names, "value": values}

    def _masks(self) -> Columns:
        masks, spec = self._said.masks, self._spec
        self._check_ids(masks.label_id)
        if not np.isfinite(masks.area).all() or not (np.diff(masks.item) >= 0).all():
            raise self._refused("masks out of order, or an area that is not finite")
        rle = masks.rle
        keep = np.flatnonzero(masks.item >= self._skip)
        none = np.array([rle[i] is None for i in keep], np.bool_)
        size = masks.size_px[keep].astype(np.int32)
        return {
            "at": masks.item[keep] - self._skip,
            "label": _names(spec, masks.label_id[keep]),
            "label_id": masks.label_id[keep].astype(np.int32),
            "area": masks.area[keep].astype(np.float32),
            "mask_rle": pa.array([rle[i] for i in keep], pa.binary()),
            "mask_width_px": pa.array(size[:, 0], mask=none),
            "mask_height_px": pa.array(size[:, 1], mask=none),
        }

    def _audio(self) -> Columns:
        labels = self._said.labels
        order, _ = self._ranked(labels.item, labels.label_id, labels.score)
        at, names, values = self._scalars()
        kinds = pa.array(["label"] * len(order) + ["feature"] * len(at), pa.string())
        named = self._names(labels.label_id[order])
        return {
            "at": np.concatenate([labels.item[order], at]),
            "kind": kinds,
            "label": pa.concat_arrays([named, names]),
            "value": np.concatenate([labels.score[order], values]).astype(np.float32),
        }

    def _shots(self) -> Columns:
        cuts = self._said.cuts
        if len(cuts) != self._said.n or np.isinf(cuts).any():
            raise self._refused(f"{len(cuts)} cuts for {self._said.n} frames, or an infinite one")
        cuts = cuts[self._skip :]
        begins = ~np.isnan(cuts)
        if self._opens:
            begins[:1] = True
        at = np.flatnonzero(begins)
        key = key_columns(self._chunk)
        return {
            "at": at,
            "start_frame": key["frame_index"][at],
            "start_s": key["time_s"][at],
            "score": pa.array(cuts[at].astype(np.float32), mask=np.isnan(cuts[at])),
        }

    # parts ------------------------------------------------------------------------------------

    def _of(self, items: Ints) -> Columns:
        """Where answers for these items belong: a row, or a box of it."""
        crops = self._said.crops
        if crops is None:
            return {"at": items - self._skip}
        return {
            "at": crops.item[items],
            "detection_id": crops.detection[items].astype(np.int32),
            "of_model": pa.repeat(pa.scalar(self._output.of_model, pa.string()), len(items)),
        }

    def _ranked(self, item: Ints, label_id: Ints, score: Singles) -> tuple[Ints, Ints]:
        """Rows without context, by item and falling score: (positions, ordinal in the item)."""
        self._check_ids(label_id)
        if not np.isfinite(score).all():
            raise self._refused("a score that is not finite")
        order, ordinal = rank_rows(item, label_id, score)
        keep = item[order] >= (self._skip if self._said.crops is None else 0)
        return order[keep], ordinal[keep]

    def _scalars(self) -> tuple[Ints, pa.Array, Singles]:
        """(row, feature, value) of every feature that is a number, by row and name."""
        values, features, n = self._said.features, self._spec.features, self._said.n
        if not features:
            return np.zeros(0, np.int64), pa.array([], pa.string()), np.zeros(0, np.float32)
        if values.shape != (n, len(features)):
            raise self._refused(f"features {values.shape}, not ({n}, {len(features)})")
        if np.isinf(values).any():
            raise self._refused("an infinite feature")
        by_name = sorted(range(len(features)), key=lambda i: features[i])
        values = values[self._skip :, by_name]
        at, which = np.nonzero(~np.isnan(values))
        names = pa.array([features[i] for i in by_name], pa.string())
        found = values[at, which].astype(np.float32)
        return at, names.take(pa.array(which, pa.int64())), found

    def _check_ids(self, label_id: Ints) -> None:
        known = len(self._spec.labels)
        if len(label_id) and not 0 <= int(label_id.min()) <= int(label_id.max()) < known:
            raise self._refused(f"a label_id outside 0..{known - 1}")

    def _names(self, label_id: Ints) -> pa.Array:
        return _names(self._spec, label_id)

    def _refused(self, what: str) -> ModelError:
        return ModelError(
            f"model {self._spec.name} gave {what} — clip at {self._clip.start_s} s of "
            f"{self._clip.video.uri} — none of its rows are kept",
            kind="bad_predictions",
            advice="correct the model or its model file; its version then changes",
        )


def _names(spec: ModelSpec, label_id: Ints) -> pa.Array:
    names = pa.array(spec.labels, pa.string())
    return names.take(pa.array(label_id, pa.int64()))
