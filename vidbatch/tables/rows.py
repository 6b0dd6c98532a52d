"""Frames and predictions of one task → the rows of one output, as sorted Arrow tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from vidbatch.data import (
    FRAMES,
    Clip,
    Frames,
    Ints,
    ModelSpec,
    Outcome,
    Output,
    Predictions,
    Singles,
    Task,
    VideoInfo,
    chunk_rows,
)
from vidbatch.errors import ModelError
from vidbatch.tables.outcomes import outcome_tables
from vidbatch.tables.parquet import sort_rows
from vidbatch.tables.schemas import SCHEMAS, result_tables

Columns = dict[str, Any]
"""Column → array of one chunk; `at` is the position of the row's frame in the chunk."""

Chunks = list[tuple[Columns, dict[str, Columns]]]
"""Of each chunk of a clip: the key of its frames, and table → columns after the key."""


class OutputRows:
    """Collects the rows of one output of one task, chunk by chunk; holds copies, no views.

    The cost is that of the columns themselves: 25 bytes a frame for its key, then what each
    table adds (4·D for a vector). Strings that repeat are made once, by `finish`.

    Args:
        output: `frames`, or a model; which tables there are follows from it.
        task: only its clips are taken.
    """

    def __init__(self, output: Output, task: Task) -> None:
        self.output = output
        self.task = task
        self.tables = result_tables(output)
        self._chunks: dict[Clip, Chunks] = {clip: [] for clip in task.clips}

    def add(self, clip: Clip, frames: Frames, predictions: Predictions | None) -> None:
        """Takes a chunk of a clip, in display order, with what the model says of it.

        Labels of a frame get rank 1, 2, … and boxes detection_id 0, 1, … by falling score (equal
        scores: by label_id, then as they came). A feature that is NaN gives no row, a context
        frame none at all.

        Args:
            predictions: one item per item of `frames`, or per row of it (the context frame left
                out already); None for the output `frames`.

        Raises:
            ModelError: the predictions are not what the model's spec allows.
        """
        rows = chunk_rows(frames)
        key = {
            "frame_index": np.array(frames.frame_index[rows], np.int64),
            "pts": np.array(frames.pts[rows], np.int64),
            "has_pts": np.array(frames.has_pts[rows], np.bool_),
            "time_s": np.array(frames.time_s[rows], np.float64),
        }
        spec = self.output.spec
        if (spec is None) != (predictions is None):
            raise ValueError(f"output {self.output.name}: predictions go with models alone")
        if spec is None or predictions is None:
            found = {FRAMES: _frame_rows(frames, rows)}
        else:
            if predictions.n not in (len(frames), frames.num_rows):
                raise _refused(spec, clip, f"{predictions.n} answers for {len(frames)} frames")
            skip = predictions.n - frames.num_rows
            found = {name: _ROWS[name](spec, clip, predictions, skip) for name in spec.gives}
        self._chunks[clip].append((key, found))

    def drop(self, clip: Clip) -> None:
        """Forgets all rows of a clip: it failed, or is decoded again from its start."""
        self._chunks[clip] = []

    def finish(
        self,
        outcomes: Sequence[Outcome],
        infos: Mapping[str, VideoInfo | None],
        *,
        run: str,
        now: datetime,
    ) -> dict[str, pa.Table]:
        """The tables of this output, parents first, then `coverage`, then `failures`.

        A result table is there even without rows: which attempt's file stands for it must not
        depend on what an attempt happened to find (see `ledger.commit`). Only `videos` is
        left out where the task owns no video's first clip, for that the plan alone decides, and
        `failures` where nothing failed, for that `coverage` decides. Rows of clips whose outcome
        is `failed` are left out. A video has its row from the generation-0 task that owns its
        first clip, with nulls if its header could not be read.

        Args:
            outcomes: one per clip of the task.
            infos: video_id → what its headers say; None or missing where they could not be read.

        Raises:
            ValueError: outcomes and clips, or frames counted and rows added, do not agree.
        """
        by_clip = {o.clip: o for o in outcomes}
        if len(outcomes) != len(self.task.clips) or by_clip.keys() != self._chunks.keys():
            raise ValueError(f"task {self.task.task_id}: not one outcome for each of its clips")
        kept: list[tuple[Clip, Chunks]] = []
        for clip in sorted(by_clip, key=lambda c: (c.video.video_id, c.first_keyframe)):
            if by_clip[clip].status == "failed":
                continue
            rows = sum(len(key["frame_index"]) for key, _ in self._chunks[clip])
            if rows != by_clip[clip].frames:
                raise ValueError(
                    f"clip at {clip.start_s} s of {clip.video.uri}: {rows} frames came as rows, "
                    f"its outcome counts {by_clip[clip].frames}"
                )
            kept.append((clip, self._chunks[clip]))
        tables = {}
        for name in self.tables:
            if name == "videos":
                videos = _video_rows(self.task, infos, run)
                if len(videos):
                    tables[name] = videos
            else:
                tables[name] = sort_rows(name, _table(name, kept))
        coverage = outcome_tables(self.task, outcomes, run=run, now=now)
        return tables | {k: v for k, v in coverage.items() if k == "coverage" or len(v)}


