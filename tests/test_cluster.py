"""The engine on Ray leaves the tables that one process leaves, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import socket
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
from vidbatch.cluster import orders, pools, slots
from vidbatch.cluster.client import credit_bytes
from vidbatch.cluster.decoder import Beat, DroppedError, Pulse
from vidbatch.cluster.driver import RayEngine
from vidbatch.cluster.metrics import attribute
from vidbatch.cluster.orders import Returned
from vidbatch.cluster.slots import Flight, Slot
from vidbatch.config import EngineConfig, Job, parse_job
from vidbatch.data import Clip, Task, Video
from vidbatch.demo import DATE_PATTERN, make_archive
from vidbatch.errors import ClusterError, InfraError, ModelError, StoreError, UsageError
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import WorkOrder
from vidbatch.pipeline.run import RunResult, run_job
from vidbatch.storage import open_store

pytest_plugins = ["tests.ray_cluster"]

ROOT = Path(__file__).resolve().parents[1]

DARK = "cam-01/2026/03/02/200000.mp4"
"""The covered lens: its frames are darker than any other's."""

Tables = dict[str, dict[tuple[str, ...], pa.Table]]


# orders that come back: no Ray -------------------------------------------------------------------


def order_of(clips: int = 3, cost_s: float = 1.0) -> WorkOrder:
    when = datetime(2026, 3, 1, tzinfo=UTC)
    videos = [
        Video(
            uri=f"/v{i}.mp4", version="1-1", size_bytes=1, modified_at=when, listed_at=when,
            captured_at=None, captured_from="modified", dt="2026-03-01", source="",
        )
        for i in range(clips)
    ]  # fmt: skip
    task = Task(clips=tuple(Clip(video=v) for v in videos), sampling="0" * 64, cost_s=cost_s)
    return WorkOrder(task=task, outputs=("f",))


def take(returned: Returned, slot: int = 9) -> WorkOrder:
    order = returned.take(slot, only_slot=False)
    assert order is not None
    return order


def test_a_death_is_charged_to_the_clip_that_was_under_work() -> None:
    returned = Returned(attempts=3)
    returned.died(order_of(), 0, 2, "killed")
    returned.died(take(returned), 0, 2, "killed")
    returned.put_back(order_of(), 0)
    first, second = take(returned), take(returned)
    assert (dict(first.deaths), first.attempt) == ({2: 2}, 3)
    assert (dict(second.deaths), second.attempt) == ({}, 1), "it was only queued behind the other"
    assert len(returned) == 0


def test_an_order_goes_to_another_slot_first(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = Returned(attempts=3)
    returned.died(order_of(), 1, 0, "killed")
    assert returned.take(1, only_slot=False) is None
    assert returned.take(1, only_slot=True) is not None
    returned.died(order_of(), 1, 0, "killed")
    monkeypatch.setattr(orders, "TAKE_ANYWAY_S", 0.0)
    assert returned.take(1, only_slot=False) is not None, "nobody else had time for it"


def test_deaths_that_nobody_can_explain_come_to_an_end() -> None:
    returned = Returned(attempts=3)
    order = order_of(clips=2)
    for _ in range(orders.BLIND_DEATHS):
        returned.died(order, 0, -1, "killed")
        order = take(returned)
    assert dict(order.deaths) == {0: 3, 1: 3}, "every clip is left out"
    with pytest.raises(ClusterError, match="kills its decoder even with every clip left out"):
        for _ in range(orders.BLIND_DEATHS + 1):
            returned.died(order, 0, -1, "killed")


def test_lost_nodes_are_no_clips_fault_but_come_to_an_end() -> None:
    returned = Returned(attempts=3)
    order = order_of(clips=1)
    for _ in range(orders.NODE_LOSSES):
        returned.lost_node(order, 0, "gone")
        order = take(returned)
    assert not order.deaths
    for _ in range(orders.BLIND_DEATHS):
        returned.lost_node(order, 0, "gone")
        order = take(returned)
    assert dict(order.deaths) == {0: 3}


def test_a_store_that_fails_for_good_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "STORE_PAUSE_S", 0.0)
    returned, error = Returned(attempts=3), StoreError("503")
    order = order_of()
    for _ in range(orders.STORE_TRIES - 1):
        returned.store_failed(order, 0, error)
        order = take(returned)
    assert not order.deaths
    with pytest.raises(InfraError) as raised:
        returned.store_failed(order, 0, error)
    assert raised.value is error


