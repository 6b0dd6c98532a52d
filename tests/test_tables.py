"""Schemas and paths, and the rows of a task as Arrow tables: keys, ranks, what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.made_rows import (
    NOW,
    PARTITION,
    SAMPLING,
    VERSIONS,
    make_clips,
    make_frames,
    make_info,
    make_outcome,
    make_output,
    make_predictions,
    make_spec,
    make_task,
    make_video,
)
from vidbatch.data import BoxRows, LabelRows, Outcome, Output, Predictions, Task
from vidbatch.errors import ModelError
from vidbatch.tables import (
    PARTITIONS,
    SCHEMAS,
    UNIQUE_KEYS,
    OutputRows,
    encode,
    file_metadata,
    keys_ascend,
    part_key,
    record_key,
)

SCENE = make_output(make_spec())


def finish(
    rows: OutputRows, outcomes: list[Outcome], infos: Mapping[str, Any] | None = None
) -> dict[str, pa.Table]:
    return rows.finish(outcomes, infos or {}, run="r1", now=NOW)


def scene_tables(seed: int = 0) -> tuple[Task, list[Outcome], dict[str, pa.Table]]:
    """Three clips of two videos, ten frames; the clips of `b` come first in the task."""
    a, b = make_video("a"), make_video("b")
    clips = [*make_clips(b, 6, 3), *make_clips(a, 4)]
    task = make_task(*clips)
    rows, rng = OutputRows(SCENE, task), np.random.default_rng(seed)
    outcomes = []
    for clip, (first, end) in zip(clips, ((0, 3), (3, 6), (0, 4)), strict=True):
        for start in range(first, end, 2):  # in chunks of two frames
            stop = min(start + 2, end)
            rows.add(clip, make_frames(start, stop), make_predictions(stop - start, rng))
        outcomes.append(make_outcome(clip, end - first))
    return task, outcomes, finish(rows, outcomes)


def encoded(
    name: str, table: pa.Table, task: Task, outcomes: list[Outcome], output: Output = SCENE
) -> bytes:
    metadata = file_metadata(
        name, output=output, sampling=PARTITION, task=task, outcomes=outcomes, versions=VERSIONS
    )
    return encode(name, table, metadata)


def test_schemas_hold_portable_types_and_keys_without_nulls() -> None:
    portable = {
        pa.string(), pa.bool_(), pa.int32(), pa.int64(), pa.float32(), pa.float64(),
        pa.timestamp("us", tz="UTC"), pa.binary(),
    }  # fmt: skip
    reserved = {"at", "end", "window", "order", "group", "start", "timestamp"}
    for name, schema in SCHEMAS.items():
        for field in schema:
            kind = field.type.value_type if pa.types.is_list(field.type) else field.type
            assert kind in portable, (name, field)
            assert field.name not in reserved
            assert field.name not in PARTITIONS[name]
        optional = (
            {"of_model", "detection_id", "end_frame"} if name in ("labels", "embeddings") else set()
        )
        for column in set(UNIQUE_KEYS[name]) - optional:
            assert not schema.field(column).nullable, (name, column)


def test_paths_carry_the_partition_values() -> None:
    key = part_key("labels", "fps1.12345678", "scene-v1.abcdef01", "2026-03-01", "t")
    assert key == (
        "v1/labels/sample=fps1.12345678/model=scene-v1.abcdef01/dt=2026-03-01/part-t.parquet"
    )
    assert part_key("frames", "s.1", "frames", "2026-03-01", "t") == (
        "v1/frames/sample=s.1/dt=2026-03-01/part-t.parquet"
    )
    assert part_key("failures", "s.1", None, "2026-03-01", "t").split("/")[3] == "model=frames"
    assert record_key("runs", "20260302") == "v1/runs/part-20260302.parquet"
    with pytest.raises(ValueError, match="empty"):
        part_key("frames", "s.1", None, "2026-03-01", "empty")


def test_an_output_changes_with_the_model_and_with_the_grid() -> None:
    one = make_output(make_spec("scene"))
    assert one.partition == f"scene-v1.{one.fingerprint[:8]}"
    assert make_output(make_spec("scene", fingerprint="f" * 64)).fingerprint != one.fingerprint
    other_grid = outcomes_output("0" * 64)
    assert other_grid.fingerprint != one.fingerprint
    assert make_output().partition == "frames"
    with pytest.raises(ValueError, match="no fingerprint"):
        make_output(make_spec(fingerprint=""))


def outcomes_output(sampling: str) -> Output:
    from vidbatch.tables import output_of

    return output_of(make_spec("scene"), sampling)


def test_rows_of_a_model_are_sorted_whole_and_unique() -> None:
    task, _, tables = scene_tables()
    assert list(tables) == ["detections", "labels", "embeddings", "features", "coverage"]
    for name, table in tables.items():
        assert table.schema.equals(SCHEMAS[name])
        assert keys_ascend(table, UNIQUE_KEYS[name])
    videos = [c.video for c in task.clips]
    assert set(tables["labels"]["video_id"].to_pylist()) == {v.video_id for v in videos}
    by_id = {v.video_id: v.uri for v in videos}
    for row in tables["embeddings"].to_pylist():
        assert row["uri"] == by_id[row["video_id"]]
        assert row["time_s"] == row["frame_index"]
        assert row["pts"] == row["frame_index"] * 90_000
        assert len(row["embedding"]) == 4
        assert row["detection_id"] is row["of_model"] is row["end_frame"] is None
    assert len(tables["embeddings"]) == 10
    assert len(tables["features"]) == len(tables["labels"]) == 20


def test_rank_and_detection_id_follow_the_score() -> None:
    (clip,) = make_clips(make_video(), 2)
    rows = OutputRows(SCENE, make_task(clip))
    score = np.array([0.2, 0.9, 0.9, 0.5], np.float32)
    item, label_id = np.array([1, 1, 1, 0]), np.array([1, 2, 0, 1])
    corners = np.tile(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), (4, 1))
    rows.add(
        clip,
        make_frames(0, 2),
        Predictions(
            n=2,
            embeddings=np.eye(2, 4, dtype=np.float32),
            features=np.array([[1, np.nan], [np.nan, np.nan]], np.float32),
            labels=LabelRows(item=item, label_id=label_id, score=score),
            boxes=BoxRows(item=item, label_id=label_id, score=score, xyxy=corners),
        ),
    )
    tables = finish(rows, [make_outcome(clip, 2)])
    found = tables["labels"].select(["frame_index", "rank", "label", "label_id"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (0, 1, "car", 1),
        (1, 1, "bike", 0),  # equal scores: the smaller label_id first
        (1, 2, "dog", 2),
        (1, 3, "car", 1),
    ]
    boxes = tables["detections"].to_pylist()
    assert [(r["frame_index"], r["detection_id"], r["label_id"]) for r in boxes] == [
        (0, 0, 1), (1, 0, 0), (1, 1, 2), (1, 2, 1),
    ]  # fmt: skip
    assert boxes[0]["x_min"] == pytest.approx(0.1)
    assert boxes[0]["y_max"] == pytest.approx(0.4)
    features = tables["features"].select(["frame_index", "feature", "value"]).to_pylist()
    assert features == [{"frame_index": 0, "feature": "sharpness", "value": 1.0}]  # NaN: no row


@pytest.mark.parametrize("items", ["frames", "rows"])
def test_a_context_frame_is_no_row(items: str) -> None:
    (clip,) = make_clips(make_video(), 5)
    rows = OutputRows(SCENE, make_task(clip))
    frames = make_frames(2, 5, context=True)
    rng = np.random.default_rng(1)
    found = make_predictions(len(frames) if items == "frames" else frames.num_rows, rng)
    rows.add(clip, frames, found)
    tables = finish(rows, [make_outcome(clip, 3)])
    for name in ("labels", "embeddings", "features"):
        assert set(tables[name]["frame_index"].to_pylist()) == {2, 3, 4}
    first = found.n - 3
    vectors = np.stack(tables["embeddings"]["embedding"].to_pylist())
    assert np.array_equal(vectors, found.embeddings[first:])
    wanted = {
        (int(i) - first + 2, float(s))
        for i, s in zip(found.boxes.item, found.boxes.score, strict=True)
        if i >= first
    }
    boxes = tables["detections"].select(["frame_index", "score"]).to_pylist()
    assert {tuple(row.values()) for row in boxes} == wanted


def test_a_chunk_is_copied_not_held() -> None:
    (clip,) = make_clips(make_video(), 2)
    rows = OutputRows(SCENE, make_task(clip))
    found = make_predictions(2, np.random.default_rng(2))
    kept = found.embeddings.copy()
    rows.add(clip, make_frames(0, 2), found)
    found.embeddings[:] = 0
    vectors = finish(rows, [make_outcome(clip, 2)])["embeddings"]["embedding"].to_pylist()
    assert np.array_equal(np.stack(vectors), kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 3, "embeddings": np.ones((3, 4), np.float32),
          "features": np.ones((3, 2), np.float32)}, "3 answers for 2 rows"),
        ({"embeddings": np.ones((2, 5), np.float32)}, r"embeddings \(2, 5\), not \(2, 4\)"),
        ({"embeddings": np.full((2, 4), np.nan, np.float32)}, "embedding that is not finite"),
        ({"features": np.ones((2, 1), np.float32)}, r"features \(2, 1\), not \(2, 2\)"),
        ({"features": np.full((2, 2), np.inf, np.float32)}, "infinite feature"),
        ({"labels": LabelRows(item=np.array([0]), label_id=np.array([3]),
                              score=np.ones(1, np.float32))}, "label_id outside 0..2"),
        ({"labels": LabelRows(item=np.array([0]), label_id=np.array([1]),
                              score=np.full(1, np.nan, np.float32))}, "score that is not finite"),
    ],
)  # fmt: skip
def test_what_the_spec_does_not_allow_is_a_model_error(
    changes: dict[str, Any], message: str
) -> None:
    (clip,) = make_clips(make_video(), 2)
    rows = OutputRows(SCENE, make_task(clip))
    facts: dict[str, Any] = {
        "n": 2,
        "embeddings": np.ones((2, 4), np.float32),
        "features": np.ones((2, 2), np.float32),
    }
    with pytest.raises(ModelError, match=message):
        rows.add(clip, make_frames(0, 2), Predictions(**(facts | changes)))


def test_frames_and_videos_of_generation_0() -> None:
    a, b = make_video("a"), make_video("b")
    first, second = make_clips(a, 4, 2)
    (whole,) = make_clips(b, 2)
    task = make_task(first, whole)
    rows = OutputRows(make_output(), task)
    rows.add(first, make_frames(0, 2, has_pts=False), None)
    tables = finish(
        rows,
        [make_outcome(first, 2), make_outcome(whole, 2, "failed", retryable=True)],
        {a.video_id: make_info(), b.video_id: None},
    )
    assert list(tables) == ["videos", "frames", "coverage", "failures"]
    videos = {row["video_id"]: row for row in tables["videos"].to_pylist()}
    assert videos[a.video_id]["fps_denominator"] == 1001
    assert videos[a.video_id]["start_s"] == 0.5
    assert videos[a.video_id]["captured_at"] is None
    assert videos[b.video_id]["codec"] is None
    assert videos[b.video_id]["size_bytes"] == 1000
    assert videos[b.video_id]["run"] == "r1"
    assert tables["frames"]["pts"].null_count == 2
    assert tables["frames"]["covers_s"].to_pylist() == [1.0, 1.0]

    later = OutputRows(make_output(), make_task(second))
    later.add(second, make_frames(2, 4), None)
    assert "videos" not in finish(later, [make_outcome(second, 2)], {a.video_id: make_info()})

    again = OutputRows(make_output(), make_task(whole, generation=1, output="f" * 64))
    again.add(whole, make_frames(0, 2), None)
    assert "videos" not in finish(again, [make_outcome(whole, 2)], {b.video_id: make_info()})


def test_failed_and_dropped_clips_leave_no_row() -> None:
    clips = make_clips(make_video(), 6, 2)
    rows = OutputRows(make_output(), make_task(*clips))
    for clip in clips:
        rows.add(clip, make_frames(clip.start_frame, clip.start_frame + 2), None)
    rows.drop(clips[1])
    rows.add(clips[1], make_frames(2, 3), None)  # decoded again, cut short this time
    outcomes = [
        make_outcome(clips[0], 2, "failed", retryable=True),
        make_outcome(clips[1], 1, "partial"),
        make_outcome(clips[2], 2),
    ]
    tables = finish(rows, outcomes)
    assert tables["frames"]["frame_index"].to_pylist() == [2, 4, 5]
    coverage = tables["coverage"].to_pylist()
    assert [r["status"] for r in coverage] == ["failed", "partial", "ok"]
    assert [r["frames"] for r in coverage] == [0, 1, 2]
    assert [r["start_s"] for r in coverage] == [0.0, 2.0, 4.0]
    failures = tables["failures"].to_pylist()
    assert [(r["start_s"], r["kind"], r["retryable"]) for r in failures] == [
        (0.0, "truncated", True),
        (2.0, "truncated", False),
    ]
    assert failures[0]["message"] == "it broke"
    assert failures[0]["failed_at"] == NOW


def test_outcomes_must_fit_the_task_and_the_rows() -> None:
    one, two = make_clips(make_video(), 4, 2)
    rows = OutputRows(make_output(), make_task(one, two))
    rows.add(one, make_frames(0, 2), None)
    with pytest.raises(ValueError, match="not one outcome for each"):
        finish(rows, [make_outcome(one, 2)])
    with pytest.raises(ValueError, match="0 frames came as rows, its outcome counts 2"):
        finish(rows, [make_outcome(one, 2), make_outcome(two, 2)])
    with pytest.raises(ValueError, match="ends at inf"):
        finish(
            rows,
            [make_outcome(one, 2), make_outcome(two, 2, "failed", end_s=float("inf"))],
        )


def test_sampling_and_output_names_never_look_numeric() -> None:
    assert f"fps1.{SAMPLING[:8]}" == PARTITION
    for value in (PARTITION, SCENE.partition, "none", "1970-01-01"):
        with pytest.raises(ValueError, match="could not convert"):
            float(value)
