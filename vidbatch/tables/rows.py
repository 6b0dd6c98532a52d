"""Chunks and predictions of one task → the rows of one output, as sorted Arrow tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from vidbatch.data import FRAMES, Chunk, Clip, Frames, Outcome, Output, Predictions, Task, VideoInfo
from vidbatch.tables.columns import Answer, Columns, frame_columns, key_columns
from vidbatch.tables.outcomes import outcome_tables
from vidbatch.tables.parquet import sort_rows
from vidbatch.tables.schemas import SCHEMAS, result_tables

Chunks = list[tuple[Columns, dict[str, Columns]]]
"""Of each chunk of a clip: the key of its rows, and table → columns after the key."""


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
        spec = output.spec
        self._by_frame = spec is None or (spec.window is None and spec.audio is None)
        self._chunks: dict[Clip, Chunks] = {clip: [] for clip in task.clips}

    def add(self, clip: Clip, chunk: Chunk, predictions: Predictions | None) -> None:
        """Takes a chunk of a clip, in order of time, with what the model says of it.

        Labels of a frame get rank 1, 2, … and boxes detection_id 0, 1, … by falling score (equal
        scores: by label_id, then as they came). A feature that is NaN gives no row, a context
        frame or halo none at all. The first sampled frame of a video begins its first shot.

        Args:
            predictions: one item per row of the chunk, or of a context frame and the rows; None
                for the output `frames`.

        Raises:
            ModelError: the predictions are not what the model's spec allows.
        """
        if (self.output.spec is None) != (predictions is None):
            raise ValueError(f"output {self.output.name}: predictions go with models alone")
        if predictions is not None:
            opens = clip.first_keyframe == 0 and not self._chunks[clip]
            found = Answer(self.output, clip, chunk, predictions, opens=opens).columns()
        elif isinstance(chunk, Frames):
            found = {FRAMES: frame_columns(chunk)}
        else:
            raise ValueError(f"{FRAMES} are no {type(chunk).__name__}")
        self._chunks[clip].append((key_columns(chunk), found))

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
            rows = sum(len(key["time_s"]) for key, _ in self._chunks[clip] if "time_s" in key)
            if self._by_frame and rows != by_clip[clip].frames:
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
                if name == "shots":
                    tables[name] = _close_shots(tables[name], kept, by_clip)
        coverage = outcome_tables(self.task, outcomes, run=run, now=now)
        return tables | {k: v for k, v in coverage.items() if k == "coverage" or len(v)}


def _table(name: str, clips: Sequence[tuple[Clip, Chunks]]) -> pa.Table:
    """The rows of one table; vectors stay in the chunks they came in, all else is joined."""
    parts: defaultdict[str, list[Any]] = defaultdict(list)
    counts, videos = [], []
    schema = SCHEMAS[name]
    for clip, chunks in clips:
        video = clip.video
        videos.append((video.video_id, video.uri, video.source))
        counts.append(sum(len(found[name]["at"]) for _, found in chunks))
        for key, found in chunks:
            columns = dict(found[name])
            at = columns.pop("at")
            key = {column: values for column, values in key.items() if column not in columns}
            for column, values in key.items():
                if column in schema.names:
                    of_row = values[at] if isinstance(values, np.ndarray) else values.take(at)
                    parts[column].append(of_row)
            for column, values in columns.items():
                parts[column].append(values)
    which = pa.array(np.repeat(np.arange(len(counts)), counts), pa.int32())
    rows = sum(counts)
    for i, column in enumerate(("video_id", "uri", "source")):
        parts[column] = [pa.array([v[i] for v in videos], pa.string()).take(which)]
    arrays = []
    for field in schema:
        chunks_of = parts.get(field.name) or ([pa.nulls(rows, field.type)] if rows else [])
        if chunks_of and isinstance(chunks_of[0], np.ndarray):
            chunks_of = [np.concatenate(chunks_of)]
        arrays.append(pa.chunked_array([pa.array(c, field.type) for c in chunks_of], field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _close_shots(
    table: pa.Table, clips: Sequence[tuple[Clip, Chunks]], outcomes: Mapping[Clip, Outcome]
) -> pa.Table:
    """Shots end where the next of the clip begins; the last of a video with it, else with null."""
    counts = [sum(len(found["shots"]["at"]) for _, found in chunks) for _, chunks in clips]
    stops = np.cumsum(counts).tolist()
    lasts = {stop - 1: clip for (clip, _), n, stop in zip(clips, counts, stops, strict=True) if n}
    for unit in ("frame", "s"):
        ends: list[Any] = [*table[f"start_{unit}"].to_pylist()[1:], None]
        for row, clip in lasts.items():
            over = clip.end_keyframe is None
            ends[row] = getattr(outcomes[clip], f"end_{unit}") if over else None
        at = table.schema.get_field_index(f"end_{unit}")
        field = table.schema.field(at)
        table = table.set_column(at, field, pa.array(ends[: len(table)], field.type))
    return table


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
