"""Scenarios in which the store, or the way to it, is at fault."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tests.chaos.stage import VIDEOS, Stage, Tables, Tally
from tests.made_rows import (
    NOW,
    PARTITION,
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
from tests.outputs import fingerprints, read_tables
from tests.s3 import Gateway
from tests.s3_faults import Action, Fault, FaultProxy
from vidbatch.data import Task
from vidbatch.ledger import Ledger
from vidbatch.tables import UNIQUE_KEYS, OutputRows

IMPATIENT_S = 1.5
"""A stall is over for the client after so long."""
AT_MOST = 3
"""Faults of one request: fewer than the tries it has."""

WAYS: dict[str, tuple[Action, ...]] = {
    "PUT": ("reset", "lost", "late", "twice", "slow_down", "internal_error", "conflict",
            "flip_sent", "hang"),
    "GET": ("reset", "lost", "slow_down", "internal_error", "cut", "short", "flip", "hang"),
    "LIST": ("reset", "lost", "slow_down", "internal_error", "cut"),
}  # fmt: skip
"""What befalls a request; of a listing nothing that only a checksum could tell."""


class Lossy:
    """Draws a fault for a share of all requests, until there were enough.

    Args:
        ways: method → actions; "LIST" is a GET of a listing.
    """

    def __init__(
        self, rng: Random, ways: dict[str, tuple[Action, ...]], share: float, enough: int
    ) -> None:
        self._rng, self._ways, self._share, self._left = rng, ways, share, enough
        self._met: Counter[str] = Counter()

    def __call__(self, method: str, path: str) -> Action | None:
        """As `FaultProxy.draw`."""
        ways = self._ways.get("LIST" if "list-type=" in path else method)
        name = f"{method} {path}"
        if not ways or not self._left or self._met[name] >= AT_MOST or "/_vidbatch/probe/" in path:
            return None
        if self._rng.random() >= self._share:
            return None
        self._met[name] += 1
        self._left -= 1
        # a stall lasts, so it is rare
        return self._rng.choice([w for w in ways if w != "hang" or self._rng.random() < 0.2])


def lossy_runs(stage: Stage, n: int, tally: Tally) -> None:
    """Whole runs, three at once, behind a network that loses, repeats, damages and delays."""
    archive = stage.archive(VIDEOS)
    want = stage.reference(archive)
    with stage.proxy() as proxy:
        lossy = Lossy(Random(stage.rng.random()), WAYS, 0.25, n)
        proxy.draw = lossy
        while proxy.happened.total() < n:
            outputs = [stage.output() for _ in range(3)]

            def one(output: str) -> Tally:
                mine = Tally("")
                with stage.watched(output, mine):
                    _to_the_end(stage, stage.tree(archive, output), mine, proxy.endpoint_url)
                    proxy.release()
                stage.judge(output, want, mine)
                return mine

            with ThreadPoolExecutor(3) as pool:
                for mine in pool.map(one, outputs):
                    _add(tally, mine)
        tally.faults += proxy.happened
        tally.faults["late requests refused"] = sum(s in (409, 412) for s in proxy.released)


def lost_answers(stage: Stage, n: int, tally: Tally) -> None:
    """Every third PUT is done and nobody is told: all commits are still known as their own."""
    output = stage.output()
    with stage.proxy() as proxy, stage.watched(output, tally):
        lossy = Lossy(Random(stage.rng.random()), {"PUT": ("lost",)}, 1 / 3, n)
        proxy.draw = lossy
        through = stage.through(proxy, output)
        work = _Commits(stage, output)
        while proxy.happened.total() < n:
            tasks = work.more(20)
            with ThreadPoolExecutor(8) as pool:
                said = list(pool.map(lambda t: work.commit(through, t, "first"), tasks))
            tally.wrong += [f"a commit of ours counts as {s}" for s in said if s != "new"]
        tally.faults += proxy.happened
    work.judge(tally)


def zombies(stage: Stage, n: int, tally: Tally) -> None:
    """A PUT of one attempt is held; another attempt commits; then the first one wakes up."""
    with stage.proxy() as proxy:
        while (left := n - proxy.happened.total()) > 0:
            output = stage.output()
            work = _Commits(stage, output)
            with stage.watched(output, tally):
                _some_zombies(stage, proxy, work, min(20, left), tally)
            work.judge(tally)
        tally.faults += proxy.happened
        tally.wrong += [f"a zombie's PUT was answered {s}" for s in proxy.released if s != 412]


def _some_zombies(stage: Stage, proxy: FaultProxy, work: _Commits, n: int, tally: Tally) -> None:
    store, tasks = stage.store(work.output), work.more(n)
    through, direct = stage.through(proxy, work.output), Ledger(store)
    # up to three of its parts may be there before it falls asleep
    proxy.faults = [
        Fault("held", "PUT", task.task_id, nth=stage.rng.randint(1, 4)) for task in tasks
    ]
    with ThreadPoolExecutor(n) as pool, ThreadPoolExecutor(8) as others:
        asleep = [pool.submit(work.commit, through, task, "first") for task in tasks]
        while len(proxy.held) < n and not any(f.done() for f in asleep):
            time.sleep(0.02)
        list(others.map(lambda task: work.commit(direct, task, "second"), tasks))
        before = fingerprints(store)
        proxy.release()
        said = [future.result() for future in asleep]
    after = fingerprints(store)
    tally.changed += len(set(before.items()) ^ set(after.items()))
    tally.wrong += [f"a zombie's commit counts as {s}" for s in said if s == "new"]


def server_killed(stage: Stage, n: int, tally: Tally) -> None:
    """The S3 server dies by SIGKILL while a run reads and writes, and comes back."""
    gateway = stage.server
    assert isinstance(gateway, Gateway)
    archive = stage.archive(VIDEOS)
    want = stage.reference(archive)
    rng = Random(stage.rng.random())
    while tally.faults["server killed"] < n:
        output = stage.output()
        with stage.watched(output, tally):
            driver = stage.start(stage.tree(archive, output))
            objects = rng.randint(5, 60)
            store = stage.store(output)
            while driver.alive and sum(1 for _ in store.list_keys("")) < objects:
                time.sleep(0.05)
            tally.faults["server killed"] += driver.alive
            gateway.kill_gateway()
            time.sleep(rng.uniform(0.2, 1.5))
            gateway.start_gateway()
            tally.runs += 1
            if driver.end() not in (0, 1, 4):
                tally.wrong.append(driver.said())
            _to_the_end(stage, stage.tree(archive, output), tally)
        stage.judge(output, want, tally)


def credentials(stage: Stage, n: int, tally: Tally) -> None:
    """The access key expires again and again; the next one lies in the credentials file."""
    archive = stage.archive(VIDEOS)
    want = stage.reference(archive)
    rng = Random(stage.rng.random())
    path = stage.folder / "credentials"
    with stage.proxy() as proxy:
        env = {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_ENDPOINT_URL": proxy.endpoint_url}

        def renew() -> None:
            proxy.valid_key = f"AKIA{rng.getrandbits(40):010X}"
            time.sleep(rng.uniform(0, 0.3))  # expired, and the next one not there yet
            text = f"[default]\naws_access_key_id={proxy.valid_key}\naws_secret_access_key=secret\n"
            (new := path.with_suffix(".new")).write_text(text)
            new.replace(path)

        renew()
        while tally.faults["key expired"] < n:
            output = stage.output()
            with stage.watched(output, tally):
                driver = stage.start(stage.tree(archive, output), env)
                while driver.alive and tally.faults["key expired"] < n:
                    refused = proxy.happened["expired"]
                    renew()
                    time.sleep(rng.uniform(1.0, 2.0))  # a key serves some requests before it goes
                    tally.faults["key expired"] += proxy.happened["expired"] > refused
                tally.runs += 1
                if code := driver.end():
                    tally.wrong.append(f"exit {code}: {driver.said()}")
            stage.judge(output, want, tally)
        tally.faults["requests refused"] = proxy.happened["expired"]


def source_replaced(stage: Stage, n: int, tally: Tally) -> None:
    """Videos are overwritten between the plan and the first read of their bytes."""
    archive = "changing"
    while (left := n - tally.faults["replaced"]) > 0:
        for i in range(VIDEOS):
            stage.put_video(archive, i, version=stage.rng.randrange(2**20))
        output = stage.output()
        with stage.proxy() as proxy, stage.watched(output, tally):
            tree = stage.tree(archive, output)
            for i in range(min(left, VIDEOS)):
                again = partial(stage.put_video, archive, i, version=stage.rng.randrange(2**20))
                name = f"{archive}/.*/{i // 60:02d}{i % 60:02d}00.mp4"
                proxy.faults.append(Fault("slow_down", "GET", name, then=again))
            driver = stage.start(tree, {"AWS_ENDPOINT_URL": proxy.endpoint_url})
            if driver.end():
                tally.wrong.append(driver.said())
            tally.runs += 1
            tally.faults["replaced"] += proxy.happened.total()
            _to_the_end(stage, tree, tally)
        fresh = stage.output()
        _to_the_end(stage, stage.tree(archive, fresh), tally)
        want = read_tables(stage.store(fresh))
        listed = {v for rows in want["videos"].values() for v in rows["video_id"].to_pylist()}
        stage.judge(output, want, tally, partial(_of, listed=listed))
        old = [
            row
            for rows in read_tables(stage.store(output))["coverage"].values()
            for row in rows.to_pylist()
            if row["video_id"] not in listed
        ]
        tally.wrong += [str(row) for row in old if row["status"] != "failed" or row["frames"]]


def _of(tables: Tables, listed: set[str]) -> Tables:
    """The rows of some videos."""
    ids = pa.array(sorted(listed))
    found: Tables = {}
    for table, partitions in tables.items():
        for partition, rows in partitions.items():
            if "video_id" in rows.column_names:
                rows = rows.filter(pc.is_in(rows["video_id"], ids))
            if len(rows):
                found.setdefault(table, {})[partition] = rows
    return found


def _to_the_end(stage: Stage, tree: Any, tally: Tally, endpoint_url: str | None = None) -> None:
    """Runs a job until it has nothing to do; what fails meanwhile is run again."""
    env = {"AWS_ENDPOINT_URL": endpoint_url} if endpoint_url else {}
    for _ in range(5):
        driver = stage.start(tree, env, read_timeout_s=IMPATIENT_S if endpoint_url else None)
        tally.runs += 1
        if (code := driver.end()) == 0:
            return
        if code not in (1, 4):
            break
    tally.wrong.append(f"exit {code}: {driver.said()}")


def _add(tally: Tally, mine: Tally) -> None:
    for name in ("runs", "reads", "lost", "doubled", "changed", "unreadable"):
        setattr(tally, name, getattr(tally, name) + getattr(mine, name))
    tally.wrong += mine.wrong


class _Commits:
    """Commits of made tasks through the real ledger: scores differ between two attempts."""

    OUTPUT = make_output(make_spec("scene", ("detections", "features")))
    FRAMES = 5

    def __init__(self, stage: Stage, output: str) -> None:
        self._stage, self.output = stage, output
        self._tasks: list[Task] = []
        self._ledger = Ledger(stage.store(output))

    def more(self, n: int) -> Sequence[Task]:
        """New tasks, planned."""
        first = len(self._tasks)
        tasks = [make_task(*make_clips(make_video(f"v{first + i}"), self.FRAMES)) for i in range(n)]
        self._tasks += tasks
        self._ledger.append_plan(self._ledger.read_plan(tasks[0].sampling), lambda _: tasks)
        return tasks

    def commit(self, ledger: Ledger, task: Task, run: str) -> str:
        """One attempt; what it came to."""
        numbers = np.random.default_rng(list(f"{run} {task.task_id}".encode()))
        rows = OutputRows(self.OUTPUT, task)
        for clip in task.clips:
            rows.add(clip, make_frames(0, self.FRAMES), make_predictions(self.FRAMES, numbers))
        outcomes = [make_outcome(clip, self.FRAMES) for clip in task.clips]
        infos = {clip.video.video_id: make_info() for clip in task.clips}
        return ledger.commit(
            task, self.OUTPUT, rows.finish(outcomes, infos, run=run, now=NOW), outcomes,
            sampling_partition=PARTITION, run=run, attempt=0, versions=VERSIONS,
        ).status  # fmt: skip

    def judge(self, tally: Tally) -> None:
        """Every frame of every task has its row, once."""
        wanted = [
            {"video_id": clip.video.video_id, "frame_index": i, "feature": name}
            for task in self._tasks
            for clip in task.clips
            for i in range(self.FRAMES)
            for name in ("sharpness", "brightness")
        ]
        want: Tables = {"features": {(): pa.Table.from_pylist(wanted).sort_by(_ORDER)}}
        self._stage.judge(self.output, want, tally, _keys_alone)


_ORDER = [(name, "ascending") for name in UNIQUE_KEYS["features"]]


def _keys_alone(tables: Tables) -> Tables:
    """Of `features`, all partitions in one."""
    parts = [rows.select(UNIQUE_KEYS["features"]) for rows in tables["features"].values()]
    return {"features": {(): pa.concat_tables(parts).sort_by(_ORDER)}}