def test_a_pause_is_kept() -> None:
    returned = Returned(attempts=3)
    returned.store_failed(order_of(), 0, StoreError("503"))
    assert returned.take(1, only_slot=False) is None


# what a decoder says of itself, and what the driver makes of it: no Ray --------------------------


def test_a_careful_clip_begins_when_the_driver_has_heard_of_it() -> None:
    pulse = Pulse(period_s=60.0)
    pulse.begin(order_of(), careful=True)
    begun = threading.Event()

    def work() -> None:
        pulse.at("t", 1, "read")
        pulse.at("t", 1, "decode")
        begun.set()

    worker = threading.Thread(target=work)
    worker.start()
    beat = Beat(seq=0)
    while beat.clip != 1:
        assert not begun.is_set()
        beat = pulse.now(beat.seq, False, moved=0, waiting=False, child_restarts=0, wait=True)
    assert not begun.wait(0.05), "the driver has been told, but has not said that it knows"
    pulse.now(beat.seq, False, moved=0, waiting=False, child_restarts=0, wait=False)
    worker.join()
    assert begun.is_set()


def beat_of(pulse: Pulse, *, drop: bool = False) -> Beat:
    return pulse.now(0, drop, moved=0, waiting=False, child_restarts=0, wait=False)


def test_waiting_for_predictions_of_an_earlier_clip_names_the_clip_under_work() -> None:
    pulse = Pulse(period_s=1.0)
    pulse.begin(order_of(), careful=False)
    pulse.at("t", 2, "decode")
    pulse.at("t", 1, "predict")
    assert (beat_of(pulse).clip, beat_of(pulse).stage) == (2, "decode")


def test_a_stop_lets_a_commit_that_has_begun_go_on_and_nothing_else() -> None:
    pulse = Pulse(period_s=1.0)
    pulse.begin(order_of(), careful=False)
    pulse.at("t", 2, "commit")
    assert beat_of(pulse, drop=True).stage == "commit"
    pulse.at("t", 2, "commit")  # its next output
    pulse.end()
    with pytest.raises(DroppedError):
        pulse.begin(order_of(), careful=False)
    late = Pulse(period_s=1.0)
    late.begin(order_of(), careful=False)
    late.at("t", 0, "decode")
    beat_of(late, drop=True)
    with pytest.raises(DroppedError):
        late.at("t", 0, "commit")


def slot_with(*costs_s: float, **facts: Any) -> Slot:
    slot = Slot(index=0, ready=True, **facts)
    slot.flights.extend(Flight(order_of(cost_s=c)) for c in costs_s)
    return slot


def test_only_a_short_task_gets_another_behind_it() -> None:
    assert slot_with().has_room and slot_with(1.0).has_room
    assert not slot_with(600.0).has_room and not slot_with(1.0, 1.0).has_room
    absent = slot_with(1.0)
    absent.ready = False
    assert not absent.has_room


def test_a_task_is_stuck_when_nothing_moves_for_its_planned_cost() -> None:
    slot = slot_with(600.0)
    slot.hear(Beat(seq=1, moved=5), 100.0)
    slot.hear(Beat(seq=1, moved=5), 400.0)
    assert not slot.is_stuck(690.0) and slot.is_stuck(701.0)
    slot.hear(Beat(seq=1, moved=5, waiting=True), 700.0)
    assert not slot.is_stuck(1299.0), "it waits for a predictor"


def test_a_death_is_charged_only_if_the_last_word_is_of_this_order() -> None:
    slot = slot_with(1.0)
    task_id = slot.flights[0].order.task.task_id
    slot.hear(Beat(seq=1, task_id="another", clip=1, stage="decode"), 0.0)
    assert slot.clip_under_work() == -1
    slot.hear(Beat(seq=2, task_id=task_id, clip=1, stage="decode"), 0.0)
    assert slot.clip_under_work() == 1
    slot.hear(Beat(seq=3, task_id=task_id, clip=2, stage="commit"), 0.0)
    assert slot.clip_under_work() == -1 and slot.committing


# numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decoders", "nodes", "predictor_nodes", "sharing"),
    [(8, 1, 1, 8), (100, 10, 10, 10), (100, 10, 1, 100), (1, 1, 1, 1), (3, 0, 0, 3)],
)
def test_credits_of_a_node_stay_under_the_cap(
    decoders: int, nodes: int, predictor_nodes: int, sharing: int
) -> None:
    cap = 2 * 2**30
    credit = credit_bytes(cap, decoders, nodes, predictor_nodes)
    assert credit * sharing <= 0.8 * cap < (credit + 1) * sharing


