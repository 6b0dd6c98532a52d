"""Whole jobs in one process: what a night leaves, what the next one does, what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outputs import (
    check_no_key_twice,
    check_nothing_changed,
    check_same,
    fingerprints,
    outcome_counts,
    read_tables,
)
from vidbatch import query
from vidbatch.config import Job, parse_job
from vidbatch.demo import CUT, DATE_PATTERN, SCENES, TEXT, make_archive
from vidbatch.errors import RefusedError, UsageError
from vidbatch.pipeline.engine import Engine, LocalEngine, Supply
from vidbatch.pipeline.order import RunSpec, TaskReport
from vidbatch.pipeline.run import RunResult, run_job
from vidbatch.storage import Store, open_store
from vidbatch.verify import verify

MODELS = ("quality", "colour")


@pytest.fixture(scope="session")
def drawn_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's archive, two seconds a video: ten good files, one cut, one that is text."""
    folder = tmp_path_factory.mktemp("drawn")
    make_archive(folder, seconds=2)
    return folder


@pytest.fixture
def archive(drawn_archive: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(drawn_archive, tmp_path / "archive"))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the tables go: a folder, and a bucket of a real S3 server."""
    if request.param == "local":
        return str(tmp_path / "tables")
    return f"s3://{request.getfixturevalue('s3_bucket')}/tables"


def make_job(folder: Path | str, output: str, **changes: Any) -> Job:
    tree: dict[str, Any] = {
        "archive": {"uri": str(folder), "date": {"from": "key", "pattern": DATE_PATTERN}},
        "sample": {"fps": 2},
        "models": [{"builtin": name} for name in MODELS],
        "output": {"uri": output},
        "engine": {"address": "none"},
        "limits": {"isolate": False, "task_minutes": 0.01},
    }
    tree.update(changes)
    return parse_job(tree, base_dir=Path(__file__).parent)


def run(job: Job, **args: Any) -> RunResult:
    return run_job(job, **args)


def no_engine(*_: Any) -> Any:
    raise AssertionError("an engine was started")


def test_a_night_and_the_next(archive: Path, output: str) -> None:
    job = make_job(archive, output)
    first = run(job)
    assert first.exit_code == 0
    store = open_store(output)
    tables = read_tables(store)
    check_no_key_twice(tables)
    good = len(SCENES)
    assert outcome_counts(store)["frames"] == {"ok": good, "partial": 1, "failed": 1}
    rows = sum(len(t) for t in tables["frames"].values())
    assert first.summary["counts"]["frames"] == rows
    assert rows >= good * 4  # two seconds at 2 fps
    for table in ("labels", "features", "embeddings"):
        frames = {
            (r["video_id"], r["frame_index"])
            for t in tables[table].values()
            for r in t.select(["video_id", "frame_index"]).to_pylist()
        }
        assert len(frames) <= rows
    assert {r["uri"].removeprefix(f"{archive}/") for t in tables["failures"].values()
            for r in t.to_pylist()} == {CUT, TEXT}  # fmt: skip
    assert not verify_problems(store)

    before = fingerprints(store)
    second = run_job(make_job(archive, output, engine={"address": "local"}), make_engine=no_engine)
    assert (second.exit_code, second.run) == (0, None)
    assert fingerprints(store) == before


def verify_problems(store: Store) -> Any:
    from vidbatch.ledger import Ledger

    return verify(Ledger(store)).problems


def test_only_what_is_new_is_done(archive: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "tables")
    kept = archive / "cam-02"
    away = tmp_path / "away"
    shutil.move(kept, away)
    first = run(make_job(archive, output))
    before = fingerprints(open_store(output))
    shutil.move(away, kept)
    second = run(make_job(archive, output))
    assert first.summary["counts"]["videos"] == 6
    assert second.summary["counts"]["videos"] == 6
    check_nothing_changed(before, fingerprints(open_store(output)))
    whole = str(tmp_path / "whole")
    run(make_job(archive, whole))
    check_same(read_tables(open_store(output)), read_tables(open_store(whole)))


def test_a_model_added_then_changed(archive: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "tables")
    run(make_job(archive, output))
    store = open_store(output)
    before = fingerprints(store)
    added = run(make_job(archive, output, models=[{"builtin": m} for m in (*MODELS, "phash")]))
    assert set(added.summary["outputs"]) == {p for p in added.summary["outputs"] if "phash" in p}
    check_nothing_changed(before, fingerprints(store))

    what = {"adapter": "builtin", "model": "quality", "min_score": 0.4}
    changed = {"name": "quality", "version": "v2", "what": what}
    third = run(make_job(archive, output, models=[changed, {"builtin": "colour"}]))
    assert [p.split("-")[0] for p in third.summary["outputs"]] == ["quality"]
    tables = read_tables(store)
    check_no_key_twice(tables)
    assert len({p[1] for p in tables["features"] if p[1].startswith("quality-")}) == 2
    current = query.sql(output, "select distinct model from labels where model like 'quality-%'")
    assert len(current.rows) == 1
    assert current.rows[0][0] in third.summary["outputs"]


def test_the_five_questions_of_the_outputs_own_readme(archive: Path, tmp_path: Path) -> None:
    """Each SQL block runs as written over what two runs left, and answers."""
    output = str(tmp_path / "tables")
    faces = {"builtin": "faces"}
    run(make_job(archive, output, models=[*({"builtin": m} for m in MODELS), faces]))
    what = {"adapter": "builtin", "model": "quality", "min_score": 0.4}
    run(make_job(archive, output, models=[{"name": "quality", "version": "v2", "what": what}]))
    readme = (tmp_path / "tables" / "README.md").read_text()
    questions = re.findall(r"```sql\n(.*?)```", readme, re.DOTALL)
    assert len(questions) == 5
    minutes, like_this, failed, versions, frames = (query.sql(output, q) for q in questions)
    assert {row[minutes.columns.index("source")] for row in minutes.rows} == {"cam-01", "cam-02"}
    all_frames = query.sql(output, "select count(*) from frames").rows[0][0]
    assert len(like_this.rows) == min(50, all_frames)
    assert like_this.rows[0][2] == pytest.approx(1.0)
    assert {row[4] for row in failed.rows} == {"not_media", "truncated"}
    assert sum(row[versions.columns.index("frames")] for row in versions.rows) > 0
    assert not frames.rows, "the drawn videos end before their tenth second"
    first = query.sql(output, "from frames_of((select min(uri) from videos), 0, 1)")
    assert len({row[0] for row in first.rows}) == 2


def test_a_video_replaced_makes_a_new_version(archive: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "tables")
    run(make_job(archive, output))
    name, other = "cam-01/2026/03/01/200000.mp4", "cam-01/2026/03/02/200000.mp4"
    shutil.copy(archive / other, archive / name)
    second = run(make_job(archive, output))
    assert second.summary["counts"]["videos"] == 1
    tables = read_tables(open_store(output))
    check_no_key_twice(tables)
    both = query.sql(
        output, f"select count(distinct video_id) from videos_all where uri like '%{name}'"
    )
    now = query.sql(output, f"select count(*) from videos where uri like '%{name}'")
    black = query.sql(
        output, f"select count(*) from labels where uri like '%{name}' and label = 'black'"
    )
    assert (both.rows[0][0], now.rows[0][0]) == (2, 1)
    assert black.rows[0][0] > 0


@pytest.mark.parametrize("change", ["clip length", "fps"])
def test_how_and_what_changed_between_two_nights(
    archive: Path, tmp_path: Path, change: str
) -> None:
    output = str(tmp_path / "tables")
    away = tmp_path / "away"
    shutil.move(archive / "cam-02", away)
    run(make_job(archive, output, clips={"split_above": 0, "length_s": 0.5}))
    shutil.move(away, archive / "cam-02")
    if change == "clip length":
        run(make_job(archive, output, clips={"split_above": 0, "length_s": 1}))
        want = str(tmp_path / "want")
        run(make_job(archive, want))
        got, whole = read_tables(open_store(output)), read_tables(open_store(want))
        check_no_key_twice(got)
        check_same(got, whole, ignore=frozenset({"runs", "models", "coverage", "failures"}))
    else:
        before = fingerprints(open_store(output))
        run(make_job(archive, output, sample={"fps": 1}))
        tables = read_tables(open_store(output))
        check_no_key_twice(tables)
        check_nothing_changed(before, fingerprints(open_store(output)))
        assert {p[0].split(".")[0] for p in tables["frames"]} == {"fps1", "fps2"}


def test_strict_limit_and_stop(archive: Path, tmp_path: Path) -> None:
    trial = run(make_job(archive, str(tmp_path / "trial")), limit=3)
    assert trial.summary["counts"]["videos"] == 3
    assert run(make_job(archive, str(tmp_path / "strict")), strict=True).exit_code == 3
    output = str(tmp_path / "stopped")
    limits = {"isolate": False, "task_minutes": 0.001, "stop_after": "0s"}
    stopped = run(make_job(archive, output, limits=limits))
    assert stopped.exit_code == 5
    assert stopped.summary["stopped"]
    assert run(make_job(archive, output)).exit_code == 0
    assert outcome_counts(open_store(output))["frames"]["ok"] == len(SCENES)


def test_a_run_stops_in_time_whatever_it_waits_for(archive: Path, tmp_path: Path) -> None:
    class Waits(LocalEngine):
        def run(self, supply: Supply) -> Iterator[TaskReport]:
            while not self._halted:
                time.sleep(0.01)
            yield from ()

    def make(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Engine:
        return Waits(spec, length_s=job.clips.length_s)

    job = make_job(archive, str(tmp_path / "out"), limits={"isolate": False, "stop_after": "1s"})
    job = job.model_copy(update={"engine": job.engine.model_copy(update={"address": "local"})})
    result = run_job(job, make_engine=make)
    assert (result.exit_code, result.summary["stopped"]) == (5, "limits.stop_after 1 s is over")


def test_retry_runs_what_may_succeed(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses one object is a retryable failure: the next night cures it by itself."""
    output = str(tmp_path / "tables")
    victim = archive / "cam-01/2026/03/01/080000.mp4"
    with unreadable(victim, monkeypatch):
        run(make_job(archive, output))
    store = open_store(output)
    assert outcome_counts(store)["frames"]["failed"] == 2
    before = fingerprints(store)
    again = run(make_job(archive, output))
    assert again.exit_code == 0
    assert outcome_counts(store)["frames"] == {"ok": len(SCENES), "partial": 1, "failed": 1}
    check_nothing_changed(before, fingerprints(store))
    tables = read_tables(store)
    check_no_key_twice(tables)
    cured = query.sql(output, f"select count(*) from failures where uri = '{victim}'")
    assert cured.rows[0][0] == 0
    assert run_job(make_job(archive, output), make_engine=no_engine).run is None


