"""`run` and `retry` as functions: a job goes to the engine that its file names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from vidbatch.config import Job, parse_job
from vidbatch.errors import UsageError, VidbatchError
from vidbatch.ledger import Ledger
from vidbatch.logs import make_progress
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import RunSpec
from vidbatch.pipeline.resolve import settings_of
from vidbatch.pipeline.run import RunResult, run_job
from vidbatch.pipeline.survey import append_retries
from vidbatch.progress import Progress
from vidbatch.report import summary_table
from vidbatch.storage import StoreSettings, open_store


def launch(
    job: Job,
    *,
    progress: Progress | None = None,
    strict: bool = False,
    limit: int | None = None,
    now: datetime | None = None,
    tell: bool = True,
) -> RunResult:
    """Runs a job on Ray, or in this process with `engine.address: none`.

    Args:
        tell: whether `tell_end` is done as well.
    Raises:
        UsageError, InfraError: see `pipeline.run.run_job`.
    """
    progress = progress or Progress(quiet=True)

    def make_engine(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Engine:
        from vidbatch.cluster.driver import RayEngine  # imports Ray: only when there is work

        engine = RayEngine(spec, job, note=note)
        engine.progress = progress
        return engine

    if _is_watched(job):
        ledger = Ledger(open_store(job.output.uri, settings_of(job.output.store)))
        last = ledger.last_success()
        progress.listing = {"last_success_s": last.timestamp() if last else None}
    code = 1
    try:
        result = run_job(
            job, progress=progress, strict=strict, limit=limit, now=now, make_engine=make_engine
        )
        code = result.exit_code
        return result
    except VidbatchError as error:
        code = error.exit_code
        raise
    finally:
        if tell:
            tell_end(job, code, progress)


def tell_end(job: Job, code: int, progress: Progress) -> None:
    """Tells the end of the last run of this process as metrics, where somebody looks after the
    cluster; takes twelve seconds there."""
    if _is_watched(job):
        from vidbatch.cluster import ending

        ending.tell_end(job.engine, code, progress)


def _is_watched(job: Job) -> bool:
    return job.engine.address not in ("local", "none")


def run_and_show(
    job: Job,
    *,
    strict: bool = False,
    limit: int | None = None,
    quiet: bool = False,
    as_json: bool = False,
    log: str | None = None,
) -> tuple[int, str | None]:
    """`launch` for people: the log on stderr, with `as_json` the summary on stdout.

    Returns:
        Exit code, and why the run stopped early.
    Raises:
        VidbatchError: as `launch`.
    """
    with make_progress(log, quiet=quiet) as progress:
        result = launch(job, progress=progress, strict=strict, limit=limit)
        progress.event("summary", **result.summary)
    if as_json:
        print(json.dumps(result.summary, indent=2, default=str, ensure_ascii=False))
    elif result.run is not None and not quiet and log != "json":
        from rich.console import Console

        Console(stderr=True).print(summary_table(dict(result.summary)))
    return result.exit_code, result.summary.get("stopped")


def kuberay_code(code: int, stopped: str | None) -> int:
    """The exit code of a RayJob's entrypoint: not zero only where another try is of use.

    KubeRay makes a new cluster and starts again, up to `backoffLimit` times, whenever the
    entrypoint fails. A finished run with failures (3), one above the failure limit (4) and one that
    a limit of the job file stopped (5) would only be run again to the same end: they are told by
    metrics.

    Args:
        stopped: why the run stopped early, as its summary says it.
    """
    by_a_limit = code == 5 and (stopped or "").startswith("limits.")
    shown = 0 if code in (3, 4) or by_a_limit else code
    if shown != code:
        print(f"vidbatch: exit code {code}, shown to KubeRay as {shown}", file=sys.stderr)
    return shown


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
