"""Steps that tests of ledger and verify share: attempts at a task, and what a glob then finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tests.made_rows import (
    NOW,
    PARTITION,
    SAMPLING,
    VERSIONS,
    make_frames,
    make_info,
    make_output,
    make_predictions,
    make_spec,
)
from tests.memory_store import Bucket, Faults, MemoryStore
from vidbatch.data import Outcome, Output, Task
from vidbatch.ledger import CommitResult, Ledger, PlanLog
from vidbatch.tables import (
    OutputRows,
    read,
)

NO_FAULTS = Faults()
SCENE = make_output(make_spec("scene", ("detections", "features")))


def ledger_of(bucket: Bucket | None = None, faults: Faults = NO_FAULTS) -> Ledger:
    return Ledger(MemoryStore(bucket, faults))


def bucket_of(ledger: Ledger) -> Bucket:
    assert isinstance(ledger.store, MemoryStore)
    return ledger.store.bucket


def attempt(
    ledger: Ledger,
    task: Task,
    output: Output,
    outcomes: Sequence[Outcome],
    *,
    seed: int = 0,
    number: int = 1,
) -> CommitResult:
    """Makes the rows that `outcomes` speak of and commits them."""
    rows, rng = OutputRows(output, task), np.random.default_rng(seed)
    for outcome in outcomes:
        start, n = outcome.clip.start_frame, outcome.frames
        found = None if output.spec is None else make_predictions(n, rng)
        rows.add(outcome.clip, make_frames(start, start + n), found)
    infos = {c.video.video_id: make_info() for c in task.clips}
    return commit(ledger, task, output, rows.finish(outcomes, infos, run="r", now=NOW), outcomes,
                  number=number)  # fmt: skip


def commit(
    ledger: Ledger,
    task: Task,
    output: Output,
    tables: dict[str, pa.Table],
    outcomes: Sequence[Outcome],
    number: int = 1,
) -> CommitResult:
    return ledger.commit(
        task,
        output,
        tables,
        outcomes,
        sampling_partition=PARTITION,
        run="r",
        attempt=number,
        versions=VERSIONS,
    )


def rows_in(bucket: Bucket, table: str) -> list[dict[str, Any]]:
    """All rows a glob of the table finds."""
    return [row for data in bucket.parts(table).values() for row in read(data).to_pylist()]


def plan(ledger: Ledger, *tasks: Task) -> PlanLog:
    log = ledger.read_plan(SAMPLING)
    return ledger.append_plan(log, lambda log: tasks if log.num_chunks == 0 else ())
