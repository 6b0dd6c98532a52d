"""Commits, adoption of what earlier attempts left, and retries: one case at a time."""

from __future__ import annotations

import pyarrow as pa
import pytest

from tests.ledger_steps import SCENE, attempt, bucket_of, commit, ledger_of, plan, rows_in
from tests.made_rows import (
    NOW,
    PARTITION,
    make_clips,
    make_outcome,
    make_output,
    make_spec,
    make_task,
    make_video,
)
from tests.memory_store import Bucket, Faults, Killed
from vidbatch.data import Clip, Output, Task
from vidbatch.errors import ExistsInStore
from vidbatch.ledger import MIXED, Ledger, PlanLog
from vidbatch.tables import (
    SCHEMAS,
    encode,
    file_metadata,
    outcome_tables,
    part_key,
    read,
    read_footer,
)

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
