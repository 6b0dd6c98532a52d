"""Rows of a task as Arrow tables and Parquet files: keys, ranks, layout, engines, redaction."""

from __future__ import annotations

import doctest
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from datafusion import SessionContext

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
from vidbatch.errors import InfraError, ModelError
from vidbatch.tables import (
    PARTITIONS,
    SCHEMAS,
    UNIQUE_KEYS,
    OutputRows,
    check_part,
    empty_part_key,
    encode,
    file_metadata,
    keys_ascend,
    outcomes,
    outcomes_from_json,
    outcomes_to_json,
    part_key,
    read,
    read_footer,
    record_key,
    redact,
    sort_rows,
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
        pa.timestamp("us", tz="UTC"),
    }  # fmt: skip
    reserved = {"at", "end", "window", "order", "group", "start", "timestamp"}
    for name, schema in SCHEMAS.items():
        for field in schema:
            kind = field.type.value_type if pa.types.is_list(field.type) else field.type
            assert kind in portable, (name, field)
            assert field.name not in reserved
            assert field.name not in PARTITIONS[name]
        optional = {"of_model", "detection_id", "end_frame"} if name != "detections" else set()
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
          "features": np.ones((3, 2), np.float32)}, "3 answers for 2 frames"),
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


def test_a_file_is_laid_out_for_every_engine() -> None:
    task, outcomes, tables = scene_tables()
    for name, table in tables.items():
        data = encoded(name, table, task, outcomes)
        meta = pq.read_metadata(io.BytesIO(data))
        assert b"ARROW:schema" not in meta.metadata
        group = meta.row_group(0)
        assert group.sorting_columns
        for i in range(group.num_columns):
            column = group.column(i)
            assert column.compression == "ZSTD"
            vector = column.path_in_schema == "embedding.list.element"
            assert column.is_stats_set != vector
            assert column.has_dictionary_page == (column.physical_type == "BYTE_ARRAY")
            assert column.has_column_index != vector
            assert column.has_offset_index
        footer = read_footer(data)
        assert (footer.table, footer.task, footer.rows) == (name, task.task_id, len(table))
        assert footer.fingerprint == SCENE.fingerprint
        assert footer.outcomes_of(task) == tuple(outcomes)
        assert read(data).replace_schema_metadata(None).equals(table)
        check_part(name, data, task_id=task.task_id, rows=len(table))


def test_vectors_lie_in_row_groups_of_4_to_16_mb() -> None:
    (clip,) = make_clips(make_video(), 7000)
    output = make_output(make_spec("clip", ("embeddings",), dim=1024))
    task = make_task(clip)
    rows = OutputRows(output, task)
    vectors = np.zeros((500, 1024), np.float32)
    for start in range(0, 7000, 500):
        rows.add(clip, make_frames(start, start + 500), Predictions(n=500, embeddings=vectors))
    outcome = make_outcome(clip, 7000)
    table = finish(rows, [outcome])["embeddings"]
    assert table["embedding"].num_chunks == 14  # never joined: no second copy of the vectors
    meta = pq.read_metadata(io.BytesIO(encoded("embeddings", table, task, [outcome], output)))
    sizes = [meta.row_group(i).num_rows * 4096 / 2**20 for i in range(meta.num_row_groups)]
    assert len(sizes) == 4
    assert all(4 <= size <= 16 for size in sizes[:-1])


def test_a_wrong_file_does_not_pass_its_check() -> None:
    task, outcomes, tables = scene_tables()
    table, task_id = tables["labels"], task.task_id
    data = encoded("labels", table, task, outcomes)
    with pytest.raises(InfraError, match="failed its check"):
        check_part("labels", data, task_id="another", rows=len(table))
    with pytest.raises(InfraError, match="failed its check"):
        check_part("labels", data, task_id=task_id, rows=len(table) + 1)
    with pytest.raises(InfraError, match="failed its check"):
        check_part("features", data, task_id=task_id, rows=len(table))
    twice = pa.concat_tables([table, table.slice(19)])
    with pytest.raises(InfraError, match="not unique and ascending"):
        check_part("labels", encoded("labels", twice, task, outcomes), task_id=task_id, rows=21)
    turned = table.take(list(range(19, -1, -1)))
    with pytest.raises(InfraError, match="not unique and ascending"):
        check_part("labels", encoded("labels", turned, task, outcomes), task_id=task_id, rows=20)
    with pytest.raises(InfraError, match="no whole Parquet file"):
        check_part("labels", data[:-20], task_id=task_id, rows=20)
    with pytest.raises(ValueError, match="another schema"):
        encode("features", table, {})
    stranger = io.BytesIO()
    pq.write_table(table, stranger)
    with pytest.raises(InfraError, match="not of vidbatch"):
        read_footer(stranger.getvalue())


def test_nulls_in_keys_sort_first_and_count_as_equal() -> None:
    key = ("video_id", "frame_index", "of_model", "detection_id", "end_frame")
    rows = [("a", 0, None, None, None), ("a", 0, None, 1, None), ("a", 0, "faces", 0, None)]

    def table(rows: list[tuple[Any, ...]]) -> pa.Table:
        schema = SCHEMAS["embeddings"]
        return pa.Table.from_pylist(
            [dict(zip(key, row, strict=True)) for row in rows],
            schema=pa.schema([schema.field(name) for name in key]),
        )

    assert keys_ascend(table(rows), key)
    assert not keys_ascend(table([rows[0], rows[0]]), key)
    assert not keys_ascend(table(rows[::-1]), key)
    assert sort_rows("embeddings", table(rows[::-1])).equals(table(rows))


