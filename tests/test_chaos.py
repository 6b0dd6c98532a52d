"""A slice of the chaos suite: every kind of fault a few times. The whole is `make chaos`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import kills, store_faults
from tests.chaos.run import SCENARIOS, table
from tests.chaos.stage import Stage, Tally
from tests.s3 import BINARIES, Gateway, Server

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 20


@pytest.fixture(scope="module")
def stage(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One archive and its reference for all."""
    if not isinstance(s3_server, Gateway):
        pytest.skip(f"{', '.join(BINARIES)} are not installed, and moto keeps no promise in a race")
    return Stage(s3_server, tmp_path_factory.mktemp("chaos"), SEED)


@pytest.fixture
def durable_stage(durable_s3: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The same on a server that may be killed."""
    found = Stage(durable_s3, tmp_path, SEED)
    _enter(found, monkeypatch)
    return found


def _enter(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in stage.env.items():
        monkeypatch.setenv(name, value)


def play(scenario: Callable[[Stage, int, Tally], None], stage: Stage, n: int) -> Tally:
    """A scenario in small, which must come to nothing."""
    tally = Tally(scenario.__name__)
    scenario(stage, n, tally)
    assert not tally.bad, f"{table([tally])}\n{tally.wrong}"
    assert tally.faults.total() >= n and tally.reads
    return tally


@pytest.mark.parametrize(
    ("scenario", "n"),
    [
        (store_faults.zombies, 20),
        (store_faults.lost_answers, 20),
        (store_faults.lossy_runs, 40),
        (store_faults.credentials, 2),
        (store_faults.source_replaced, 3),
        (kills.drivers, 5),
        (kills.children, 3),
        pytest.param(kills.workers, 3, marks=pytest.mark.ray),
    ],
)
def test_nothing_is_lost_doubled_or_changed(
    stage: Stage,
    scenario: Callable[[Stage, int, Tally], None],
    n: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _enter(stage, monkeypatch)
    play(scenario, stage, n)


def test_the_server_may_be_killed(durable_stage: Stage) -> None:
    play(store_faults.server_killed, durable_stage, 1)


def test_the_suite_finds_what_is_wrong(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row twice, an object that changes, one that cannot be read, rows that go: all count."""
    _enter(stage, monkeypatch)
    archive, output, tally = stage.archive(3), stage.output(), Tally("spoilt")
    want = stage.reference(archive)

    def put(key: str, data: bytes) -> None:
        stage.client.put_object(Bucket=stage.bucket, Key=f"{output}/{key}", Body=data)

    with stage.watched(output, tally) as reader:
        driver = stage.start(stage.tree(archive, output))
        assert driver.end() == 0, driver.said()
        store = stage.store(output)
        first, second = [k for k in store.list_keys("v1/frames/") if "part-empty" not in k][:2]
        again, half = (second.replace("part-", f"part-{x}") for x in ("again", "half"))
        put(again, store.get(second))
        put(half, store.get(second)[:100])
        reader.wait()
        put(first, store.get(first) + b" ")
    assert tally.doubled and (tally.changed, tally.unreadable) == (1, 1)
    assert tally.reads and not tally.wrong
    for key in (again, half, first):
        store.remove(key)
    judged = Tally("judged")
    stage.judge(output, want, judged)
    assert judged.lost and judged.wrong and judged.bad


def test_every_fault_has_its_figure() -> None:
    """What the whole suite promises to inject."""
    figures = {name: scenario.n for name, scenario in SCENARIOS.items()}
    assert (figures["drivers"], figures["nodes"], figures["zombies"]) == (50, 20, 200)
    assert figures["workers"] + figures["children"] == 100
    assert (figures["lost"], figures["network"]) == (300, 500)
