"""The tables of schema v1 as Arrow constants, their keys, and where their files lie.

Portable types only: string, binary, bool, int32, int64, float32, float64, timestamp(us, UTC), and
lists of float32 or string. Key columns are never null. `sample`, `model` and `dt` stand in the path
alone. A change here is a new SCHEMA_VERSION, hence a new root beside `v1/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from vidbatch.data import FRAMES, ModelSpec, Output, Sample, digest
from vidbatch.sampling import sample_name, sampling_fingerprint

SCHEMA_VERSION = 1
ROOT = f"v{SCHEMA_VERSION}"

_UTC = pa.timestamp("us", tz="UTC")
_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "time": _UTC,
    "binary": pa.binary(),
    "strings": pa.list_(pa.field("element", pa.string(), nullable=False)),
    # Not a fixed-size list: two widths under one root break Polars, pyarrow, pandas, DataFusion.
    "vector": pa.list_(pa.field("element", pa.float32(), nullable=False)),
}


def _schema(*columns: str) -> pa.Schema:
    """Columns as "name type", with "!" after the type of one that is never null."""
    fields = []
    for column in columns:
        name, kind = column.split()
        fields.append(pa.field(name, _TYPES[kind.rstrip("!")], nullable=not kind.endswith("!")))
    return pa.schema(fields)


_VIDEO_KEY = ("video_id string!", "uri string!", "source string!")
_FRAME_KEY = (*_VIDEO_KEY, "frame_index int64!", "pts int64", "time_s float64!")

SCHEMAS: dict[str, pa.Schema] = {
    "videos": _schema(
        "video_id string!", "uri string!", "modified_at time", "listed_at time",
        "captured_at time", "captured_from string", "source string!", "key_fields string",
        "version string", "size_bytes int64", "container string", "codec string",
        "width_px int32", "height_px int32", "rotation_deg int32", "time_base_numerator int64",
        "time_base_denominator int64", "fps_numerator int64", "fps_denominator int64",
        "start_s float64", "duration_s float64", "frame_count int64", "audio_codec string",
        "audio_rate_hz int32", "run string",
    ),
    "coverage": _schema(
        *_VIDEO_KEY, "start_s float64!", "end_s float64!", "start_frame int64!",
        "end_frame int64!", "generation int32!", "frames int64!", "status string!",
        "reason string", "frames_decoded int64", "decode_errors int64", "corrupt_frames int64",
        "fallback string", "device string", "run string", "committed_at time",
    ),
    "frames": _schema(*_FRAME_KEY, "covers_s float64", "is_keyframe bool", "is_corrupt bool"),
    "labels": _schema(
        *_FRAME_KEY, "rank int32!", "label string!", "label_id int32!", "score float32!",
        "detection_id int32", "of_model string",
    ),
    "embeddings": _schema(
        *_FRAME_KEY, "embedding vector!", "detection_id int32", "of_model string",
        "end_frame int64",
    ),
    "detections": _schema(
        *_FRAME_KEY, "detection_id int32!", "label string!", "label_id int32!", "score float32!",
        "x_min float32!", "y_min float32!", "x_max float32!", "y_max float32!",
    ),
    "features": _schema(*_FRAME_KEY, "feature string!", "value float32!"),
    "masks": _schema(
        *_FRAME_KEY, "label string!", "label_id int32!", "area float32!", "mask_rle binary",
        "mask_width_px int32", "mask_height_px int32",
    ),
    "windows": _schema(
        *_VIDEO_KEY, "start_s float64!", "end_s float64!", "start_frame int64!",
        "end_frame int64!", "rank int32!", "label string!", "label_id int32!", "score float32!",
    ),
    "audio": _schema(
        *_VIDEO_KEY, "start_s float64!", "end_s float64!", "kind string!", "label string!",
        "value float32!",
    ),
    "shots": _schema(
        *_VIDEO_KEY, "start_frame int64!", "end_frame int64", "start_s float64!",
        "end_s float64", "score float32",
    ),
    "tracks": _schema(
        *_FRAME_KEY, "detection_id int32!", "of_model string!", "track_id int64!", "label string",
    ),
    "failures": _schema(
        *_VIDEO_KEY, "run string", "generation int32!", "stage string", "kind string",
        "message string", "advice string", "start_s float64!", "end_s float64!",
        "attempts int32", "retryable bool", "failed_at time",
    ),
    "models": _schema(
        "fingerprint string!", "name string!", "version string", "model string!",
        "adapter string", "kind string", "dim int32", "normalised bool", "labels strings",
        "thresholds string", "weights_sha256 string", "config string", "first_run string",
    ),
    "runs": _schema(
        "run string!", "job string", "started_at time", "ended_at time", "exit_code int32",
        "videos int64", "spans_ok int64", "spans_partial int64", "spans_failed int64",
        "video_hours float64", "bytes_read int64", "frames int64", "vidbatch_version string",
        "ray_version string", "torch_version string", "av_version string",
        "ffmpeg_version string",
    ),
}  # fmt: skip
"""Every table of the main job, parents before what refers to them."""

UNIQUE_KEYS: dict[str, tuple[str, ...]] = {
    "videos": ("video_id",),
    "coverage": ("video_id", "start_s", "generation"),
    "frames": ("video_id", "frame_index"),
    "labels": ("video_id", "frame_index", "of_model", "detection_id", "rank"),
    "embeddings": ("video_id", "frame_index", "of_model", "detection_id", "end_frame"),
    "detections": ("video_id", "frame_index", "detection_id"),
    "features": ("video_id", "frame_index", "feature"),
    "masks": ("video_id", "frame_index", "label_id"),
    "windows": ("video_id", "start_frame", "end_frame", "rank"),
    "audio": ("video_id", "start_s", "kind", "label"),
    "shots": ("video_id", "start_frame"),
    "tracks": ("video_id", "frame_index", "detection_id"),
    "failures": ("video_id", "start_s", "generation"),
    "models": ("fingerprint",),
    "runs": ("run",),
}
"""Unique within a partition, over all part files; rows of a file are sorted by it, nulls first."""

PARTITIONS: dict[str, tuple[str, ...]] = {
    "videos": ("sample", "dt"),
    "frames": ("sample", "dt"),
    "models": (),
    "runs": (),
    "coverage": ("sample", "model", "dt"),
    "labels": ("sample", "model", "dt"),
    "embeddings": ("sample", "model", "dt"),
    "detections": ("sample", "model", "dt"),
    "features": ("sample", "model", "dt"),
    "masks": ("sample", "model", "dt"),
    "windows": ("sample", "model", "dt"),
    "audio": ("sample", "model", "dt"),
    "shots": ("sample", "model", "dt"),
    "tracks": ("sample", "model", "dt"),
    "failures": ("sample", "model", "dt"),
}
"""The hive levels of each table's path, outermost first."""

