"""The plan log: which clips and tasks there are, decided once per sampling rule, for ever.

`_vidbatch/plans/<sampling>/00000000.parquet`, `00000001.parquet`, …: create-only and without a
gap over all runs and drivers; a chunk is what one planning step added. One row per clip; the rows
of a task follow each other. In memory the log stays columnar (about 250 bytes a clip); a
Task is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidbatch.data import Bools, Clip, Floats, Ints, Task, Video
from vidbatch.errors import InfraError
from vidbatch.tables import SCHEMA_VERSION, read, read_metadata, write

_UTC = pa.timestamp("us", tz="UTC")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_VIDEO: dict[str, pa.DataType] = {
    "uri": pa.string(),
    "version": pa.string(),
    "size_bytes": pa.int64(),
    "modified_at": _UTC,
    "listed_at": _UTC,
    "captured_at": _UTC,
    "captured_from": pa.string(),
    "dt": pa.string(),
    "source": pa.string(),
    "key_fields": pa.string(),
}
_CLIP: dict[str, pa.DataType] = {
    "first_keyframe": pa.int64(),
    "end_keyframe": pa.int64(),
    "start_s": pa.float64(),
    "end_s": pa.float64(),
    "start_frame": pa.int64(),
    "end_frame": pa.int64(),
}
_SCHEMA = pa.schema(
    {
        "task_id": pa.string(),
        "ordinal": pa.int32(),  # of the clip in its task: 0 begins a task
        "generation": pa.int32(),
        "output": pa.string(),
        "cost_s": pa.float64(),
        "video_id": pa.string(),
    }
    | _VIDEO
    | _CLIP
)
_REPEATED = ("task_id", "output", "video_id", "uri", "version", "captured_from", "dt", "source",
             "key_fields")  # fmt: skip
"""Equal for the clips of a video or task, or of a small set: kept as dictionaries in memory."""

_SLICE_CLIPS = 4096
"""Clips turned into Python objects at a time when many tasks are asked for in order."""


def encode_chunk(sampling: str, tasks: Sequence[Task]) -> bytes:
    """The Parquet file of some tasks, in their order."""
    strangers = [task.task_id for task in tasks if task.sampling != sampling]
    if strangers:
        raise ValueError(f"task {strangers[0]} is not of sampling {sampling}")
    sizes = [len(task.clips) for task in tasks]
    clips = [clip for task in tasks for clip in task.clips]
    videos = [clip.video for clip in clips]

    def per_clip(values: Iterable[Any]) -> list[Any]:
        return [v for v, n in zip(values, sizes, strict=True) for _ in range(n)]

    columns: dict[str, Iterable[Any]] = {
        "task_id": per_clip(task.task_id for task in tasks),
        "ordinal": [ordinal for n in sizes for ordinal in range(n)],
        "generation": per_clip(task.generation for task in tasks),
        "output": per_clip(task.output for task in tasks),
        "cost_s": per_clip(task.cost_s for task in tasks),
        "video_id": [video.video_id for video in videos],
    }
    columns |= {name: list(map(attrgetter(name), videos)) for name in _VIDEO}
    columns |= {name: list(map(attrgetter(name), clips)) for name in _CLIP}
    table = pa.Table.from_pydict(columns, schema=_SCHEMA)
    return write(
        table,
        {"vidbatch.plan_version": str(SCHEMA_VERSION), "vidbatch.sampling": sampling},
    )


def decode_chunk(data: bytes, key: str) -> pa.Table:
    """The rows of a chunk file. Raises InfraError: it is not a chunk of a version known here."""
    version = read_metadata(data).get("vidbatch.plan_version", "?")
    if version != str(SCHEMA_VERSION):
        raise InfraError(
            f"{key} is a plan of version {version}, this vidbatch knows {SCHEMA_VERSION} — nothing "
            "was planned — run it with the version that wrote the output",
            kind="plan_version",
        )
    return read(data, as_dictionary=_REPEATED).replace_schema_metadata(None)


class PlanLog:
    """All tasks of one sampling rule, in the order of the log. Immutable.

    Args:
        sampling: fingerprint of the rule.
        chunks: the rows of chunk 0, 1, … as `decode_chunk` gives them.
    """

    def __init__(self, sampling: str, chunks: Sequence[pa.Table] = ()) -> None:
        self.sampling = sampling
        self._chunks = tuple(chunks)
        self._rows = pa.concat_tables(chunks) if chunks else _SCHEMA.empty_table()
        ordinals = self._rows["ordinal"].to_numpy()
        self._starts: Ints = np.append(np.flatnonzero(ordinals == 0), len(ordinals))
        """Row of the first clip of each task, and the number of rows."""

    def __len__(self) -> int:
        """Tasks, retries included."""
        return len(self._starts) - 1

    def __repr__(self) -> str:
        return f"PlanLog({self.sampling[:8]}, chunks={self.num_chunks}, tasks={len(self)})"

    @property
    def num_chunks(self) -> int:
        """Chunks read: the number of the next one."""
        return len(self._chunks)

    @property
    def num_clips(self) -> int:
        """Rows of the log: clips, counted again in each retry."""
        return len(self._rows)

    def extended(self, chunk: pa.Table) -> PlanLog:
        """This log with one more chunk at its end."""
        return PlanLog(self.sampling, [*self._chunks, chunk])

    @cached_property
    def task_ids(self) -> pa.Array:
        """(tasks,) string, in log order."""
        return self._per_task("task_id").cast(pa.string())

    @cached_property
    def costs_s(self) -> Floats:
        """(tasks,) planned core seconds, in log order."""
        return np.asarray(self._per_task("cost_s"), np.float64)

    @cached_property
    def days(self) -> pa.Array:
        """(tasks,) string, the `dt` of each task, in log order."""
        return self._per_task("dt").cast(pa.string())

    @cached_property
    def generations(self) -> Ints:
        """(tasks,) 0 for what was planned first."""
        return np.asarray(self._per_task("generation"), np.int64)

    @property
    def clip_counts(self) -> Ints:
        """(tasks,) clips of each task."""
        return np.diff(self._starts)

    def _per_task(self, column: str) -> pa.Array:
        return self._rows[column].take(pa.array(self._starts[:-1])).combine_chunks()

    def knows(self, video_ids: Sequence[str] | pa.Array) -> Bools:
        """(len(video_ids),) whether the log has that video: it is never planned again."""
        return self._holds("video_id", video_ids)

    def knows_uri(self, uris: Sequence[str]) -> Bools:
        """(len(uris),) whether the log has any version of that object."""
        return self._holds("uri", uris)

    def _holds(self, column: str, values: Sequence[str] | pa.Array) -> Bools:
        """Which values a column has. It is asked for each chunk of a plan: a set is made of the
        values asked for and of those found, never of a million that the log has."""
        wanted = pa.array(values, pa.string())
        found = [
            distinct.filter(pc.is_in(distinct, value_set=wanted))
            for distinct in map(_distinct, self._rows[column].chunks)
        ]
        held = pa.chunked_array(found, pa.string())
        return np.asarray(pc.is_in(wanted, value_set=held), np.bool_)

    def todo(
        self, output: str, done: Iterable[str], listed: Sequence[str] | pa.Array | None = None
    ) -> Ints:
        """Positions of the tasks that an output still lacks, in log order.

        Args:
            output: fingerprint; a retry belongs to the one output it names.
            done: task ids that output has committed (`Ledger.done`).
            listed: video_ids of the run's listing: tasks without any of them are left out.
                None takes every task.
        """
        if not len(self):
            return np.zeros(0, np.int64)
        of = self._per_task("output").cast(pa.string())
        wanted = pc.or_(pc.is_null(of), pc.fill_null(pc.equal(of, output), False))
        is_done = pc.is_in(self.task_ids, value_set=pa.array(done, pa.string()))
        mask = np.asarray(wanted, np.bool_) & ~np.asarray(is_done, np.bool_)
        if listed is not None:
            mask &= self._with_video(listed)
        return np.flatnonzero(mask)

    def added(self, since: int, listed: Sequence[str]) -> Ints:
        """Positions, from `since` on, of first-generation tasks with a clip of a listed video."""
        positions = np.arange(since, len(self))
        first = np.asarray(self._per_task("generation"), np.int64)[since:] == 0
        return positions[first & self._with_video(listed, since)] if len(positions) else positions

    def _with_video(self, video_ids: Sequence[str] | pa.Array, since: int = 0) -> Bools:
        """(tasks from `since` on,) whether a task has a clip of one of those videos."""
        if len(self) <= since:
            return np.zeros(0, np.bool_)
        wanted, begin = pa.array(video_ids, pa.string()), int(self._starts[since])
        ids = self._rows["video_id"].slice(begin).cast(pa.string())
        hit = pc.is_in(ids, value_set=wanted).to_numpy()
        return np.asarray(np.logical_or.reduceat(hit, self._starts[since:-1] - begin), np.bool_)

    def task(self, position: int) -> Task:
        """The task at a position of the log."""
        return next(self._tasks(position, position + 1))

    def tasks(self, positions: Iterable[int] | None = None) -> Iterator[Task]:
        """Tasks at some positions (default: all), one by one, never all in memory."""
        wanted = np.arange(len(self)) if positions is None else np.fromiter(positions, np.int64)
        start = 0
        while start < len(wanted):  # a stretch of neighbours at a time
            room = self._starts[wanted[start]] + _SLICE_CLIPS
            end = start + 1
            while (
                end < len(wanted)
                and wanted[end] == wanted[end - 1] + 1
                and self._starts[wanted[end] + 1] <= room
            ):
                end += 1
            yield from self._tasks(int(wanted[start]), int(wanted[end - 1]) + 1)
            start = end

    def _tasks(self, begin: int, end: int) -> Iterator[Task]:
        """Tasks at positions [begin, end), their clips made column by column."""
        first = int(self._starts[begin])
        rows = self._rows.slice(first, int(self._starts[end]) - first)
        columns = {name: _values(rows[name]) for name in rows.column_names}
        videos: dict[str, Video] = {}
        clips = []
        for i, video_id in enumerate(columns["video_id"]):
            video = videos.get(video_id)
            if video is None:
                video = videos[video_id] = Video(**{name: columns[name][i] for name in _VIDEO})
            clips.append(Clip(video=video, **{name: columns[name][i] for name in _CLIP}))
        for position in range(begin, end):
            at = int(self._starts[position]) - first
            yield Task(
                clips=tuple(clips[at : int(self._starts[position + 1]) - first]),
                sampling=self.sampling,
                generation=columns["generation"][at],
                output=columns["output"][at],
                cost_s=columns["cost_s"][at],
            )

    def retried(self, output: str) -> set[tuple[str, int, int]]:
        """(video_id, first_keyframe, generation) of the clips planned again for an output."""
        rows = self._rows.select(["video_id", "first_keyframe", "generation", "output"])
        again = rows.filter(pc.fill_null(pc.equal(rows["output"].cast(pa.string()), output), False))
        return {
            (r["video_id"], r["first_keyframe"], r["generation"])
            for r in again.drop_columns(["output"]).to_pylist()
        }

    def positions_of(self, task_ids: Sequence[str]) -> Ints:
        """Positions of those tasks; ids that the log does not have are left out."""
        found = pc.is_in(self.task_ids, value_set=pa.array(task_ids, pa.string()))
        return np.flatnonzero(np.asarray(found, np.bool_))


def _distinct(chunk: pa.Array) -> pa.StringArray:
    """The values of an array, each about once: a dictionary has them already."""
    if pa.types.is_dictionary(chunk.type):
        return chunk.dictionary.cast(pa.string())
    return pc.unique(chunk.cast(pa.string()))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values, by the fast way where pyarrow's own is slow (3 µs a time)."""
    if column.type == _UTC:
        times = column.cast(pa.int64()).to_pylist()
        return [None if t is None else _EPOCH + timedelta(microseconds=t) for t in times]
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    values: list[Any] = column.to_pylist()
    return values
