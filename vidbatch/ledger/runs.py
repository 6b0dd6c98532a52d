"""The run folder, and the tables `models` and `runs`: what status, report and operator need.

runs/<run>/job.yaml                     the job as it was resolved, with versions
runs/<run>/events/<writer>-<n>.jsonl    whole objects
runs/<run>/summary.json                 written once, at the end
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from vidbatch.data import Output
from vidbatch.errors import ExistsInStore
from vidbatch.ledger.fetch import fetch
from vidbatch.tables import ROOT, SCHEMAS, encode, file_metadata, read, record_key

if TYPE_CHECKING:
    from vidbatch.storage import Store

RUNS = "_vidbatch/runs"

LOOK_BACK = 31
"""Runs that are read to find the last good one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LastJob:
    """A run and the job it ran."""

    run: str
    job: Mapping[str, Any]
    """As `config.parse_job` takes it."""


class Runs:
    """The part of the ledger that tells of runs. Holds nothing but the store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def start_run(self, run: str, job: Mapping[str, Any]) -> None:
        """Writes `runs/<run>/job.yaml`. Raises ExistsInStore: a run of that name is there."""
        text = yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True)
        self.store.put_new(f"{RUNS}/{_name(run)}/job.yaml", text.encode())

    def last_job(self) -> LastJob | None:
        """The newest run and its job (as it was resolved), or None where no run ever began."""
        runs = {
            k.split("/")[2] for k in self.store.list_keys(RUNS + "/") if k.endswith("/job.yaml")
        }
        if not runs:
            return None
        run = max(runs)  # a run's name begins with its start
        job = yaml.safe_load(self.store.get(f"{RUNS}/{run}/job.yaml"))
        job.pop("versions", None)
        return LastJob(run=run, job=job)

    def last_success(self) -> datetime | None:
        """When the newest run that finished (exit code 0 or 3) ended; looks at a month of runs."""
        keys = [k for k in self.store.list_keys(RUNS + "/") if k.endswith("/summary.json")]
        for key in sorted(keys, reverse=True)[:LOOK_BACK]:
            summary = json.loads(self.store.get(key))
            if summary["exit_code"] in (0, 3):
                started = datetime.fromisoformat(summary["started_at"])
                return started + timedelta(seconds=summary["elapsed_s"])
        return None

    def write_event(self, run: str, writer: str, n: int, lines: Sequence[str]) -> None:
        """Writes the `n`-th batch of a writer's JSON lines as one whole object."""
        key = f"{RUNS}/{_name(run)}/events/{_name(writer)}-{n:06d}.jsonl"
        self._create(key, "".join(line + "\n" for line in lines).encode())

    def finish_run(
        self, run: str, summary: Mapping[str, Any], row: Mapping[str, Any] | None = None
    ) -> None:
        """Writes `runs/<run>/summary.json` and, with `row`, the run's row of the table `runs`.

        Raises:
            ValueError: `row` has a column that the table has not.
        """
        data = json.dumps(summary, indent=1, default=str).encode()
        self._create(f"{RUNS}/{_name(run)}/summary.json", data)
        if row is not None:
            self._put_row("runs", run, {"run": run, **row})

    def write_models(self, outputs: Sequence[Output], run: str) -> None:
        """Registers the models of some outputs in the table `models`, each once for ever."""
        for output in outputs:
            spec = output.spec
            if spec is not None:
                row = {
                    "fingerprint": output.fingerprint,
                    "name": spec.name,
                    "version": spec.version,
                    "model": output.partition,
                    "adapter": spec.adapter,
                    "kind": spec.kind,
                    "dim": spec.dim,
                    "normalised": spec.normalised,
                    "labels": list(spec.labels),
                    "thresholds": spec.thresholds,
                    "weights_sha256": json.dumps(dict(spec.weights_sha256), sort_keys=True),
                    "config": spec.config,
                    "first_run": run,
                }
                self._put_row("models", output.fingerprint, row)

    def model_names(self) -> set[str]:
        """Names of the models that ever ran here; reads the few small files of `models`."""
        keys = list(self.store.list_keys(f"{ROOT}/models/"))
        return {n for data in fetch(self.store, keys) for n in read(data)["name"].to_pylist()}

    def _put_row(self, table: str, name: str, row: Mapping[str, Any]) -> None:
        unknown = row.keys() - set(SCHEMAS[table].names)
        if unknown:
            raise ValueError(f"table {table} has no column {sorted(unknown)}")
        rows = pa.Table.from_pylist([dict(row)], schema=SCHEMAS[table])
        self._create(record_key(table, _name(name)), encode(table, rows, file_metadata(table)))

    def _create(self, key: str, data: bytes) -> bool:
        """Whether this call made the object; False: one is there already, and stays."""
        try:
            self.store.put_new(key, data)
        except ExistsInStore:
            return False
        return True


def _name(text: str) -> str:
    """`text` if it may be one level of a key. Raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} cannot be part of a key")
    return text
