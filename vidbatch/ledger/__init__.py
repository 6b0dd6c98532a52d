"""What is planned, what is done, what failed: the records of one output folder.

plan_log   clips and tasks, cut once per sampling rule
commit     part files and the record that makes them count
parents    boxes that rows of a model on them may refer to
retries    failed clips that come back
runs       run folders, and the tables `models` and `runs`
fetch      many small objects at once

All of it lies under `_vidbatch/`, which no reader of the tables needs, and every object is
create-only: many drivers and workers may run at once, and any may be killed at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from vidbatch.data import Outcome, Output, Task
from vidbatch.errors import InfraError, NotFoundInStore, RefusedError
from vidbatch.ledger.commit import (
    COMMITS,
    MIXED,
    Commit,
    CommitRecord,
    CommitResult,
    PartFile,
    record_path,
)
from vidbatch.ledger.fetch import fetch
from vidbatch.ledger.parents import KEY, Boxes
from vidbatch.ledger.plan_log import PlanLog, decode_chunk, encode_chunk
from vidbatch.ledger.retries import MAX_GENERATION, RETRIES, retry_tasks
from vidbatch.ledger.runs import LastJob, Runs
from vidbatch.tables import (
    SCHEMA_VERSION,
    SCHEMAS,
    empty_part_key,
    encode,
    file_metadata,
    outcomes_from_json,
    read,
)

__all__ = [
    "COMMITS",
    "MAX_GENERATION",
    "MIXED",
    "PLANS",
    "RETRIES",
    "Boxes",
    "CommitRecord",
    "CommitResult",
    "LastJob",
    "Ledger",
    "PartFile",
    "PlanLog",
]

PLANS = "_vidbatch/plans"
OUTPUT = "_vidbatch/output.json"


class Ledger(Runs):
    """The records below one output root. Holds nothing but the store; safe to make anywhere."""

    # the output as a whole

    def pinned(self) -> dict[str, Any] | None:
        """What the first run fixed for this output, or None before it.

        Raises:
            RefusedError: a newer vidbatch wrote the output.
        """
        try:
            rules: dict[str, Any] = json.loads(self.store.get(OUTPUT))
        except NotFoundInStore:
            return None
        if rules["schema_version"] != SCHEMA_VERSION:
            raise RefusedError(
                f"{self.store.uri} has tables of schema {rules['schema_version']}, this vidbatch "
                f"writes {SCHEMA_VERSION} — nothing was started — use the vidbatch that wrote it, "
                "or another output.uri",
                kind="schema_version",
            )
        return rules

    def pin(self, rules: Mapping[str, Any]) -> dict[str, Any]:
        """Fixes the rules of the output if no run has yet; gives those that hold.

        Args:
            rules: plain JSON values: `date` (the date rule and its time zone), which every later
                run must repeat, and facts such as `store` (the verdict of the probe), which are
                the first run's.

        Raises:
            RefusedError: the output was begun with another date rule or by a newer vidbatch.
        """
        held = self.pinned()
        if held is None:
            offer = {"schema_version": SCHEMA_VERSION, **rules}
            data = json.dumps(offer, indent=1, sort_keys=True).encode()
            self._create(OUTPUT, data)
            held = self.pinned()
            if held is None:
                raise InfraError(f"{self.store.uri}/{OUTPUT} is gone again", kind="store_lies")
        self._same_date(held, rules)
        return held

    def check(self, rules: Mapping[str, Any]) -> None:
        """Like `pin`, but writes nothing: for commands that only look.

        Raises:
            RefusedError: the output was begun with another date rule or by a newer vidbatch.
        """
        held = self.pinned()
        if held is not None:
            self._same_date(held, rules)

    def _same_date(self, held: Mapping[str, Any], rules: Mapping[str, Any]) -> None:
        if held["date"] != json.loads(json.dumps(rules["date"])):
            raise RefusedError(
                f"{self.store.uri} is dated by {json.dumps(held['date'], sort_keys=True)}, the job "
                f"says {json.dumps(rules['date'], sort_keys=True)} — nothing was started: one "
                "video would stand under two dates — keep archive.date, or use another output.uri",
                kind="date_rule",
            )

    def first_files(self, files: Mapping[str, bytes]) -> None:
        """Writes a file without rows for every table, and `files` (key → bytes), create-only.

        Called before `pin`: where the output is pinned, they are there.
        """
        for name, schema in SCHEMAS.items():
            data = encode(name, schema.empty_table(), file_metadata(name))
            self._create(empty_part_key(name), data)
        for key, data in files.items():
            self._create(key, data)

    # the plan

    def samplings(self) -> list[str]:
        """Fingerprints of the sampling rules that have a plan here."""
        return sorted({k.split("/")[2] for k in self.store.list_keys(PLANS + "/")})

    def read_plan(self, sampling: str) -> PlanLog:
        """The plan log of a sampling rule (its fingerprint), empty if there is none.

        Raises:
            InfraError: a chunk is missing or was written by a newer vidbatch.
        """
        prefix = f"{PLANS}/{sampling}/"
        keys = sorted(self.store.list_keys(prefix))
        expected = [_chunk_key(sampling, n) for n in range(len(keys))]
        if keys != expected:
            odd = sorted(set(keys) ^ set(expected))[0]
            raise InfraError(
                f"the plan log {prefix} has a gap or a stranger at {odd} — nothing was planned: "
                "clips could be cut twice — restore the object from a backup",
                kind="plan_gap",
            )
        bodies = fetch(self.store, keys)
        chunks = [decode_chunk(data, key) for key, data in zip(keys, bodies, strict=True)]
        return PlanLog(sampling, chunks)

    def append_plan(self, log: PlanLog, plan_new: Callable[[PlanLog], Sequence[Task]]) -> PlanLog:
        """Adds tasks to the log; another driver's chunk, if it came first, is read and planned on.

        Args:
            log: as far as it is known; it may be out of date.
            plan_new: the tasks to add to a log: videos it does not know, or retries it does not
                have. Called again after every lost race; pure but for its argument.

        Returns:
            The log with all chunks up to the new one; as it was found where nothing is to add.

        Raises:
            ValueError: a new task cuts a video that the log knows.
        """
        while tasks := plan_new(log):
            fresh = sorted({c.video.video_id for t in tasks if t.generation == 0 for c in t.clips})
            if log.knows(fresh).any():
                raise ValueError("a video of the log was planned again; its clips would overlap")
            key = _chunk_key(log.sampling, log.num_chunks)
            data = encode_chunk(log.sampling, tasks)
            created = self._create(key, data)
            found = data if created else self.store.get(key)
            log = log.extended(decode_chunk(found, key))
            if found == data:
                return log
        return log

    def retry_tasks(
        self,
        log: PlanLog,
        output: Output,
        *,
        done: Collection[str] | None = None,
        kinds: Collection[str] | None = None,
        max_generation: int | None = MAX_GENERATION,
        listed: Collection[str] | None = None,
    ) -> list[Task]:
        """Tasks, not yet in the log, for the clips whose newest generation failed retryably.

        A retry holds the failed clips of one task, names the output and goes into the log by
        `append_plan(log, lambda log: ledger.retry_tasks(log, output))`.

        Args:
            done: `self.done(output.fingerprint)` if at hand.
            kinds: only failures of these kinds (`vidbatch retry --kind`).
            max_generation: retries beyond it are left to a person; None: any.
            listed: video_ids; clips of other videos are left out.
        """
        committed = self.done(output.fingerprint) if done is None else done
        return retry_tasks(
            self.store,
            log,
            output,
            done=committed,
            kinds=kinds,
            max_generation=max_generation,
            listed=listed,
        )

    # commits

    def outputs(self) -> list[str]:
        """Fingerprints of the outputs that have commits."""
        return sorted({k.split("/")[2] for k in self.store.list_keys(COMMITS + "/")})

    def done(self, output: str) -> set[str]:
        """Ids of the tasks an output (its fingerprint) has committed: one LIST, no body read."""
        keys = self.store.list_keys(f"{COMMITS}/{output}/")
        return {PurePosixPath(key).stem for key in keys}

    def records(self, output: str) -> Iterator[CommitRecord]:
        """Every commit record of an output (its fingerprint), by task id; reads all bodies."""
        keys = list(self.store.list_keys(f"{COMMITS}/{output}/"))
        for key, data in zip(keys, fetch(self.store, keys), strict=True):
            yield CommitRecord.from_json(data, key)

    def boxes(self, output: Output, task: Task) -> Boxes | None:
        """The detections that an output has committed for a task; None if it has not.

        Raises:
            StoreError: the store does not answer.
            InfraError: what it holds is no record or part.
        """
        path = record_path(output.fingerprint, task.task_id)
        try:
            record = CommitRecord.from_json(self.store.get(path), path)
        except NotFoundInStore:
            return None
        parts = [self.store.get(f.key) for f in record.files if f.table == "detections"]
        return Boxes(
            model=record.model,
            keys=pa.concat_tables(read(part, columns=KEY) for part in parts),
            outcomes=outcomes_from_json(record.outcomes, task),
        )

    def commit(
        self,
        task: Task,
        output: Output,
        tables: Mapping[str, pa.Table],
        outcomes: Sequence[Outcome],
        *,
        sampling_partition: str,
        run: str,
        attempt: int,
        versions: Mapping[str, str],
    ) -> CommitResult:
        """Makes one output of one task count: parts, then the record; safe to repeat, at any time.

        What an earlier attempt has left is adopted: this attempt's rows give way where they do
        not go with it, and result and record describe the objects found.

        Args:
            tables: of `OutputRows.finish`, with the `outcomes` it was given.
            sampling_partition: the value of `sample=`.
            attempt: counts the attempts at the task within the run.
            versions: of the software, for the files' metadata.

        Raises:
            ExistsInStore: kind `alien_part`: under a part's name lies something else.
            InfraError: a part failed its check; nothing of it was put.
            StoreError: the store failed; calling again finishes what was begun.
        """
        return Commit(
            self.store,
            task,
            output,
            tables,
            outcomes,
            sampling_partition=sampling_partition,
            run=run,
            attempt=attempt,
            versions=versions,
        ).run_through()


def _chunk_key(sampling: str, n: int) -> str:
    return f"{PLANS}/{sampling}/{n:08d}.parquet"
