"""Every engine that analysts use reads every table by its glob: rows, types, values, hive keys."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

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
STRING, DOUBLE, MICROS = pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")
READ_WITH_SPARK = Path(__file__).parent / "engines_env" / "read_with_spark.py"


@dataclass
class Facts:
    """What one engine makes of a table: comparable over engines."""

    rows: int
    types: dict[str, Any]
    counts: dict[str, int]
    """Column → values that are not null."""
    values: dict[str, Any]
    """Column → one figure, see `read_with_spark.py`."""


def of_arrow(table: pa.Table) -> Facts:
    counts, values = {}, {}
    for name in table.column_names:
        column = table[name]
        counts[name] = len(column) - column.null_count
        values[name] = _figure(column)
    types = {field.name: field.type for field in table.schema}
    return Facts(rows=len(table), types=types, counts=counts, values=values)


def _figure(column: pa.ChunkedArray) -> Any:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_list(kind):
        figure = pc.sum(pc.list_value_length(column)).as_py()
        if figure is not None and pa.types.is_floating(kind.value_type):
            figure += pc.sum(pc.list_element(column, 0).cast(DOUBLE)).as_py()
    elif pa.types.is_timestamp(kind):
        figure = pc.max(column.cast(pa.int64())).as_py()
    elif pa.types.is_boolean(kind):
        figure = pc.sum(column.cast(pa.int64())).as_py()
    elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
        figure = pc.sum(column.cast(DOUBLE)).as_py()
    else:
        figure = pc.max(column.cast(STRING)).as_py()
    return figure


def truth(root: Path, name: str) -> Facts:
    """File by file, with the partition values taken from the path by hand."""
    tables = []
    for path in sorted(root.glob(table_glob(name))):
        table = pq.ParquetFile(path).read()
        for part in path.relative_to(root).parts[2:-1]:
            level, _, value = part.partition("=")
            filled = pa.array([value] * len(table), STRING)
            table = table.append_column(
                level, filled.cast(pa.date32()) if level == "dt" else filled
            )
        tables.append(table)
    return of_arrow(pa.concat_tables(tables))


def read_duckdb(root: Path, name: str) -> Facts:
    import duckdb

    hive = ", hive_partitioning = true" if PARTITIONS[name] else ""
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        source = f"FROM read_parquet('{root}/{table_glob(name)}'{hive})"
        described = connection.execute(f"DESCRIBE {source}").fetchall()
        table = connection.sql(source).to_arrow_table()
    return _typed(of_arrow(table), {row[0]: row[1] for row in described})


def read_polars(root: Path, name: str) -> Facts:
    import polars as pl

    lazy = pl.scan_parquet(f"{root}/{table_glob(name)}", hive_partitioning=bool(PARTITIONS[name]))
    frame = lazy.collect()
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    fields = [
        pa.field(f.name, _small(f.type)) for f in table.schema
    ]  # Polars hands over large_string and large_list
    facts = of_arrow(table.cast(pa.schema(fields)))
    return _typed(facts, {k: str(v) for k, v in frame.schema.items()})


def _small(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(kind):
        return pa.list_(_small(kind.value_type))
    return STRING if pa.types.is_large_string(kind) else kind


def read_pyarrow(root: Path, name: str) -> Facts:
    files = sorted(str(p) for p in root.glob(table_glob(name)))
    partitioning = "hive" if PARTITIONS[name] else None
    return of_arrow(ds.dataset(files, format="parquet", partitioning=partitioning).to_table())


def read_pandas(root: Path, name: str) -> Facts:
    import pandas as pd  # type: ignore[import-untyped]

    frame = pd.read_parquet(root / "v1" / name)
    counts = {n: int(frame[n].notna().sum()) for n in frame.columns}
    values: dict[str, Any] = {}
    for n in frame.columns:
        column = frame[n].dropna()
        kind = SCHEMAS[name].field(n).type if n in SCHEMAS[name].names else STRING
        if not len(column):
            values[n] = None
        elif pa.types.is_list(kind):
            values[n] = float(sum(map(len, column)))
            if pa.types.is_floating(kind.value_type):
                assert all(v.dtype == np.float32 for v in column)
                values[n] += float(sum(float(v[0]) for v in column))
        elif pa.types.is_timestamp(kind):
            values[n] = int(column.max().value // 1000)
        elif pa.types.is_string(kind):
            values[n] = max(str(v) for v in column)
        else:
            values[n] = float(column.astype("float64").sum())
    types = {n: str(t) for n, t in frame.dtypes.items()}
    return Facts(rows=len(frame), types=types, counts=counts, values=values)


def read_datafusion(root: Path, name: str) -> Facts:
    from datafusion import SessionContext

    context = SessionContext()
    levels = [(k, pa.date32() if k == "dt" else STRING) for k in PARTITIONS[name]]
    context.register_parquet("t", str(root / "v1" / name), table_partition_cols=levels)
    table = context.sql("SELECT * FROM t").to_arrow_table()
    fields = [
        pa.field(f.name, STRING if pa.types.is_string_view(f.type) else _plain(f.type))
        for f in table.schema
    ]
    return of_arrow(table.cast(pa.schema(fields)))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Without the names that engines give to list elements and to UTC."""
    if pa.types.is_list(kind):
        element = STRING if pa.types.is_string_view(kind.value_type) else kind.value_type
        return pa.list_(element)
    if pa.types.is_timestamp(kind) and kind.tz == "+00:00":
        return MICROS
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _typed(facts: Facts, types: dict[str, Any]) -> Facts:
    facts.types = types
    return facts


