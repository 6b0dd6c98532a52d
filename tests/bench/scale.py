"""`make bench-scale`: a million clips through the real conductor, plan log and ledger; no pixels.

    python -m tests.bench.scale [--clips 1000000] [--folder /dev/shm] [--legs list,plan,…]

    list     a million keys from an S3 endpoint that pages, as `vidbatch run` lists them
    plan     listed, planned, taken and reported, by an engine that answers at once in this process
    probed   the same clips as 50 each of large videos, whose headers an engine makes up
    run      `plan` again on local Ray: the real driver, and two decoders whose tasks only put the
             commit records of their outputs (`frames` and the model `builtin: null`)
    resume   what the next run asks of a store that pages before it knows that nothing is to do
    store    50,000 of them, whose plan, records and resume stand in a real S3 server (Ceph)
    task     the real tasks of 2,000 clips whose decoder gives no frame: files, bytes, PUTs, CPU

A video has two minutes and 60 MB, so a task of ten planned minutes holds 39 of them. Each leg runs
in a process of its own, whose peak memory (RSS) is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests.bench.paging_s3 import Made, requests, serving
from vidbatch.config import Job, parse_job
from vidbatch.data import Clip, ClipEnd, ClipRange, DecodeEvent, Video, VideoInfo
from vidbatch.ledger import COMMITS, PLANS, CommitRecord, Ledger
from vidbatch.pipeline.engine import Probed, Supply
from vidbatch.pipeline.order import RunSpec, TaskReport, WorkOrder
from vidbatch.pipeline.run import EngineFactory, run_job
from vidbatch.pipeline.survey import take_survey
from vidbatch.progress import Counts, Progress

CLIPS_OF_A_LARGE_VIDEO = 50
RUN = "20260101T000000-000-aaaaaa"
LEGS = ("list", "plan", "probed", "run", "resume", "store", "task")
IN_A_STORE = 50_000
"""Clips of leg `store`."""
INFO = VideoInfo(
    container="mp4", codec="h264", width_px=1920, height_px=1080, rotation_deg=0,
    time_base=Fraction(1, 15360), rate=Fraction(30), start_s=0.0, duration_s=120.0,
    frame_count=3600, audio_codec=None, audio_rate_hz=None,
)  # fmt: skip


def make_job(
    made: Made,
    output: str,
    *,
    split_above: int = 2**26,
    task_minutes: float = 10,
    endpoints: tuple[str | None, str | None] = (None, None),
) -> Job:
    """The job of all legs: the made archive, one frame per second, the model that does nothing.

    Args:
        endpoints: of the archive and of the output, where the environment's is not meant.
    """
    stores = [{"store": {"endpoint_url": url}} if url else {} for url in endpoints]
    tree = {
        "archive": {"uri": "s3://archive", "date": made.date_rule, **stores[0]},
        "sample": {"fps": 1},
        "models": [{"builtin": "null"}],
        "output": {"uri": output, **stores[1]},
        "clips": {"split_above": split_above},
        "engine": {"decoders": 2},
        "limits": {"isolate": False, "task_minutes": task_minutes},
    }
    return parse_job(tree, base_dir=Path.cwd())


def nothing_done(order: WorkOrder, spec: RunSpec) -> TaskReport:
    """The report of a task that did nothing, well."""
    n = len(order.task.clips)
    return TaskReport(
        task_id=order.task.task_id,
        counts=Counts(tasks=1, clips=n, videos=n, ok=n * len(order.outputs)),
        committed={spec.output(f).partition: "new" for f in order.outputs},
        failures=(),
        kinds={},
        device="cpu",
    )


def put_records(order: WorkOrder, spec: RunSpec, ledger: Ledger) -> None:
    """Commit records that name no part, of each output of an order."""
    for fingerprint in order.outputs:
        output, task = spec.output(fingerprint), order.task
        record = CommitRecord(
            schema_version=1, task=task.task_id, output=fingerprint, model=output.partition,
            sampling=task.sampling, sample=spec.sampling_partition, generation=task.generation,
            run=spec.run, attempt=order.attempt, committed_at=datetime.now(UTC).isoformat(),
            files=(), outcomes="[]",
        )  # fmt: skip
        ledger.store.put_new(f"{COMMITS}/{fingerprint}/{task.task_id}.json", record.to_json())


class Nobody:
    """An engine of two workers that do nothing, in this process; a `pipeline.engine.Engine`."""

    width = 2

    def __init__(self, spec: RunSpec, job: Job, note: Callable[[str], None]) -> None:
        self.spec = spec
        self.halted = False

    def start(self) -> str:
        """See `Engine.start`."""
        return "nobody works"

    def probe(self, videos: Sequence[Video]) -> list[Probed]:
        """Clips of a minute of 30 frames/s, as many as the bench says."""
        return [Probed(video=v, ranges=RANGES) for v in videos]

    def run(self, supply: Supply) -> Iterator[TaskReport]:
        """Each order is done as soon as it is taken."""
        while not (supply.finished or self.halted):
            order = supply.take()
            if order is None:
                time.sleep(0.001)
            else:
                yield nothing_done(order, self.spec)

    def halt(self) -> None:
        """See `Engine.halt`."""
        self.halted = True

    def stop(self) -> Mapping[str, Any]:
        """See `Engine.stop`."""
        return {}


RANGES = tuple(
    ClipRange(
        first_keyframe=30 * i,
        end_keyframe=30 * (i + 1) if i + 1 < CLIPS_OF_A_LARGE_VIDEO else None,
        start_s=60.0 * i,
        end_s=60.0 * (i + 1) if i + 1 < CLIPS_OF_A_LARGE_VIDEO else None,
        start_frame=1800 * i,
        end_frame=1800 * (i + 1) if i + 1 < CLIPS_OF_A_LARGE_VIDEO else None,
        packet_bytes=30_000_000,
        frames=1800,
    )
    for i in range(CLIPS_OF_A_LARGE_VIDEO)
)


class Blank:
    """A clip decoder (`order.ClipDecoder`) that finds a sound video and gives no frame."""

    restarts = 0

    def decode(self, source: Any, clip: Clip, **_: Any) -> Iterator[DecodeEvent]:
        """The header, and the end of an empty clip."""
        yield INFO
        yield ClipEnd(
            status="ok", reason=None, kind=None, start_s=0.0, end_s=120.0, start_frame=0,
            end_frame=3600, frames_decoded=0, decode_errors=0, corrupt_frames=0, fallback=None,
        )  # fmt: skip


class NoSource:
    """Stands for a `pipeline.reading.Sources` and for each of its sources: no byte is read."""

    size_bytes = bytes_read = gets = 0

    def take(self, clip: Clip) -> Any:
        """Itself."""
        return self

    def prepare(self, clip: Clip) -> None:
        """Nothing to fetch."""

    def spent(self) -> tuple[int, int]:
        """No byte, no GET."""
        return 0, 0


class Stopwatch(Progress):
    """Notes when the engine was up, when the last work was planned, and when the last was done."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.up_at = self.planned_at = self.done_at = 0.0
        self.cpu_up_s = self.cpu_done_s = 0.0

    def note(self, text: str) -> None:
        """The last line of a run that goes well says that the engine is up."""
        self.up_at, self.cpu_up_s = time.monotonic(), time.process_time()

    def expect(self, tasks: int, cost_s: float) -> None:
        """See `Progress.expect`."""
        super().expect(tasks, cost_s)
        self.planned_at = time.monotonic()

    def add(self, counts: Counts, cost_s: float = 0.0) -> None:
        """See `Progress.add`."""
        super().add(counts, cost_s)
        self.done_at, self.cpu_done_s = time.monotonic(), time.process_time()


