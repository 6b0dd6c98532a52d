"""The command line: each command a thin shell over a Python function. stdout is data, stderr talk.

Exit codes of `run`: 0 finished, 1 infrastructure, 2 usage, 3 (--strict) finished with failures,
4 stopped above the failure limit, 5 stopped before the end (the same command goes on).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vidbatch.cli_models import models_app
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
app.add_typer(models_app, name="models")


class LogStyle(StrEnum):
    """`text` for people; `json`: one object per line."""

    text = "text"
    json = "json"


class ExitCodes(StrEnum):
    """`all` six of them, or those that KubeRay should see."""

    all = "all"
    kuberay = "kuberay"


SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; may stand several times")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
OutputArg = Annotated[str, typer.Argument(help="the output folder or s3:// prefix")]


def main() -> None:
    """The console script: every error of ours becomes one line and its exit code."""
    try:
        code = app(standalone_mode=False)  # an Exit comes back as its code, it is not raised
    except VidbatchError as error:
        from vidbatch.logs import say_error

        say_error(error, None)
        sys.exit(error.exit_code)
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
    sys.exit(code or 0)


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


@app.command("try")
def try_model(
    model: Annotated[str, typer.Argument(help="a model file, or the name of a builtin")],
    video: Annotated[str, typer.Argument(help="one video")],
    beside: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="one it needs: whose boxes it gets")
    ] = None,
    fps: Annotated[str | None, typer.Option(help="frames per second; without: spread out")] = None,
    frames: Annotated[int, typer.Option("-n", min=1, max=200, help="frames shown")] = 20,
    out: Annotated[Path, typer.Option("-o", "--out", help="the picture")] = Path("try.png"),
    as_json: JsonFlag = False,
) -> None:
    """Shows frames of a video as a model sees them, with its rows: a picture and tables."""
    from vidbatch.trial import try_and_show

    try_and_show(model, video, out, beside=beside or (), fps=fps, n=frames, as_json=as_json)


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
    log: Annotated[
        LogStyle, typer.Option(envvar="VIDBATCH_LOG", help="lines on stderr")
    ] = LogStyle.text,
    exit_codes: Annotated[
        ExitCodes, typer.Option(help="kuberay: not zero only where a retry is of use")
    ] = ExitCodes.all,
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Runs a job to its end; the same command resumes it, or finds that nothing is to do."""
    from vidbatch.config import QuickJob
    from vidbatch.launch import kuberay_code, run_and_show
    from vidbatch.logs import say_error

    try:
        if _is_job_file(job):
            if output is not None or model:
                raise UsageError(f"-o and -m go without a job file; {job} says both itself")
            parsed = _job(job, overrides)
        else:
            if output is None:
                raise UsageError(f"{job}: a folder of videos needs -o OUTPUT, or give a job file")
            models = tuple(model or ("quality",))
            quick = QuickJob(archive=job, output=output, models=models, fps=fps)
            parsed = quick.job(overrides or ())
        code, stopped = run_and_show(
            parsed, strict=strict, limit=limit, quiet=quiet, as_json=as_json, log=log
        )
    except VidbatchError as error:
        say_error(error, log)
        code, stopped = error.exit_code, None
    raise typer.Exit(kuberay_code(code, stopped) if exit_codes == "kuberay" else code)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="the job file")],
    args: Annotated[
        list[str] | None, typer.Argument(help="after --: options of `run`, or of the script")
    ] = None,
    address: Annotated[str | None, typer.Option(help="http://HOST:PORT of a Ray dashboard")] = None,
    k8s: Annotated[
        str | None, typer.Option(help="a manifest (- for stdin) to print a RayJob from")
    ] = None,
    script: Annotated[Path | None, typer.Option(help="instead of `vidbatch run`")] = None,
    overrides: SetOption = None,
    wait: Annotated[bool, typer.Option(help="follow the job; exit with its code")] = True,
) -> None:
    """Runs a job on a Ray cluster, or prints the RayJob that does."""
    from vidbatch.submit import collect_files, entrypoint, rayjob

    if (address is None) == (k8s is None) or (k8s is not None and script is not None):
        raise UsageError("give --address URL, or --k8s MANIFEST (its entrypoint is the script)")
    files = collect_files(_job(str(job), overrides), script)
    if k8s is not None:
        try:
            manifests = sys.stdin.read() if k8s == "-" else Path(k8s).read_text("utf-8")
        except OSError as error:
            raise UsageError(f"--k8s {k8s}: cannot be read: {error.strerror}") from error
        print(rayjob(manifests, files, args or ()), end="")
        return
    assert address is not None
    from vidbatch.cluster.jobs import JobClient

    client = JobClient(address)
    name = client.submit(entrypoint(script, args or ()), files)
    stop = f"ray job stop {name} --address {client.address}"
    print(f"submitted {name}; to stop it: {stop}", file=sys.stderr)
    if not wait:
        print(name)
        return
    try:
        raise typer.Exit(client.follow(name, sys.stderr.write))
    except KeyboardInterrupt:
        print(f"vidbatch: {name} goes on without a watcher; to stop it: {stop}", file=sys.stderr)
        raise typer.Exit(5) from None


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
    from vidbatch.launch import last_job, plan_retries, run_and_show

    parsed = _job(job, None) if job else last_job(output, _settings(endpoint_url))
    planned = plan_retries(parsed, kinds=tuple(kind or ()))
    print(f"{planned} tasks to retry", file=sys.stderr)
    if planned:
        raise typer.Exit(run_and_show(parsed, quiet=quiet)[0])


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
def track(
    output: OutputArg,
    model: Annotated[str | None, typer.Option(help="the detector whose boxes are followed")] = None,
    config: Annotated[Path | None, typer.Option(help="a tracker file")] = None,
    appearance: Annotated[
        str | None, typer.Option(help="the model that gives embeddings of the boxes")
    ] = None,
    sample: Annotated[str | None, typer.Option(help="sample=… or its beginning")] = None,
    endpoint_url: str | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Links the boxes of each video to tracks, from the tables alone; a rerun takes what is new."""
    from vidbatch.track import load_rule, report_lines
    from vidbatch.track import track as track_boxes

    found = track_boxes(
        output, _settings(endpoint_url), rule=load_rule(config) if config else None,
        model=model, appearance=appearance, sample=sample,
    )  # fmt: skip
    if as_json:
        _print_json(asdict(found))
    else:
        print("\n".join(report_lines(found)))


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
        _print_json(result.dicts())
    else:
        _rich(queries.result_table(result))


@config_app.command("check")
def config_check(
    job: Annotated[str, typer.Argument(help="the job file")],
    overrides: SetOption = None,
    load: Annotated[bool, typer.Option(help="also load every model and show it two items")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Reads a job file, tries its models, shows fingerprints and what differs from the last run."""
    from vidbatch.jobfile import check_job

    found = check_job(_job(job, overrides), load=load)
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
