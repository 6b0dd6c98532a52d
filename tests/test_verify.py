"""What `verify` proves and what it finds: every kind of damage is made once and must be named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.ledger_steps import SCENE, attempt
from tests.made_rows import (
    NOW,
    PARTITION,
    SAMPLING,
    make_clips,
    make_outcome,
    make_output,
    make_task,
    make_video,
)
from tests.memory_store import Bucket, Faults, Killed, MemoryStore
from vidbatch.ledger import Ledger
from vidbatch.storage import open_store
from vidbatch.tables import encode, file_metadata, part_key, read
from vidbatch.verify import SWEEP_AFTER_S, OutputCount, sweep, verify

CLIPS = make_clips(make_video(), 8, 2)
TASK = make_task(*CLIPS)
OTHER = make_task(*make_clips(make_video("b"), 2))


@pytest.fixture
def bucket() -> Bucket:
    """`frames` and `scene` of one task committed, a second task planned, a run and a model."""
    bucket = Bucket()
    ledger = Ledger(MemoryStore(bucket))
    ledger.first_files({})
    log = ledger.read_plan(SAMPLING)
    ledger.append_plan(log, lambda log: [TASK, OTHER] if not len(log) else [])
    outcomes = [
        make_outcome(CLIPS[0], 2),
        make_outcome(CLIPS[1], 1, "partial"),
        make_outcome(CLIPS[2], 2, "failed", retryable=True),
        make_outcome(CLIPS[3], 2),
    ]
    for output in (make_output(), SCENE):
        attempt(ledger, TASK, output, outcomes)
    ledger.write_models([SCENE], "r")
    ledger.finish_run("r", {}, {"job": "nightly"})
    return bucket


def problems(bucket: Bucket) -> str:
    return "\n".join(verify(Ledger(MemoryStore(bucket))).problems)


def key_of(table: str, task_id: str = TASK.task_id) -> str:
    return part_key(table, PARTITION, SCENE.partition, TASK.dt, task_id)


def test_a_sound_output_is_proved(bucket: Bucket) -> None:
    report = verify(Ledger(MemoryStore(bucket)))
    assert report.ok, report.problems
    assert report.uncommitted == ()
    counts = {"planned": 5, "ok": 2, "partial": 1, "failed": 1, "pending": 1}
    assert set(report.outputs) == {
        OutputCount(sample=PARTITION, model=model, **counts)
        for model in ("frames", SCENE.partition)
    }
    assert report.rows["frames"] == 5
    assert report.rows["coverage"] == 8
    assert report.files == 4 + 4 + 2


def test_the_same_on_disk(tmp_path: Path) -> None:
    ledger = Ledger(open_store(str(tmp_path / "out")))
    ledger.first_files({"README.md": b"tables"})
    ledger.append_plan(ledger.read_plan(SAMPLING), lambda log: [] if len(log) else [OTHER])
    statuses = [
        attempt(ledger, OTHER, SCENE, [make_outcome(OTHER.clips[0], 2)], seed=n, number=n).status
        for n in (0, 1)
    ]
    assert statuses == ["new", "exists"]
    report = verify(ledger)
    assert report.ok
    assert [count.ok for count in report.outputs] == [1]
    assert sweep(ledger).removed == ()


def test_a_retry_counts_its_clips_once(bucket: Bucket) -> None:
    ledger = Ledger(MemoryStore(bucket))
    log = ledger.append_plan(ledger.read_plan(SAMPLING), lambda log: ledger.retry_tasks(log, SCENE))
    again = log.task(len(log) - 1)
    attempt(ledger, again, SCENE, [make_outcome(CLIPS[2], 2)])
    report = verify(ledger)
    assert report.ok
    (count,) = (c for c in report.outputs if c.model == SCENE.partition)
    assert (count.planned, count.ok, count.failed, count.pending) == (5, 3, 0, 1)


def test_files_of_an_attempt_under_way_are_named_not_wrong(bucket: Bucket) -> None:
    for output in (make_output(), SCENE):
        with pytest.raises(Killed):
            attempt(
                Ledger(MemoryStore(bucket, Faults(kill_before=3))),
                OTHER, output, [make_outcome(OTHER.clips[0], 2)],
            )  # fmt: skip
    ledger = Ledger(MemoryStore(bucket))
    report = verify(ledger)
    assert report.ok
    assert len(report.uncommitted) == 4
    assert all(OTHER.task_id in key for key in report.uncommitted)
    assert sweep(ledger).uncommitted == report.uncommitted


def lose(bucket: Bucket) -> str:
    del bucket.objects[key_of("features")]
    return "is committed and gone"


def cut(bucket: Bucket) -> str:
    data, metadata = bucket.objects[key_of("features")]
    bucket.objects[key_of("features")] = data[:-9], metadata
    return "no whole Parquet file"


def flip(bucket: Bucket) -> str:
    data, metadata = bucket.objects[key_of("features")]
    bucket.objects[key_of("features")] = data.replace(b'"0.1.0"', b'"0.1.9"'), metadata
    return "not the object that its record describes"


def double(bucket: Bucket) -> str:
    """What a task renamed by hand would do."""
    table = read(bucket.objects[key_of("features")][0]).replace_schema_metadata(None)
    metadata = file_metadata("features", output=SCENE, sampling=PARTITION, task=OTHER)
    data = encode("features", table, metadata)
    bucket.create(key_of("features", OTHER.task_id), data, {})
    return "stands in it twice"


def smuggle(bucket: Bucket) -> str:
    """A table that the record of the task does not know."""
    table = read(bucket.objects[key_of("coverage")][0]).replace_schema_metadata(None)
    metadata = file_metadata("coverage", output=SCENE, sampling=PARTITION, task=TASK)
    key = part_key("labels", PARTITION, SCENE.partition, TASK.dt, TASK.task_id)
    bucket.create(key, encode("coverage", table, metadata), {})
    return "is not in the record of its task"


def unplan(bucket: Bucket) -> str:
    del bucket.objects[f"_vidbatch/plans/{SAMPLING}/00000000.parquet"]
    return "is in no plan"


def recount(bucket: Bucket) -> str:
    """A record that claims other outcomes than the tables hold."""
    key = f"_vidbatch/commits/{SCENE.fingerprint}/{TASK.task_id}.json"
    data, metadata = bucket.objects[key]
    bucket.objects[key] = data.replace(b'"failed"', b'"ok"'), metadata
    return "does not account for the clips of its task"


@pytest.mark.parametrize("damage", [lose, cut, flip, double, smuggle, unplan, recount])
def test_damage_is_named(bucket: Bucket, damage: Callable[[Bucket], str]) -> None:
    expected = damage(bucket)
    assert expected in problems(bucket)


def test_sweep_removes_old_temporary_files_alone(bucket: Bucket) -> None:
    bucket.create("_vidbatch/tmp/1f", b"half", {})
    ledger = Ledger(MemoryStore(bucket))
    written = next(e for e in ledger.store.list("_vidbatch/tmp/")).modified_at
    assert sweep(ledger, now=written + timedelta(seconds=SWEEP_AFTER_S)).removed == ()
    report = sweep(ledger, now=written + timedelta(seconds=SWEEP_AFTER_S + 1))
    assert report.removed == ("_vidbatch/tmp/1f",)
    assert bucket.removed == ["_vidbatch/tmp/1f"]
    assert written < NOW
