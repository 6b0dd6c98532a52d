"""The conductor: one run from the survey to its summary, whatever engine carries it out.

Order of a start: list → diff → only then an engine. Nothing to do: no engine, nothing written.
Exit codes: 0 finished, 1 infrastructure, 2 usage, 3 (strict) finished with failures, 4 stopped
above the failure limit, 5 stopped before the end.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from vidbatch.config import Job
from vidbatch.errors import VidbatchError
from vidbatch.pipeline.engine import Engine, LocalEngine
from vidbatch.pipeline.order import RunSpec, SlowClip, TaskReport
from vidbatch.pipeline.supply import PlannedSupply
from vidbatch.pipeline.survey import Survey, new_run_id, take_survey
from vidbatch.progress import Counts, Progress, human_s

FAILURE_LIMIT_AFTER = 50
"""Outcomes before the failure limit may stop a run."""

SILENT_TASKS = 3
"""Tasks in a row in which a model gave nothing before a run stops."""

MAX_SLOWEST = 20
"""Clips that the summary names."""

EVENTS_EVERY_S, EVENTS_BYTES = 10.0, 2**20
"""One event object per so much time or size, whichever comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended."""

    run: str | None
    """Null when there was nothing to do."""
    exit_code: int
    summary: Mapping[str, Any]


EngineFactory = Callable[[RunSpec, Job, Callable[[str], None]], Engine]


def run_job(
    job: Job,
    *,
    progress: Progress | None = None,
    strict: bool = False,
    limit: int | None = None,
    now: datetime | None = None,
    make_engine: EngineFactory | None = None,
) -> RunResult:
    """Runs a job to its end, or finds that it is done.

    Args:
        limit: take only that many videos (the newest), for a trial.
        make_engine: the engine on Ray comes in from above (`cluster.driver.RayEngine`); without
            one, or with `engine.address: none`, everything runs in this process.
    Raises:
        UsageError, InfraError: nothing more can be done; the same command goes on later.
    """
    progress = progress or Progress(quiet=True)
    now = now or datetime.now(UTC)
    started = time.monotonic()
    survey = take_survey(job, run=new_run_id(now), now=now, limit=limit)
    progress.listing = {**progress.listing, **survey.listing_facts()}
    for line in survey.describe():
        progress.note(line)
    if survey.nothing_to_do:
        progress.note("nothing to do: every output of every video listed is committed")
        return RunResult(run=None, exit_code=0, summary={"listing": dict(progress.listing)})
    survey.check_limits()
    if make_engine is None or job.engine.address == "none":
        engine: Engine = LocalEngine(survey.spec, length_s=job.clips.length_s)
    else:
        engine = make_engine(survey.spec, job, progress.note)
    return _Conductor(job, survey, engine, progress, started, now).run(strict=strict)


class _Conductor:
    def __init__(
        self,
        job: Job,
        survey: Survey,
        engine: Engine,
        progress: Progress,
        started: float,
        now: datetime,
    ) -> None:
        self.job, self.survey, self.engine, self.progress = job, survey, engine, progress
        self.started, self.now = started, now
        self.counts = Counts()
        self.by_output: dict[str, Counter[str]] = {}
        self.kinds: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.silent: Counter[str] = Counter()
        """Model → tasks in a row in which it failed on every clip."""
        self.slowest: list[SlowClip] = []
        self.stop_reason: str | None = None
        self.exit_code = 0
        self.on_gpu = False
        self.first_task_s: float | None = None
        self.first_commit_s: float | None = None

    def run(self, *, strict: bool) -> RunResult:
        survey, run = self.survey, self.survey.spec.run
        self.progress.ids["run"] = run
        survey.open_output()
        events = _Events(survey, run, self.progress)
        facts: Mapping[str, Any] = {}
        try:
            with self._signals():
                line = self.engine.start()
                self.progress.note(f"run {run}: {line}")
                events.add("started", engine=line)
                facts = self._drive(events)
        except VidbatchError as error:  # a model that does not load, a store or cluster that fails
            self.exit_code, self.stop_reason = error.exit_code, error.message
            self._finish(events, facts)
            raise
        c = self.counts
        if self.exit_code == 0 and self.stop_reason is not None:
            self.exit_code = 5
        elif self.exit_code == 0 and c.failed_outside and c.failed_outside == c.ok + c.failed:
            # too small a run for the limit, yet nothing at all came of it: no good night
            self.exit_code = 4
            self.stop_reason = "every outcome failed for causes outside the files"
        if self.exit_code == 0 and strict and (self.counts.failed or self.counts.partial):
            self.exit_code = 3
        summary = self._finish(events, facts)
        return RunResult(run=run, exit_code=self.exit_code, summary=summary)

    def _drive(self, events: _Events) -> Mapping[str, Any]:
        supply = PlannedSupply(self.survey, self.engine, self.progress)
        alarm = self._alarm()
        try:
            for report in self.engine.run(supply):
                self._take(report, supply, events)
                events.flush()
        finally:
            alarm.cancel()
            supply.close()
            facts = self.engine.stop()
        if not supply.finished and self.stop_reason is None:
            self.stop_reason = "stopped"
        return facts

    def _alarm(self) -> threading.Timer:
        """Stops the run when its time is over, whatever it waits for then."""
        most_s = self.job.limits.stop_after
        left_s = max(0.0, (most_s or 0.0) - (time.monotonic() - self.started))
        reason = f"limits.stop_after {human_s(most_s or 0.0)} is over"
        alarm = threading.Timer(left_s, self._halt, (reason,))
        alarm.daemon = True
        if most_s is not None:
            alarm.start()
        return alarm

    def _take(self, report: TaskReport, supply: PlannedSupply, events: _Events) -> None:
        elapsed = time.monotonic() - self.started
        if self.first_commit_s is None:
            self.first_commit_s = elapsed
            self.first_task_s = elapsed - report.counts.stage_s.get("task", 0.0)
        self.counts = self.counts + report.counts
        self.on_gpu = self.on_gpu or report.device == "cuda"
        self.progress.add(report.counts, supply.cost_of(report.task_id))
        for uri, name, kind, message in report.failures:
            self.progress.event(
                "failure", task=report.task_id, video=uri, output=name, kind=kind, message=message
            )
        self.kinds.update(report.kinds)
        self.fallbacks.update(report.fallbacks)
        slowest = sorted([*self.slowest, *report.slowest], key=lambda c: -c.seconds)
        self.slowest = slowest[:MAX_SLOWEST]
        for partition, status in report.committed.items():
            self.by_output.setdefault(partition, Counter())[status] += 1
        self._count_silent(report)
        events.add(
            "task",
            task=report.task_id,
            committed=dict(report.committed),
            counts=report.counts.as_dict(),
            failures=[list(f) for f in report.failures],
            kinds=dict(report.kinds),
        )
        self._check_limits()

    def _count_silent(self, report: TaskReport) -> None:
        names = {o.partition: o.name for o in self.survey.spec.outputs}
        for name in (names[partition] for partition in report.committed):
            self.silent[name] = self.silent[name] + 1 if name in report.silent else 0
            if self.silent[name] >= SILENT_TASKS and self.stop_reason is None:
                self.exit_code = 4
                self._halt(
                    f"{name} failed on every clip of {SILENT_TASKS} tasks in a row: "
                    f"{report.silent[name]}; mend it (`vidbatch config check` runs it), or take it "
                    "out of the job"
                )

    def _check_limits(self) -> None:
        c, limits = self.counts, self.job.limits
        outcomes = c.ok + c.partial + c.failed
        share = c.failed_outside / outcomes if outcomes else 0.0
        if (
            self.stop_reason is None
            and outcomes >= FAILURE_LIMIT_AFTER
            and (share > limits.max_failed_share)
        ):
            self.exit_code = 4
            self._halt(
                f"{share:.0%} of {outcomes} outcomes failed for causes outside the files "
                f"(limits.max_failed_share {limits.max_failed_share:.0%})"
            )
        cost = sum(self._cost().values())
        if limits.max_cost is not None and cost > limits.max_cost:
            self._halt(f"limits.max_cost {limits.max_cost:g} is spent (about {cost:.2f} so far)")

    def _cost(self) -> dict[str, float]:
        """About what the run has cost so far, by the job file's prices: decoders while they had a
        task, GPUs from the start to now, requests."""
        c, prices, engine = self.counts, self.job.cost, self.job.engine
        gpus = 0 if not self.on_gpu else 1 if engine.predictors == "auto" else engine.predictors
        gpu_h = gpus * (time.monotonic() - self.started) / 3600
        requests = c.gets * prices.get_1000 / 1000 + c.puts * prices.put_1000 / 1000
        return {
            "cpu": round(c.stage_s.get("task", 0.0) / 3600 * prices.cpu_hour, 6),
            "gpu": round(gpu_h * prices.gpu_hour, 6),
            "requests": round(requests, 6),
        }

    def _halt(self, reason: str) -> None:
        if self.stop_reason is None:
            self.stop_reason = reason
            self.progress.note(f"stopping: {reason}; the same command goes on from here")
            self.engine.halt()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first SIGINT stop handing out; a second SIGINT ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(signum: int, _: FrameType | None) -> None:
            if signum == signal.SIGINT:
                signal.signal(signal.SIGINT, before[signal.SIGINT])
            self._halt(f"received {signal.Signals(signum).name}")

        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for s in before:
            signal.signal(s, stop)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _finish(self, events: _Events, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the last events, the summary and the row of `runs`, if the store lets it."""
        elapsed = time.monotonic() - self.started
        c = self.counts
        summary: dict[str, Any] = {
            "run": self.survey.spec.run,
            "started_at": self.now.isoformat(),
            "elapsed_s": round(elapsed, 3),
            "exit_code": self.exit_code,
            "stopped": self.stop_reason,
            "listing": self.survey.listing_facts(),
            "counts": c.as_dict(),
            "frames_per_s": round(c.frames / elapsed, 2) if elapsed else 0.0,
            "video_hours": round(c.video_s / 3600, 6),
            "first_task_s": self.first_task_s and round(self.first_task_s, 3),
            "first_commit_s": self.first_commit_s and round(self.first_commit_s, 3),
            "outputs": {k: dict(v) for k, v in self.by_output.items()},
            "failures_by_kind": dict(self.kinds),
            "fallbacks": dict(self.fallbacks.most_common()),
            "slowest": [{**c._asdict(), "seconds": round(c.seconds, 3)} for c in self.slowest],
            "not_planned": self.survey.not_planned,
            "engine": dict(facts),
            "cost": self._cost(),
            "versions": dict(self.survey.spec.versions),
        }
        try:
            events.add("finished", exit_code=self.exit_code, stopped=self.stop_reason)
            events.flush(force=True)
            self.survey.close_run(summary)
        except VidbatchError as error:
            self.progress.note(f"the run's summary could not be written: {error.message}")
            if self.exit_code == 0:
                raise
        return summary


class _Events:
    """JSON lines of the driver, written as whole objects."""

    def __init__(self, survey: Survey, run: str, progress: Progress) -> None:
        self._survey, self._run, self._progress = survey, run, progress
        self._lines: list[str] = []
        self._bytes = 0
        self._n = 0
        self._since = time.monotonic()

    def add(self, event: str, **facts: Any) -> None:
        line = json.dumps({"t": datetime.now(UTC).isoformat(), "event": event, **facts})
        self._lines.append(line)
        self._bytes += len(line)
        self._progress.event(event, **facts)

    def flush(self, *, force: bool = False) -> None:
        due = time.monotonic() - self._since > EVENTS_EVERY_S or self._bytes > EVENTS_BYTES
        if self._lines and (force or due):
            self._survey.ledger.write_event(self._run, "driver", self._n, self._lines)
            self._n += 1
            self._lines, self._bytes, self._since = [], 0, time.monotonic()