def _refused(spec: ModelSpec, clip: Clip, what: str) -> ModelError:
    return ModelError(
        f"model {spec.name} gave {what} — clip at {clip.start_s} s of {clip.video.uri} — "
        "none of its rows are kept",
        kind="bad_predictions",
        advice="correct the model or its model file; its version then changes",
    )


def _frame_rows(frames: Frames, rows: slice) -> Columns:
    return {
        "at": np.arange(frames.num_rows),
        "covers_s": np.array(frames.covers_s[rows], np.float64),
        "is_keyframe": np.array(frames.is_keyframe[rows], np.bool_),
        "is_corrupt": np.array(frames.is_corrupt[rows], np.bool_),
    }


def _ranked(
    spec: ModelSpec, clip: Clip, item: Ints, label_id: Ints, score: Singles, skip: int
) -> tuple[Ints, Ints]:
    """Rows without context, by frame and falling score: (their positions, ordinal in the frame)."""
    if len(label_id) and not 0 <= int(label_id.min()) <= int(label_id.max()) < len(spec.labels):
        raise _refused(spec, clip, f"a label_id outside 0..{len(spec.labels) - 1}")
    if not np.isfinite(score).all():
        raise _refused(spec, clip, "a score that is not finite")
    order = np.lexsort((label_id, -score, item))
    order = order[item[order] >= skip]
    sorted_items = item[order]
    return order, np.arange(len(order)) - np.searchsorted(sorted_items, sorted_items, side="left")


def _label_rows(spec: ModelSpec, clip: Clip, predictions: Predictions, skip: int) -> Columns:
    labels = predictions.labels
    order, ordinal = _ranked(spec, clip, labels.item, labels.label_id, labels.score, skip)
    label_id = labels.label_id[order]
    return {
        "at": labels.item[order] - skip,
        "rank": (ordinal + 1).astype(np.int32),
        "label": _names(spec, label_id),
        "label_id": label_id.astype(np.int32),
        "score": labels.score[order].astype(np.float32),
    }


def _box_rows(spec: ModelSpec, clip: Clip, predictions: Predictions, skip: int) -> Columns:
    boxes = predictions.boxes
    if not np.isfinite(boxes.xyxy).all():
        raise _refused(spec, clip, "a box that is not finite")
    order, ordinal = _ranked(spec, clip, boxes.item, boxes.label_id, boxes.score, skip)
    label_id, xyxy = boxes.label_id[order], boxes.xyxy[order].astype(np.float32)
    columns = {
        "at": boxes.item[order] - skip,
        "detection_id": ordinal.astype(np.int32),
        "label": _names(spec, label_id),
        "label_id": label_id.astype(np.int32),
        "score": boxes.score[order].astype(np.float32),
    }
    return columns | {n: xyxy[:, i] for i, n in enumerate(("x_min", "y_min", "x_max", "y_max"))}


def _names(spec: ModelSpec, label_id: Ints) -> pa.Array:
    names = pa.array(spec.labels, pa.string())
    return names.take(pa.array(label_id, pa.int64()))


