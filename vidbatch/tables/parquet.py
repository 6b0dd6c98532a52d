"""Arrow tables ↔ Parquet bytes: how a file is laid out, what its footer says, whether it is whole.

The only way in this package to write Parquet: in memory, as one value, never through a handle of
a store (closing such a handle in an exception commits half a file).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vidbatch.data import Outcome, Output, Task
from vidbatch.errors import InfraError
from vidbatch.tables.outcomes import outcomes_from_json, outcomes_to_json
from vidbatch.tables.schemas import SCHEMA_VERSION, SCHEMAS, UNIQUE_KEYS

ROW_GROUP_ROWS = 131_072
"""Of tables of scalars: at least 100,000, so that statistics pay and scans stay wide."""

ROW_GROUP_BYTES = 8 * 2**20
"""Of vectors: row groups of 4 to 16 MB bound what one search worker holds."""

_PREFIX = "vidbatch."


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """What a file says of itself."""

    table: str
    schema_version: int
    task: str
    rows: int
    fingerprint: str
    """Of the output, "" where there is none (empty files, `models`, `runs`)."""
    outcomes: str
    """JSON of the writer's outcomes, for `outcomes_of`; "" where there are none."""

    def outcomes_of(self, task: Task) -> tuple[Outcome, ...]:
        """How each clip of `task` ended for the attempt that wrote the file, in task order.

        Raises:
            ValueError: the file names other clips than the task.
        """
        return outcomes_from_json(self.outcomes, task)


