"""The commit protocol under kills, races, lost answers and zombies: the real ledger, made-up media.

Each seed is a few nights over a changing archive. A night has two drivers at once, each with clip
lengths of its own, that take turns at every LIST and PUT; either may be killed before any PUT, sees
answers lost, and leaves PUTs in the network that arrive later. Workers are not reproducible:
scores, boxes and random failures differ between attempts. Two calm nights finish the work.

Judged by what a reader by glob sees, never through commit records: no key twice, no row lost, and
every object readable from the moment it appears.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

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
from vidbatch.ledger import Ledger, PlanLog
from vidbatch.tables import SCHEMAS, UNIQUE_KEYS, OutputRows, read, read_footer
from vidbatch.verify import verify

NIGHTS = 3
CALM = 2
SEEDS = 100
SHARDS = 5
"""Seeds are dealt to this many tests, so that a failure names few of them."""

FRAMES_OUT = make_output()
SCENE = make_output(make_spec("scene", ("detections", "features")))
LATER = make_output(make_spec("later", ("labels",)))


class Turns:
    """Lets one of several threads run at a time; who is next is drawn at every request."""

    def __init__(self, rng: random.Random, names: list[int]) -> None:
        self._rng = rng
        self._names = list(names)
        self._current = rng.choice(names)
        self._changed = threading.Condition()

    def wait(self, name: int) -> None:
        """Until it is `name`'s turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._current == name)

    def pass_on(self, name: int) -> None:
        """Gives the turn away, perhaps to itself, and waits for it to come back."""
        with self._changed:
            self._current = self._rng.choice(self._names)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._current == name)

    def leave(self, name: int) -> None:
        """Takes part no more."""
        with self._changed:
            self._names.remove(name)
            if self._names:
                self._current = self._rng.choice(self._names)
            self._changed.notify_all()


@dataclass
class World:
    """The archive, what is wrong with its videos, and the bucket of the tables."""

    rng: random.Random
    bucket: Bucket = field(default_factory=Bucket)
    videos: dict[str, Video] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    """video_id → true number of frames, of every version there ever was."""
    fate: dict[str, str] = field(default_factory=dict)
    """video_id → good, poison (fails until the calm nights), dead (never decodes), cut."""
    night: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """What happened, to prove that it happened."""

    def change(self) -> None:
        """What happens to the archive by day: new videos, some replaced, some gone."""
        rng = self.rng
        for name in list(self.videos):
            if rng.random() < 0.2:
                self.add(name, f"v{self.night}")
            elif rng.random() < 0.05:
                del self.videos[name]
        for n in range(rng.randint(0, 1) if self.night else 2):
            self.add(f"n{self.night}-{n}", "v")

    def add(self, name: str, version: str) -> None:
        video = make_video(name, version, dt=f"2026-03-0{self.rng.randint(1, 2)}")
        self.videos[name] = video
        self.frames[video.video_id] = self.rng.randint(0, 5)
        self.fate[video.video_id] = self.rng.choice(["good"] * 4 + ["poison", "dead", "cut"])

    @property
    def calm(self) -> bool:
        return self.night >= NIGHTS

    def outputs(self) -> list[Output]:
        """A model is added on the second night."""
        return [FRAMES_OUT, SCENE] + ([LATER] if self.night else [])