NAMES: dict[str, dict[str, str]] = {
    "duckdb": {
        "string": "VARCHAR", "bool": "BOOLEAN", "int32": "INTEGER", "int64": "BIGINT",
        "float": "FLOAT", "double": "DOUBLE", "timestamp[us, tz=UTC]": "TIMESTAMP WITH TIME ZONE",
        "vector": "FLOAT[]", "strings": "VARCHAR[]", "date32[day]": "DATE",
    },
    "polars": {
        "string": "String", "bool": "Boolean", "int32": "Int32", "int64": "Int64",
        "float": "Float32", "double": "Float64",
        "timestamp[us, tz=UTC]": "Datetime(time_unit='us', time_zone='UTC')",
        "vector": "List(Float32)", "strings": "List(String)", "date32[day]": "Date",
    },
    "spark": {
        "string": "string", "bool": "boolean", "int32": "int", "int64": "bigint",
        "float": "float", "double": "double", "timestamp[us, tz=UTC]": "timestamp",
        "vector": "array<float>", "strings": "array<string>", "date32[day]": "date",
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


def put_large(root: Path, table: str, n: int, columns: dict[str, pa.Array]) -> None:
    """A file of n rows, as a long task leaves it: several pages and row groups."""
    schema, (sample, *_) = SCHEMAS[table], (p.name for p in (root / "v1" / table).glob("s*=f*"))
    filled = {f.name: columns.get(f.name, pa.nulls(n, f.type)) for f in schema}
    filled |= {k: pa.array([v] * n, STRING) for k, v in (("uri", "s3://a/b"), ("source", "c"))}
    filled |= {"video_id": pa.array(["a" * 20] * n), "frame_index": pa.array(np.arange(n))}
    filled |= {"time_s": pa.array(np.arange(n) / 25)}
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
    return root


@pytest.fixture(scope="module")
def truths(root: Path) -> dict[str, Facts]:
    return {name: truth(root, name) for name in TABLES}


READERS: dict[str, Callable[[Path, str], Facts]] = {
    "duckdb": read_duckdb,
    "polars": read_polars,
    "pyarrow": read_pyarrow,
    "pandas": read_pandas,
    "datafusion": read_datafusion,
}


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
            assert _plain(kind) == _plain(dates.get(column, wanted)), column


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
            assert column.is_stats_set == (top not in vectors), top
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
