"""What a tracker is made from: the committed outputs of one output folder, and how clips ended."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidbatch.data import Clip, Ints, Outcome, Singles, Task
from vidbatch.errors import UsageError
from vidbatch.ledger import COMMITS, MAX_GENERATION, CommitRecord, Ledger, PlanLog
from vidbatch.ledger.commit import record_path
from vidbatch.ledger.fetch import fetch
from vidbatch.tables import ROOT, outcomes_from_json, read

RATE_TASKS = 100
"""Tasks that the rate of samples is measured on: ids are hashes, so the first are a fair choice."""

_KEPT = 16
"""Records and part files in memory: clips of a video lie next to each other in the plan."""

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model under a sampling rule that has commits."""

    name: str
    partition: str
    """The value of `model=`."""
    fingerprint: str
    """Of the output."""
    dim: int
    first_run: str
    sampling: str
    """Fingerprint of the sampling rule."""
    sample: str
    """The value of `sample=`."""
    tables: frozenset[str]


def holdings(ledger: Ledger) -> list[Held]:
    """The models of an output that have committed anything, oldest first."""
    keys = list(ledger.store.list_keys(f"{ROOT}/models/"))
    rows = [row for data in fetch(ledger.store, keys) for row in read(data).to_pylist()]
    found = []
    for row in sorted(rows, key=lambda r: (r["first_run"] or "", r["model"])):
        prefix = f"{COMMITS}/{row['fingerprint']}/"
        key = next(iter(ledger.store.list_keys(prefix)), None)
        if key is None:
            continue
        record = CommitRecord.from_json(ledger.store.get(key), key)
        found.append(
            Held(
                name=row["name"],
                partition=row["model"],
                fingerprint=row["fingerprint"],
                dim=row["dim"] or 0,
                first_run=row["first_run"] or "",
                sampling=record.sampling,
                sample=record.sample,
                tables=frozenset(part.table for part in record.files),
            )
        )
    return found