PARENTS_FIRST = (
    "videos", FRAMES, "detections", "labels", "embeddings", "features", "masks", "windows",
    "audio", "shots",
)  # fmt: skip
"""Result tables in the order they are put; `coverage` and `failures` follow them."""

_NOWHERE = {"sample": "none", "model": "none", "dt": "1970-01-01"}


def _key(table: str, values: dict[str, str], stem: str) -> str:
    levels = [f"{level}={values[level]}" for level in PARTITIONS[table]]
    return "/".join([ROOT, table, *levels, f"part-{stem}.parquet"])


def part_key(table: str, sampling: str, model: str | None, dt: str, task_id: str) -> str:
    """The key of a task's part file below the output's root: one name for all attempts.

    Args:
        sampling: `sampling_partition` of the rule.
        model: `Output.partition`; not used by `videos` and `frames`, whose path has no model.
    """
    if task_id == "empty":
        raise ValueError("no task is called 'empty'")
    return _key(table, {"sample": sampling, "model": model or FRAMES, "dt": dt}, task_id)


def record_key(table: str, name: str) -> str:
    """The key of one row of `models` (name: its fingerprint) or `runs` (name: the run)."""
    return _key(table, {}, name)


def empty_part_key(table: str) -> str:
    """Where the table's file without rows lies, so that a query over nothing gives no rows.

    It must match the table's glob level by level and must not spoil what engines guess from
    paths: `none` is no number, and 1970-01-01 is a date, as every other value of dt is (a word
    there would turn the whole column into text). Without rows, neither value ever shows.
    """
    return _key(table, _NOWHERE, "empty")


def sampling_partition(sample: Sample) -> str:
    """The value of `sample=`: the rule's name and 8 hex digits of its fingerprint."""
    return f"{sample_name(sample)}.{sampling_fingerprint(sample)[:8]}"


def output_of(spec: ModelSpec | None, sampling_fp: str) -> Output:
    """The output of a model under a sampling rule, or with None that of the frames themselves.

    A different model fingerprint or a different grid is a different output; each commits and is
    read for itself.
    """
    if spec is None:
        fingerprint = digest([FRAMES, SCHEMA_VERSION, sampling_fp])
        return Output(name=FRAMES, partition=FRAMES, fingerprint=fingerprint)
    if not spec.fingerprint:
        raise ValueError(f"model {spec.name} has no fingerprint")
    fingerprint = digest([spec.fingerprint, sampling_fp])
    crop, of_model = spec.crop, None
    if crop is not None:
        of_model = _partition(crop.on, crop.version, digest([crop.parent, sampling_fp]))
    return Output(
        name=spec.name,
        partition=_partition(spec.name, spec.version, fingerprint),
        fingerprint=fingerprint,
        spec=spec,
        of_model=of_model,
    )


def _partition(name: str, version: str, fingerprint: str) -> str:
    return f"{name}-{version}.{fingerprint[:8]}"


def result_tables(output: Output) -> tuple[str, ...]:
    """The tables an output fills besides `coverage` and `failures`, parents first."""
    gives: Sequence[str] = ("videos", FRAMES) if output.spec is None else output.spec.gives
    return tuple(name for name in PARENTS_FIRST if name in gives)
