"""SIGKILL at seeded moments, then the same command: equal tables, nothing changed or doubled."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outputs import (
    check_no_key_twice,
    check_nothing_changed,
    check_same,
    fingerprints,
    outcome_counts,
    read_tables,
)
from vidbatch.demo import make_archive
from vidbatch.ledger import Ledger
from vidbatch.storage import Store, open_store
from vidbatch.verify import verify

pytestmark = [pytest.mark.s3, pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]

VIDEOS = 24
KILLS = 20


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn files, each put twice below: 24 objects of which four are broken."""
    folder = tmp_path_factory.mktemp("drawn")
    make_archive(folder, seconds=2)
    return folder


@pytest.fixture
def bucket(s3_bucket: str, drawn: Path) -> str:
    """A bucket whose prefix `archive/` holds 24 objects."""
    store = open_store(f"s3://{s3_bucket}/archive")
    for path in sorted(drawn.rglob("*.mp4")):
        key = str(path.relative_to(drawn))
        store.put_new(key, path.read_bytes())
        store.put_new(key.replace("cam-0", "cam-1"), path.read_bytes() + b"\0" * 8)
    return s3_bucket


def write_job(folder: Path, bucket: str, output: str, **changes: Any) -> Path:
    tree = {
        "archive": {"uri": f"s3://{bucket}/archive"},
        "sample": {"fps": 2},
        "models": [{"builtin": "quality"}, {"builtin": "colour"}],
        "output": {"uri": f"s3://{bucket}/{output}"},
        "limits": {"task_minutes": 0.002},  # about two videos a task
        **changes,
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(job: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vidbatch", "run", str(job), *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(job: Path, *args: str) -> None:
    process = start(job, *args)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 0, err


def wait_for_objects(store: Store, count: int, process: subprocess.Popen[str]) -> None:
    """Until the output holds so many objects, or the process is done."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if sum(1 for _ in store.list_keys("")) >= count:
            return
        time.sleep(0.02)


def check_whole(store: Store, want: Store) -> None:
    got = read_tables(store)
    check_no_key_twice(got)
    check_same(got, read_tables(want))
    assert not verify(Ledger(store)).problems
    assert outcome_counts(store)["frames"] == {"ok": 20, "partial": 2, "failed": 2}


@pytest.mark.timeout(400)
def test_driver_killed_at_seeded_moments(bucket: str, tmp_path: Path) -> None:
    """Every kill hits the same output; what one attempt began the next ones finish."""
    finish(write_job(tmp_path, bucket, "want"))
    want = open_store(f"s3://{bucket}/want")
    objects = sum(1 for _ in want.list_keys(""))
    job = write_job(tmp_path, bucket, "got")
    store = open_store(f"s3://{bucket}/got")
    rng = random.Random(20)
    seen: dict[str, str] = {}
    killed = 0
    for n in range(KILLS):
        process = start(job)
        # moments spread over the whole run, from the first object of the output to its last
        wait_for_objects(store, round(objects * (n + rng.random()) / KILLS), process)
        time.sleep(rng.uniform(0, 0.2))
        killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = fingerprints(store)
        check_nothing_changed(seen, now)
        seen = now
    finish(job)
    assert killed >= KILLS * 3 // 4, "most kills must hit a run that is under way"
    check_nothing_changed(seen, fingerprints(store))
    check_whole(store, want)


@pytest.mark.timeout(200)
def test_two_drivers_at_once(bucket: str, tmp_path: Path) -> None:
    """Both plan, decode and commit the same tasks; the tables are those of one."""
    finish(write_job(tmp_path, bucket, "want", engine={"address": "none"}))
    job = write_job(tmp_path, bucket, "got", engine={"address": "none"})
    both = [start(job), start(job)]
    for process in both:
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    check_whole(open_store(f"s3://{bucket}/got"), open_store(f"s3://{bucket}/want"))
