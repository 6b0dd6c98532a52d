"""One output of one task becomes visible: part files first, then the record that says so.

    table 1 (decides)   put_new ─ exists? adopt: its footer says how each clip ended
    table 2, …          put_new ─ exists? adopt
    coverage, failures  what the objects now in the store hold
    retry marker        only where a clip failed and may succeed later
    commit record       names the objects found, with sha256 and rows

Every attempt, of any run or driver, takes the same way in the same order, and no object is ever
written twice. So the first table with rows of clips fixes, at the moment it is created, which
clips failed: an attempt that comes later drops its own rows of those. The reverse, a clip whose
rows stand already but which failed this time, ends `partial` if this attempt has to write a further
table of it (its rows there are missing, and a retry would double those that stand).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from vidbatch.data import Clip, Outcome, Output, Task
from vidbatch.errors import ExistsInStore, InfraError
from vidbatch.ledger.parents import KEY, with_parent
from vidbatch.ledger.retries import put_marker
from vidbatch.tables import (
    SCHEMA_VERSION,
    check_part,
    encode,
    file_metadata,
    outcome_tables,
    outcomes_from_json,
    outcomes_to_json,
    part_key,
    read,
    read_footer,
)

if TYPE_CHECKING:
    from vidbatch.storage import Store

COMMITS = "_vidbatch/commits"

MIXED = "mixed_attempts"
"""Kind of a clip whose rows come from two attempts, one of which failed at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """One object of a commit."""

    table: str
    key: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """The body of `_vidbatch/commits/<output fingerprint>/<task_id>.json`."""

    schema_version: int
    task: str
    output: str
    """Fingerprint."""
    model: str
    """The value of `model=`."""
    sampling: str
    """Fingerprint of the sampling rule."""
    sample: str
    """The value of `sample=`."""
    generation: int
    run: str
    attempt: int
    committed_at: str
    files: tuple[PartFile, ...]
    outcomes: str
    """JSON for `tables.outcomes_from_json`."""

    def to_json(self) -> bytes:
        """One line of UTF-8."""
        body = asdict(self) | {"outcomes": json.loads(self.outcomes)}
        return json.dumps(body, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes, key: str) -> CommitRecord:
        """Raises InfraError: the bytes at `key` are no record of this schema version."""
        try:
            body: dict[str, Any] = json.loads(data)
            files = tuple(PartFile(**f) for f in body.pop("files"))
            outcomes = json.dumps(body.pop("outcomes"), separators=(",", ":"))
            return CommitRecord(files=files, outcomes=outcomes, **body)
        except (ValueError, KeyError, TypeError) as error:
            raise InfraError(f"{key} is no commit record: {error}", kind="bad_record") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitResult:
    """What a commit came to."""

    status: Literal["new", "adopted", "exists"]
    """All objects are this attempt's; some are an earlier one's; the record was there before."""
    files: tuple[PartFile, ...]
    """The objects that now hold the task's rows, in the order they were put."""
    outcomes: tuple[Outcome, ...]
    """How the clips ended according to those objects, in the task's order."""
    rows: Mapping[str, int]
    """Table → rows."""


def record_path(output: str, task_id: str) -> str:
    """The key of a commit record."""
    return f"{COMMITS}/{output}/{task_id}.json"


