"""The command line: each command a thin shell over a Python function. stdout is data, stderr talk.

Exit codes of `run`: 0 finished, 1 infrastructure, 2 usage, 3 (--strict) finished with failures,
4 stopped above the failure limit, 5 stopped before the end (the same command goes on).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vidbatch.errors import UsageError, VidbatchError

app = typer.Typer(
    name="vidbatch",
    help="A video archive in, partitioned Parquet tables of labels and embeddings out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at a job file without running it.", no_args_is_help=True)
app.add_typer(config_app, name="config")

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; may stand several times")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
OutputArg = Annotated[str, typer.Argument(help="the output folder or s3:// prefix")]


def main() -> None:
    """The console script: every error of ours becomes one line and its exit code."""
    try:
        app(standalone_mode=False)
    except VidbatchError as error:
        print(f"vidbatch: {error.message}", file=sys.stderr)
        if error.advice and error.advice not in error.message:
            print(f"  {error.advice}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("vidbatch: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(5)
    except Exception as error:
        # usage errors of the command line itself come from click, with a message of their own
        show: Callable[[], None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(2)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def _job(path: str, overrides: list[str] | None) -> Any:
    from vidbatch.config import load_job

    return load_job(Path(path), overrides or ())


def _is_job_file(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="where to make it")] = Path(),
    address: Annotated[str, typer.Option(help="local (Ray) or none (one process)")] = "local",
) -> None:
    """Makes a small archive, runs the whole job on it, asks two questions."""
    from vidbatch.demo import run_demo

    raise typer.Exit(run_demo(folder, address=address))


@app.command()
def init(
    folder: Annotated[str, typer.Argument(help="a folder or s3:// prefix with videos")],
    out: Annotated[Path, typer.Option("-o", "--out", help="the job file to write")] = Path(
        "job.yaml"
    ),
) -> None:
    """Writes a commented job file from what it finds in an archive."""
    from vidbatch.jobfile import init_job

    text = init_job(folder)
    if out.exists():
        raise UsageError(f"{out} exists; nothing was written; choose another name with --out")
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}; look at it, then: vidbatch plan {out}", file=sys.stderr)


@app.command()
def plan(
    job: Annotated[str, typer.Argument(help="the job file")],
    overrides: SetOption = None,
    probe: Annotated[int, typer.Option(help="headers to read for hours and errors")] = 200,
    as_json: JsonFlag = False,
) -> None:
    """Shows what a run would do, without running anything."""
    from vidbatch.pipeline.estimate import plan_table, show_plan

    shown = show_plan(_job(job, overrides), max_probes=probe)
    if as_json:
        _print_json(shown)
    else:
        from rich.console import Console

        Console().print(plan_table(shown))


@app.command()
def run(
    job: Annotated[str, typer.Argument(help="a job file, or a folder of videos")],
    output: Annotated[str | None, typer.Option("-o", "--output", help="without a job file")] = None,
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="built-in name or model file")
    ] = None,
    fps: Annotated[str, typer.Option(help="frames per second, without a job file")] = "1",
    overrides: SetOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit 3 if anything failed")] = False,
    limit: Annotated[int | None, typer.Option(help="only the newest N videos")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Runs a job to its end; the same command resumes it, or finds that nothing is to do."""
    from vidbatch.config import QuickJob

    if _is_job_file(job):
        if output is not None or model:
            raise UsageError(f"-o and -m go without a job file; {job} says both itself")
        parsed = _job(job, overrides)
    else:
        if output is None:
            raise UsageError(f"{job}: a folder of videos needs -o OUTPUT, or give a job file")
        quick = QuickJob(archive=job, output=output, models=tuple(model or ("quality",)), fps=fps)
        parsed = quick.job(overrides or ())
    raise typer.Exit(_run(parsed, strict=strict, limit=limit, quiet=quiet, as_json=as_json))


