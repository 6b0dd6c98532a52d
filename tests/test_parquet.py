"""Part files: layout, footers, checks, what engines make of them, and what messages may say."""

from __future__ import annotations

import doctest
import io
import json
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
    PARTITION,
    make_clips,
    make_frames,
    make_info,
    make_outcome,
    make_output,
    make_spec,
    make_task,
    make_video,
)
from tests.test_tables import SCENE, encoded, finish, scene_tables
from vidbatch.data import Predictions
from vidbatch.errors import InfraError
from vidbatch.tables import (
    PARTITIONS,
    SCHEMAS,
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
    redact,
    sort_rows,
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