def pick(found: Sequence[Held], what: str, *, name: str | None, sample: str | None) -> Held:
    """The one that is meant: by name and rule, or the only one; of its versions the newest.

    Args:
        found: those that may be meant.
        what: what they are, for the message.
        sample: the value of `sample=` or its beginning.

    Raises:
        UsageError: there is none, or more than one name or rule to choose from.
    """
    fits = [h for h in found if name in (None, h.name) and h.sample.startswith(sample or "")]
    if not fits:
        there = ", ".join(sorted({f"{h.name} under {h.sample}" for h in found})) or "none at all"
        wanted = f"{name or 'any model'} under {sample or 'any rule'}"
        raise UsageError(f"no {what} of {wanted} — nothing was written — there are: {there}")
    for option, values in (
        ("--model", {h.name for h in fits}),
        ("--sample", {h.sample for h in fits}),
    ):
        if len(values) > 1:
            raise UsageError(
                f"{what} are there of {', '.join(sorted(values))} — nothing was written — say "
                f"which: {option}"
            )
    return fits[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a clip ended last in one output."""

    outcome: Outcome
    record: CommitRecord
    """Of the task that says so: its files hold the clip's rows."""
    final: bool
    """Whether no run will bring it back by itself."""

    @property
    def committed_at(self) -> datetime:
        """When its record was written."""
        return datetime.fromisoformat(self.record.committed_at)


ClipKey = tuple[str, int]
"""video_id and first_keyframe."""


def key_of(clip: Clip) -> ClipKey:
    """Names a clip within a sampling rule."""
    return clip.video.video_id, clip.first_keyframe


class Source:
    """One output as a tracker reads it: how clips ended, and their rows; keeps the last few."""

    def __init__(self, ledger: Ledger, log: PlanLog, held: Held) -> None:
        self.ledger, self.held = ledger, held
        self.done = ledger.done(held.fingerprint)
        self._later: defaultdict[ClipKey, list[End | None]] = defaultdict(list)
        self._ends: OrderedDict[str, dict[ClipKey, End]] = OrderedDict()
        self._parts: OrderedDict[str, pa.Table] = OrderedDict()
        again = log.todo(held.fingerprint, ())
        for task in log.tasks(again[log.generations[again] > 0]):
            ends = self._ends_of(task)
            for clip in task.clips:
                self._later[key_of(clip)].append(ends.get(key_of(clip)))

    def end(self, task: Task, clip: Clip, *, before: datetime | None = None) -> End | None:
        """How a clip ended for good, or None while it may still come, or come again, by itself.

        Args:
            task: the one of generation 0 that the clip is of.
            before: as it stood then, whatever a person has had retried since.
        """
        ends = _kept(self._ends, task.task_id, lambda: self._ends_of(task))
        history = [ends.get(key_of(clip)), *self._later.get(key_of(clip), ())]
        if before is not None:
            history = [end for end in history if end is not None and end.committed_at <= before]
        end = history[-1] if history else None
        return end if end is not None and end.final else None

    def _ends_of(self, task: Task) -> dict[ClipKey, End]:
        """The ends as the record of one task has them; none before it is committed."""
        if task.task_id not in self.done:
            return {}
        record = read_record(self.ledger, self.held.fingerprint, task)
        over = task.generation >= MAX_GENERATION
        return {
            key_of(o.clip): End(
                outcome=o, record=record, final=o.status != "failed" or not o.retryable or over
            )
            for o in outcomes_from_json(record.outcomes, task)
        }

    def rows(self, table: str, end: End, columns: Sequence[str]) -> pa.Table:
        """The part file that holds a clip's rows of a table, whole."""
        key = next(part.key for part in end.record.files if part.table == table)
        return _kept(
            self._parts, key, lambda: read(self.ledger.store.get(key), columns=list(columns))
        )

    def cured(self) -> set[ClipKey]:
        """Clips that failed at first and have rows by now."""
        return {
            key
            for key, ends in self._later.items()
            if ends[-1] is not None and ends[-1].outcome.status != "failed"
        }

    def rate_fps(self, log: PlanLog) -> float:
        """Samples a second of the videos, their median over some committed tasks; 0 of nothing."""
        rates: list[float] = []
        for task in log.tasks(log.positions_of(sorted(self.done)[:RATE_TASKS])):
            by_video: defaultdict[str, list[Outcome]] = defaultdict(list)
            for (video_id, _), end in self._ends_of(task).items():
                if end.outcome.status != "failed":
                    by_video[video_id].append(end.outcome)
            rates += [clips_fps(outcomes) for outcomes in by_video.values()]
        return median(rates) if rates else 0.0


def read_record(ledger: Ledger, output: str, task: Task) -> CommitRecord:
    """The record of a task that an output (its fingerprint) has committed."""
    path = record_path(output, task.task_id)
    return CommitRecord.from_json(ledger.store.get(path), path)


def clips_fps(outcomes: Sequence[Outcome]) -> float:
    """Samples a second over some clips."""
    seconds = sum(o.end_s - o.start_s for o in outcomes)
    return sum(o.frames for o in outcomes) / max(seconds, 1e-3)


def crop_embeddings(ledger: Ledger, found: Sequence[Held], of: Held) -> list[Held]:
    """The models that give embeddings of a detector's boxes, as their rows say, oldest first."""
    return [
        held
        for held in found
        if "embeddings" in held.tables
        and held.sampling == of.sampling
        and _is_of(ledger, held, of.partition)
    ]


def _is_of(ledger: Ledger, held: Held, partition: str) -> bool:
    """Whether the first embedding that is there is one of those boxes."""
    for record in ledger.records(held.fingerprint):
        for part in record.files:
            if part.table == "embeddings" and part.rows:
                parents = read(ledger.store.get(part.key), columns=["of_model"])["of_model"]
                return bool(parents[0].as_py() == partition)
    return False


def looks_of(table: pa.Table, of: Held, dim: int, boxes: pa.Table) -> Singles:
    """(M, dim) the embedding of each of a video's boxes, of unit length; NaN where there is none.

    Args:
        table: rows of `embeddings`, of any videos.
        boxes: M rows of `detections` of one video.
    """
    looks = np.full((len(boxes), dim), np.nan, np.float32)
    if not len(boxes):
        return looks
    of_boxes = pc.equal(table["of_model"], of.partition)
    of_video = pc.equal(table["video_id"], boxes["video_id"][0])
    rows = table.filter(pc.and_(of_boxes, of_video))
    if not len(rows):
        return looks
    vectors = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    length = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    keys, wanted = _box_keys(rows), _box_keys(boxes)  # ascending: the files are sorted by them
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[at] == wanted
    looks[found] = (vectors / length)[at[found]]
    return looks


def _box_keys(rows: pa.Table) -> Ints:
    """(frame_index, detection_id) as one number: a frame has fewer than 2²⁰ boxes."""
    frame = rows["frame_index"].to_numpy().astype(np.int64)
    keys: Ints = frame * 2**20 + rows["detection_id"].to_numpy().astype(np.int64)
    return keys


def _kept(kept: OrderedDict[str, _V], key: str, make: Callable[[], _V]) -> _V:
    """`kept[key]`, made if it is not there; the oldest beyond a few are let go."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return kept[key]