def _run(
    job: Any, *, strict: bool, limit: int | None = None, quiet: bool = False, as_json: bool = False
) -> int:
    from vidbatch.launch import launch
    from vidbatch.progress import Progress
    from vidbatch.report import summary_table

    with Progress(quiet=quiet) as progress:
        result = launch(job, progress=progress, strict=strict, limit=limit)
    if as_json:
        _print_json(result.summary)
    elif result.run is not None and not quiet:
        from rich.console import Console

        Console(stderr=True).print(summary_table(dict(result.summary)))
    return result.exit_code


@app.command()
def status(output: OutputArg, endpoint_url: str | None = None, as_json: JsonFlag = False) -> None:
    """Shows the runs of an output and how the last one goes or went, from its run folder alone."""
    from vidbatch import report

    found = report.status(output, _settings(endpoint_url))
    if as_json:
        _print_json(found)
    else:
        _rich(report.status_table(found))


@app.command()
def failures(
    output: OutputArg,
    endpoint_url: str | None = None,
    history: Annotated[bool, typer.Option("--all", help="cured ones too")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Shows what failed, why, and what to do."""
    from vidbatch import report

    rows = report.failures(output, _settings(endpoint_url), history=history)
    if as_json:
        _print_json(rows)
    else:
        _rich(report.failures_table(rows))


@app.command()
def retry(
    output: OutputArg,
    kind: Annotated[list[str] | None, typer.Option(help="only failures of this kind")] = None,
    job: Annotated[str | None, typer.Option(help="default: the job of its last run")] = None,
    endpoint_url: str | None = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    """Runs again what failed and may succeed, as a new generation; good rows are not touched."""
    from vidbatch.launch import last_job, plan_retries

    parsed = _job(job, None) if job else last_job(output, _settings(endpoint_url))
    planned = plan_retries(parsed, kinds=tuple(kind or ()))
    print(f"{planned} tasks to retry", file=sys.stderr)
    if planned:
        raise typer.Exit(_run(parsed, strict=False, quiet=quiet))


@app.command()
def verify(output: OutputArg, endpoint_url: str | None = None, as_json: JsonFlag = False) -> None:
    """Proves from the store alone that nothing is lost, doubled or changed."""
    from vidbatch import report

    found = report.verify_output(output, _settings(endpoint_url))
    if as_json:
        _print_json(found)
    else:
        _rich(report.verify_table(found))
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def sweep(output: OutputArg, endpoint_url: str | None = None, as_json: JsonFlag = False) -> None:
    """Removes left-over temporary files and names part files without a record."""
    from vidbatch import report

    found = report.sweep_output(output, _settings(endpoint_url))
    if as_json:
        _print_json(found)
    else:
        _rich(report.sweep_table(found))


@app.command()
def sql(
    output: OutputArg,
    query: Annotated[str, typer.Argument(help="a DuckDB query over the views")],
    endpoint_url: str | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Runs a query with the tables as views: labels, labels_all, features_quality, …"""
    from vidbatch import query as queries

    result = queries.sql(output, query, _settings(endpoint_url))
    if as_json:
        _print_json([dict(zip(result.columns, row, strict=True)) for row in result.rows])
    else:
        _rich(queries.result_table(result))


@app.command()
def models(
    output: Annotated[str | None, typer.Argument(help="also what this output holds")] = None,
    endpoint_url: str | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows the built-in models and adapters, and the models an output holds."""
    from vidbatch import report

    found = report.known_models(output, _settings(endpoint_url))
    if as_json:
        _print_json(found)
    else:
        _rich(report.models_table(found))


@config_app.command("check")
def config_check(
    job: Annotated[str, typer.Argument(help="the job file")],
    overrides: SetOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Reads a job file, shows its fingerprints and what differs from the output's last run."""
    from vidbatch.jobfile import check_job

    found = check_job(_job(job, overrides))
    if as_json:
        _print_json(found)
    else:
        for key, value in found.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            print(f"{key}: {text}")


def _settings(endpoint_url: str | None) -> Any:
    from vidbatch.storage import StoreSettings

    return StoreSettings(endpoint_url=endpoint_url)


def _rich(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)