class Driver:
    """One run: plan, retries, then every task and output that lacks."""

    def __init__(self, world: World, store: MemoryStore, seed: int) -> None:
        self.world, self.ledger = world, Ledger(store)
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.name = f"run-{seed}"

    def run(self) -> None:
        ledger, world = self.ledger, self.world
        if ledger.pinned() is None:
            ledger.first_files({"README.md": b"# Tables\n"})
        ledger.pin({"date": {"from": "modified", "tz": "UTC"}, "store": "create-only"})
        listing = list(world.videos.values())
        listed = [v.video_id for v in listing]
        log = ledger.append_plan(ledger.read_plan(SAMPLING), lambda log: self.plan(log, listing))
        for output in world.outputs():
            log = ledger.append_plan(log, self.retries(output, listed))
        done = {o.fingerprint: ledger.done(o.fingerprint) for o in world.outputs()}
        orders = sorted(
            (
                (int(position), output)
                for output in world.outputs()
                for position in log.todo(output.fingerprint, done[output.fingerprint], listed)
            ),
            key=lambda order: order[0],
        )
        if self.rng.random() < 0.3:
            self.rng.shuffle(orders)  # else both drivers come to the same task at once
        for attempt, (position, output) in enumerate(orders):
            self.work(log.task(position), output, attempt)

    def plan(self, log: PlanLog, listing: list[Video]) -> list[Task]:
        """Cuts what the log does not know, by a length that no other driver or night shares."""
        length = self.rng.choice([2, 3, None])
        by_day: dict[str, list[Clip]] = {}
        known = log.knows([video.video_id for video in listing])
        for video, old in zip(listing, known, strict=True):
            if not old:
                frames = self.world.frames[video.video_id]
                by_day.setdefault(video.dt, []).extend(make_clips(video, frames, length))
        size = self.rng.randint(2, 4)
        return [
            make_task(*clips[i : i + size])
            for clips in by_day.values()
            for i in range(0, len(clips), size)
        ]

    def retries(self, output: Output, listed: list[str]) -> Callable[[PlanLog], list[Task]]:
        beyond = None if self.world.calm else 2
        return lambda log: self.ledger.retry_tasks(
            log, output, listed=listed, max_generation=beyond
        )

    def work(self, task: Task, output: Output, attempt: int) -> None:
        """An attempt: rows of the clips that decode this time, then the commit."""
        rows = OutputRows(output, task)
        outcomes = [self.clip(rows, output, clip) for clip in task.clips]
        infos = {o.clip.video.video_id: make_info() for o in outcomes if o.status != "failed"}
        tables = rows.finish(outcomes, infos, run=self.name, now=NOW)
        result = self.ledger.commit(
            task,
            output,
            tables,
            outcomes,
            sampling_partition=PARTITION,
            run=self.name,
            attempt=attempt,
            versions=VERSIONS,
        )
        assert [o.clip for o in result.outcomes] == list(task.clips)
        world_seen = self.world.seen
        world_seen[result.status] += 1
        for mine, stands in zip(outcomes, result.outcomes, strict=True):
            world_seen[f"{mine.status} here, {stands.status} in the store"] += 1

    def clip(self, rows: OutputRows, output: Output, clip: Clip) -> Outcome:
        video_id = clip.video.video_id
        end = self.world.frames[video_id] if clip.end_frame is None else clip.end_frame
        fate, frames = self.world.fate[video_id], end - clip.start_frame
        gone = clip.video not in self.world.videos.values()
        if fate == "dead" or gone:
            return make_outcome(clip, frames, "failed", kind="source_changed" if gone else "dead")
        shaky = self.rng.random() < 0.3 and not self.world.calm
        if shaky or (fate == "poison" and not self.world.calm):
            return make_outcome(clip, frames, "failed", kind="DecoderDied", retryable=True)
        if fate == "cut":
            frames //= 2
        chunk = make_frames(clip.start_frame, clip.start_frame + frames)
        found = None if output.spec is None else make_predictions(frames, self.numbers)
        rows.add(clip, chunk, found)
        return make_outcome(clip, frames, "partial" if fate == "cut" else "ok")


def live_through(seed: int) -> World:
    """All nights of one seed."""
    rng = random.Random(seed)
    world = World(rng)

    def whole(key: str, data: bytes) -> None:
        if key.startswith("v1/"):
            read_footer(data)

    world.bucket.on_create = whole
    for world.night in range(NIGHTS + CALM):
        if not world.calm:
            world.change()
        turns = Turns(rng, [0, 1])
        errors: list[BaseException] = []
        threads = [
            threading.Thread(target=_session, args=(world, turns, n, rng.random(), errors))
            for n in ([0] if world.calm else [0, 1])
        ]
        if world.calm:
            turns.leave(1)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        world.bucket.deliver(len(world.bucket.late) if world.calm else rng.randint(0, 2))
    return world


