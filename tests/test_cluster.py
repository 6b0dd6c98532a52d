"""The engine's book-keeping, sizes and addresses; whole runs are in test_cluster_runs.py."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from vidbatch.cluster import orders, pools
from vidbatch.cluster.attribution import attribute
from vidbatch.cluster.client import credit_bytes
from vidbatch.cluster.decoder import Beat, DroppedError, Pulse
from vidbatch.cluster.orders import Returned
from vidbatch.cluster.slots import Flight, Slot
from vidbatch.config import EngineConfig
from vidbatch.data import Clip, Task, Video
from vidbatch.errors import ClusterError, InfraError, StoreError, UsageError
from vidbatch.pipeline.order import WorkOrder

pytest_plugins = ["tests.ray_cluster"]


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