@pytest.mark.parametrize(
    ("compute", "starved", "collating", "says"),
    [
        (3.9, 6.1, 0.0, "starved 61%: decoders are the limit"),
        (9.5, 0.3, 0.2, "busy 95%: they are the limit"),
        (5.0, 0.5, 4.5, "waited 45% for frames to be copied"),
        (0.0, 0.0, 0.0, "no model was run"),
    ],
)
def test_a_sentence_follows_from_the_seconds(
    compute: float, starved: float, collating: float, says: str
) -> None:
    seconds = {"compute": compute, "starved": starved, "collating": collating, "loading": 99.0}
    stats = {"seconds": seconds, "frames": 1, "batches": 1, "halved": 0}
    assert says in attribute([stats], "cpu")["sentence"]


# addresses ---------------------------------------------------------------------------------------


def engine_config(**engine: Any) -> EngineConfig:
    return EngineConfig.model_validate(engine)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
            pools.start_ray(engine_config(address=address))


def test_an_address_that_does_not_speak_rays_protocol_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match="no Ray cluster answers"):
            pools.start_ray(engine_config(address=f"127.0.0.1:{silent.getsockname()[1]}"))


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ClusterError, match="not of the form HOST:PORT"):
        pools.start_ray(engine_config(address="the-cluster"))


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265"])
def test_ports_that_run_anybodys_code_are_not_used(address: str) -> None:
    with pytest.raises(UsageError, match="client and job ports"):
        pools.start_ray(engine_config(address=address))


@pytest.mark.ray
def test_a_cluster_that_answers_is_told_from_one_that_does_not(ray_cluster: None) -> None:
    import ray

    pools._check_answers(ray.get_runtime_context().gcs_address)


@pytest.mark.ray
def test_device_auto_is_for_this_machine(ray_cluster: None) -> None:
    with pytest.raises(UsageError, match="write cuda or cpu"):
        pools.plan_pools(engine_config(address="auto"), local=False, models=True)
    with pytest.raises(ClusterError, match="no GPU"):
        pools.plan_pools(engine_config(device="cuda"), local=True, models=True)


@pytest.mark.ray
def test_pools_are_sized_by_what_is_there(ray_cluster: None) -> None:
    local = pools.plan_pools(engine_config(), local=True, models=True)
    assert (local.decoders, local.predictors, local.device) == (4, 1, "cpu")
    assert local.predictor_cpus == 0, "all cores decode while it shares them"
    joined = pools.plan_pools(
        engine_config(address="auto", device="cuda", decoders=7, predictors=3),
        local=False, models=True,
    )  # fmt: skip
    assert (joined.decoders, joined.predictors, joined.predictor_gpus) == (7, 3, 1.0)
    assert pools.plan_pools(engine_config(), local=True, models=False).predictors == 0


# whole runs --------------------------------------------------------------------------------------


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


@pytest.mark.ray
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
    assert notes.of("object store: 2 decoders x ")
    again, _, _ = run_on_ray(job_for(archive, tmp_path / "out", {}))
    assert again.run is None, "nothing to do"


@pytest.mark.ray
def test_whatever_dies_once_leaves_no_trace_in_the_tables(
    ray_cluster: None,
    archive: Path,
    expected: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A decoder killed, one that hangs, a fault of ours, a predictor killed, all in one run."""
    monkeypatch.setattr(slots, "STUCK_S", 3.0)
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
    assert result.summary["engine"]["decoder_deaths"] == 2
    assert result.summary["engine"]["predictor_restarts"] == 1
    assert notes.of("a decoder died") and notes.of("a decoder did not move for")
    assert notes.of("KeyError: 'a case that nobody had foreseen' (ray_faults.py:")


@pytest.mark.ray
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


@pytest.mark.ray
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


@pytest.mark.ray
def test_a_model_that_cannot_be_loaded_stops_the_start(
    ray_cluster: None, archive: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"fragile: load on cpu raised OSError: weights are cut"):
        run_on_ray(job_for(archive, tmp_path / "out", {"fails": True}))


@pytest.mark.ray
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


@pytest.mark.ray
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