def _session(
    world: World, turns: Turns, name: int, seed: float, errors: list[BaseException]
) -> None:
    rng = random.Random(seed)
    faults = Faults()
    if not world.calm:
        faults = Faults(
            kill_before=rng.choice([None, rng.randint(1, 3), rng.randint(1, 12)]),
            kill_where=rng.choice(["", "", "/features/", "/coverage/", "/commits/"]),
            kill_after=rng.choice([None, None, rng.randint(1, 40)]),
            answer_lost=frozenset(rng.sample(range(1, 40), 4)),
            twice=frozenset(rng.sample(range(1, 40), 4)),
        )

    def request() -> None:
        if rng.random() < 0.2:
            world.bucket.deliver(1)
        turns.pass_on(name)

    store = MemoryStore(world.bucket, faults, request)
    try:
        turns.wait(name)
        Driver(world, store, rng.randrange(2**30)).run()
    except Killed:
        pass  # the next night goes on from what is in the bucket
    except BaseException as error:  # an assertion in a thread would be lost
        errors.append(error)
    finally:
        turns.leave(name)


Rows = list[tuple[str, dict[str, Any]]]
"""(model, row) of every row that a glob of a table finds."""


def glob(world: World, table: str) -> Rows:
    """What a reader sees who knows nothing but the path; asserts that no key is there twice."""
    names = UNIQUE_KEYS[table]
    columns = None if table in ("coverage", "failures") else names
    found: Rows = []
    keys = []
    for key, data in world.bucket.parts(table).items():
        folder = key.rpartition("/")[0]
        model = key.partition("model=")[2].partition("/")[0]
        for row in read(data, columns=columns).to_pylist():
            found.append((model, row))
            keys.append((folder, *(row[name] for name in names)))
    assert not [key for key, n in Counter(keys).items() if n > 1]
    return found


def judge(world: World, audited: bool) -> Counter[str]:
    """Asserts what a reader may rely on; gives what happened."""
    assert not world.bucket.removed
    tables = {table: glob(world, table) for table in SCHEMAS}
    found = {
        table: {(row["video_id"], row["frame_index"]) for _, row in tables[table]}
        for table in ("frames", "detections", "features", "labels")
    }
    rows_of = {
        FRAMES_OUT.partition: found["frames"],
        SCENE.partition: found["detections"] & found["features"],
        LATER.partition: found["labels"],
    }
    listed = {v.video_id for v in world.videos.values()}
    explained = {
        (model, r["video_id"], r["start_s"], r["generation"]) for model, r in tables["failures"]
    }
    newest: dict[tuple[str, str, float], dict[str, Any]] = {}
    seen = world.seen
    for model, row in sorted(tables["coverage"], key=lambda found: found[1]["generation"]):
        newest[model, row["video_id"], row["start_s"]] = row
        seen["retries"] += row["generation"] > 0
    for (model, video_id, start_s), row in newest.items():
        wanted = {(video_id, int(start_s) + i) for i in range(row["frames"])}
        seen[row["status"]] += 1
        assert row["status"] != "failed" or not wanted
        mixed = "this one has none" in str(row["reason"])
        # Made by two attempts: the rows of the first stand, and the row says what is missing.
        assert wanted <= (found["detections"] if mixed else rows_of[model]), (model, row)
        # Of a video that is gone, a task may stay unfinished between coverage and failures.
        if row["status"] != "ok" and video_id in listed:
            assert (model, video_id, start_s, row["generation"]) in explained

    ledger = Ledger(MemoryStore(world.bucket))
    log = ledger.read_plan(SAMPLING)
    planned = {clip for task in log.tasks() for clip in task.clips}
    assert listed <= {clip.video.video_id for clip in planned}
    for clip in planned:
        video_id = clip.video.video_id
        for output in world.outputs() if video_id in listed else []:
            status = newest[output.partition, video_id, clip.start_s]["status"]
            assert (status == "failed") == (world.fate[video_id] == "dead"), status
    assert listed <= {row["video_id"] for _, row in tables["videos"]}

    if not audited:
        return seen
    report = verify(ledger)
    assert report.ok, report.problems
    for count in report.outputs:
        assert count.planned == count.ok + count.partial + count.failed + count.pending
    return seen


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_row_is_lost_or_doubled(shard: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(shard, SEEDS, SHARDS):
        try:
            seen += judge(live_through(seed), audited=seed % (4 * SHARDS) < SHARDS)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    happened = ("ok", "partial", "failed", "retries", "adopted", "exists",
                "ok here, failed in the store", "failed here, ok in the store")  # fmt: skip
    assert all(seen[event] for event in happened), seen
