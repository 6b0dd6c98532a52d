"""The engine on Ray leaves the tables that one process leaves, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from tests.outputs import check_no_key_twice, check_same, read_tables
from tests.ray_faults import KILLS_ITS_PROCESS, faulty_decoder
from vidbatch.cluster import pools, slots
from vidbatch.cluster.driver import RayEngine
from vidbatch.config import Job, parse_job
from vidbatch.data import Clip, Task
from vidbatch.demo import DATE_PATTERN, make_archive
from vidbatch.errors import ModelError
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import WorkOrder
from vidbatch.pipeline.run import RunResult, run_job
from vidbatch.storage import open_store

pytest_plugins = ["tests.ray_cluster"]
pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[1]

DARK = "cam-01/2026/03/02/200000.mp4"
"""The covered lens: its frames are darker than any other's."""

Tables = dict[str, dict[tuple[str, ...], pa.Table]]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    make_archive(folder, seconds=3)
    (folder / "models").mkdir()
    (folder / "models" / "fragile.py").write_text(KILLS_ITS_PROCESS)
    return folder


def job_for(archive: Path, output: Path, params: Mapping[str, Any], **engine: Any) -> Job:
    what = {"adapter": "python", "class": "fragile:Fragile", "params": params}
    tree = {
        "archive": {
            "uri": str(archive),
            "date": {"from": "key", "pattern": DATE_PATTERN, "tz": "UTC"},
        },
        "sample": {"fps": 2},
        "models": [{"builtin": "colour"}, {"name": "fragile", "version": "v1", "what": what}],
        "output": {"uri": str(output)},
        "clips": {"length_s": 1, "split_above": "2KiB"},
        "limits": {"max_failed_share": 1},
        "engine": {"decoders": 2, "object_store_cap": "200MiB", **engine},
    }
    return parse_job(tree, base_dir=archive / "models")


