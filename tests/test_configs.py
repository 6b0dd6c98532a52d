"""Every file that a user may start from loads and means what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vidbatch.config import Job, load_job, parse_job
from vidbatch.errors import UsageError
from vidbatch.models.registry import resolve_model
from vidbatch.pipeline.resolve import archive_rule, job_outputs

ROOT = Path(__file__).resolve().parents[1]
OK: dict[str, Any] = {
    "archive": {"uri": "videos"},
    "sample": {"fps": 1},
    "output": {"uri": "tables"},
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_jobs_load(path: Path) -> None:
    job = load_job(path)
    archive_rule(job)
    sampling, outputs = job_outputs(job)
    assert sampling and len(outputs) == len(job.models) + 1
    assert path.read_text().startswith("# "), "opens with its command"


def own_models() -> list[Path]:
    """Those whose weights are at hand; `test_huggingface.py` and `test_adapters.py` run the others,
    on tiny models."""
    found = sorted((ROOT / "configs" / "models").glob("*.yaml"))
    return [p for p in found if "s3://acme-models/" not in p.read_text("utf-8")]


@pytest.mark.parametrize("path", own_models(), ids=lambda p: p.name)
def test_shipped_models_resolve(path: Path) -> None:
    spec = resolve_model({"file": str(path)}, path.parent).spec
    assert spec.gives and spec.fingerprint
    assert path.read_text().startswith("# "), "opens with its command"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampel": 1}, "unknown key sampel; did you mean 'sample'"),
        ({"clips": {"lenght_s": 1}}, "unknown key clips.lenght_s; did you mean 'length_s'"),
        ({"sample": {"fps": 1, "all": True}}, "exactly one of fps, every, keyframes, all"),
        ({"sample": {}}, "exactly one of"),
        ({"sample": {"fps": 1, "tolerance_s": 2}}, "tolerance_s"),
        ({"sample": {"every": 0}}, "sample.every"),
        ({"engine": {"decoders": "many"}}, "engine.decoders"),
        ({"limits": {"max_pixels": "large"}}, "limits.max_pixels"),
        ({"clips": {"split_above": "64 parsec"}}, "not a size such as 64MiB"),
        ({"archive": {"uri": "x", "date": {"from": "key"}}}, "needs a 'pattern'"),
        ({"archive": {"uri": "x", "date": {"from": "key", "pattern": "("}}}, "regular expression"),
        ({"archive": {"uri": "x", "date": {"tz": "Mars/Base"}}}, "not a time zone"),
        ({"archive": {"uri": "s3://me:secret@bucket"}}, "looks like a credential"),
        ({"models": ["quality"]}, "each entry is a mapping"),
        ({"output": {}}, "output.uri is missing"),
    ],
)
def test_a_wrong_job_is_one_line_that_says_where(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_job({**OK, **change}, base_dir=ROOT)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_yaml_errors_name_the_file(tmp_path: Path) -> None:
    for text, says in (
        ("a: [", "not YAML"),
        ("- a", "expected a mapping"),
        ("a: 1\na: 2", "twice"),
    ):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        with pytest.raises(UsageError, match=says) as caught:
            load_job(path)
        assert str(path) in caught.value.message
    with pytest.raises(UsageError, match="no such file"):
        load_job(tmp_path / "missing.yaml")


def test_paths_are_relative_to_the_file_and_overrides_win(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**OK, "sample": {"fps": 29.97}}))
    job = load_job(path, ["limits.isolate=false", "output.uri=elsewhere"])
    assert job.archive.uri == (str(tmp_path / "videos"),)
    assert job.output.uri == str(tmp_path / "elsewhere")
    assert not job.limits.isolate
    assert str(job.sample.rule().fps) == "2997/100"
    assert load_job(path, ["archive.include=**/*.mp4"]).archive.include == ("**/*.mp4",)
    assert load_job(path, ["sample.all=true"]).sample.rule().kind == "all"
    again = parse_job(job.dump(), base_dir=Path("/elsewhere"))
    assert isinstance(again, Job) and again == job


@pytest.mark.parametrize("name", ["nightly", "backfill"])
def test_job_scripts_name_their_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "jobs" / f"{name}.py"
    assert f"python jobs/{name}.py" in script.read_text()
    days = ["--from", "2026-01-01", "--to", "2026-01-02"] if name == "backfill" else []
    monkeypatch.setattr(sys, "argv", [str(script), "missing.yaml", *days])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 2
    assert "no such file" in capsys.readouterr().err