class unreadable:  # noqa: N801 used as a verb
    """While it lasts, the store refuses to open one object."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = path, monkeypatch

    def __enter__(self) -> None:
        import vidbatch.pipeline.reading as reading
        from vidbatch.errors import ForbiddenByStore

        real: Callable[..., Any] = reading.open_source

        def refuse(store: Store, uri: str, **facts: Any) -> Any:
            if uri == str(self.path):
                raise ForbiddenByStore(f"{uri}: access denied", kind="access_denied")
            return real(store, uri, **facts)

        self.patch.setattr(reading, "open_source", refuse)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "empty"
    folder.mkdir()
    yield folder


def test_what_is_refused_writes_nothing(archive: Path, empty: Path, tmp_path: Path) -> None:
    output = tmp_path / "tables"
    for uri in (empty, tmp_path / "missing"):
        with pytest.raises(UsageError, match=str(uri)):
            run(make_job(uri, str(output)))
    with pytest.raises(UsageError, match="colour"):
        run(make_job(archive, str(output), models=[{"builtin": "color"}]))
    with pytest.raises(UsageError, match="stands above it"):
        run(make_job(archive, str(output), models=[{"builtin": "colour"}] * 2))
    with pytest.raises(RefusedError, match="max_video_hours"):
        run(make_job(archive, str(output), limits={"max_video_hours": 1e-6}))
    assert not output.exists()

    run(make_job(archive, str(output)))
    before = fingerprints(open_store(str(output)))
    with pytest.raises(RefusedError, match="dated by"):
        run(make_job(archive, str(output), archive={"uri": str(archive)}))
    assert fingerprints(open_store(str(output))) == before


def test_an_output_of_a_newer_version_is_refused(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "tables"
    pinned = output / "_vidbatch" / "output.json"
    pinned.parent.mkdir(parents=True)
    pinned.write_text('{"schema_version": 2, "date": {}}')
    with pytest.raises(RefusedError, match="schema 2"):
        run(make_job(archive, str(output)))
    assert sorted(p.name for p in output.rglob("*")) == ["_vidbatch", "output.json"]


def test_the_job_scripts_do_what_they_say(archive: Path, tmp_path: Path) -> None:
    """A backfill over four days (one without a video), then a nightly that finds all done."""
    job = make_job(archive, str(tmp_path / "tables"))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.dump()))
    jobs = Path(__file__).resolve().parents[1] / "jobs"
    backfill = [str(jobs / "backfill.py"), str(path), "--from", "2026-02-28", "--to", "2026-03-04"]
    for command in (backfill, [str(jobs / "nightly.py"), str(path)]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, timeout=150
        )
        assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    counts = outcome_counts(open_store(str(tmp_path / "tables")))
    assert counts["frames"] == {"ok": len(SCENES), "partial": 1, "failed": 1}
