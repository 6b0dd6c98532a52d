"""A slice of `make bench-scale`: requests, chunks of the plan and bytes of memory per clip."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest

from tests.bench import scale
from tests.bench.paging_s3 import PAGE_KEYS, PER_DAY, Made, serving
from vidbatch.data import Clip, Task, Video
from vidbatch.ledger import COMMITS, PLANS
from vidbatch.pipeline import survey as surveying
from vidbatch.pipeline.order import Orders, WorkOrder
from vidbatch.pipeline.run import run_job
from vidbatch.pipeline.supply import PlannedSupply
from vidbatch.pipeline.survey import Survey, take_survey
from vidbatch.plan import Piece
from vidbatch.progress import Progress

NOW = datetime(2026, 11, 1, tzinfo=UTC)
VIDEOS = 5_432


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A made endpoint, and the folder that it shows as the bucket `tables`."""
    folder = tmp_path_factory.mktemp("tables")
    with serving(Made(VIDEOS), folder) as endpoint:
        yield endpoint, folder


@pytest.fixture(autouse=True)
def _led_there(served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in scale.access(served[0]).items():
        monkeypatch.setenv(name, value)


def look(made: Made, output: Path, *, limit: int | None = None, split: int = 2**26) -> Survey:
    job = scale.make_job(made, str(output), split_above=split)
    return take_survey(job, run=scale.RUN, now=NOW, limit=limit)


def all_orders(survey: Survey) -> list[Orders]:
    survey.ledger.pin({"date": survey.job.date_rule()})
    return list(survey.orders(scale.Nobody(survey.spec, survey.job, print).probe, width=2))


def test_a_finished_archive_is_known_by_a_list_per_thousand_tasks(
    served: tuple[str, Path],
) -> None:
    endpoint, folder = served
    made = Made(VIDEOS)
    job = scale.make_job(made, str(folder), task_minutes=1)
    progress = Progress(quiet=True)
    tasks: list[str] = []

    class Recorder(scale.Nobody):
        def run(self, supply):  # type: ignore[no-untyped-def]
            for report in super().run(supply):
                tasks.append(report.task_id)
                yield report

    result = run_job(job, progress=progress, make_engine=Recorder, now=NOW)
    assert result.exit_code == 0
    assert result.summary["counts"]["clips"] == result.summary["counts"]["videos"] == VIDEOS
    assert len(tasks) == len(set(tasks)) == progress.total_tasks > PAGE_KEYS
    assert progress.done_cost_s == pytest.approx(progress.total_cost_s)
    chunks = list((folder / PLANS).rglob("*.parquet"))
    assert len(chunks) == 3, "of 1,000, of 2,000, and the rest"
    assert sum(c.stat().st_size for c in chunks) < 60 * VIDEOS

    fresh = take_survey(job, run=scale.RUN, now=NOW)
    for output in fresh.spec.outputs:
        records = folder / COMMITS / output.fingerprint
        records.mkdir(parents=True)
        for task in tasks:
            (records / f"{task}.json").touch()  # a resume reads names alone
    asked = scale.resume(made, endpoint, task_minutes=1)["asked"]
    pages = math.ceil(len(tasks) / PAGE_KEYS)
    assert asked["LIST archive"] == math.ceil(VIDEOS / PAGE_KEYS)
    assert asked["LIST tables"] == 2 * pages + 3, "a record per task and output, plan, retries"
    assert asked["GET tables"] == 1 + len(chunks), "no record is read"
    assert set(asked) == {"LIST archive", "LIST tables", "GET tables"}


def test_a_planned_clip_is_some_hundred_bytes_of_the_driver(tmp_path: Path) -> None:
    """A million of them are 1 GB at the most, beside what Ray and the libraries take."""
    kinds = (Clip, Piece, Task, WorkOrder)
    arrow, objects = pa.total_allocated_bytes(), sum(type(o) in kinds for o in live_objects())
    survey = look(Made(VIDEOS), tmp_path / "t")
    batches = all_orders(survey)
    assert sum(type(o) in kinds for o in live_objects()) <= objects, "the log is columns"
    planned = (pa.total_allocated_bytes() - arrow) / VIDEOS
    listed = sum(map(own_bytes, survey.listing.videos)) / VIDEOS
    assert 50 < planned < 300
    assert 300 < listed < 600
    assert sum(len(order.task.clips) for order in chain(*batches)) == VIDEOS


def live_objects() -> list[object]:
    gc.collect()
    return gc.get_objects()


def own_bytes(video: Video) -> int:
    """Of a video and of what it shares with no other; 16 of the collector, 8 of the list."""
    own = (video, video.video_id, video.uri, video.version, video.size_bytes, video.modified_at,
           video.captured_at)  # fmt: skip
    return 24 + sum(map(sys.getsizeof, own))


def test_a_supply_makes_no_order_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = look(Made(VIDEOS), tmp_path / "t", limit=3000)
    survey.ledger.pin({"date": survey.job.date_rule()})
    made = 0
    real = Orders.__iter__

    def counting(orders: Orders):  # type: ignore[no-untyped-def]
        nonlocal made
        for order in real(orders):
            made += 1
            yield order

    monkeypatch.setattr(Orders, "__iter__", counting)
    engine = scale.Nobody(survey.spec, survey.job, print)
    supply = PlannedSupply(survey, engine, Progress(quiet=True))  # type: ignore[arg-type]
    days = []
    while not supply.finished:
        order = supply.take()
        if order is not None:
            days.append(order.task.dt)
            assert made == len(days)
            assert supply.cost_of(order.task.task_id) == order.task.cost_s > 0
    supply.close()
    assert supply.take() is None
    assert days == sorted(days, reverse=True), "newest first, over all chunks"


def test_large_videos_are_probed_in_growing_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surveying, "MAX_PROBED", 16)
    survey = look(Made(VIDEOS), tmp_path / "t", limit=60, split=1)
    asked: list[int] = []
    engine = scale.Nobody(survey.spec, survey.job, print)

    def probe(videos):  # type: ignore[no-untyped-def]
        asked.append(len(videos))
        return engine.probe(videos)

    survey.ledger.pin({"date": survey.job.date_rule()})
    orders = chain(*survey.orders(probe, width=1))
    clips = {tuple(c.identity()) for order in orders for c in order.task.clips}
    assert asked == [4, 8, 16, 16, 16]
    assert len(clips) == 60 * scale.CLIPS_OF_A_LARGE_VIDEO
    assert survey.log.num_chunks == len(asked)


def test_two_drivers_that_plan_at_once_share_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second plans all that the first has not: the first works on that, each task once."""
    monkeypatch.setattr(surveying, "FIRST_CHUNK_VIDEOS", PER_DAY)
    first, second = (look(Made(VIDEOS), tmp_path / "t", limit=9 * PER_DAY) for _ in "12")
    first.ledger.pin({"date": first.job.date_rule()})
    turns = first.orders(scale.Nobody(first.spec, first.job, print).probe, width=2)
    mine = [next(turns), next(turns)]
    theirs = list(chain(*all_orders(second)))
    mine += turns
    orders = list(chain(*mine))
    for found in (orders, theirs):
        clips = [c.video.video_id for o in found for c in o.task.clips]
        assert len(clips) == len(set(clips)) == 9 * PER_DAY
    assert {o.task.task_id for o in orders} == {o.task.task_id for o in theirs}
    assert first.log.task_ids.equals(second.log.task_ids)
