"""Plan log, the rules of an output, the run folder: one behaviour of the ledger at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml

from tests.ledger_steps import SCENE, attempt, bucket_of, ledger_of, plan, rows_in
from tests.made_rows import (
    NOW,
    SAMPLING,
    make_clips,
    make_outcome,
    make_output,
    make_task,
    make_video,
)
from tests.memory_store import Bucket, Faults, MemoryStore
from vidbatch.data import Task, Video
from vidbatch.errors import ExistsInStore, InfraError, RefusedError
from vidbatch.ledger import Ledger, PlanLog
from vidbatch.tables import (
    SCHEMAS,
    encode,
    read,
)

RULES = {"date": {"from": "modified", "tz": "UTC"}, "store": {"create_only": True}}


# the output


def test_the_first_run_pins_the_rules() -> None:
    ledger = ledger_of()
    assert ledger.pinned() is None
    assert ledger.pin(RULES) == {"schema_version": 1, **RULES}
    assert ledger.pin(RULES | {"store": "probed again"})["store"] == RULES["store"]
    with pytest.raises(
        RefusedError, match=r'"tz": "UTC".*"tz": "Europe/Berlin".*keep archive.date'
    ):
        ledger.pin({"date": {"from": "modified", "tz": "Europe/Berlin"}})


def test_another_schema_is_refused() -> None:
    ledger = ledger_of()
    body = json.dumps({"schema_version": 2, "date": {}}).encode()
    ledger.store.put_new("_vidbatch/output.json", body)
    with pytest.raises(RefusedError, match="has tables of schema 2, this vidbatch writes 1"):
        ledger.pin(RULES)


def test_two_first_runs_agree_on_one_rule() -> None:
    bucket = Bucket()
    other = {"date": {"from": "container", "tz": "UTC"}}

    def overtake() -> None:
        if not bucket.objects:
            Ledger(MemoryStore(bucket)).pin(other)

    slow = MemoryStore(bucket, on_request=overtake)
    with pytest.raises(RefusedError, match="container"):
        Ledger(slow).pin(RULES)


def test_first_files_are_written_once() -> None:
    ledger = ledger_of()
    ledger.first_files({"README.md": b"tables", "views/duckdb.sql": b"select 1"})
    ledger.first_files({"README.md": b"other"})
    bucket = bucket_of(ledger)
    assert bucket.objects["README.md"][0] == b"tables"
    for table in SCHEMAS:
        (data,) = bucket.parts(table).values()
        assert read(data).replace_schema_metadata(None).schema.equals(SCHEMAS[table])


# the plan log


def test_a_log_gives_back_its_tasks() -> None:
    a, b = make_video("a"), replace(make_video("b"), captured_at=NOW, captured_from="key")
    tasks = [
        make_task(*make_clips(a, 5, 2)),
        make_task(*make_clips(b, 3)),
        make_task(make_clips(b, 3)[0], generation=1, output="f" * 64),
    ]
    ledger = ledger_of()
    plan(ledger, *tasks)
    log = ledger.read_plan(SAMPLING)
    assert list(log.tasks()) == tasks
    assert list(log.tasks([2, 0])) == [tasks[2], tasks[0]]
    assert log.task(1) == tasks[1]
    assert log.task_ids.to_pylist() == [t.task_id for t in tasks]
    assert log.clip_counts.tolist() == [3, 1, 1]
    assert log.generations.tolist() == [0, 0, 1]
    assert (len(log), log.num_clips, log.num_chunks) == (3, 5, 1)
    assert log.knows([b.video_id, "x", a.video_id]).tolist() == [True, False, True]
    assert ledger.samplings() == [SAMPLING]


def test_an_empty_log_has_nothing_to_do() -> None:
    log = ledger_of().read_plan(SAMPLING)
    assert (len(log), log.num_clips, log.num_chunks) == (0, 0, 0)
    assert not list(log.tasks())
    assert log.task_ids.to_pylist() == log.generations.tolist() == []
    assert log.todo("f", []).tolist() == []
    assert not log.knows(["a"]).any()
    assert ledger_of().append_plan(log, lambda log: []) is log


def test_many_tasks_come_in_order_whatever_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidbatch.ledger.plan_log._SLICE_CLIPS", 3)
    tasks = [make_task(*make_clips(make_video(f"v{n}"), n % 5 + 1, 1)) for n in range(12)]
    ledger = ledger_of()
    plan(ledger, *tasks)
    assert list(ledger.read_plan(SAMPLING).tasks()) == tasks


def test_a_lost_race_is_planned_again_on_what_won() -> None:
    bucket = Bucket()
    videos = [make_video(name) for name in "abc"]

    def planner(frames: int, listed: list[Video]) -> Callable[[PlanLog], list[Task]]:
        return lambda log: [
            make_task(*make_clips(v, 6, frames)) for v in listed if not log.knows([v.video_id])
        ]

    first, second = ledger_of(bucket), ledger_of(bucket)
    stale = second.read_plan(SAMPLING)
    won = first.append_plan(first.read_plan(SAMPLING), planner(2, videos[:2]))
    log = second.append_plan(stale, planner(3, videos))
    assert log.num_chunks == 2
    assert [len(t.clips) for t in log.tasks()] == [3, 3, 2]  # a, b as the first one cut them
    assert list(won.tasks()) == list(log.tasks())[:2]
    assert [t.task_id for t in first.read_plan(SAMPLING).tasks()] == log.task_ids.to_pylist()


def test_an_answer_that_was_lost_plans_nothing_twice() -> None:
    ledger = ledger_of(faults=Faults(answer_lost=frozenset({1})))
    assert plan(ledger, make_task(*make_clips(make_video(), 2))).num_chunks == 1
    assert len(bucket_of(ledger).objects) == 1


def test_a_video_is_cut_once_for_ever() -> None:
    ledger = ledger_of()
    log = plan(ledger, make_task(*make_clips(make_video(), 6, 3)))
    with pytest.raises(ValueError, match="planned again"):
        ledger.append_plan(log, lambda log: [make_task(*make_clips(make_video(), 6, 2))])
    with pytest.raises(ValueError, match="is not of sampling"):
        task = make_task(*make_clips(make_video("b"), 6))
        ledger.append_plan(log, lambda log: [replace(task, sampling="0" * 64)])


def test_a_gap_or_a_newer_plan_stops_the_run() -> None:
    ledger = ledger_of()
    plan(ledger, make_task(*make_clips(make_video(), 2)))
    ledger.store.put_new(f"_vidbatch/plans/{SAMPLING}/00000002.parquet", b"x")
    with pytest.raises(InfraError, match=r"gap or a stranger at .*00000001"):
        ledger.read_plan(SAMPLING)
    other = ledger_of()
    data = encode("runs", SCHEMAS["runs"].empty_table(), {"vidbatch.plan_version": "2"})
    other.store.put_new(f"_vidbatch/plans/{SAMPLING}/00000000.parquet", data)
    with pytest.raises(InfraError, match="is a plan of version 2, this vidbatch knows 1"):
        other.read_plan(SAMPLING)


def test_what_is_to_do_follows_from_lists_alone() -> None:
    ledger = ledger_of()
    a, b = make_video("a"), make_video("b")
    first, second = make_task(*make_clips(a, 2)), make_task(*make_clips(b, 2))
    log = plan(ledger, first, second)
    frames = make_output()
    attempt(ledger, first, frames, [make_outcome(first.clips[0], 2)])
    store = ledger.store
    assert isinstance(store, MemoryStore)
    store.gets.clear()
    done = {o.fingerprint: ledger.done(o.fingerprint) for o in (frames, SCENE)}
    assert store.gets == []
    assert done == {frames.fingerprint: {first.task_id}, SCENE.fingerprint: set()}
    assert [log.todo(*item).tolist() for item in done.items()] == [[1], [0, 1]]
    assert log.todo(SCENE.fingerprint, [], [b.video_id]).tolist() == [1]
    assert log.todo(SCENE.fingerprint, [], []).tolist() == []


# runs


def test_the_run_folder() -> None:
    ledger = ledger_of()
    ledger.start_run("20260302-ab", {"sample": {"fps": "1/2"}, "models": ["quality"]})
    ledger.write_event("20260302-ab", "driver", 0, ['{"event":"start"}', '{"event":"end"}'])
    row = {"job": "nightly", "started_at": NOW, "exit_code": 0, "spans_ok": 3}
    ledger.finish_run("20260302-ab", {"clips": 3, "at": NOW}, row)
    objects = {k: v[0] for k, v in bucket_of(ledger).objects.items()}
    folder = "_vidbatch/runs/20260302-ab"
    assert yaml.safe_load(objects[f"{folder}/job.yaml"])["sample"] == {"fps": "1/2"}
    assert objects[f"{folder}/events/driver-000000.jsonl"].count(b"\n") == 2
    assert json.loads(objects[f"{folder}/summary.json"])["clips"] == 3
    (run,) = rows_in(bucket_of(ledger), "runs")
    assert (run["run"], run["spans_ok"], run["started_at"]) == ("20260302-ab", 3, NOW)
    with pytest.raises(ExistsInStore):
        ledger.start_run("20260302-ab", {})
    with pytest.raises(ValueError, match="no column"):
        ledger.finish_run("20260302-ac", {}, {"hours": 3})
    with pytest.raises(ValueError, match="cannot be part of a key"):
        ledger.start_run("../x", {})


def test_a_model_is_registered_once() -> None:
    ledger = ledger_of()
    ledger.write_models([make_output(), SCENE], "r1")
    ledger.write_models([SCENE], "r2")
    (model,) = rows_in(bucket_of(ledger), "models")
    assert model["first_run"] == "r1"
    assert model["model"] == SCENE.partition
    assert model["fingerprint"] == SCENE.fingerprint
    assert model["labels"] == ["bike", "car", "dog"]