def file_metadata(
    table: str,
    *,
    output: Output | None = None,
    sampling: str = "",
    task: Task | None = None,
    outcomes: Sequence[Outcome] = (),
    versions: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The key-value metadata of a part file. `sampling` is the value of `sample=`."""
    return {
        _PREFIX + "schema_version": str(SCHEMA_VERSION),
        _PREFIX + "table": table,
        _PREFIX + "model": output.partition if output else "",
        _PREFIX + "fingerprint": output.fingerprint if output else "",
        _PREFIX + "sampling": sampling,
        _PREFIX + "task": task.task_id if task else "",
        _PREFIX + "versions": json.dumps(dict(versions or {}), sort_keys=True),
        _PREFIX + "outcomes": outcomes_to_json(outcomes) if outcomes else "",
    }


def encode(name: str, table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """One table of `SCHEMAS` as a whole Parquet file; rows must be sorted by its unique key.

    Raises:
        ValueError: the schema is not the table's, or a column that is never null holds a null.
    """
    if not table.schema.equals(SCHEMAS[name]):
        raise ValueError(f"table {name} has another schema:\n{table.schema}")
    return write(table, metadata, sorted_by=UNIQUE_KEYS[name][:2])


def write(table: pa.Table, metadata: Mapping[str, str], *, sorted_by: Sequence[str] = ()) -> bytes:
    """Any table as Parquet: zstd 1, dictionaries for strings alone, vectors PLAIN, page index.

    No statistics of vector elements and masks: their minimum says nothing and every page would
    carry one.
    No Arrow schema inside: other readers trip over it.
    """
    schema = table.schema
    strings = [f.name for f in schema if pa.types.is_string(f.type) or _is_dictionary(f.type)]
    vectors = [f.name for f in schema if pa.types.is_list(f.type)]
    unordered = {*vectors, *(f.name for f in schema if pa.types.is_binary(f.type))}
    group_rows = ROW_GROUP_ROWS
    if "embedding" in vectors and len(table):
        group_rows = max(1, ROW_GROUP_BYTES * len(table) // max(table["embedding"].nbytes, 1))
    sink = io.BytesIO()
    order = [pq.SortingColumn(schema.get_field_index(name)) for name in sorted_by]
    with pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=strings or False,
        write_statistics=[f.name for f in schema if f.name not in unordered] or False,
        column_encoding={f"{name}.list.element": "PLAIN" for name in vectors} or None,
        sorting_columns=order or None,
        store_schema=False,
        write_page_index=True,
    ) as writer:
        writer.write_table(table, row_group_size=group_rows)
        writer.add_key_value_metadata(dict(metadata))
    return sink.getvalue()


def _is_dictionary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind))


def read(
    data: bytes, *, columns: Sequence[str] | None = None, as_dictionary: Sequence[str] = ()
) -> pa.Table:
    """The rows of a Parquet file; the columns `as_dictionary` stay dictionary-encoded.

    Raises:
        InfraError: the bytes are no whole Parquet file.
    """
    return _read(_open(data, as_dictionary), columns)


def read_metadata(data: bytes) -> dict[str, str]:
    """The key-value metadata of a Parquet file. Raises InfraError: it is no whole one."""
    return _metadata(_open(data))


def _metadata(file: pq.ParquetFile) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items()}


def read_footer(data: bytes) -> Footer:
    """What a part file says of itself, without decoding a row.

    Raises:
        InfraError: the bytes are no whole Parquet file, or not one of ours.
    """
    return _footer(_open(data))


def _open(data: bytes, as_dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(as_dictionary))
    except pa.ArrowException as error:
        raise InfraError(f"no whole Parquet file: {error}", kind="unreadable") from error


def _read(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    try:
        # One thread: a decoder has one core, and waking a pool costs more than a small file.
        return file.read(columns=None if columns is None else list(columns), use_threads=False)
    except pa.ArrowException as error:
        raise InfraError(f"a Parquet file cannot be read: {error}", kind="unreadable") from error


def _footer(file: pq.ParquetFile) -> Footer:
    values = _metadata(file)
    try:
        return Footer(
            table=values[_PREFIX + "table"],
            schema_version=int(values[_PREFIX + "schema_version"]),
            task=values[_PREFIX + "task"],
            rows=file.metadata.num_rows,
            fingerprint=values[_PREFIX + "fingerprint"],
            outcomes=values[_PREFIX + "outcomes"],
        )
    except (KeyError, ValueError) as error:
        raise InfraError(f"the file is not of vidbatch: no {error}", kind="unreadable") from error


def check_part(name: str, data: bytes, *, task_id: str, rows: int | None = None) -> pa.Table:
    """Opens a finished file again and proves that it is what it should be.

    Args:
        rows: how many there must be; None: as many as its footer says.

    Returns:
        The columns of the table's unique key.

    Raises:
        InfraError: it cannot be read, is of another task, table or schema, has another number of
            rows, a key twice, or rows out of order. Nothing of it may be put.
    """
    file = _open(data)
    footer = _footer(file)
    keys = _read(file, UNIQUE_KEYS[name]) if footer.table == name else pa.table({})
    expected = (name, SCHEMA_VERSION, task_id, footer.rows if rows is None else rows)
    problem = ""
    if (footer.table, footer.schema_version, footer.task, len(keys)) != expected:
        problem = f"{footer} was to be {expected}"
    elif not file.schema_arrow.remove_metadata().equals(SCHEMAS[name]):
        problem = f"its schema is not that of {name}"
    elif not keys_ascend(keys, UNIQUE_KEYS[name]):
        problem = f"{UNIQUE_KEYS[name]} is not unique and ascending"
    if problem:
        raise InfraError(
            f"part of {name}, task {task_id}, failed its check: {problem} — it must not be written "
            "or trusted — report it with the file",
            kind="bad_part",
        )
    return keys.replace_schema_metadata(None)


def keys_ascend(table: pa.Table, key: Sequence[str]) -> bool:
    """Whether rows ascend strictly by the columns `key` (nulls first): sorted, and no key twice."""
    n = len(table)
    if n < 2:
        return True
    ascends: pa.Array | bool = False
    for name in reversed(key):
        column = table[name].combine_chunks()
        here, after = column.slice(0, n - 1), column.slice(1)
        less = pc.fill_null(pc.less(here, after), False)
        same = pc.fill_null(pc.equal(here, after), False)
        if column.null_count:
            less = pc.or_(less, pc.and_(pc.is_null(here), pc.is_valid(after)))
            same = pc.or_(same, pc.and_(pc.is_null(here), pc.is_null(after)))
        ascends = pc.or_(less, pc.and_(same, ascends))
    return bool(pc.all(ascends).as_py())


def sort_rows(name: str, table: pa.Table) -> pa.Table:
    """The table's rows in the order of its unique key, nulls first; as it is where they are."""
    key = UNIQUE_KEYS[name]
    if keys_ascend(table.select(key), key):
        return table
    order = [(column, "ascending", "at_start") for column in key]
    return table.take(pc.sort_indices(table.select(key), sort_keys=order))
