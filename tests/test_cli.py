"""The command line as a user meets it: every command, what it prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vidbatch import cli
from vidbatch.demo import make_archive

ROOT = Path(__file__).resolve().parents[1]


def call(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidbatch", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive `videos/`, a job file and the tables of one run."""
    folder = tmp_path_factory.mktemp("user")
    make_archive(folder / "videos", seconds=1)
    assert call("init", "videos", cwd=folder).returncode == 0
    done = call("run", "job.yaml", "--set", "engine.address=none", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["videos"] == 12
    return folder


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    names |= {"config check"}
    missing = sorted(n for n in names if f"vidbatch {n}" not in readme and f"`{n}`" not in readme)
    assert not missing, f"not in README.md: {missing}"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["status", "videos-tables"], "finished after"),
        (["failures", "videos-tables"], "not_media"),
        (["verify", "videos-tables"], "all proved"),
        (["sweep", "videos-tables"], "0 temporary files removed"),
        (["models", "videos-tables"], "quality-v1"),
        (["sql", "videos-tables", "select count(*) as n from videos"], "12"),
        (["plan", "job.yaml"], "to do"),
        (["config", "check", "job.yaml"], "outputs"),
        (["models", "bench", "motion", "--batch", "8"], "items/s"),
        (["run", "job.yaml"], ""),
        (["retry", "videos-tables"], ""),
    ],
)
def test_a_command_answers_and_ends_well(folder: Path, command: list[str], says: str) -> None:
    done = call(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["status", "failures", "verify", "sweep", "models"])
def test_json_is_for_machines(folder: Path, command: str) -> None:
    done = call(command, "videos-tables", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["run", "missing.yaml"], 2, "no such file"),
        (["run", "videos"], 2, "needs -o OUTPUT"),
        (["run", "job.yaml", "-m", "quality"], 2, "without a job file"),
        (["run", "nowhere", "-o", "t", "--set", "engine.address=none"], 2, "does not exist"),
        (["run", "videos", "-o", "t", "-m", "qualty"], 2, "quality"),
        (["run", "job.yaml", "--set", "sample.fsp=2"], 2, "unknown key sample.fsp"),
        (["init", "empty"], 2, "empty"),
        (["init", "videos"], 2, "exists"),
        (["sql", "videos-tables", "select * from lables"], 2, "did you mean 'labels'"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    folder: Path, command: list[str], code: int, says: str
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    before = sorted(p.name for p in folder.iterdir())
    done = call(*command, cwd=folder)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_changed_job_says_what_would_be_computed(folder: Path) -> None:
    done = call("config", "check", "job.yaml", "--set", "sample.fps=2", "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert list(found["differs_in"]) == ["engine", "sample"]
    assert len(found["recomputed"]) == 2
