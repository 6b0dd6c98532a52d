"""Proves an output from its store alone: what is committed is there, whole, once, and complete.

Looks at `ledger` although of the same layer: it is the ledger's auditor, and nothing that writes
may depend on it. Reads every object below the output; memory is bounded by one partition.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from vidbatch.data import FRAMES, Outcome, Status
from vidbatch.errors import InfraError
from vidbatch.ledger import CommitRecord, Ledger, PartFile, PlanLog
from vidbatch.ledger.fetch import READERS, fetch
from vidbatch.tables import (
    PARTITIONS,
    ROOT,
    UNIQUE_KEYS,
    check_part,
    empty_part_key,
    keys_ascend,
    outcomes_from_json,
    output_of,
    part_key,
    read,
    sort_rows,
)

TMP = "_vidbatch/tmp/"

SWEEP_AFTER_S = 86_400.0
"""A temporary file younger than a day may belong to a PUT under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCount:
    """Clips of one output under one sampling rule; planned = ok + partial + failed + pending."""

    sample: str
    """The value of `sample=`."""
    model: str
    """The value of `model=`."""
    planned: int
    ok: int
    partial: int
    failed: int
    pending: int
    """Clips whose task is not committed yet; of no retry that is planned, but not done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    outputs: tuple[OutputCount, ...]
    problems: tuple[str, ...]
    """One line each; empty when all is proved."""
    uncommitted: tuple[str, ...]
    """Part files whose task has no record: of an attempt under way, or one that another will
    finish. No error."""
    files: int
    rows: Mapping[str, int]
    """Table → rows seen by glob."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """What `sweep` removed and what it only names."""

    removed: tuple[str, ...]
    uncommitted: tuple[str, ...]


def verify(ledger: Ledger) -> VerifyReport:
    """Checks every record against every object; see the module's first lines.

    Proved, if there are no problems: each committed file is there with the bytes and rows its
    record names, is sorted and of the right schema; no unique key stands twice in a partition,
    over all files that a glob finds; every committed task is in a plan; every clip of a committed
    task is accounted for by `coverage` as by the record; `frames` has the rows coverage counts.

    Raises:
        StoreError: the store does not answer.
        InfraError: the plan log itself is broken.
    """
    audit = _Audit(ledger)
    logs = {sampling: ledger.read_plan(sampling) for sampling in ledger.samplings()}
    counts = [audit.records_of(output, logs) for output in ledger.outputs()]
    parts = _by_partition(ledger)
    audit.files(parts)
    orphans = [k for keys in parts.values() for k in keys if k not in audit.expected]
    uncommitted = _without_record(ledger, orphans)
    audit.problems += [
        f"{key} is not in the record of its task"
        for key in sorted(set(orphans) - set(uncommitted))
        if PARTITIONS[key.split("/")[1]]
    ]
    return VerifyReport(
        outputs=tuple(c for c in counts if c is not None),
        problems=tuple(audit.problems),
        uncommitted=tuple(uncommitted),
        files=sum(map(len, parts.values())),
        rows=dict(audit.rows),
    )


def sweep(
    ledger: Ledger, *, older_than_s: float = SWEEP_AFTER_S, now: datetime | None = None
) -> SweepReport:
    """Removes temporary files that writers left behind; names part files without a record.

    Part files stay: the task's next attempt adopts them.
    """
    limit = (now or datetime.now(UTC)) - timedelta(seconds=older_than_s)
    removed = [e.key for e in ledger.store.list(TMP) if e.modified_at < limit]
    for key in removed:
        ledger.store.remove(key)
    keys = [k for part in _by_partition(ledger).values() for k in part]
    return SweepReport(removed=tuple(removed), uncommitted=tuple(_without_record(ledger, keys)))


def _by_partition(ledger: Ledger) -> dict[str, list[str]]:
    """Folder → part files of the known tables, as globs find them, without the empty ones."""
    parts: defaultdict[str, list[str]] = defaultdict(list)
    empty = {empty_part_key(table) for table in PARTITIONS}
    for key in ledger.store.list_keys(ROOT + "/"):
        folder, _, name = key.rpartition("/")
        levels = folder.split("/")[1:]
        if (
            levels[0] in PARTITIONS
            and len(levels) == 1 + len(PARTITIONS[levels[0]])
            and name.endswith(".parquet")
            and key not in empty
        ):
            parts[folder].append(key)
    return dict(parts)


def _levels(key: str) -> dict[str, str]:
    """Partition values of a key, and `task`: what stands in its file name."""
    *folders, name = key.split("/")[2:]
    values = {level: value for level, _, value in (f.partition("=") for f in folders)}
    return values | {"task": name.removeprefix("part-").removesuffix(".parquet")}


def _without_record(ledger: Ledger, keys: Iterable[str]) -> list[str]:
    """Those part files whose task has no commit record for the output they are of: LISTs only."""
    by_hex = {fp[:8]: fp for fp in ledger.outputs()}
    frames = {s[:8]: output_of(None, s).fingerprint for s in ledger.samplings()}
    done: dict[str, set[str]] = {}
    found = []
    for key in keys:
        if not PARTITIONS[key.split("/")[1]]:
            continue  # models, runs: a row each, without a task
        values = _levels(key)
        model = values.get("model", FRAMES)
        source = values["sample"] if model == FRAMES else model
        output = (frames if model == FRAMES else by_hex).get(source.rpartition(".")[2], "")
        if output not in done:
            done[output] = ledger.done(output) if output else set()
        if values["task"] not in done[output]:
            found.append(key)
    return sorted(found)


class _Audit:
    """The expectations that records raise, and what speaks against them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.problems: list[str] = []
        self.expected: dict[str, tuple[PartFile, tuple[Outcome, ...]]] = {}
        self.rows: Counter[str] = Counter()

    def records_of(self, output: str, logs: Mapping[str, PlanLog]) -> OutputCount | None:
        """Reads the records of one output; its clips, each by its newest committed generation."""
        newest: dict[tuple[str, int], tuple[int, Status]] = {}
        record: CommitRecord | None = None
        positions: dict[str, dict[str, int]] = {}
        for record in self.ledger.records(output):
            log = logs.get(record.sampling, PlanLog(record.sampling))
            if record.sampling not in positions:
                ids = log.task_ids.to_pylist()
                positions[record.sampling] = {task_id: i for i, task_id in enumerate(ids)}
            position = positions[record.sampling].get(record.task)
            if position is None:
                self.problems.append(f"task {record.task} of {record.model} is in no plan")
                continue
            task = log.task(position)
            try:
                outcomes = outcomes_from_json(record.outcomes, task)
            except ValueError as error:
                self.problems.append(f"record of task {record.task}, {record.model}: {error}")
                continue
            if task.task_id != record.task or task.output not in (None, output):
                self.problems.append(f"task {record.task} of {record.model} is not as planned")
            for outcome in outcomes:
                clip = outcome.clip
                identity = (clip.video.video_id, clip.first_keyframe)
                state = (task.generation, outcome.status)
                newest[identity] = max(newest.get(identity, (-1, "ok")), state)
            for part in record.files:
                dt = task.dt
                key = part_key(part.table, record.sample, record.model, dt, record.task)
                if part.key != key:
                    self.problems.append(f"record of task {record.task} names {part.key}")
                self.expected[part.key] = (part, outcomes)
        if record is None:
            return None
        log = logs.get(record.sampling, PlanLog(record.sampling))
        planned = int(log.clip_counts[log.generations == 0].sum())
        states = Counter(status for _, status in newest.values())
        return OutputCount(
            sample=record.sample,
            model=record.model,
            planned=planned,
            ok=states["ok"],
            partial=states["partial"],
            failed=states["failed"],
            pending=planned - sum(states.values()),
        )

    def files(self, parts: Mapping[str, list[str]]) -> None:
        """Reads every part file once, partition by partition."""
        there = {key for keys in parts.values() for key in keys}
        self.problems += [f"{key} is committed and gone" for key in self.expected.keys() - there]
        for folder, keys in parts.items():
            table = folder.split("/")[1]
            unique = UNIQUE_KEYS[table]
            found = []
            for key, data in zip(keys, fetch(self.ledger.store, keys, ahead=READERS), strict=True):
                try:
                    found.append(self._file(table, key, data))
                except InfraError as error:
                    self.problems.append(f"{key}: {error}")
            rows = pa.concat_tables(found) if found else pa.table({})
            self.rows[table] += len(rows)
            if len(rows) and not keys_ascend(sort_rows(table, rows), unique):
                self.problems.append(f"{folder}: a key {unique} stands in it twice")

    def _file(self, table: str, key: str, data: bytes) -> pa.Table:
        """The key columns of one file, after its checks. Raises InfraError: it is no such part."""
        task_id = _levels(key)["task"] if PARTITIONS[table] else ""
        keys = check_part(table, data, task_id=task_id)
        if key in self.expected:
            part, outcomes = self.expected[key]
            sha256 = hashlib.sha256(data).hexdigest()
            if (part.rows, part.size_bytes, part.sha256) != (len(keys), len(data), sha256):
                self.problems.append(f"{key} is not the object that its record describes")
            elif table == "coverage":
                self._coverage(key, data, outcomes)
            elif table == FRAMES and part.rows != sum(o.frames for o in outcomes):
                self.problems.append(f"{key}: {part.rows} rows, coverage counts other frames")
        return keys

    def _coverage(self, key: str, data: bytes, outcomes: tuple[Outcome, ...]) -> None:
        """Whether `coverage` says of the clips what the record says."""
        rows = read(data, columns=["video_id", "start_s", "status", "frames"]).to_pylist()
        says = {(r["video_id"], r["start_s"]): (r["status"], r["frames"]) for r in rows}
        clips = {(o.clip.video.video_id, o.clip.start_s): (o.status, o.frames) for o in outcomes}
        if says != clips:
            self.problems.append(f"{key} does not account for the clips of its task")