def list_keys(made: Made, output: str) -> dict[str, Any]:
    """Leg `list`."""
    from vidbatch.archive import list_archive
    from vidbatch.pipeline.resolve import archive_rule

    rule = archive_rule(make_job(made, output))
    before, started = peak_mib(), time.monotonic()
    listing = list_archive(rule, now=datetime.now(UTC))
    seconds = time.monotonic() - started
    assert len(listing.videos) == made.videos and not listing.no_date
    grown = (peak_mib() - before) * 2**20
    return {"keys": made.videos, "list_s": seconds, "bytes_per_key": grown / made.videos}


def drive(made: Made, output: str, engine: EngineFactory, clips: int) -> dict[str, Any]:
    """Legs `plan`, `probed` and `run`: one whole run by an engine whose tasks do nothing."""
    job = make_job(made, output, split_above=2**26 if clips == made.videos else 2**20)
    progress, started = Stopwatch(), time.monotonic()
    result = run_job(job, progress=progress, make_engine=engine)
    ended, counts = time.monotonic(), result.summary["counts"]
    assert (result.exit_code, counts["clips"]) == (0, clips), result.summary
    plan = [p.stat().st_size for p in Path(output, PLANS).rglob("*.parquet")]
    return {
        "clips": clips,
        "tasks": counts["tasks"],
        "whole_s": ended - started,
        "plan_s": progress.planned_at - progress.up_at,
        "first_task_s": result.summary["first_task_s"],
        "tasks_per_s": counts["tasks"] / (progress.done_at - progress.up_at),
        "tasks_per_cpu_s": counts["tasks"] / (progress.cpu_done_s - progress.cpu_up_s),
        "plan_chunks": len(plan),
        "plan_bytes_per_clip": sum(plan) / clips,
        "commit_records": sum(1 for _ in Path(output, COMMITS).rglob("*.json")),
    }


