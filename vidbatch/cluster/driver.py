"""The engine on Ray: hands out orders, watches decoders, buries the dead, carries on.

Everything that Ray answers becomes an event in one queue; one thread (whoever iterates `run`)
takes them out, so there is no polling and no lock:

    supply ─▶ order ─▶ slot (a decoder actor) ─▶ report          ─▶ yielded
                         │  progress, long poll
                         ├─ died ─▶ the clip it last named is charged, a new actor takes the slot,
                         │          the order goes again, to another slot, carefully
                         └─ store error ─▶ the order goes again after a while, some times
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

import ray

import vidbatch
from vidbatch.cluster.decoder import Beat, Decoder, Fault, TaskEnd
from vidbatch.cluster.faults import DEATHS, is_node_loss, one_line
from vidbatch.cluster.metrics import attribute
from vidbatch.cluster.pools import Pools, make_decoder_actor, make_predictor, plan_pools, start_ray
from vidbatch.cluster.predictor import Predictor
from vidbatch.config import Job
from vidbatch.data import Failure, Video
from vidbatch.errors import ClusterError, InfraError
from vidbatch.pipeline.engine import Probed, Supply
from vidbatch.pipeline.order import RunSpec, TaskReport, WorkOrder
from vidbatch.progress import human_s

SHORT_TASK_S = 5.0
"""Behind an order of at most so much planned work a second one is queued, so that the decoder need
not wait for the driver; behind a longer one it could wait while another decoder has nothing."""

STUCK_S = 180.0
"""A task without any progress for so long (or for its planned cost) is stuck. Longer than what the
decoder's own child may be silent, so that a hanging file is the child's death, not the actor's."""

BATCH_STUCK_S = 600.0
"""One batch in a predictor."""

STORE_TRIES, STORE_PAUSE_S = 4, 2.0
"""Of an order whose output's store failed; the pause doubles."""

BLIND_DEATHS = 5
"""Of one order where no clip can be named: then all of its clips are charged."""

NODE_LOSSES = 20
"""Of one order; they are charged to no clip, and must come to an end as well."""

TAKE_ANYWAY_S = 10.0
"""After so long an order may go back to the slot where it failed: nobody else has time for it."""

HALT_S = 60.0
"""For commits under way when the run is stopped."""

TICK_S = 1.0


@dataclass(slots=True, eq=False)
class _Flight:
    """An order at a decoder."""

    order: WorkOrder
    done: bool = False


@dataclass(slots=True, eq=False)
class _Slot:
    """A place in the pool of decoders, whatever actor holds it at the moment."""

    index: int
    handle: Any
    ready: bool = False
    flights: deque[_Flight] = field(default_factory=deque)
    """The first is under work, the second queued behind it."""
    beat: Beat = field(default_factory=lambda: Beat(seq=0))
    moved_at: float = field(default_factory=time.monotonic)
    asking: bool = False
    child_restarts: int = 0
    """Of actors before this one."""


@dataclass(slots=True, eq=False)
class _Again:
    """An order that waits to be handed out once more."""

    order: WorkOrder
    slot: int
    due: float


