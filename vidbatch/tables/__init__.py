"""The tables that analysts read: schemas, rows, Parquet bytes, and where each file lies.

schemas   columns, keys and paths as constants
outcomes  how clips ended → `coverage`, `failures`; what may stand in a message
columns   what a model says of a chunk → columns
rows      chunks and predictions of a task → sorted Arrow tables
parquet   Arrow tables ↔ Parquet bytes and their check
"""

from vidbatch.tables.outcomes import (
    outcome_tables,
    outcomes_from_json,
    outcomes_to_json,
    redact,
)
from vidbatch.tables.parquet import (
    Footer,
    check_part,
    encode,
    file_metadata,
    keys_ascend,
    read,
    read_footer,
    read_metadata,
    sort_rows,
    write,
)
from vidbatch.tables.rows import OutputRows
from vidbatch.tables.schemas import (
    PARTITIONS,
    ROOT,
    SCHEMA_VERSION,
    SCHEMAS,
    UNIQUE_KEYS,
    empty_part_key,
    output_of,
    part_key,
    record_key,
    result_tables,
    sampling_partition,
)

__all__ = [
    "PARTITIONS",
    "ROOT",
    "SCHEMAS",
    "SCHEMA_VERSION",
    "UNIQUE_KEYS",
    "Footer",
    "OutputRows",
    "check_part",
    "empty_part_key",
    "encode",
    "file_metadata",
    "keys_ascend",
    "outcome_tables",
    "outcomes_from_json",
    "outcomes_to_json",
    "output_of",
    "part_key",
    "read",
    "read_footer",
    "read_metadata",
    "record_key",
    "redact",
    "result_tables",
    "sampling_partition",
    "sort_rows",
    "write",
]
