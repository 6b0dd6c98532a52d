"""What operators see: runs from their folder alone, failures with advice, models, proofs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.made_output import COUNTS, CURED, CUT, LONG, NIGHTS, NO_VIDEO, RUNS, TWICE, begin, upload
from vidbatch import report
from vidbatch.errors import UsageError
from vidbatch.report.runs import SILENT_AFTER_S


def shown(table: Any, width: int = 200) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def state(root: Path, run: str, **at: float) -> report.RunStatus:
    """How `run` looks as the last one, so long after its start."""
    for later in sorted(RUNS)[RUNS.index(run) + 1 :]:
        shutil.rmtree(root / "_vidbatch" / "runs" / later)
    last = report.status(str(root), now=NIGHTS[RUNS.index(run)] + timedelta(**at))["last"]
    assert last is not None
    return last


@pytest.fixture
def copied(made_output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_output, tmp_path / "copy"))


# runs


def test_a_run_under_way_is_told_from_its_events(copied: Path) -> None:
    run = state(copied, RUNS[2], minutes=5)
    assert (run["state"], run["exit_code"], run["run"]) == ("running", None, RUNS[2])
    assert run["counts"] == (COUNTS + COUNTS).as_dict()
    assert (run["elapsed_s"], run["frames_per_s"]) == (20.0, 6.0)
    assert run["failures_by_kind"] == {"busy": 2}
    assert set(run["committed"]) == {"frames", "faces-v1.0." + _hex(copied, "faces", "fps2")}
    assert all(how == {"new": 2} for how in run["committed"].values())


def _hex(root: Path, name: str, sample: str) -> str:
    (path,) = (root / "v1" / "coverage").glob(f"sample={sample}.*/model={name}-*")
    return path.name.rpartition(".")[2]


def test_a_run_without_a_sign_of_life_is_silent(copied: Path) -> None:
    run = state(copied, RUNS[2], seconds=20 + SILENT_AFTER_S + 1)
    assert run["state"] == "silent"
    text = shown(report.status_table(report.status(str(copied))))
    assert "killed? the same command goes on from here" in text


def test_a_run_that_died_before_its_first_event(copied: Path) -> None:
    shutil.rmtree(copied / "_vidbatch" / "runs" / RUNS[2] / "events")
    run = state(copied, RUNS[2], days=1)
    assert (run["state"], run["elapsed_s"], run["frames_per_s"]) == ("silent", 0.0, 0.0)
    assert run["started_at"] == "2026-03-06T01:00:00+00:00", "its label says"


@pytest.mark.parametrize(
    ("run", "ended", "stopped"),
    [(RUNS[1], "finished", None), (RUNS[0], "stopped before the end", "received SIGTERM")],
)
def test_a_run_that_ended_is_told_from_its_summary(
    run: str, ended: str, stopped: str | None, copied: Path
) -> None:
    found = state(copied, run, days=300)
    assert (found["state"], found["stopped"]) == (ended, stopped)
    assert (found["elapsed_s"], found["frames_per_s"]) == (24.0, 5.0)


def test_status_counts_what_is_planned_and_committed(made_output: Path) -> None:
    found = report.status(str(made_output))
    assert found["runs"] == sorted(RUNS, reverse=True)
    outputs = {
        (o["sample"].partition(".")[0], o["model"].rpartition(".")[0] or o["model"]): o
        for o in found["outputs"]
    }
    # five tasks of run 1 and CHANGED_NEW's; CURED and TWICE came back for four outputs
    expected = {
        ("fps1", "frames"): (9, 9), ("fps1", "faces-v1.0"): (9, 9), ("fps1", "quality-v1"): (9, 9),
        ("fps1", "colour-mix-v1"): (9, 9), ("fps1", "scene-v1"): (7, 6),
        ("fps1", "scene-v2"): (7, 3), ("fps2", "frames"): (1, 1), ("fps2", "faces-v1.0"): (1, 1),
    }  # fmt: skip
    assert {k: (o["planned"], o["committed"]) for k, o in outputs.items()} == expected
    touched = {k for k, o in outputs.items() if o["in_last_run"]}
    assert touched == {("fps2", "frames"), ("fps2", "faces-v1.0")}
    assert json.loads(json.dumps(found)) == found
    text = shown(report.status_table(found))
    assert "3 of 7 tasks committed" in text and "4 open" in text


def test_status_needs_the_run_folder_alone(copied: Path) -> None:
    expected = report.status(str(copied), now=NIGHTS[2])
    shutil.rmtree(copied / "v1")
    assert report.status(str(copied), now=NIGHTS[2]) == expected


def test_status_of_nothing(tmp_path: Path) -> None:
    found = report.status(str(tmp_path / "new"))
    assert (found["runs"], found["last"], found["outputs"]) == ([], None, [])
    assert "nothing has been written here yet" in shown(report.status_table(found))
    assert not (tmp_path / "new").exists()


def test_the_summary_shows_where_the_time_went(made_output: Path) -> None:
    path = made_output / "_vidbatch" / "runs" / RUNS[0] / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
    summary["not_planned"] = {"s3://a/b[1].mp4": "the store answered 503"}
    summary["slowest"] = [{"uri": "s3://a/slow.mp4", "start_s": 60.0, "seconds": 61.0,
                           "bytes_read": 2**25, "gets": 3}]  # fmt: skip
    summary["fallbacks"] = {"timestamps step back N times": 4}
    text = shown(report.summary_table(summary))
    for part in (
        "stopped before the end after 24 s: received SIGTERM", "5 frames/s", "5 x real time",
        "20 ok, 8 partial, 4 failed", "2 clips decoded in order", "2 busy", "6.0 MiB in 24 GETs",
        "2.0 MiB in 80 PUTs", "decode 12 s (60%), predict 6 s (30%), read 2 s (10%)",
        "s3://a/b[1].mp4: the store answered 503",
        "1 min 01 s: s3://a/slow.mp4 from 60 s, 32.0 MiB in 3 GETs",
        "4 × timestamps step back N times", "GPUs starved 61 %", "decoders 2",
        "decode 1 min 39 s (99%), idle 1 s (1%)", "compute 39 s (39%); 640 frames in 10 batches",
    ):  # fmt: skip
        assert part in text, part


# failures


def test_failures_say_what_why_and_what_to_do(made_output: Path) -> None:
    rows = report.failures(str(made_output))
    assert {r["uri"] for r in rows} == {v.uri for v in (NO_VIDEO, CUT, LONG, TWICE, CURED)}
    cut = next(r for r in rows if r["uri"] == CUT.uri and r["model"] == "frames")
    expected = {
        "status": "partial", "stage": "decode", "kind": "truncated", "end_s": 20.0,
        "message": "cut at 20 s of 30 s", "advice": "final until the object changes",
        "dt": "2026-03-02", "run": RUNS[0], "generation": 0, "retryable": False,
        "failed_at": "2026-03-04T01:30:00+00:00",
    }  # fmt: skip
    assert cut.items() >= expected.items()
    assert [r["failed_at"] for r in rows] == sorted((r["failed_at"] for r in rows), reverse=True)
    assert json.loads(json.dumps(rows)) == rows


def test_the_history_has_what_was_cured(made_output: Path) -> None:
    current, history = (report.failures(str(made_output), history=h) for h in (False, True))
    assert len(current) == 17 and len(history) == 25
    cured = [r for r in history if r["uri"] == CURED.uri and r["model"] == "frames"]
    assert cured and not [r for r in current if r in cured]


def test_failures_of_several_outputs_stand_on_one_line(made_output: Path) -> None:
    rows: list[dict[str, Any]] = report.failures(str(made_output))
    rows[0]["message"] = "[h264 @ 0x5] no frame"
    text = shown(report.failures_table(rows), width=400)
    assert text.count(NO_VIDEO.uri) == 1
    assert "[h264 @ 0x5] no frame" in text and "rests until the object changes" in text
    assert "[14, 30) s" in text and text.rstrip().endswith("\n6 clips")
    assert "nothing failed" in shown(report.failures_table([]))


# models, proofs


def test_models_say_what_they_covered(made_output: Path) -> None:
    found = report.known_models(str(made_output))
    assert "quality" in found["builtin"] and "opencv" in found["adapters"]
    rows: dict[str, Mapping[str, Any]] = {
        r["model"].rpartition(".")[0] + r["first_run"][7:8]: r for r in found["output"]
    }
    assert rows["scene-v14"].items() >= {"videos": 9, "frames": 260, "videos_current": 4}.items()
    assert rows["scene-v25"].items() >= {"videos": 5, "frames": 150, "videos_current": 5}.items()
    assert rows["faces-v1.06"]["videos"] == 1
    assert json.loads(json.dumps(found)) == found
    text = shown(report.models_table(found))
    assert "vidbatch[opencv]" in text and "9 videos, 260 frames, current for 4" in text
    assert report.known_models()["output"] == []


def test_verify_and_sweep_are_reported(copied: Path) -> None:
    found = report.verify_output(str(copied))
    assert found["problems"] == () or found["problems"] == []
    assert "all proved" in shown(report.verify_table(found))
    part = next((copied / "v1" / "labels").rglob("part-[!e]*.parquet"))
    part.unlink()
    found = report.verify_output(str(copied))
    text = shown(report.verify_table(found), width=400)
    assert found["problems"] and part.name in text and "PROBLEM" in text
    (copied / "_vidbatch" / "tmp").mkdir(exist_ok=True)
    (copied / "_vidbatch" / "tmp" / "left").write_bytes(b"")
    swept = report.sweep_output(str(copied), older_than_s=-1)
    assert list(swept["removed"]) == ["_vidbatch/tmp/left"]
    assert "1 temporary files removed" in shown(report.sweep_table(swept))


def test_nothing_looks_well_at_a_mistyped_path(tmp_path: Path) -> None:
    for ask in (report.failures, report.verify_output, report.sweep_output, report.known_models):
        with pytest.raises(UsageError, match="holds no run of vidbatch"):
            ask(str(tmp_path / "tabels"))
    begin(tmp_path / "tables")
    assert report.failures(str(tmp_path / "tables")) == []


@pytest.mark.s3
def test_reports_over_a_bucket(made_output: Path, s3_bucket: str) -> None:
    uri = f"s3://{s3_bucket}/tables"
    upload(made_output, uri)
    assert report.failures(uri) == report.failures(str(made_output))
    here = report.status(str(made_output), now=NIGHTS[2])
    assert {**report.status(uri, now=NIGHTS[2]), "output": here["output"]} == here
