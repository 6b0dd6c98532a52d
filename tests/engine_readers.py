"""How each engine reads a table of an output by its glob, and what it makes of it, comparably."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from vidbatch.query.views import table_glob
from vidbatch.tables import PARTITIONS, SCHEMAS

STRING, DOUBLE, MICROS = pa.string(), pa.float64(), pa.timestamp("us", tz="UTC")


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
    if pa.types.is_large_binary(kind):
        return pa.binary()
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
        elif pa.types.is_binary(kind):
            values[n] = max(column).decode()
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
    fields = [pa.field(f.name, plain(f.type)) for f in table.schema]
    return of_arrow(table.cast(pa.schema(fields)))


def plain(kind: pa.DataType) -> pa.DataType:
    """Without the names that engines give to list elements and to UTC."""
    if pa.types.is_list(kind):
        element = STRING if pa.types.is_string_view(kind.value_type) else kind.value_type
        return pa.list_(element)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return STRING if pa.types.is_string_view(kind) else pa.binary()
    if pa.types.is_timestamp(kind) and kind.tz == "+00:00":
        return MICROS
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _typed(facts: Facts, types: dict[str, Any]) -> Facts:
    facts.types = types
    return facts


READERS: dict[str, Callable[[Path, str], Facts]] = {
    "duckdb": read_duckdb,
    "polars": read_polars,
    "pyarrow": read_pyarrow,
    "pandas": read_pandas,
    "datafusion": read_datafusion,
}