def _embedding_rows(spec: ModelSpec, clip: Clip, predictions: Predictions, skip: int) -> Columns:
    vectors = predictions.embeddings
    if vectors.shape != (predictions.n, spec.dim):
        raise _refused(spec, clip, f"embeddings {vectors.shape}, not ({predictions.n}, {spec.dim})")
    if not np.isfinite(vectors).all():
        raise _refused(spec, clip, "an embedding that is not finite")
    vectors = np.array(vectors[skip:], np.float32, order="C")
    offsets = np.arange(len(vectors) + 1, dtype=np.int32) * np.int32(spec.dim)
    kind = SCHEMAS["embeddings"].field("embedding").type
    return {
        "at": np.arange(len(vectors)),
        "embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)), type=kind),
    }


def _feature_rows(spec: ModelSpec, clip: Clip, predictions: Predictions, skip: int) -> Columns:
    values = predictions.features
    if values.shape != (predictions.n, len(spec.features)):
        raise _refused(
            spec, clip, f"features {values.shape}, not ({predictions.n}, {len(spec.features)})"
        )
    if np.isinf(values).any():
        raise _refused(spec, clip, "an infinite feature")
    by_name = sorted(range(len(spec.features)), key=lambda i: spec.features[i])
    values = values[skip:, by_name]
    at, which = np.nonzero(~np.isnan(values))
    names = pa.array([spec.features[i] for i in by_name], pa.string())
    return {
        "at": at,
        "feature": names.take(pa.array(which, pa.int64())),
        "value": values[at, which].astype(np.float32),
    }


_ROWS = {
    "labels": _label_rows,
    "detections": _box_rows,
    "embeddings": _embedding_rows,
    "features": _feature_rows,
}


def _table(name: str, clips: Sequence[tuple[Clip, Chunks]]) -> pa.Table:
    """The rows of one table; vectors stay in the chunks they came in, all else is joined."""
    parts: defaultdict[str, list[Any]] = defaultdict(list)
    counts, videos = [], []
    for clip, chunks in clips:
        video = clip.video
        videos.append((video.video_id, video.uri, video.source))
        counts.append(sum(len(found[name]["at"]) for _, found in chunks))
        for key, found in chunks:
            columns = dict(found[name])
            at = columns.pop("at")
            parts["pts"].append(pa.array(key["pts"][at], mask=~key["has_pts"][at]))
            for column in ("frame_index", "time_s"):
                parts[column].append(key[column][at])
            for column, values in columns.items():
                parts[column].append(values)
    which = pa.array(np.repeat(np.arange(len(counts)), counts), pa.int32())
    schema, rows = SCHEMAS[name], sum(counts)
    for i, column in enumerate(("video_id", "uri", "source")):
        parts[column] = [pa.array([v[i] for v in videos], pa.string()).take(which)]
    arrays = []
    for field in schema:
        chunks_of = parts.get(field.name) or ([pa.nulls(rows, field.type)] if rows else [])
        if chunks_of and isinstance(chunks_of[0], np.ndarray):
            chunks_of = [np.concatenate(chunks_of)]
        arrays.append(pa.chunked_array([pa.array(c, field.type) for c in chunks_of], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _video_rows(task: Task, infos: Mapping[str, VideoInfo | None], run: str) -> pa.Table:
    """A row per video whose first clip the task owns; none in a retry: generation 0 wrote it."""
    rows: dict[str, dict[str, Any]] = {}
    for clip in task.clips if task.generation == 0 else ():
        if clip.first_keyframe == 0:
            row = {name: getattr(clip.video, name) for name in _VIDEO_FACTS} | {"run": run}
            rows[row["video_id"]] = row | _info_row(infos.get(row["video_id"]))
    return pa.Table.from_pylist([rows[k] for k in sorted(rows)], schema=SCHEMAS["videos"])


_VIDEO_FACTS = (
    "video_id", "uri", "modified_at", "listed_at", "captured_at", "captured_from", "source",
    "key_fields", "version", "size_bytes",
)  # fmt: skip


def _info_row(info: VideoInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    return {
        "container": info.container,
        "codec": info.codec,
        "width_px": info.width_px,
        "height_px": info.height_px,
        "rotation_deg": info.rotation_deg,
        "time_base_numerator": info.time_base.numerator,
        "time_base_denominator": info.time_base.denominator,
        "fps_numerator": info.rate.numerator if info.rate else None,
        "fps_denominator": info.rate.denominator if info.rate else None,
        "start_s": info.start_s,
        "duration_s": info.duration_s,
        "frame_count": info.frame_count,
        "audio_codec": info.audio_codec,
        "audio_rate_hz": info.audio_rate_hz,
    }
