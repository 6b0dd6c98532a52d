"""How the runs of an output went and how far it is, from its run folder alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypedDict

from vidbatch.data import FRAMES
from vidbatch.ledger import COMMITS, CommitRecord, Ledger
from vidbatch.ledger.fetch import fetch
from vidbatch.ledger.runs import RUNS
from vidbatch.progress import Counts
from vidbatch.storage import StoreSettings, open_store

SILENT_AFTER_S = 1800.0
"""Without an event for so long a run without a summary counts as dead: three times a task."""

ENDS = {
    0: "finished",
    1: "ended by an infrastructure error",
    3: "finished, with failures",
    4: "stopped above the failure limit",
    5: "stopped before the end",
}
"""Exit code → how a run ended."""


class RunStatus(TypedDict):
    """One run as its folder tells it."""

    run: str
    state: str
    """`running`, `silent` (no summary and no event for long: killed), or a value of ENDS."""
    exit_code: int | None
    started_at: str
    """UTC, ISO 8601."""
    elapsed_s: float
    """Up to the end, or to the last event."""
    stopped: str | None
    """Why it stopped early."""
    counts: dict[str, Any]
    """Of `progress.Counts`; of a run without summary the sum of its events."""
    frames_per_s: float
    failures_by_kind: dict[str, int]
    committed: dict[str, dict[str, int]]
    """Output → `new`, `adopted`, `exists` → tasks."""


class OutputStatus(TypedDict):
    """How far one output is, over all runs."""

    sample: str
    model: str
    planned: int
    """Tasks in the plan log, retries of this output among them."""
    committed: int
    in_last_run: bool


class Status(TypedDict):
    """An output, seen from its run folder."""

    output: str
    runs: list[str]
    """All of them, the newest first."""
    last: RunStatus | None
    outputs: list[OutputStatus]


def status(
    output: str, settings: StoreSettings | None = None, *, now: datetime | None = None
) -> Status:
    """The runs of an output, how the last one goes or went, and what is planned and committed.

    Reads the run folder, the plan log and one record per output; lists commits. An output that
    nothing was written to has no runs.

    Raises:
        UsageError, InfraError: the store cannot be read.
    """
    store = open_store(output, settings or StoreSettings())
    ledger = Ledger(store)
    keys = list(store.list_keys(f"{RUNS}/"))
    runs = sorted({key.split("/")[2] for key in keys}, reverse=True)
    last = None
    if runs:
        mine = [key for key in keys if key.split("/")[2] == runs[0]]
        last = _run_status(ledger, runs[0], mine, now or datetime.now(UTC))
    return Status(
        output=store.uri, runs=runs, last=last,
        outputs=_outputs(ledger, last["committed"] if last else {}),
    )  # fmt: skip


def _run_status(ledger: Ledger, run: str, keys: Sequence[str], now: datetime) -> RunStatus:
    summary_key = f"{RUNS}/{run}/summary.json"
    if summary_key in keys:
        found: dict[str, Any] = json.loads(ledger.store.get(summary_key))
        code = found["exit_code"]
        return RunStatus(
            run=run, state=ENDS.get(code, f"ended with exit code {code}"), exit_code=code,
            started_at=found["started_at"], elapsed_s=found["elapsed_s"], stopped=found["stopped"],
            counts=found["counts"], frames_per_s=found["frames_per_s"],
            failures_by_kind=found["failures_by_kind"], committed=found["outputs"],
        )  # fmt: skip
    return _from_events(ledger, run, [k for k in keys if "/events/" in k], now)


def _from_events(ledger: Ledger, run: str, keys: Sequence[str], now: datetime) -> RunStatus:
    """A run without a summary: it is under way, or was killed."""
    counts, kinds = Counts(), Counter[str]()
    committed: dict[str, Counter[str]] = {}
    times: list[datetime] = []
    for data in fetch(ledger.store, sorted(keys)):
        for line in data.decode().splitlines():
            event = json.loads(line)
            times.append(datetime.fromisoformat(event["t"]))
            if event["event"] == "task":
                counts += counts_of(event["counts"])
                kinds.update(event.get("kinds", {}))
                for name, how in event["committed"].items():
                    committed.setdefault(name, Counter())[how] += 1
    started, seen = (min(times), max(times)) if times else (_started(run), _started(run))
    elapsed_s = (seen - started).total_seconds()
    silent = (now - seen).total_seconds() > SILENT_AFTER_S
    return RunStatus(
        run=run, state="silent" if silent else "running", exit_code=None,
        started_at=started.isoformat(), elapsed_s=round(elapsed_s, 3), stopped=None,
        counts=counts.as_dict(),
        frames_per_s=round(counts.frames / elapsed_s, 2) if elapsed_s else 0.0,
        failures_by_kind=dict(kinds), committed={k: dict(v) for k, v in committed.items()},
    )  # fmt: skip


def _started(run: str) -> datetime:
    """The start that a run's label begins with."""
    return datetime.strptime(run.partition("-")[0], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)


def counts_of(said: Mapping[str, Any]) -> Counts:
    """Counts as a summary or an event says them."""
    return Counts(**{f.name: said[f.name] for f in fields(Counts) if f.name in said})


def _outputs(ledger: Ledger, last: Mapping[str, Any]) -> list[OutputStatus]:
    logs = {sampling: ledger.read_plan(sampling) for sampling in ledger.samplings()}
    found = []
    for fingerprint in ledger.outputs():
        done = ledger.done(fingerprint)
        key = f"{COMMITS}/{fingerprint}/{min(done)}.json"
        record = CommitRecord.from_json(ledger.store.get(key), key)
        found.append(
            OutputStatus(
                sample=record.sample, model=record.model, committed=len(done),
                planned=len(logs[record.sampling].todo(fingerprint, ())),
                in_last_run=record.model in last,
            )
        )  # fmt: skip
    # a run has one sampling rule, and `frames` is called so under each of them: its models tell
    rules = {o["sample"] for o in found if o["in_last_run"] and o["model"] != FRAMES}
    for o in found:
        o["in_last_run"] &= o["sample"] in rules or not rules
    return sorted(found, key=lambda o: (o["sample"], o["model"]))
