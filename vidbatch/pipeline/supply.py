"""The orders of a run as the engine takes them, planned in a thread of their own meanwhile.

    Survey.orders ─▶ Orders (positions in the plan log) ─▶ take() ─▶ one WorkOrder
      plans, probes     some bytes a task                    made when it is taken

A million planned clips are a million objects only if somebody makes them all: here none is made
before an engine has room for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import WorkOrder
from vidbatch.pipeline.survey import Survey
from vidbatch.progress import Progress


class PlannedSupply:
    """`pipeline.engine.Supply` of a survey. Use in one thread, `close` at the end.

    With an engine of width 1 there is no second thread: work is planned when it is needed.
    """

    def __init__(self, survey: Survey, engine: Engine, progress: Progress) -> None:
        self._progress = progress
        self._batches = survey.orders(engine.probe, width=engine.width)
        self._ready: deque[Iterator[WorkOrder]] = deque()
        self._costs: dict[str, float] = {}
        self._planned = self._taken = 0
        self._exhausted = False
        self._closing = Event()
        self._planner: ThreadPoolExecutor | None = None
        self._planning: Future[None] | None = None
        if engine.width > 1:
            self._planner = ThreadPoolExecutor(1, "plan")
            self._planning = self._planner.submit(self._plan_all)

    def take(self) -> WorkOrder | None:
        """The next order; None while it is still being planned, and at the end.

        Raises:
            InfraError: the plan could not be written.
        """
        while True:
            while self._ready:
                order = next(self._ready[0], None)
                if order is not None:
                    self._taken += 1
                    self._costs[order.task.task_id] = order.task.cost_s
                    return order
                self._ready.popleft()
            if self._planning is not None:
                if self._planning.done():
                    self._planning.result()
                return None
            if self._exhausted:
                return None
            self._plan_next()

    @property
    def finished(self) -> bool:
        """Everything is planned and taken."""
        return self._exhausted and self._taken == self._planned

    def cost_of(self, task_id: str) -> float:
        """Planned seconds of a task handed out; forgets it."""
        return self._costs.pop(task_id, 0.0)

    def close(self) -> None:
        """Ends the planning, after the chunk it is at."""
        self._closing.set()
        if self._planner is not None:
            self._planner.shutdown(wait=True)

    def _plan_all(self) -> None:
        while not self._exhausted and not self._closing.is_set():
            self._plan_next()

    def _plan_next(self) -> None:
        orders = next(self._batches, None)
        if orders is None:
            self._exhausted = True
        elif len(orders):
            self._planned += len(orders)
            self._ready.append(iter(orders))
            self._progress.expect(len(orders), orders.cost_s)
