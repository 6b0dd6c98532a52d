"""Every engine that analysts use reads every table by its glob: rows, types, values, hive keys."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.engine_readers import READERS, STRING, Facts, plain, truth
from vidbatch.query.views import table_glob
from vidbatch.tables import (
    PARTITIONS,
    SCHEMAS,
    UNIQUE_KEYS,
    empty_part_key,
    encode,
    file_metadata,
)

TABLES = tuple(SCHEMAS)
READ_WITH_SPARK = Path(__file__).parent / "engines_env" / "read_with_spark.py"


NAMES: dict[str, dict[str, str]] = {
    "duckdb": {
        "string": "VARCHAR", "bool": "BOOLEAN", "int32": "INTEGER", "int64": "BIGINT",
        "float": "FLOAT", "double": "DOUBLE", "timestamp[us, tz=UTC]": "TIMESTAMP WITH TIME ZONE",
        "vector": "FLOAT[]", "strings": "VARCHAR[]", "date32[day]": "DATE", "binary": "BLOB",
    },
    "polars": {
        "string": "String", "bool": "Boolean", "int32": "Int32", "int64": "Int64",
        "float": "Float32", "double": "Float64",
        "timestamp[us, tz=UTC]": "Datetime(time_unit='us', time_zone='UTC')",
        "vector": "List(Float32)", "strings": "List(String)", "date32[day]": "Date",
        "binary": "Binary",
    },
    "spark": {
        "string": "string", "bool": "boolean", "int32": "int", "int64": "bigint",
        "float": "float", "double": "double", "timestamp[us, tz=UTC]": "timestamp",
        "vector": "array<float>", "strings": "array<string>", "date32[day]": "date",
        "binary": "binary",
    },
}  # fmt: skip
"""Engine → Arrow type → what the engine calls it."""


def expected_types(name: str, engine: str) -> dict[str, str]:
    """Every column of a table and its partition levels, as an engine should type them."""
    kinds = {f.name: _kind(f.type) for f in SCHEMAS[name]}
    kinds |= {k: "date32[day]" if k == "dt" else "string" for k in PARTITIONS[name]}
    return {column: NAMES[engine][kind] for column, kind in kinds.items()}


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return "vector" if pa.types.is_floating(kind.value_type) else "strings"
    return str(kind)


def agree(found: Facts, expected: Facts) -> None:
    """Rows, counts and figures of every column."""
    assert found.rows == expected.rows
    assert found.counts == expected.counts
    assert found.values.keys() == expected.values.keys()
    for column, value in expected.values.items():
        if isinstance(value, str) or value is None or found.values[column] is None:
            assert found.values[column] == value, column
        else:
            assert math.isclose(found.values[column], value, rel_tol=1e-9), column


def some(field: pa.Field, n: int) -> pa.Array:
    """A value in every second row, or in every row of a column that is never null."""
    if pa.types.is_list(field.type) or pa.types.is_timestamp(field.type):
        return pa.nulls(n, field.type)
    values: dict[str, Any] = {"string": "x", "bool": True, "binary": b"rle"}
    value = values.get(str(field.type), 3)
    return pa.array([None if field.nullable and i % 2 else value for i in range(n)], field.type)


def put_large(root: Path, table: str, n: int, columns: dict[str, pa.Array]) -> None:
    """A file of n rows, as a long task leaves it: several pages and row groups."""
    schema, (sample, *_) = SCHEMAS[table], (p.name for p in (root / "v1" / "frames").glob("s*=f*"))
    filled = {f.name: columns.get(f.name, some(f, n)) for f in schema}
    filled |= {k: pa.array([v] * n, STRING) for k, v in (("uri", "s3://a/b"), ("source", "c"))}
    filled |= {"video_id": pa.array(["a" * 20] * n)}
    filled |= {k: pa.array(np.arange(n)) for k in ("frame_index", "start_frame")}
    filled |= {k: pa.array(np.arange(n) / 25) for k in ("time_s", "start_s")}
    rows = pa.Table.from_arrays([filled[c] for c in schema.names], schema=schema)
    model = "model=large-v1.00000000" if "model" in PARTITIONS[table] else ""
    path = root / "v1" / table / sample / model / "dt=2026-03-04" / "part-large.parquet"
    path.parent.mkdir(parents=True)
    metadata = file_metadata(table, sampling=sample.removeprefix("sample="))
    path.write_bytes(encode(table, rows, metadata))


@pytest.fixture(scope="module")
def root(made_output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made output with two large files."""
    root = tmp_path_factory.mktemp("engines") / "tables"
    shutil.copytree(made_output, root)
    n, dim = 12_000, 300
    flat = pa.array(np.random.default_rng(0).normal(size=n * dim).astype(np.float32))
    kind = SCHEMAS["embeddings"].field("embedding").type
    offsets = np.arange(n + 1, dtype=np.int32) * np.int32(dim)
    vectors = pa.ListArray.from_arrays(offsets, flat, type=kind)
    put_large(root, "embeddings", n, {"embedding": vectors})
    put_large(root, "frames", 200_000, {})
    for table in ("masks", "windows", "audio", "shots", "tracks"):  # no model of the made output's
        put_large(root, table, 3_000, {})
    return root


@pytest.fixture(scope="module")
def truths(root: Path) -> dict[str, Facts]:
    return {name: truth(root, name) for name in TABLES}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("engine", READERS)