def test_outcomes_survive_json() -> None:
    clips = make_clips(make_video(), 6, 2)
    task = make_task(*clips)
    told = [
        make_outcome(clips[0], 2, fallback="open GOP"),
        make_outcome(clips[1], 2, "failed", retryable=True, attempts=3),
        make_outcome(clips[2], 2, "partial"),
    ]
    assert outcomes_from_json(outcomes_to_json(told), task) == tuple(told)
    assert outcomes_from_json(outcomes_to_json(told[::-1]), task) == tuple(told)
    assert json.loads(outcomes_to_json(told))["device"] == "cpu"  # the same for all: once
    with pytest.raises(ValueError, match="not those of the clips"):
        outcomes_from_json(outcomes_to_json(told), make_task(*clips[:2]))
    with pytest.raises(ValueError, match="not the outcomes"):
        outcomes_from_json("{}", task)
    many = make_clips(make_video("long"), 1000, 2)
    text = outcomes_to_json([make_outcome(clip, 2) for clip in many])
    assert len(text) < 80 * len(many)  # stands in each file of the task


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain s3://bucket/a b.mp4 is cut", "plain s3://bucket/a b.mp4 is cut"),
        ("two\nlines\tand\x00nul", "two lines and nul"),
        ("GET https://h/k?X-Amz-Signature=AKIAABCDEFGH&x=1 403", "GET https://h/k?*** 403"),
        ("http://user:pa55@proxy:3128 refused", "http://***@proxy:3128 refused"),
        ("key AKIAABCDEFGHIJKLMNOP is unknown", "key *** is unknown"),
        ("aws_secret_access_key=abc/def+ghi", "aws_secret_access_key=***"),
        ('{"password": "hunter2", "n": 1}', '{"password": ***, "n": 1}'),
        ("Authorization: Bearer abcdefghijkl.mno", "Authorization: Bearer ***"),
        ("sent hf_abcdefghijklmnopqrstuv", "sent ***"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY no", "*** no"),
        ("da39a3ee5e6b4b0d3255bfef95601890afd80709", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
    ],
)  # fmt: skip
def test_secrets_do_not_reach_a_table(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_messages_are_short() -> None:
    assert len(redact("x" * 2_000_000)) == 500
    assert redact("x" * 500) == "x" * 500
    assert doctest.testmod(outcomes).failed == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder with one part of every per-task table and the empty file of every table."""
    root = tmp_path_factory.mktemp("output")
    counts = dict.fromkeys(SCHEMAS, 0)

    def put(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for name, schema in SCHEMAS.items():
        put(empty_part_key(name), encode(name, schema.empty_table(), file_metadata(name)))
    task, outcomes, tables = scene_tables()
    rows = OutputRows(make_output(), task)
    for clip, n in zip(task.clips, (3, 3, 4), strict=True):
        rows.add(clip, make_frames(clip.start_frame, clip.start_frame + n), None)
    others = finish(rows, outcomes, {task.clips[0].video.video_id: make_info()})
    for output, found in ((SCENE, tables), (make_output(), others)):
        for name, table in found.items():
            data = encoded(name, table, task, outcomes, output)
            put(part_key(name, PARTITION, output.partition, task.dt, task.task_id), data)
            counts[name] += len(table)
    return root, counts


def glob_of(root: Path, table: str) -> str:
    levels = [f"{level}=*" for level in PARTITIONS[table]]
    return "/".join([str(root), "v1", table, *levels, "*.parquet"])


@pytest.mark.parametrize("table", sorted(SCHEMAS))
def test_engines_read_every_table(table: str, written: tuple[Path, dict[str, int]]) -> None:
    root, counts = written
    pattern, rows = glob_of(root, table), counts[table]
    hive = sorted({"sample", "model", "dt"} & set(PARTITIONS[table]))

    with duckdb.connect() as base:
        found = base.sql(f"FROM read_parquet('{pattern}', hive_partitioning = true)")
        assert set(found.columns) == {*SCHEMAS[table].names, *hive}
        assert len(found.to_arrow_table()) == rows
        if "dt" in hive:
            kind = base.execute(f"SELECT any_value(typeof(dt)) FROM '{pattern}'").fetchone()
            assert kind in (("DATE",), (None,))

    frame = pl.scan_parquet(pattern, hive_partitioning=True).collect()
    assert frame.height == rows
    if table == "embeddings":
        assert frame.schema["embedding"] == pl.List(pl.Float32)

    dataset = ds.dataset(str(root / "v1" / table), partitioning="hive")
    assert dataset.count_rows() == rows
    assert len(pd.read_parquet(str(root / "v1" / table))) == rows

    context = SessionContext()
    context.register_parquet(
        "t",
        str(root / "v1" / table),
        table_partition_cols=[(level, pa.string()) for level in PARTITIONS[table]],
    )
    assert context.sql("SELECT count(*) AS n FROM t").to_pydict()["n"] == [rows]


def test_sampling_and_output_names_never_look_numeric() -> None:
    assert f"fps1.{SAMPLING[:8]}" == PARTITION
    for value in (PARTITION, SCENE.partition, "none", "1970-01-01"):
        with pytest.raises(ValueError, match="could not convert"):
            float(value)
