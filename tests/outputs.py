"""Reads an output the way an analyst's glob does, never through the ledger, and compares two."""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidbatch.storage import Store
from vidbatch.tables import PARTITIONS, UNIQUE_KEYS

PER_ATTEMPT = {"run", "committed_at", "failed_at", "listed_at", "device", "attempts"}
"""Columns that tell runs apart and so may differ between two ways to the same tables."""

Partition = tuple[str, ...]


def read_tables(store: Store) -> dict[str, dict[Partition, pa.Table]]:
    """table → partition values → all rows of all part files, sorted by the unique key."""
    parts: dict[str, dict[Partition, list[pa.Table]]] = defaultdict(lambda: defaultdict(list))
    for key in store.list_keys("v1/"):
        _, table, *levels, name = key.split("/")
        assert name.endswith(".parquet"), key
        partition = tuple(level.split("=", 1)[1] for level in levels)
        assert len(partition) == len(PARTITIONS[table]), key
        rows = pq.read_table(io.BytesIO(store.get(key)))
        if len(rows):
            parts[table][partition].append(rows)
    found: dict[str, dict[Partition, pa.Table]] = {}
    for table, partitions in parts.items():
        order = [(k, "ascending") for k in UNIQUE_KEYS[table]]
        found[table] = {p: pa.concat_tables(t).sort_by(order) for p, t in partitions.items()}
    return found


def check_no_key_twice(tables: dict[str, dict[Partition, pa.Table]]) -> None:
    """No unique key stands twice inside any partition."""
    for table, partitions in tables.items():
        for partition, rows in partitions.items():
            keys = list(zip(*(rows[k].to_pylist() for k in UNIQUE_KEYS[table]), strict=True))
            doubled = len(keys) - len(set(keys))
            assert not doubled, f"{table} {partition}: {doubled} keys stand twice"


def check_same(
    got: dict[str, dict[Partition, pa.Table]],
    want: dict[str, dict[Partition, pa.Table]],
    *,
    tolerance: float = 1e-4,
    ignore: frozenset[str] = frozenset({"runs", "models"}),
) -> None:
    """The same tables, partitions and rows; floats of scores and vectors within a tolerance."""
    assert got.keys() - ignore == want.keys() - ignore
    for table in want.keys() - ignore:
        assert got[table].keys() == want[table].keys(), table
        for partition, rows in want[table].items():
            _check_rows(got[table][partition], rows, f"{table} {partition}", tolerance)


def _check_rows(got: pa.Table, want: pa.Table, name: str, tolerance: float) -> None:
    assert len(got) == len(want), f"{name}: {len(got)} rows, expected {len(want)}"
    for column in want.column_names:
        if column in PER_ATTEMPT:
            continue
        mine, theirs = got[column], want[column]
        if pa.types.is_list(theirs.type):
            assert mine.combine_chunks().value_lengths() == theirs.combine_chunks().value_lengths()
            a = np.concatenate([np.asarray(c.flatten()) for c in mine.chunks])
            b = np.concatenate([np.asarray(c.flatten()) for c in theirs.chunks])
            np.testing.assert_allclose(a, b, atol=tolerance, err_msg=f"{name}.{column}")
        elif column in ("score", "value", "x_min", "y_min", "x_max", "y_max"):
            np.testing.assert_allclose(
                np.asarray(mine), np.asarray(theirs), atol=tolerance, rtol=tolerance,
                err_msg=f"{name}.{column}",
            )  # fmt: skip
        else:
            assert mine.to_pylist() == theirs.to_pylist(), f"{name}.{column} differs"


def fingerprints(store: Store) -> dict[str, str]:
    """key → sha256 of every object of the output: what must never change once it is there."""
    keys = (k for k in store.list_keys("") if not k.startswith("_vidbatch/tmp/"))
    return {key: hashlib.sha256(store.get(key)).hexdigest() for key in keys}


def check_nothing_changed(before: dict[str, str], after: dict[str, str]) -> None:
    """Every object that was there is there, with the same bytes."""
    for key, digest in before.items():
        assert after.get(key) == digest, f"{key} was changed or removed"


def outcome_counts(store: Store) -> dict[str, dict[str, int]]:
    """Output partition → status → clips, from `coverage` of the newest generation."""
    newest: dict[tuple[str, Any], tuple[int, str]] = {}
    for partition, rows in read_tables(store)["coverage"].items():
        for row in rows.to_pylist():
            key = (partition[1], (row["video_id"], row["start_s"]))
            newest[key] = max(newest.get(key, (-1, "")), (row["generation"], row["status"]))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (model, _), (_, status) in newest.items():
        counts[model][status] += 1
    return json.loads(json.dumps(counts))