def test_an_engine_reads_a_table(
    engine: str, name: str, root: Path, truths: dict[str, Facts]
) -> None:
    found = READERS[engine](root, name)
    assert truths[name].rows
    agree(found, truths[name])
    if engine in NAMES:
        assert found.types == expected_types(name, engine)
    elif engine == "pandas":
        for column, kind in found.types.items():
            whole = found.counts[column] == found.rows and column not in PARTITIONS[name]
            if whole and found.rows and column in SCHEMAS[name].names:
                assert kind == _pandas_type(SCHEMAS[name].field(column).type), column
    else:
        dates = {"dt": pa.date32()} if engine == "datafusion" else {}
        for column, kind in found.types.items():
            in_file = SCHEMAS[name].names
            wanted = SCHEMAS[name].field(column).type if column in in_file else STRING
            assert plain(kind) == plain(dates.get(column, wanted)), column


def _pandas_type(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "datetime64[us, UTC]"
    if pa.types.is_string(kind):
        return "str"
    return "object" if pa.types.is_list(kind) else str(kind.to_pandas_dtype()().dtype)


@pytest.mark.parametrize("engine", READERS)
def test_an_output_without_rows_reads_as_tables_without_rows(engine: str, tmp_path: Path) -> None:
    for name, schema in SCHEMAS.items():
        path = tmp_path / empty_part_key(name)
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(name, schema.empty_table(), file_metadata(name)))
    for name, schema in SCHEMAS.items():
        found = READERS[engine](tmp_path, name)
        assert found.rows == 0
        assert set(found.types) == {*schema.names, *PARTITIONS[name]}
        if engine in NAMES:
            assert found.types == expected_types(name, engine)


def test_partition_values_are_names_and_dates(root: Path) -> None:
    """What looks numeric becomes a number in some engine."""
    for name in TABLES:
        for path in root.glob(table_glob(name)):
            for part in path.relative_to(root).parts[2:-1]:
                level, _, value = part.partition("=")
                if level == "dt":
                    date.fromisoformat(value)
                else:
                    assert value[0].isalpha(), part
                    with pytest.raises(ValueError, match="could not convert"):
                        float(value)


def test_nothing_but_table_files_lies_under_v1(root: Path) -> None:
    globbed = {p for name in TABLES for p in root.glob(table_glob(name))}
    assert {p for p in (root / "v1").rglob("*") if p.is_file()} == globbed


@pytest.mark.parametrize("name", TABLES)
def test_the_layout_of_every_file(name: str, root: Path) -> None:
    schema = SCHEMAS[name]
    vectors = {f.name for f in schema if pa.types.is_list(f.type)}
    strings = {f.name for f in schema if pa.types.is_string(f.type)}
    blobs = {f.name for f in schema if pa.types.is_binary(f.type)}
    for path in root.glob(table_glob(name)):
        file = pq.ParquetFile(path)
        said = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
        assert said["vidbatch.schema_version"] == "1" and said["vidbatch.table"] == name
        assert "ARROW:schema" not in said, "the Arrow hint breaks other readers"
        levels = dict(p.split("=") for p in path.relative_to(root).parts[2:-1])
        if not file.metadata.num_rows:
            continue
        assert said["vidbatch.sampling"] == levels.get("sample", "")
        group = file.metadata.row_group(0)
        assert [schema.names[c.column_index] for c in group.sorting_columns] == list(
            UNIQUE_KEYS[name][:2]
        )
        for i in range(group.num_columns):
            column = group.column(i)
            top = column.path_in_schema.partition(".")[0]
            encodings = set(column.encodings)
            assert column.compression == "ZSTD"
            assert column.has_offset_index
            if top in vectors:
                assert encodings <= {"PLAIN", "RLE"} or name == "models", column.path_in_schema
            elif top in strings:
                assert encodings & {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}, top
            else:
                assert not encodings & {"RLE_DICTIONARY", "PLAIN_DICTIONARY"}, top
            assert column.is_stats_set == (top not in vectors | blobs), top
        key = file.read(columns=list(UNIQUE_KEYS[name])).to_pylist()
        rows = [tuple((v is not None, v) for v in row.values()) for row in key]
        assert rows == sorted(rows) and len(set(rows)) == len(rows)


def test_row_groups_of_large_files(root: Path) -> None:
    """Vectors: 4 to 16 MB each, so that one search worker holds little; scalars: 100,000 rows."""
    (vectors,) = (root / "v1" / "embeddings").rglob("part-large.parquet")
    metadata = pq.ParquetFile(vectors).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    position = SCHEMAS["embeddings"].get_field_index("embedding")
    sizes = [g.column(position).total_uncompressed_size for g in groups]
    assert len(groups) > 1 and all(4e6 <= size <= 16 * 2**20 for size in sizes[:-1])
    assert set(groups[0].column(position).encodings) <= {"PLAIN", "RLE"}
    (scalars,) = (root / "v1" / "frames").rglob("part-large.parquet")
    metadata = pq.ParquetFile(scalars).metadata
    counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert len(counts) > 1 and all(n >= 100_000 for n in counts[:-1])


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize("spark", ["spark-3.5", "spark-newest"])
def test_spark_reads_every_table(
    spark: str, root: Path, truths: dict[str, Facts], tmp_path: Path
) -> None:
    folder = os.environ.get("ENGINES_DIR")
    if not folder:
        pytest.skip("needs Java and two Sparks: `make engines` installs them and sets ENGINES_DIR")
    tables = tmp_path / "tables.json"
    tables.write_text(json.dumps(PARTITIONS))
    done = subprocess.run(
        [Path(folder) / spark / "bin" / "python", READ_WITH_SPARK, root, tables],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["version"].startswith("3.5.") == (spark == "spark-3.5")
    for name in TABLES:
        facts = Facts(**found["tables"][name])
        agree(facts, truths[name])
        assert facts.types == expected_types(name, "spark")