def on_ray(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Any:
    """The engine of leg `run`: the real one, whose decoders only put commit records."""
    from vidbatch.cluster.decoder import Decoder
    from vidbatch.cluster.driver import RayEngine

    class Instant(Decoder):
        def run_task(self, order: WorkOrder, careful: bool) -> TaskReport:
            put_records(order, self._spec, self._ledger)
            return nothing_done(order, self._spec)

    class Engine(RayEngine):
        decoder_class = Instant

    return Engine(spec, job, note=note)


def resume(made: Made, endpoint: str, task_minutes: float = 10) -> dict[str, Any]:
    """Leg `resume`: the survey of a finished archive; its output is the bucket `tables`."""
    before, started = requests(endpoint), time.monotonic()
    job = make_job(made, "s3://tables", task_minutes=task_minutes)
    survey = take_survey(job, run=RUN, now=datetime.now(UTC))
    assert survey.nothing_to_do, survey.describe()
    asked = {k: n - before.get(k, 0) for k, n in requests(endpoint).items()}
    tasks = len(survey.log)
    return {
        "tasks": tasks,
        "resume_s": time.monotonic() - started,
        "asked": asked,
        "lists_per_1000_tasks": asked["LIST tables"] * 1000 / tasks,
    }


def in_a_store(made: Made, endpoint: str, folder: str) -> dict[str, Any]:
    """Leg `store`: a run on Ray and the survey after it, all of the output in an S3 server."""
    from tests.s3 import Gateway, make_bucket

    gateway = Gateway(Path(folder, "ceph"), "memstore")
    gateway.start()
    os.environ["AWS_ACCESS_KEY_ID"] = gateway.access_key
    os.environ["AWS_SECRET_ACCESS_KEY"] = gateway.secret_key
    output, endpoints = f"s3://{make_bucket(gateway)}", (endpoint, gateway.endpoint_url)
    job, progress = make_job(made, output, endpoints=endpoints), Stopwatch()
    counts = run_job(job, progress=progress, make_engine=on_ray).summary["counts"]
    assert counts["clips"] == made.videos, counts
    started = time.monotonic()
    survey = take_survey(job, run=RUN, now=datetime.now(UTC))
    assert survey.nothing_to_do, survey.describe()
    return {
        "clips": counts["clips"],
        "tasks": counts["tasks"],
        "tasks_per_s": counts["tasks"] / (progress.done_at - progress.up_at),
        "plan_s": progress.planned_at - progress.up_at,
        "resume_s": time.monotonic() - started,
        "server": gateway.name,
    }


def real_tasks(made: Made, output: str) -> dict[str, Any]:
    """Leg `task`: real tasks and commits, but for the pixels."""
    from vidbatch.pipeline.engine import LocalPredictor
    from vidbatch.pipeline.task import process_task

    survey = take_survey(make_job(made, output), run=RUN, now=datetime.now(UTC))
    survey.open_output()
    predictor, total = LocalPredictor(survey.spec), Counts()
    before = time.process_time()
    for orders in survey.orders(lambda videos: [], width=1):
        for order in orders:
            total += process_task(
                order, survey.spec, ledger=survey.ledger, decoder=Blank(), predictor=predictor,
                sources=NoSource(),
            ).counts  # fmt: skip
    cpu_s = time.process_time() - before
    assert (total.clips, total.failed) == (made.videos, 0), total
    sizes = [p.stat().st_size for p in Path(output).rglob("*") if p.is_file()]
    return {
        "clips": total.clips,
        "tasks": total.tasks,
        "puts_per_task": total.puts / total.tasks,
        "cpu_ms_per_task": cpu_s * 1000 / total.tasks,
        "record_bytes": statistics.mean(
            p.stat().st_size for p in Path(output, COMMITS).rglob("*.json")
        ),
        "objects": len(sizes),
        "bytes_per_clip": sum(sizes) / total.clips,
    }


def peak_mib() -> float:
    """The most memory this process ever held (RSS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def leg(name: str, clips: int, endpoint: str, folder: str) -> dict[str, Any]:
    """One leg, in this process; its peak memory is among what it gives."""
    output, made = f"{folder}/{name}", Made(clips)
    few, many = Made(min(clips, 2_000)), Made(max(1, clips // CLIPS_OF_A_LARGE_VIDEO))
    legs: dict[str, Callable[[], dict[str, Any]]] = {
        "list": lambda: list_keys(made, output),
        "plan": lambda: drive(made, output, Nobody, clips),
        "probed": lambda: drive(many, output, Nobody, many.videos * CLIPS_OF_A_LARGE_VIDEO),
        "run": lambda: drive(made, output, on_ray, clips),
        "resume": lambda: resume(made, endpoint),
        "store": lambda: in_a_store(Made(min(clips, IN_A_STORE)), endpoint, folder),
        "task": lambda: real_tasks(few, output),
    }
    return {**legs[name](), "peak_mib": peak_mib()}


def run_leg(name: str, clips: int, folder: Path) -> dict[str, Any]:
    """One leg in a process of its own, before an endpoint of its own."""
    videos = {
        "probed": max(1, clips // CLIPS_OF_A_LARGE_VIDEO),
        "store": min(clips, IN_A_STORE),
        "task": min(clips, 2_000),
    }
    with serving(Made(videos.get(name, clips)), folder / "run") as endpoint:
        called = f"leg({name!r}, {clips}, {endpoint!r}, {str(folder)!r})"
        code = f"import json; from tests.bench.scale import leg; print(json.dumps({called}))"
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
            env={**os.environ, **access(endpoint)},
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def access(endpoint: str) -> dict[str, str]:
    """The environment that leads to the made endpoint."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "made",
        "AWS_SECRET_ACCESS_KEY": "made",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def main() -> None:
    """Runs the legs and prints what each measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for the outputs")
    parser.add_argument("--legs", default=",".join(LEGS), help="resume needs run before it")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vidbatch-scale-", dir=args.folder))
    try:
        for name in args.legs.split(","):
            for key, value in run_leg(name, args.clips, folder).items():
                shown = f"{value:,.1f}" if isinstance(value, float) else value
                print(f"{name:8} {key:22} {shown}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