@pytest.fixture(scope="module")
def expected(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """What one process without Ray leaves."""
    output = tmp_path_factory.mktemp("expected")
    assert run_job(job_for(archive, output, {}, address="none")).exit_code == 0
    return read_tables(open_store(str(output)))


class Notes(list[str]):
    def of(self, text: str) -> list[str]:
        return [line for line in self if text in line]


def run_on_ray(job: Job, decoder_class: type[Any] | None = None) -> tuple[RunResult, Notes, Tables]:
    notes = Notes()

    def make(spec: Any, job: Job, _: Any) -> Engine:
        engine = RayEngine(spec, job, note=notes.append)
        if decoder_class is not None:
            engine.decoder_class = decoder_class
        return engine

    result = run_job(job, make_engine=make)
    return result, notes, read_tables(open_store(job.output.uri))


def by_model(tables: Tables) -> Tables:
    """Without the fingerprint of the model that has other parameters in every test."""
    return {
        table: {
            tuple(v.rsplit(".", 1)[0] if v.startswith("fragile") else v for v in p): rows
            for p, rows in partitions.items()
        }
        for table, partitions in tables.items()
    }


def test_ray_leaves_the_tables_of_one_process(
    ray_cluster: None, archive: Path, expected: Tables, tmp_path: Path
) -> None:
    result, notes, tables = run_on_ray(job_for(archive, tmp_path / "out", {}))
    check_same(tables, expected)
    check_no_key_twice(tables)
    assert result.exit_code == 0
    engine = result.summary["engine"]
    assert engine["decoder_deaths"] == engine["predictor_restarts"] == 0
    assert engine["frames"] == result.summary["counts"]["frames"]
    assert notes.of("of frames under way per decoder (2 on 1 node, predictors on 1)")
    again, _, _ = run_on_ray(job_for(archive, tmp_path / "out", {}))
    assert again.run is None, "nothing to do"


def test_whatever_dies_once_leaves_no_trace_in_the_tables(
    ray_cluster: None,
    archive: Path,
    expected: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder killed, one that hangs, a fault of ours, a predictor killed, all in one run."""
    monkeypatch.setattr(slots, "STUCK_S", 4.0)
    (marks := tmp_path / "marks").mkdir()
    faulty = faulty_decoder(
        {
            "03/01/080000.mp4": ("kill", 1),
            "03/02/090000.mp4": ("hang", 1),
            "03/03/080000.mp4": ("raise", 1),
        },
        marks,
    )
    params = {"below": 30.0, "times": 1, "marks": str(marks)}
    job = job_for(archive, tmp_path / "out", params, predictors=2)
    result, notes, tables = run_on_ray(job, faulty)
    assert len(list(marks.iterdir())) == 4, "every accident happened"
    check_same(by_model(tables), by_model(expected))
    check_no_key_twice(tables)
    assert result.exit_code == 0 and result.summary["counts"]["failed_outside"] == 0
    assert result.summary["engine"]["decoder_deaths"] >= 2
    assert result.summary["engine"]["predictor_restarts"] == 1
    assert notes.of("a decoder died") and notes.of("a decoder did not move for")
    assert notes.of("a decoder raised KeyError: 'a case that nobody had foreseen' (ray_faults.py:")


def test_what_kills_every_time_is_left_out_and_the_rest_is_committed(
    ray_cluster: None, archive: Path, expected: Tables, tmp_path: Path
) -> None:
    (marks := tmp_path / "marks").mkdir()
    poison = "cam-01/2026/03/01/080000.mp4"
    faulty = faulty_decoder({poison: ("kill", 99)}, marks)
    params = {"below": 30.0, "times": 3, "marks": str(marks)}
    result, _, tables = run_on_ray(job_for(archive, tmp_path / "out", params), faulty)
    assert result.exit_code == 0
    failed: dict[str, set[tuple[str, str, float]]] = {"worker_died": set(), "predictor_lost": set()}
    for partition, rows in tables["failures"].items():
        for row in rows.to_pylist():
            name = partition[1].split("-")[0]
            failed.get(row["kind"], set()).add((name, row["uri"], row["start_s"]))
    assert failed["worker_died"] == {
        (name, f"{archive}/{poison}", 0.0) for name in ("frames", "colour", "fragile")
    }
    (start_s,) = {f[2] for f in failed["predictor_lost"]}  # one with others, two with it alone
    assert failed["predictor_lost"] == {
        (name, f"{archive}/{DARK}", start_s) for name in ("colour", "fragile")
    }
    assert result.summary["engine"]["decoder_deaths"] in (3, 4), "a first one may go unexplained"
    assert result.summary["engine"]["predictor_restarts"] >= 1
    want, got = _rows_of_frames(expected), _rows_of_frames(tables)
    assert {uri for uri in want if want[uri] != got.get(uri)} == {f"{archive}/{poison}"}


def _rows_of_frames(tables: Tables) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rows in tables["frames"].values():
        for row in rows.to_pylist():
            found.setdefault(row["uri"], []).append(row["frame_index"])
    return found


class Orders:
    """A supply from a list."""

    def __init__(self, orders: list[WorkOrder]) -> None:
        self._orders = orders

    def take(self) -> WorkOrder | None:
        return self._orders.pop(0) if self._orders else None

    @property
    def finished(self) -> bool:
        return not self._orders


def test_sigterm_drops_what_has_not_begun_to_commit(
    ray_cluster: None, archive: Path, expected: Tables, tmp_path: Path
) -> None:
    """One task hangs while others end; then the run is stopped, and the next one goes on."""
    (marks := tmp_path / "marks").mkdir()
    faulty = faulty_decoder({"03/03/090000.mp4": ("hang", 1)}, marks)
    job = job_for(archive, tmp_path / "out", {})

    def stop_when_hanging() -> None:
        while not list(marks.iterdir()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run's handler is gone"))
    try:
        stopper = threading.Thread(target=stop_when_hanging)
        stopper.start()
        result, _, _ = run_on_ray(job, faulty)
        stopper.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 5
    result, _, tables = run_on_ray(job)
    assert result.exit_code == 0
    check_same(tables, expected)


def test_a_model_that_cannot_be_loaded_stops_the_start(
    ray_cluster: None, archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"fragile: load on cpu raised OSError: weights are cut"):
        run_on_ray(job_for(archive, tmp_path / "out", {"fails": True}))


def test_every_order_ends_in_one_report(ray_cluster: None, archive: Path, tmp_path: Path) -> None:
    """Short tasks: a second one waits at each decoder."""
    from vidbatch.pipeline.resolve import run_spec
    from vidbatch.pipeline.survey import take_survey

    job = job_for(archive, tmp_path / "out", {}).model_copy(update={"models": ()})
    survey = take_survey(job, run="r", now=datetime.now(UTC))
    survey.open_output()
    given = [
        WorkOrder(task=Task(clips=(Clip(video=v),), sampling=survey.spec.sampling, generation=g),
                  outputs=(survey.spec.outputs[0].fingerprint,))
        for g in range(4) for v in survey.new
    ]  # fmt: skip
    engine = RayEngine(run_spec(job, "r"), job, note=lambda _: None)
    try:
        engine.start()
        assert engine.width == 2
        reports = list(engine.run(Orders(list(given))))
    finally:
        engine.stop()
    assert sorted(r.task_id for r in reports) == sorted(o.task.task_id for o in given)


JOINS = """
import sys
from pathlib import Path
from vidbatch.config import load_job
from vidbatch.errors import ClusterError
from vidbatch.launch import launch
try:
    print(launch(load_job(Path(sys.argv[1]))).summary["counts"]["frames"])
except ClusterError as error:
    print(error)
"""


def test_another_process_joins_with_the_token_alone(
    ray_cluster: None, archive: Path, expected: Tables, tmp_path: Path
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    job = job_for(archive, tmp_path / "out", {}, address=address, device="cpu", predictors=1)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.dump()))

    def run(**env: str) -> str:
        found = subprocess.run(
            [sys.executable, "-c", JOINS, str(tmp_path / "job.yaml")],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env},
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return found.stdout.strip()

    refused = run()
    assert "was not joined" in refused and "token" in refused and "\n" not in refused
    frames = sum(len(rows) for rows in expected["frames"].values())
    assert run(RAY_AUTH_TOKEN=pools._token) == str(frames)

    engine = {"address": address, "device": "cuda", "predictors": 1, "wait_s": 3}
    job = job_for(archive, tmp_path / "none", {}, **engine)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.dump()))
    assert "no predictor was up for 3 s" in run(RAY_AUTH_TOKEN=pools._token)
    failures = read_tables(open_store(str(tmp_path / "none")))["failures"].values()
    kinds = {kind for rows in failures for kind in rows["kind"].to_pylist()}
    assert "predictor_lost" not in kinds, "only a file that cannot be read has an outcome"
