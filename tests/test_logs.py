"""JSON lines: one object each, ids in it, no secrets; the job scripts and their exit codes."""

from __future__ import annotations

import io
import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidbatch.cluster import ending
from vidbatch.config import parse_job
from vidbatch.demo import DATE_PATTERN, make_archive
from vidbatch.errors import ClusterError, UsageError
from vidbatch.launch import kuberay_code, tell_end
from vidbatch.ledger import Ledger
from vidbatch.logs import JsonLog, say_error
from vidbatch.progress import Counts, Progress
from vidbatch.storage import open_store

ROOT = Path(__file__).resolve().parents[1]


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_line_is_an_object_with_its_run() -> None:
    stream = io.StringIO()
    with Progress(stream=stream, log=JsonLog(stream).say) as progress:
        progress.note("before there is a run")
        progress.ids["run"] = "r1"
        progress.expect(1, 1.0)
        progress.event("failure", task="t1", video="s3://b/k.mp4", kind="no_video")
        progress.add(Counts(tasks=1, frames=2))
    first, failure, last = lines(stream)
    assert (first["event"], first["level"], "run" in first) == ("note", "info", False)
    assert (failure["run"], failure["task"], failure["video"]) == ("r1", "t1", "s3://b/k.mp4")
    assert (last["event"], last["frames"], last["total_tasks"]) == ("progress", 2, 1)


def test_no_secret_is_written() -> None:
    stream = io.StringIO()
    log = JsonLog(stream)
    log.say("note", {"message": "GET https://bob:hunter2@host/a?X-Amz-Signature=0123abcd", "n": 1,
                     "list": [("s3://b/k", "aws_secret_access_key=abcdefgh")]})  # fmt: skip
    said = stream.getvalue()
    assert "hunter2" not in said and "0123abcd" not in said and "abcdefgh" not in said
    assert lines(stream)[0]["list"][0][0] == "s3://b/k" and lines(stream)[0]["n"] == 1


@pytest.mark.logs_errors
def test_what_libraries_log_becomes_lines() -> None:
    stream = io.StringIO()
    log = JsonLog(stream).start()
    try:
        logging.getLogger("some.library").error("it\nbroke")
        logging.getLogger("some.library").info("chatter")
    finally:
        logging.getLogger().removeHandler(log)
    (line,) = lines(stream)
    assert (line["level"], line["event"], line["logger"]) == ("error", "log", "some.library")
    assert line["message"] == "it broke"


def test_an_error_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    say_error(UsageError("that is wrong", advice="write it so"), "json")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["kind"], line["advice"]) == ("error", "UsageError", "write it so")
    say_error(UsageError("that is wrong", advice="write it so"), None)
    assert capsys.readouterr().err == "vidbatch: that is wrong\n  write it so\n"


# how things end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "stopped", "shown"),
    [
        (0, None, 0),
        (1, "no store", 1),
        (2, None, 2),
        (3, None, 0),
        (4, "6% of 900 outcomes failed", 0),
        (5, "limits.stop_after 6 h 00 min is over", 0),
        (5, "received SIGTERM", 5),
    ],
)
def test_kuberay_retries_what_a_retry_helps(code: int, stopped: str | None, shown: int) -> None:
    assert kuberay_code(code, stopped) == shown


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of three days and a job file that reads it without Ray."""
    folder = tmp_path_factory.mktemp("jobs")
    make_archive(folder / "videos", seconds=1)
    tree = {
        "archive": {"uri": "videos", "date": {"from": "key", "pattern": DATE_PATTERN}},
        "sample": {"fps": 1},
        "models": [{"builtin": "colour"}],
        "output": {"uri": "tables"},
        "engine": {"address": "none"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_exit_codes_leave_the_process(folder: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "jobs" / "nightly.py"), str(folder / "job.yaml")]
        return subprocess.run(
            [*script, "--set", f"output.uri={folder}/{len(args)}", *args],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    strict = run("--strict")
    assert strict.returncode == 3, "the archive holds a file that is no video"
    mapped = run("--strict", "--exit-codes", "kuberay", "--log", "json")
    assert mapped.returncode == 0
    said = [json.loads(x) for x in mapped.stderr.splitlines() if x.startswith("{")]
    assert {"note", "started", "task", "failure", "finished", "summary"} <= {
        s["event"] for s in said
    }
    failed = [s for s in said if s["event"] == "failure"]
    assert all(s["video"].startswith(str(folder / "videos")) for s in failed)
    assert {s["task"] for s in failed} <= {s["task"] for s in said if s["event"] == "task"}
    assert {s["run"] for s in failed} == {said[-1]["run"]}
    assert "exit code 3, shown to KubeRay as 0" in mapped.stderr


def backfill(folder: Path, output: str, *args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [
        "backfill.py", str(folder / "job.yaml"), "--from", "2026-03-01", "--to", "2026-03-04",
        "--set", f"output.uri={folder / output}", *args,
    ])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "jobs" / "backfill.py"), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_backfill_goes_from_the_newest_day_to_the_oldest(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert backfill(folder, "all", monkeypatch=monkeypatch) == 0
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("backfill: ")]
    assert said == [f"backfill: 2026-03-0{day}" for day in (3, 2, 1)]
    assert backfill(folder, "all", "--stop-after", "0", monkeypatch=monkeypatch) == 5


def test_the_cost_limit_holds_for_the_whole_backfill(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = ("--set", "cost.cpu_hour=3600", "--max-cost")  # one a second of decoding
    assert backfill(folder, "cheap", *prices, "1e-3", monkeypatch=monkeypatch) == 5
    assert "limits.max_cost 0.001 is spent" in capsys.readouterr().err
    assert backfill(folder, "cheap", *prices, "1e6", monkeypatch=monkeypatch) == 0


def test_the_last_good_run_is_found(folder: Path) -> None:
    ledger = Ledger(open_store(str(folder / "good")))
    assert ledger.last_success() is None
    for run, code, elapsed_s in (("20260301T0", 0, 60.0), ("20260302T0", 4, 1.0)):
        ledger.finish_run(
            run,
            {"exit_code": code, "started_at": "2026-03-01T02:00:00+00:00", "elapsed_s": elapsed_s},
        )
    found = ledger.last_success()
    assert found is not None and found.isoformat() == "2026-03-01T02:01:00+00:00"


def test_a_cluster_that_is_gone_does_not_hide_how_the_run_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(_: Any) -> bool:
        raise ClusterError("no Ray cluster answers at h:1")

    monkeypatch.setattr(ending, "start_ray", gone)
    monkeypatch.setattr(ending.ray, "is_initialized", lambda: False)
    stream = io.StringIO()
    tree = yaml.safe_load((folder / "job.yaml").read_text())
    job = parse_job({**tree, "engine": {"address": "h:1"}}, base_dir=folder)
    tell_end(job, 4, Progress(stream=stream))
    assert "how the run ended is not told as metrics: no Ray cluster answers" in stream.getvalue()