class Commit:
    """One attempt at committing; see `Ledger.commit`."""

    def __init__(
        self,
        store: Store,
        task: Task,
        output: Output,
        tables: Mapping[str, pa.Table],
        outcomes: Sequence[Outcome],
        *,
        sampling_partition: str,
        run: str,
        attempt: int,
        versions: Mapping[str, str],
    ) -> None:
        if sampling_partition.rpartition(".")[2] != task.sampling[:8]:
            raise ValueError(f"{sampling_partition} is not the partition of {task.sampling}")
        by_clip = {o.clip: o for o in outcomes}
        self.store, self.task, self.output, self.task_id = store, task, output, task.task_id
        self.own = tuple(by_clip[clip] for clip in task.clips)
        self.agreed = self.own
        self.sample, self.run, self.attempt, self.versions = (
            sampling_partition, run, attempt, versions,
        )  # fmt: skip
        self.now: datetime = tables["coverage"]["committed_at"][0].as_py()
        self.results = {k: v for k, v in tables.items() if k not in ("coverage", "failures")}
        self.files: list[PartFile] = []
        self.adopted = False
        self.parents: pa.Table | None = None

    def run_through(self) -> CommitResult:
        """Puts or adopts every part, then marker and record."""
        # All are built and checked before the first is put: a table that cannot be written then
        # leaves nothing behind.
        ready = {name: self._encode(name, table, self.own) for name, table in self.results.items()}
        for name, table in self.results.items():
            kept, outcomes = self._reconcile(name, table)
            if outcomes is not self.own:
                ready[name] = self._encode(name, kept, outcomes)
            self._put(name, ready.pop(name), len(kept), outcomes)
        # `failures` follows from the coverage found, not from the one offered: so from here on
        # every attempt agrees on whether there is such a file, and on its rows.
        for name in ("coverage", "failures"):
            rows = outcome_tables(self.task, self.agreed, run=self.run, now=self.now)[name]
            if name == "coverage" or len(rows):
                self._put(name, self._encode(name, rows, self.agreed), len(rows), self.agreed)
        put_marker(self.store, self.output.fingerprint, self.task, self.agreed)
        return self._record()

    def _encode(self, name: str, table: pa.Table, outcomes: Sequence[Outcome]) -> bytes:
        data = encode(
            name,
            table,
            file_metadata(
                name,
                output=self.output,
                sampling=self.sample,
                task=self.task,
                outcomes=outcomes,
                versions=self.versions,
            ),
        )
        check_part(name, data, task_id=self.task_id, rows=len(table))
        return data

    def _reconcile(self, name: str, table: pa.Table) -> tuple[pa.Table, tuple[Outcome, ...]]:
        """This attempt's rows and outcomes as far as they go with what is in the store."""
        if name == "videos" or self.agreed is self.own:
            return table, self.own  # which videos it holds, the plan alone decides
        outcomes = []
        for mine, theirs in zip(self.own, self.agreed, strict=True):
            if theirs.status == "failed" and mine.status != "failed":
                table = table.filter(pc.invert(_rows_of(mine.clip, table)))
            if mine.status == "failed" and theirs.status != "failed":
                outcomes.append(_mixed(mine, theirs, name))
            else:
                outcomes.append(theirs)
        if self.parents is not None and "of_model" in table.column_names:
            table = with_parent(table, self.parents)
        return table, tuple(outcomes)

    def _put(self, name: str, data: bytes, rows: int, outcomes: tuple[Outcome, ...]) -> None:
        """Creates one part, or takes the one that is there for what it is."""
        key = part_key(name, self.sample, self.output.partition, self.task.dt, self.task_id)
        metadata = {
            "task": self.task_id,
            "attempt": f"{self.run} {self.attempt}",
            "table": name,
            "schema": str(SCHEMA_VERSION),
        }
        try:
            self.store.put_new(key, data, metadata)
        except ExistsInStore:
            found = self.store.get(key)
            if found != data:  # else: our own, its answer was lost
                data, self.adopted = found, True
                rows, outcomes = self._adopt(name, key, found, outcomes)
        if name != "videos":
            self.agreed = outcomes
        self.files.append(
            PartFile(
                table=name,
                key=key,
                rows=rows,
                size_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )

    def _adopt(
        self, name: str, key: str, found: bytes, offered: tuple[Outcome, ...]
    ) -> tuple[int, tuple[Outcome, ...]]:
        """Rows and outcomes of the object found, if it is this task's."""
        footer = read_footer(found)
        expected = (name, SCHEMA_VERSION, self.task_id, self.output.fingerprint)
        says = (footer.table, footer.schema_version, footer.task, footer.fingerprint)
        if says != expected:
            raise ExistsInStore(
                f"{key} is there and says it is {says}, expected {expected} — its task is not "
                "committed, no row of it is trusted — find out who writes below this output",
                kind="alien_part",
                advice="find out who else writes below this output",
            )
        if name == "detections":
            self.parents = read(found, columns=KEY)
        if name in ("videos", "failures"):
            return footer.rows, offered
        return footer.rows, footer.outcomes_of(self.task)

    def _record(self) -> CommitResult:
        record = CommitRecord(
            schema_version=SCHEMA_VERSION,
            task=self.task_id,
            output=self.output.fingerprint,
            model=self.output.partition,
            sampling=self.task.sampling,
            sample=self.sample,
            generation=self.task.generation,
            run=self.run,
            attempt=self.attempt,
            committed_at=self.now.isoformat(),
            files=tuple(self.files),
            outcomes=outcomes_to_json(self.agreed),
        )
        key = record_path(self.output.fingerprint, self.task_id)
        status: Literal["new", "adopted", "exists"] = "adopted" if self.adopted else "new"
        data = record.to_json()
        try:
            self.store.put_new(key, data, {"task": self.task_id})
        except ExistsInStore:
            found = self.store.get(key)
            if found != data:
                record, status = CommitRecord.from_json(found, key), "exists"
        return CommitResult(
            status=status,
            files=record.files,
            outcomes=outcomes_from_json(record.outcomes, self.task),
            rows={f.table: f.rows for f in record.files},
        )


def _mixed(mine: Outcome, theirs: Outcome, table: str) -> Outcome:
    """A clip of which an earlier attempt left rows, and this one has none for `table`."""
    if theirs.kind == MIXED:
        return theirs
    return replace(
        theirs,
        status="partial",
        kind=MIXED,
        stage=mine.stage or "write",
        reason=f"an earlier attempt wrote its rows and died; this one has none for {table} and "
        f"what follows: {mine.reason}",
        advice="its rows are kept; final until the object changes",
        attempts=mine.attempts,
        retryable=False,
    )


def _rows_of(clip: Clip, table: pa.Table) -> pa.Array:
    """Mask of the rows that are frames of a clip: clips tile a video in frame_index."""
    frame = table["frame_index" if "frame_index" in table.column_names else "start_frame"]
    mask = pc.and_(
        pc.equal(table["video_id"], clip.video.video_id),
        pc.greater_equal(frame, clip.start_frame),
    )
    return mask if clip.end_frame is None else pc.and_(mask, pc.less(frame, clip.end_frame))
