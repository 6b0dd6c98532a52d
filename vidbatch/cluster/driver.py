"""The engine on Ray: hands out orders, watches decoders, buries the dead, carries on.

Everything that Ray answers becomes an event in one queue; one thread (whoever iterates `run`)
takes them out, so there is no lock:

    supply ─▶ order ─▶ slot (a decoder actor) ─┬─ report ─▶ yielded
                         ▲                     ├─ died: the clip that `progress` last named is
                         │                     │  charged, a new actor takes the slot ─┐
                         │                     └─ its output's store failed ───────────┤
                         └──────── again, in another slot, carefully ◀── orders.py ◀───┘
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

import vidbatch
from vidbatch.cluster.crew import Crew
from vidbatch.cluster.decoder import Beat, Decoder, Fault, TaskEnd
from vidbatch.cluster.faults import DEATHS, is_node_loss, is_unclear, one_line
from vidbatch.cluster.inbox import Inbox
from vidbatch.cluster.orders import Returned
from vidbatch.cluster.pools import Pools, make_decoder_actor, plan_pools, start_ray
from vidbatch.cluster.predictor import Predictor
from vidbatch.cluster.probing import probe_videos
from vidbatch.cluster.slots import Flight, Slot
from vidbatch.cluster.telling import Telling
from vidbatch.config import Job
from vidbatch.data import Video
from vidbatch.errors import ClusterError
from vidbatch.pipeline.engine import Probed, Supply
from vidbatch.pipeline.order import RunSpec, TaskReport, WorkOrder
from vidbatch.progress import Progress, human_s

HALT_S = 60.0
"""For commits under way when the run is stopped."""
SUPPLY_S = 0.05
"""Between two looks at a supply that had nothing: it does not say when it has."""

TICK_S = 1.0
WAITING_LINE_S = 30.0


class RayEngine:
    """`pipeline.engine.Engine` on Ray actors.

    Args:
        job: its `engine` block says where and how wide, `clips.length_s` where probing cuts.
        note: takes a line for the person who watches.
    """

    decoder_class: type[Decoder] = Decoder
    predictor_class: type[Predictor] = Predictor
    """The actors; tests inject faults by subclasses."""
    progress: Progress | None = None
    """Shown as metrics; is told in turn what the actors do."""

    def __init__(self, spec: RunSpec, job: Job, *, note: Callable[[str], None]) -> None:
        self._spec, self._job, self._note = spec, job, note
        self._inbox = Inbox()
        self._slots: list[Slot] = []
        self._hungry: deque[Slot] = deque()
        """Slots that may have room."""
        self._returned = Returned(spec.attempts)
        self._crew = Crew(self._inbox.on, note, self.predictor_class)
        self._pools: Pools | None = None
        self._telling = Telling(self._slots, self._crew, note)
        self._args: tuple[Any, ...] = ()
        self._deaths = self._fruitless = 0
        """Decoders lost: all, and since the last sign that anything gets done."""
        self._owns_ray = self._halted = self._dropping = False
        self._halt_by = float("inf")
        self._ticked = self._some_up_at = self._hired_at = time.monotonic()

    @property
    def width(self) -> int:
        """Decoders, also those whose node is still to come."""
        return len(self._slots) or 1

    # start ------------------------------------------------------------------------------------

    def start(self) -> str:
        """Brings up Ray, the predictors and the decoders.

        Returns once a decoder is up; the others join when they come. Models are loaded while the
        first frames are decoded: one that cannot be ends `run`.

        Raises:
            ClusterError: Ray, a GPU, or any decoder cannot be had within `engine.wait_s`.
            UsageError: the job file asks for what this kind of cluster cannot give.
        """
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> str:
        engine = self._job.engine
        self._owns_ray = start_ray(engine)
        local = engine.address == "local"
        pools = plan_pools(engine, local=local, models=bool(self._spec.models))
        self._pools = pools
        self._some_up_at = self._hired_at = time.monotonic()
        self._crew.hire(self._spec, pools)
        pool = {"device": pools.device, "credit": pools.credit_bytes, "wait_s": engine.wait_s}
        spec = replace(self._spec, models=())  # without the models' files
        self._args = (spec, self._job.clips.length_s, self._crew.handles, pools.beat_s, pool)
        self._slots.extend(Slot(index=i) for i in range(pools.decoders))
        for slot in self._slots:
            self._hire(slot)
        if pools.predictors:
            self._note(pools.object_store)
        self._await_first(pools)
        where = "this machine" if local else f"the cluster at {engine.address}"
        return f"Ray {ray.__version__} on {where}, {pools.line}"

    def _await_first(self, pools: Pools) -> None:
        said = time.monotonic()
        while not self._halted and not any(s.ready for s in self._slots):
            deque(self._step(TICK_S), maxlen=0)  # no reports yet
            if (now := time.monotonic()) - said > WAITING_LINE_S:
                said = now
                self._note(f"waiting for the cluster: 0 of {pools.decoders} decoders are up")

    def _hire(self, slot: Slot) -> None:
        """A new actor for a slot, perhaps pending."""
        *args, pool = self._args
        handle = make_decoder_actor(self.decoder_class, *args, {**pool, "seed": slot.index})
        slot.occupy(handle)
        self._ask_ready(slot)

    def _ask_ready(self, slot: Slot) -> None:
        slot.asking = True
        call = slot.handle.ready.options(concurrency_group="control")
        self._inbox.on(call.remote(), self._decoder_ready, slot, slot.handle)

    def _decoder_ready(self, slot: Slot, handle: Any, answer: Future[Any]) -> None:
        if slot.handle is not handle:
            return
        slot.asking = False
        error = answer.exception()
        if getattr(error, "actor_init_failed", False) and not any(s.ready for s in self._slots):
            assert error is not None
            raise ClusterError(
                f"decoders do not start: {one_line(error)}; have the nodes the driver's vidbatch?",
                kind="no_actors",
            ) from error
        if isinstance(error, DEATHS):
            self._lost(slot, handle, error)
            return
        if slot.missing_since is not None:  # it was only out of reach, but its answers are lost
            self._bury(slot, ActorUnavailableError("the connection was lost", None))
            return
        version = answer.result()["version"]
        if version != vidbatch.__version__:
            raise ClusterError(
                f"the cluster has vidbatch {version}, the driver {vidbatch.__version__}; nothing "
                "was begun; use one image for all",
                kind="version",
            )
        slot.ready, slot.moved_at = True, time.monotonic()
        self._hungry.append(slot)
        self._ask_progress(slot)

    # probe ------------------------------------------------------------------------------------

    def probe(self, videos: Sequence[Video]) -> list[Probed]:
        """Reads the headers of some videos, spread over the decoders that are up.

        May be called from another thread than the one that iterates `run`, and before it.
        """
        return probe_videos(
            videos,
            lambda: [s.handle for s in tuple(self._slots) if s.ready],
            lambda: self._halted,
        )

    # run --------------------------------------------------------------------------------------

    def run(self, supply: Supply) -> Iterator[TaskReport]:
        """Hands out orders and yields reports until the supply is finished, or `halt`.

        Raises:
            InfraError: the output's store or the cluster failed for good.
            ModelError: a model cannot be loaded.
        """
        while True:
            if not self._halted:
                self._hand_out(supply)
            elif not self._dropping:
                self._drop()
            flying = any(s.flights for s in self._slots)
            if not flying and not self._returned and (self._halted or supply.finished):
                return
            look_again = self._hungry and not self._halted and not supply.finished
            yield from self._step(SUPPLY_S if look_again else TICK_S)

    def _hand_out(self, supply: Supply) -> None:
        """Orders to slots with room, one each before any gets a second."""
        idle: list[Slot] = []
        while self._hungry:
            slot = self._hungry.popleft()
            if not slot.has_room:
                continue
            order = None
            if not slot.flights:
                order = self._returned.take(slot.index, only_slot=len(self._slots) == 1)
            if order is None and not supply.finished:
                order = supply.take()
            if order is not None:
                self._send(slot, order)
                self._hungry.append(slot)
                continue
            idle.append(slot)
            if not self._returned:
                break
        self._hungry.extendleft(reversed(idle))

    def _send(self, slot: Slot, order: WorkOrder) -> None:
        flight = slot.take_on(order)
        careful = order.attempt > 1 or self._spec.attempts == 1
        ref = slot.handle.run_task.remote(order, careful)
        self._inbox.on(ref, self._task_ended, slot, slot.handle, flight)

    def _task_ended(
        self, slot: Slot, handle: Any, flight: Flight, answer: Future[TaskEnd]
    ) -> TaskReport | None:
        if flight.done:
            return None
        error = answer.exception()
        if isinstance(error, DEATHS):
            self._lost(slot, handle, error)
            return None
        flight.done = True
        slot.flights.remove(flight)
        slot.moved_at = time.monotonic()
        self._hungry.append(slot)
        order = flight.order
        end = answer.result() if error is None else Fault(clip=-1, message=one_line(error))
        if isinstance(end, TaskReport):
            self._fruitless = 0
            self._returned.done(end.task_id)
            self._telling.count(end)
            return end
        if end is not None and not self._halted:
            if isinstance(end, Fault):
                line = self._returned.died(
                    order, slot.index, end.clip, f"a decoder raised {end.message}"
                )
            else:
                line = self._returned.store_failed(order, slot.index, end)
            self._note(line)
        return None

    def _lost(self, slot: Slot, handle: Any, error: BaseException) -> None:
        """An actor does not answer: is it dead, or its node, or the way to it?"""
        if slot.handle is not handle:
            return
        if self._halted or not is_unclear(error) or slot.is_given_up(time.monotonic()):
            self._bury(slot, error)

    def _bury(self, slot: Slot, error: BaseException) -> None:
        """An actor is gone: its first order's clip is charged, both orders go again."""
        flights, clip = tuple(slot.flights), slot.clip_under_work()
        why = f"a decoder died: {one_line(error)}"
        slot.vacate()
        self._deaths += 1
        self._fruitless += 1
        if self._halted:
            return
        if self._fruitless > 10 + 5 * len(self._slots):
            raise ClusterError(
                f"{self._fruitless} decoders died and nothing got done; {why}; "
                "what is committed stands; the same command goes on from there",
                kind="decoders_die",
            )
        self._hire(slot)
        for flight in flights[1:]:
            self._returned.put_back(flight.order, slot.index)
        if flights and is_node_loss(error):
            self._note(self._returned.lost_node(flights[0].order, slot.index, why))
        elif flights:
            self._fruitless *= clip < 0
            self._note(self._returned.died(flights[0].order, slot.index, clip, why))

    # watch ------------------------------------------------------------------------------------

    def _ask_progress(self, slot: Slot) -> None:
        slot.asking = True
        drop = self._dropping
        call = slot.handle.progress.options(concurrency_group="control")
        self._inbox.on(call.remote(slot.beat.seq, drop), self._progress, slot, slot.handle, drop)

    def _progress(self, slot: Slot, handle: Any, drop: bool, answer: Future[Beat]) -> None:
        if slot.handle is not handle:
            return
        slot.asking = False
        error = answer.exception()
        if error is not None:
            if isinstance(error, DEATHS) and not slot.flights:
                self._lost(slot, handle, error)
            return  # its order's own call ends as well; if not, the next tick asks again
        slot.hear(answer.result(), time.monotonic())
        if not self._dropping:
            self._ask_progress(slot)
        elif drop and not slot.committing:
            slot.vacate()

    def _tick(self, now: float) -> None:
        """Once a second: stuck and silent decoders, and whether any is left."""
        for slot in self._slots:
            if now > self._halt_by:
                slot.vacate()
            if slot.missing_since is not None and not slot.asking:
                self._ask_ready(slot)
            if not slot.ready:
                continue
            self._some_up_at = now
            if not slot.asking:
                self._ask_progress(slot)
            if slot.is_stuck(now) and not self._halted:
                self._note(
                    f"a decoder did not move for {human_s(now - slot.moved_at)}: it is ended"
                )
                slot.moved_at = now
                ray.kill(slot.handle)
        if not self._halted:
            self._check_up(now)
        self._crew.tick()
        device = self._pools.device if self._pools else ""
        self._telling.tick(self._deaths, device, self.progress)

    def _check_up(self, now: float) -> None:
        """Whether decoders, and at first a predictor, have been waited for long enough."""
        wait_s, crew = self._job.engine.wait_s, self._crew
        lacks = "decoder" if now - self._some_up_at > wait_s else ""
        if crew.handles and not crew.seen_up and now - self._hired_at > wait_s:
            lacks = lacks or "predictor"
        if lacks:
            raise ClusterError(
                f"no {lacks} was up for {human_s(wait_s)} (engine.wait_s); what is committed "
                "stands; the same command goes on from there; `ray status` says what nodes there "
                "are and what was asked for",
                kind="no_actors",
            )

    def _step(self, timeout_s: float) -> Iterator[TaskReport]:
        """Waits for an answer and takes in all there are; yields the reports among them."""
        yield from self._inbox.take(timeout_s)
        if (now := time.monotonic()) - self._ticked >= TICK_S:
            self._ticked = now
            self._tick(now)

    # the end ----------------------------------------------------------------------------------

    def halt(self) -> None:
        """Hands out nothing more; commits that have begun are finished. Safe in signal handlers."""
        self._halted = True
        self._inbox.wake()

    def _drop(self) -> None:
        """Orders that wait are forgotten; decoders that do not commit are dismissed."""
        self._dropping = True
        self._halt_by = time.monotonic() + HALT_S
        self._returned.clear()
        for slot in self._slots:
            if slot.ready and slot.flights:
                self._ask_progress(slot)
            else:
                slot.vacate()

    def stop(self) -> Mapping[str, Any]:
        """Takes all actors down, and Ray if it was started here; may be called at any moment."""
        facts: dict[str, Any] = {
            "decoder_deaths": self._deaths,
            "child_restarts": sum(s.past_restarts + s.beat.child_restarts for s in self._slots),
        }
        if ray.is_initialized():
            for slot in self._slots:
                slot.vacate()
            stats = self._crew.dismiss()
            facts["predictor_restarts"] = self._crew.restarts
            if self._pools is not None:
                facts |= self._telling.facts(stats, self._pools.device)
            if self._owns_ray:
                ray.shutdown()
                self._owns_ray = False
        return facts