class RayEngine:
    """`pipeline.engine.Engine` on Ray actors.

    Args:
        job: its `engine` block says where and how wide, `clips.length_s` where probing cuts.
        note: takes a line for the person who watches.
    """

    decoder_class: type[Decoder] = Decoder
    predictor_class: type[Predictor] = Predictor
    """The actors; tests inject faults by subclasses."""

    def __init__(self, spec: RunSpec, job: Job, *, note: Callable[[str], None]) -> None:
        self._spec, self._job, self._note = spec, job, note
        self._events: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
        self._slots: list[_Slot] = []
        self._hungry: deque[_Slot] = deque()
        self._again: list[_Again] = []
        self._blind: Counter[str] = Counter()
        self._lost_nodes: Counter[str] = Counter()
        self._store_faults: Counter[str] = Counter()
        self._predictors: list[Any] = []
        self._stats: dict[int, Mapping[str, Any]] = {}
        self._past_stats: list[Mapping[str, Any]] = []
        self._predictors_up = 0
        self._deaths = 0
        self._fruitless = 0
        """Decoders lost since the last sign that anything gets done."""
        self._last_death = ""
        self._pools: Pools | None = None
        self._args: tuple[Any, ...] = ()
        self._owns_ray = self._halted = self._dropping = False
        self._halt_by = float("inf")
        self._ticked = 0.0

    @property
    def width(self) -> int:
        """Decoders, also those whose node is still to come."""
        return len(self._slots) or 1

    # start ------------------------------------------------------------------------------------

    def start(self) -> str:
        """Brings up Ray, the predictors (their models loaded) and the decoders.

        Returns once one of each is up; the others join when they come.

        Raises:
            ClusterError: Ray, a GPU, or any actor cannot be had within `engine.wait_s`.
            ModelError: a model cannot be loaded.
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
        whole = ray.put(self._spec)
        for i in range(pools.predictors):
            self._predictors.append(make_predictor(self.predictor_class, whole, pools))
            self._ask_predictor(i)
        pool = {"device": pools.device, "credit": pools.credit_bytes, "wait_s": engine.wait_s}
        spec = ray.put(replace(self._spec, models=()))  # without the models' files
        self._args = (spec, self._job.clips.length_s, self._predictors, pools.beat_s, pool)
        for i in range(pools.decoders):
            self._slots.append(_Slot(index=i, handle=None))
            self._hire(self._slots[i])
        self._note(pools.object_store)
        self._await_first(pools, engine.wait_s)
        where = "this machine" if local else f"the cluster at {engine.address}"
        reason = f" ({pools.device_reason})" if pools.device_reason else ""
        plural = "s" * (pools.predictors != 1)
        return (
            f"Ray {ray.__version__} on {where}, device {pools.device}{reason}, {pools.decoders} "
            f"decoders, {pools.predictors} predictor{plural}"
        )

    def _await_first(self, pools: Pools, wait_s: float) -> None:
        deadline, said = time.monotonic() + wait_s, time.monotonic()
        while not any(s.ready for s in self._slots) or (
            pools.predictors and not self._predictors_up
        ):
            now = time.monotonic()
            up = sum(s.ready for s in self._slots)
            state = (
                f"{up} of {pools.decoders} decoders and {self._predictors_up} of "
                f"{pools.predictors} predictors are up"
            )
            if now > deadline:
                raise ClusterError(
                    f"{state} after {human_s(wait_s)} (engine.wait_s); nothing was begun; look at "
                    f"`ray status`: do nodes with {'GPUs' if pools.device == 'cuda' else 'CPUs'} "
                    "come?",
                    kind="no_actors",
                )
            if now - said > 30:
                said = now
                self._note(f"waiting for the cluster: {state}")
            for _ in self._step(1.0):
                pass

    def _hire(self, slot: _Slot) -> None:
        """A new actor for a slot, perhaps pending."""
        spec, length_s, predictors, beat_s, pool = self._args
        handle = make_decoder_actor(
            self.decoder_class, spec, length_s, predictors, beat_s, {**pool, "seed": slot.index}
        )
        slot.child_restarts += slot.beat.child_restarts
        slot.handle, slot.ready, slot.asking, slot.beat = handle, False, False, Beat(seq=0)
        self._on(handle.ready.remote(), self._decoder_ready, slot, handle)

    def _decoder_ready(self, slot: _Slot, handle: Any, answer: Future[Any]) -> None:
        error = answer.exception()
        if isinstance(error, DEATHS):
            if getattr(error, "actor_init_failed", False) and not any(s.ready for s in self._slots):
                raise ClusterError(
                    f"decoders do not start: {one_line(error)}; nothing can be done; do the nodes "
                    "have the same vidbatch as the driver?",
                    kind="no_actors",
                ) from error
            self._bury(slot, handle, error)
            return
        facts = answer.result()
        if facts["version"] != vidbatch.__version__:
            raise ClusterError(
                f"the cluster has vidbatch {facts['version']}, the driver {vidbatch.__version__}; "
                "nothing was begun; use one image for all",
                kind="version",
            )
        slot.ready, slot.moved_at = True, time.monotonic()
        self._hungry.append(slot)
        self._ask_progress(slot)

    def _ask_predictor(self, i: int) -> None:
        ref = self._predictors[i].ready.options(concurrency_group="control").remote()
        self._on(ref, self._predictor_ready, i)

    def _predictor_ready(self, i: int, answer: Future[Any]) -> None:
        error = answer.exception()
        if isinstance(error, DEATHS):
            if getattr(error, "actor_init_failed", False):
                raise ClusterError(
                    f"predictors do not start: {one_line(error)}; nothing can be done; do the "
                    "nodes have the same vidbatch as the driver?",
                    kind="no_actors",
                ) from error
            self._ask_predictor(i)
            return
        facts = answer.result()
        if facts["error"] is not None:
            raise facts["error"]
        self._predictors_up += 1

    # probe ------------------------------------------------------------------------------------

    def probe(self, videos: Sequence[Video]) -> list[Probed]:
        """Reads the headers of some videos, spread over the decoders that are up.

        May be called from another thread than the one that iterates `run`, and before it.
        """
        found: dict[int, Probed] = {}
        left = list(range(len(videos)))
        why = "no decoder is up"
        for round_ in range(3):
            handles = [s.handle for s in self._slots if s.ready]
            asked = {}
            for n, i in enumerate(left):
                if handles and not self._halted:
                    handle = handles[(n + round_) % len(handles)]
                    ref = handle.probe.options(concurrency_group="probe").remote(videos[i])
                    asked[ref] = i
            waiting = list(asked)
            while waiting and not self._halted:
                ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=TICK_S)
                for ref in ready:
                    try:
                        found[asked[ref]] = ray.get(ref)
                    except DEATHS as error:
                        why = one_line(error)
            left = [i for i in left if i not in found]
            if not left or self._halted:
                break
            time.sleep(TICK_S)
        failure = Failure(
            stage="probe",
            kind="worker_died",
            message=f"its header was not read: {'stopped' if self._halted else why}",
            advice="comes back by itself on the next runs",
            retryable=True,
        )
        return [found.get(i) or Probed(video=v, failure=failure) for i, v in enumerate(videos)]

    # run --------------------------------------------------------------------------------------

    def run(self, supply: Supply) -> Iterator[TaskReport]:
        """Hands out orders and yields reports until the supply is finished, or `halt`.

        Raises:
            InfraError: the output's store or the cluster failed for good.
        """
        while True:
            if not self._halted:
                self._hand_out(supply)
            elif not self._dropping:
                self._drop()
            flying = any(s.flights for s in self._slots)
            if not flying and not self._again and (self._halted or supply.finished):
                return
            # a supply that is still being probed says nothing when it has found more
            patience = 0.05 if not (self._halted or supply.finished) and self._hungry else TICK_S
            yield from self._step(patience)

    def _hand_out(self, supply: Supply) -> None:
        """Orders to slots with room, one each before any gets a second."""
        full: list[_Slot] = []
        while self._hungry:
            slot = self._hungry.popleft()
            if not self._has_room(slot):
                continue
            order = self._next(slot)
            if order is None and not supply.finished:
                order = supply.take()
            if order is None:
                full.append(slot)
                if not self._again:
                    break
                continue
            self._send(slot, order)
            if self._has_room(slot):
                self._hungry.append(slot)
        self._hungry.extendleft(reversed(full))

    @staticmethod
    def _has_room(slot: _Slot) -> bool:
        flights = slot.flights
        return slot.ready and (
            not flights or (len(flights) == 1 and flights[0].order.task.cost_s <= SHORT_TASK_S)
        )

    def _next(self, slot: _Slot) -> WorkOrder | None:
        """An order that comes back, due, and best not one that failed in this very slot."""
        now = time.monotonic()
        for again in self._again:
            elsewhere = again.slot != slot.index or len(self._slots) == 1
            if now >= again.due + (0 if elsewhere else TAKE_ANYWAY_S) and not slot.flights:
                self._again.remove(again)
                return again.order
        return None

    def _send(self, slot: _Slot, order: WorkOrder) -> None:
        flight = _Flight(order)
        if not slot.flights:
            slot.moved_at = time.monotonic()
        slot.flights.append(flight)
        careful = order.attempt > 1 or self._spec.attempts == 1
        ref = slot.handle.run_task.remote(order, careful)
        self._on(ref, self._task_ended, slot, slot.handle, flight)

    def _task_ended(
        self, slot: _Slot, handle: Any, flight: _Flight, answer: Future[TaskEnd]
    ) -> TaskReport | None:
        if flight.done:
            return None  # buried with its actor; whatever it still says is late
        error = answer.exception()
        if isinstance(error, DEATHS):
            self._bury(slot, handle, error)
            return None
        flight.done = True
        slot.flights.remove(flight)
        slot.moved_at = time.monotonic()
        self._hungry.append(slot)
        order, task_id = flight.order, flight.order.task.task_id
        end = Fault(clip=-1, message=one_line(error)) if error is not None else answer.result()
        if isinstance(end, TaskReport):
            self._fruitless = 0
            for tally in (self._blind, self._lost_nodes, self._store_faults):
                tally.pop(task_id, None)
            return end
        if isinstance(end, Fault):
            self._note(f"task {task_id}: {end.message}; it is tried again without blaming others")
            self._charge(slot, order, end.clip)
        elif isinstance(end, InfraError):
            self._store_faults[task_id] += 1
            tries = self._store_faults[task_id]
            if tries >= STORE_TRIES:
                raise end
            self._note(f"task {task_id}: {end.message}; try {tries} of {STORE_TRIES}")
            pause_s = STORE_PAUSE_S * 2 ** (tries - 1)
            self._requeue(slot, replace(order, attempt=order.attempt + 1), pause_s)
        return None

    # deaths -----------------------------------------------------------------------------------

    def _bury(self, slot: _Slot, handle: Any, error: BaseException) -> None:
        """An actor is gone: its first order's clip is charged, both orders go again."""
        if slot.handle is not handle:
            return
        flights, slot.flights = slot.flights, deque()
        for flight in flights:
            flight.done = True
        ray.kill(handle)  # it may be alive behind a broken connection
        self._deaths += 1
        self._fruitless += 1
        self._last_death = one_line(error)
        if self._fruitless > 10 + 5 * len(self._slots):
            raise ClusterError(
                f"{self._fruitless} decoders died and nothing got done; the last one: "
                f"{self._last_death}; what is committed stands; the same command goes on from there",
                kind="decoders_die",
            )
        if self._halted:
            slot.handle, slot.ready = None, False
            return
        beat = slot.beat
        for n, flight in enumerate(flights):
            if n == 0 and is_node_loss(error):
                self._charge_node(slot, flight.order)
            elif n == 0:
                named = beat.task_id == flight.order.task.task_id and beat.stage != "commit"
                clip = beat.clip if named else -1
                self._note(self._obituary(flight.order, clip))
                self._charge(slot, flight.order, clip)
            else:
                self._requeue(slot, flight.order, 0.0)
        self._hire(slot)

    def _obituary(self, order: WorkOrder, clip: int) -> str:
        video = order.task.clips[clip].video.uri if clip >= 0 else "no clip of its own"
        return (
            f"a decoder died at {video} (task {order.task.task_id}, attempt {order.attempt}): "
            f"{self._last_death}; the task goes again"
        )

    def _charge(self, slot: _Slot, order: WorkOrder, clip: int) -> None:
        """Counts a death against a clip, or against the order if nobody knows which."""
        deaths = dict(order.deaths)
        if clip >= 0:
            deaths[clip] = deaths.get(clip, 0) + 1
            self._fruitless = 0
        else:
            task_id = order.task.task_id
            self._blind[task_id] += 1
            if self._blind[task_id] > 2 * BLIND_DEATHS:
                raise ClusterError(
                    f"task {task_id} kills its decoder even with every clip left out "
                    f"({self._last_death}); what is committed stands; please report it",
                    kind="decoders_die",
                )
            if self._blind[task_id] == BLIND_DEATHS:
                deaths = dict.fromkeys(range(len(order.task.clips)), self._spec.attempts)
        self._requeue(slot, replace(order, deaths=deaths, attempt=order.attempt + 1), 0.0)

    def _charge_node(self, slot: _Slot, order: WorkOrder) -> None:
        task_id = order.task.task_id
        self._lost_nodes[task_id] += 1
        self._note(f"a node was lost with task {task_id}; the task goes again")
        if self._lost_nodes[task_id] > NODE_LOSSES:
            self._charge(slot, order, -1)
        else:
            self._requeue(slot, replace(order, attempt=order.attempt + 1), 0.0)

    def _requeue(self, slot: _Slot, order: WorkOrder, pause_s: float) -> None:
        self._again.append(_Again(order, slot.index, time.monotonic() + pause_s))

    # watch ------------------------------------------------------------------------------------

    def _ask_progress(self, slot: _Slot, *, drop: bool = False) -> None:
        slot.asking = True
        call = slot.handle.progress.options(concurrency_group="control")
        self._on(call.remote(slot.beat.seq, drop), self._progress, slot, slot.handle)

    def _progress(self, slot: _Slot, handle: Any, answer: Future[Beat]) -> None:
        if slot.handle is not handle:
            return
        slot.asking = False
        error = answer.exception()
        if error is not None:
            if isinstance(error, DEATHS) and not slot.flights:
                self._bury(slot, handle, error)
            return  # its order's own call ends as well; else the next tick asks again
        beat = answer.result()
        if beat.waiting or (beat.seq, beat.moved) != (slot.beat.seq, slot.beat.moved):
            slot.moved_at = time.monotonic()
        slot.beat = beat
        if not self._halted:
            self._ask_progress(slot)
        elif self._dropping and not self._is_committing(slot):
            self._dismiss(slot)

    def _tick(self) -> None:
        """Once a second: stuck tasks, silent decoders, the predictors' numbers."""
        now = time.monotonic()
        for slot in self._slots:
            if not slot.ready:
                continue
            if not slot.asking:
                self._ask_progress(slot, drop=self._dropping)
            if slot.flights and not self._halted:
                limit_s = max(STUCK_S, slot.flights[0].order.task.cost_s)
                if now - slot.moved_at > limit_s:
                    self._note(f"a decoder has not moved for {human_s(limit_s)}: it is ended")
                    slot.moved_at = now
                    ray.kill(slot.handle)
        if now > self._halt_by:
            for slot in self._slots:
                self._dismiss(slot)
        for i, handle in enumerate(self._predictors):
            if self._predictors_up and self._stats.get(i, {}).get("asked", 0) < now - 10 * TICK_S:
                self._stats[i] = {**self._stats.get(i, {}), "asked": now}
                ref = handle.stats.options(concurrency_group="control").remote()
                self._on(ref, self._predictor_stats, i)

    def _predictor_stats(self, i: int, answer: Future[Any]) -> None:
        error = answer.exception()
        if error is not None:
            return  # it died and comes back; its clients have noticed
        new, old = answer.result(), self._stats.get(i, {})
        if "pid" in old and old["pid"] != new["pid"]:
            self._past_stats.append(old)
            self._note("a predictor died and was started again")
        self._stats[i] = {**new, "asked": old.get("asked", 0)}
        if new["busy_s"] > BATCH_STUCK_S:
            self._note(f"a predictor has had one batch for {human_s(new['busy_s'])}: restarted")
            ray.kill(self._predictors[i], no_restart=False)

    # events -----------------------------------------------------------------------------------

    def _on(self, ref: Any, handler: Callable[..., Any], *args: Any) -> None:
        """Calls `handler(*args, future)` in the thread of `run` when Ray has an answer."""
        ref.future().add_done_callback(lambda f: self._events.put((handler, (*args, f))))

    def _step(self, timeout_s: float) -> Iterator[TaskReport]:
        """Waits for an event and takes in all there are; yields the reports among them."""
        try:
            event = self._events.get(timeout=timeout_s)
            while True:
                handler, args = event
                report = handler(*args)
                if report is not None:
                    yield report
                event = self._events.get_nowait()
        except Empty:
            pass
        if (now := time.monotonic()) - self._ticked >= TICK_S:
            self._ticked = now
            self._tick()

    # the end ----------------------------------------------------------------------------------

    def halt(self) -> None:
        """Hands out nothing more; commits that have begun are finished. From any thread or signal."""
        self._halted = True
        self._events.put((lambda: None, ()))

    def _drop(self) -> None:
        """Orders that wait are forgotten; decoders that do not commit are dismissed."""
        self._dropping = True
        self._halt_by = time.monotonic() + HALT_S
        self._again.clear()
        for slot in self._slots:
            if slot.flights and slot.ready:
                self._ask_progress(slot, drop=True)
            else:
                self._dismiss(slot)

    @staticmethod
    def _is_committing(slot: _Slot) -> bool:
        if not slot.flights:
            return False
        return (
            slot.beat.stage == "commit" and slot.beat.task_id == slot.flights[0].order.task.task_id
        )

    def _dismiss(self, slot: _Slot) -> None:
        for flight in slot.flights:
            flight.done = True
        slot.flights.clear()
        if slot.handle is not None:
            ray.kill(slot.handle)
        slot.handle, slot.ready = None, False

    def stop(self) -> Mapping[str, Any]:
        """Takes all actors down, and Ray if it was started here; may be called at any moment."""
        facts: dict[str, Any] = {"decoder_deaths": self._deaths}
        if ray.is_initialized():
            restarts = sum(s.child_restarts + s.beat.child_restarts for s in self._slots)
            facts |= {"child_restarts": restarts, "predictor_restarts": len(self._past_stats)}
            if self._pools is not None and self._pools.predictors:
                facts |= attribute([*self._past_stats, *self._last_stats()], self._pools.device)
            for slot in self._slots:
                self._dismiss(slot)
            for handle in self._predictors:
                ray.kill(handle)
            self._predictors.clear()
            if self._owns_ray:
                ray.shutdown()
                self._owns_ray = False
        return facts

    def _last_stats(self) -> list[Mapping[str, Any]]:
        """The predictors' numbers now, or the last ones known of one that does not answer."""
        asked = {
            handle.stats.options(concurrency_group="control").remote(): i
            for i, handle in enumerate(self._predictors)
        }
        if asked and self._predictors_up:
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=2 * TICK_S)
            for ref in ready:
                try:
                    self._stats[asked[ref]] = ray.get(ref)
                except DEATHS as error:
                    self._note(f"a predictor is gone at the end: {one_line(error)}")
        return [s for s in self._stats.values() if "seconds" in s]
