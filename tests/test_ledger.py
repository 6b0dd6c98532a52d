"""Plan log, commits, adoption, retries, the run folder: one behaviour of the ledger at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from tests.made_rows import (
    NOW,
    PARTITION,
    SAMPLING,
    VERSIONS,
    make_clips,
    make_frames,
    make_info,
    make_outcome,
    make_output,
    make_predictions,
    make_spec,
    make_task,
    make_video,
)
from tests.memory_store import Bucket, Faults, Killed, MemoryStore
from vidbatch.data import Clip, Outcome, Output, Task, Video
from vidbatch.errors import ExistsInStore, InfraError, RefusedError
from vidbatch.ledger import MIXED, CommitResult, Ledger, PlanLog
from vidbatch.tables import (
    SCHEMAS,
    OutputRows,
    encode,
    file_metadata,
    outcome_tables,
    part_key,
    read,
    read_footer,
)

RULES = {"date": {"from": "modified", "tz": "UTC"}, "store": {"create_only": True}}
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


# commits


def test_a_commit_puts_parents_first_and_the_record_last() -> None:
    ledger = ledger_of()
    (clip,) = make_clips(make_video(), 3)
    task = make_task(clip)
    result = attempt(ledger, task, SCENE, [make_outcome(clip, 3, "partial")])
    assert result.status == "new"
    objects = bucket_of(ledger).objects
    tables = ["detections", "features", "coverage", "failures"]
    record = f"_vidbatch/commits/{SCENE.fingerprint}/{task.task_id}.json"
    assert list(objects) == [
        part_key(t, PARTITION, SCENE.partition, task.dt, task.task_id) for t in tables
    ] + [record]
    assert [f.key for f in result.files] == list(objects)[:-1]
    assert result.rows["features"] == 6
    (body,) = ledger.records(SCENE.fingerprint)
    assert body.files == result.files
    assert (body.model, body.sample, body.generation) == (SCENE.partition, PARTITION, 0)
    key = result.files[0].key
    assert ledger.store.metadata(key)["task"] == task.task_id
    assert read_footer(objects[key][0]).outcomes_of(task) == result.outcomes
    assert ledger.outputs() == [SCENE.fingerprint]


def test_a_commit_done_before_is_found_and_nothing_changes() -> None:
    ledger = ledger_of()
    (clip,) = make_clips(make_video(), 3)
    task = make_task(clip)
    first = attempt(ledger, task, SCENE, [make_outcome(clip, 3)])
    before = dict(bucket_of(ledger).objects)
    again = attempt(
        ledger, task, SCENE, [make_outcome(clip, 3, "failed", retryable=True)], seed=1, number=2
    )
    assert again.status == "exists"
    assert (again.files, again.outcomes, again.rows) == (first.files, first.outcomes, first.rows)
    assert bucket_of(ledger).objects == before


@pytest.mark.parametrize("output", [make_output(), SCENE], ids=["frames", "scene"])
def test_killed_before_any_put_the_next_attempt_finishes(output: Output) -> None:
    clips = make_clips(make_video(), 6, 2)
    task = make_task(*clips)
    outcomes = [
        make_outcome(clips[0], 2),
        make_outcome(clips[1], 2, "failed", retryable=True),
        make_outcome(clips[2], 1, "partial"),
    ]
    calm = ledger_of()
    attempt(calm, task, output, outcomes)
    keys = list(bucket_of(calm).objects)
    for n in range(1, len(keys) + 1):
        bucket = Bucket()
        with pytest.raises(Killed):
            attempt(ledger_of(bucket, Faults(kill_before=n)), task, output, outcomes)
        assert list(bucket.objects) == keys[: n - 1]
        result = attempt(ledger_of(bucket), task, output, outcomes, seed=n, number=2)
        assert list(bucket.objects) == keys
        assert result.status == "adopted" or n == 1 or output is not SCENE
        assert result.outcomes == tuple(outcomes)
        for file in result.files:
            assert len(read(bucket.objects[file.key][0])) == file.rows


def test_an_answer_that_was_lost_is_no_adoption() -> None:
    (clip,) = make_clips(make_video(), 3)
    ledger = ledger_of(faults=Faults(answer_lost=frozenset(range(1, 9))))
    assert attempt(ledger, make_task(clip), SCENE, [make_outcome(clip, 3)]).status == "new"


def test_rows_give_way_to_a_failure_that_stands() -> None:
    """The first attempt failed at a clip and died after its first table."""
    clips = make_clips(make_video(), 4, 2)
    task, bucket = make_task(*clips), Bucket()
    failed = make_outcome(clips[1], 2, "failed", retryable=True, kind="DecoderDied")
    with pytest.raises(Killed):
        attempt(
            ledger_of(bucket, Faults(kill_before=2)), task, SCENE,
            [make_outcome(clips[0], 2), failed],
        )  # fmt: skip
    ledger = ledger_of(bucket)
    result = attempt(ledger, task, SCENE, [make_outcome(clip, 2) for clip in clips], seed=1)
    assert result.status == "adopted"
    assert result.outcomes[1] == failed
    assert {r["frame_index"] for r in rows_in(bucket, "features")} == {0, 1}
    log = plan(ledger, task)
    (again,) = ledger.retry_tasks(log, SCENE)
    assert again.clips == (clips[1],)


def test_rows_that_stand_make_a_later_failure_partial() -> None:
    """The first attempt wrote rows of a clip; the second fails at it and has to write the rest."""
    clips = make_clips(make_video(), 4, 2)
    task, bucket = make_task(*clips), Bucket()
    with pytest.raises(Killed):
        attempt(
            ledger_of(bucket, Faults(kill_before=2)), task, SCENE,
            [make_outcome(clip, 2) for clip in clips],
        )  # fmt: skip
    ledger = ledger_of(bucket)
    outcomes = [
        make_outcome(clips[0], 2, "failed", retryable=True, attempts=3),
        make_outcome(clips[1], 2),
    ]
    result = attempt(ledger, task, SCENE, outcomes, seed=1)
    mixed = result.outcomes[0]
    assert (mixed.status, mixed.kind, mixed.frames, mixed.attempts) == ("partial", MIXED, 2, 3)
    assert not mixed.retryable
    assert {r["frame_index"] for r in rows_in(bucket, "detections")} == {0, 1, 2, 3}
    assert {r["frame_index"] for r in rows_in(bucket, "features")} == {2, 3}
    (failure,) = rows_in(bucket, "failures")
    assert "this one has none for features" in failure["message"]
    assert ledger.retry_tasks(plan(ledger, task), SCENE) == []  # they would double what stands


def test_a_failure_gives_way_where_every_row_stands() -> None:
    (clip,) = make_clips(make_video(), 4)
    task, bucket = make_task(clip), Bucket()
    with pytest.raises(Killed):
        attempt(ledger_of(bucket, Faults(kill_before=3)), task, SCENE, [make_outcome(clip, 4)])
    result = attempt(
        ledger_of(bucket), task, SCENE, [make_outcome(clip, 4, "failed", retryable=True)]
    )
    assert result.outcomes == (make_outcome(clip, 4),)
    assert rows_in(bucket, "coverage")[0]["status"] == "ok"
    assert "failures" not in result.rows


def test_children_without_a_parent_in_the_store_are_left_out() -> None:
    (clip,) = make_clips(make_video(), 2)
    task, bucket = make_task(clip), Bucket()
    output = make_output(make_spec("faces", ("detections", "labels")))
    outcomes = [make_outcome(clip, 2)]
    key = {"video_id": clip.video.video_id, "uri": clip.video.uri, "source": "cam-1"}

    def tables(detections: int) -> dict[str, pa.Table]:
        """Boxes of frame 0, each with a label; and a label of frame 1 itself."""
        box = {"time_s": 0.0, "label": "car", "label_id": 1, "score": 0.5, "x_min": 0.0,
               "y_min": 0.0, "x_max": 1.0, "y_max": 1.0}  # fmt: skip
        boxes = [key | box | {"frame_index": 0, "detection_id": n} for n in range(detections)]
        labels = [row | {"rank": 1} for row in boxes]
        labels.append(key | box | {"frame_index": 1, "time_s": 1.0, "rank": 1})
        made = outcome_tables(task, outcomes, run="r", now=NOW)
        return {
            "detections": pa.Table.from_pylist(boxes, schema=SCHEMAS["detections"]),
            "labels": pa.Table.from_pylist(labels, schema=SCHEMAS["labels"]),
            "coverage": made["coverage"],
        }

    with pytest.raises(Killed):
        commit(ledger_of(bucket, Faults(kill_before=2)), task, output, tables(1), outcomes)
    result = commit(ledger_of(bucket), task, output, tables(3), outcomes)
    assert result.rows == {"detections": 1, "labels": 2, "coverage": 1}
    found = {(r["frame_index"], r["detection_id"]) for r in rows_in(bucket, "labels")}
    assert found == {(0, 0), (1, None)}


def test_a_stranger_under_the_name_of_a_part_is_an_alarm() -> None:
    ledger = ledger_of()
    (clip,) = make_clips(make_video(), 2)
    task, other = make_task(clip), make_task(clip, generation=1)
    key = part_key("detections", PARTITION, SCENE.partition, task.dt, task.task_id)
    metadata = file_metadata("detections", output=SCENE, sampling=PARTITION, task=other)
    data = encode("detections", SCHEMAS["detections"].empty_table(), metadata)
    ledger.store.put_new(key, data)
    with pytest.raises(ExistsInStore, match="says it is") as caught:
        attempt(ledger, task, SCENE, [make_outcome(clip, 2)])
    assert caught.value.kind == "alien_part"
    assert not caught.value.retryable
    assert ledger.done(SCENE.fingerprint) == set()


def test_the_partition_must_be_that_of_the_task() -> None:
    (clip,) = make_clips(make_video(), 2)
    task = make_task(clip)
    with pytest.raises(ValueError, match="is not the partition of"):
        ledger_of().commit(
            task, SCENE, {}, [], sampling_partition="fps2.00000000", run="r", attempt=1, versions={}
        )


# retries


def failed_task(ledger: Ledger, output: Output) -> tuple[PlanLog, Task, tuple[Clip, ...]]:
    """A committed task of four clips: ok, DecoderDied, source_changed (permanent), timeout."""
    clips = make_clips(make_video(), 8, 2)
    task = make_task(*clips)
    log = plan(ledger, task)
    kinds = [("DecoderDied", True), ("source_changed", False), ("timeout", True)]
    outcomes = [make_outcome(clips[0], 2)] + [
        make_outcome(clip, 2, "failed", kind=kind, retryable=retryable)
        for clip, (kind, retryable) in zip(clips[1:], kinds, strict=True)
    ]
    attempt(ledger, task, output, outcomes)
    return log, task, clips


def test_what_failed_retryably_comes_back_for_its_output_alone() -> None:
    ledger = ledger_of()
    log, task, clips = failed_task(ledger, SCENE)
    (again,) = ledger.retry_tasks(log, SCENE)
    assert again.clips == (clips[1], clips[3])
    assert (again.generation, again.output) == (1, SCENE.fingerprint)
    assert again.cost_s == task.cost_s / 2
    assert ledger.retry_tasks(log, make_output()) == []
    log = ledger.append_plan(log, lambda log: ledger.retry_tasks(log, SCENE))
    assert len(log) == 2
    assert ledger.retry_tasks(log, SCENE) == []
    done = {o.fingerprint: ledger.done(o.fingerprint) for o in (make_output(), SCENE)}
    assert [log.todo(*item).tolist() for item in done.items()] == [[0], [1]]


def test_retries_can_be_narrowed() -> None:
    ledger = ledger_of()
    log, _, clips = failed_task(ledger, SCENE)
    (again,) = ledger.retry_tasks(log, SCENE, kinds={"timeout"})
    assert again.clips == (clips[3],)
    assert ledger.retry_tasks(log, SCENE, listed=set()) == []
    assert ledger.retry_tasks(log, SCENE, done=set()) == []  # a marker without its record
    log = ledger.append_plan(log, lambda log: ledger.retry_tasks(log, SCENE, kinds={"timeout"}))
    (rest,) = ledger.retry_tasks(log, SCENE)
    assert rest.clips == (clips[1],)


def test_after_generation_2_a_person_decides() -> None:
    ledger = ledger_of()
    log, _, clips = failed_task(ledger, SCENE)
    for generation in (1, 2):
        log = ledger.append_plan(log, lambda log: ledger.retry_tasks(log, SCENE))
        task = log.task(len(log) - 1)
        assert task.generation == generation
        attempt(
            ledger, task, SCENE,
            [make_outcome(c, 2, "failed", kind="timeout", retryable=True) for c in task.clips],
        )  # fmt: skip
    assert ledger.retry_tasks(log, SCENE) == []
    (task,) = ledger.retry_tasks(log, SCENE, max_generation=None)
    assert task.generation == 3
    log = ledger.append_plan(log, lambda log: [task] if log.num_chunks == 3 else [])
    attempt(ledger, task, SCENE, [make_outcome(c, 2) for c in task.clips])
    assert ledger.retry_tasks(log, SCENE, max_generation=None) == []
    coverage = rows_in(bucket_of(ledger), "coverage")
    assert sorted(r["generation"] for r in coverage) == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 2
    frames = [(r["frame_index"], r["feature"]) for r in rows_in(bucket_of(ledger), "features")]
    assert len(frames) == len(set(frames)) == 2 * 3 * 2
    assert clips[2] not in task.clips


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
