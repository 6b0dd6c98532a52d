"""`run` and `retry` as functions: a job goes to the engine that its file names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from vidbatch.config import Job, parse_job
from vidbatch.errors import UsageError
from vidbatch.ledger import Ledger
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import RunSpec
from vidbatch.pipeline.run import RunResult, run_job
from vidbatch.pipeline.survey import append_retries
from vidbatch.progress import Progress
from vidbatch.storage import StoreSettings, open_store


def launch(
    job: Job,
    *,
    progress: Progress | None = None,
    strict: bool = False,
    limit: int | None = None,
    now: datetime | None = None,
) -> RunResult:
    """Runs a job on Ray, or in this process with `engine.address: none`.

    Raises:
        UsageError, InfraError: see `pipeline.run.run_job`.
    """
    return run_job(
        job, progress=progress, strict=strict, limit=limit, now=now, make_engine=_ray_engine
    )


def _ray_engine(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Engine:
    from vidbatch.cluster.driver import RayEngine  # imports Ray: only when there is work for it

    return RayEngine(spec, job, note=note)


def last_job(output: str, settings: StoreSettings | None = None) -> Job:
    """The job of an output's last run, for commands that are given the output alone.

    Raises:
        UsageError: the output holds no run.
    """
    last = Ledger(open_store(output, settings or StoreSettings())).last_job()
    if last is None:
        raise UsageError(f"{output}: holds no run of vidbatch; check the path, or give --job")
    return parse_job(last.job, base_dir=Path.cwd(), name=f"job of run {last.run}")


def plan_retries(job: Job, *, kinds: tuple[str, ...] = ()) -> int:
    """Plans a new generation for clips that failed and may succeed; the next run does them.

    Args:
        kinds: only failures of these kinds; empty: all that are not permanent.

    Returns:
        Tasks planned.
    """
    return append_retries(job, kinds=kinds)
