"""Orders that come back: who is charged, when they go again and where, and when it is enough.

Plain book-keeping without Ray. A death is charged to the clip under work; `pipeline.task` leaves a
clip out once `limits.attempts` workers died at it, so every order ends: either its clips are done
or they are charged, and where no clip can be named all of them are, after BLIND_DEATHS.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

from vidbatch.errors import ClusterError, InfraError
from vidbatch.pipeline.order import WorkOrder

STORE_TRIES, STORE_PAUSE_S = 4, 2.0
"""Of an order whose output's store failed; the pause doubles."""

BLIND_DEATHS = 5
"""Of one order where no clip can be named: then all of its clips are charged."""

NODE_LOSSES = 20
"""Of one order; they are charged to no clip, and must come to an end as well."""

TAKE_ANYWAY_S = 10.0
"""After so long an order may go back to the slot where it failed: nobody else has time for it."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    order: WorkOrder
    slot: int
    due: float


class Returned:
    """Orders on their way back to a decoder. Every method that takes one puts it in again.

    Args:
        attempts: workers that may die at one clip.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._waiting: list[_Waiting] = []
        self._blind: Counter[str] = Counter()
        self._nodes: Counter[str] = Counter()
        self._store: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def clear(self) -> None:
        """Forgets them all."""
        self._waiting.clear()

    def take(self, slot: int, *, only_slot: bool) -> WorkOrder | None:
        """The first that is due for a slot; best not one that failed in this very slot."""
        now = time.monotonic()
        for found in self._waiting:
            elsewhere = found.slot != slot or only_slot
            if now >= found.due + (0.0 if elsewhere else TAKE_ANYWAY_S):
                self._waiting.remove(found)
                return found.order
        return None

    def put_back(self, order: WorkOrder, slot: int) -> None:
        """It was queued behind the one that died: nothing happened to it."""
        self._waiting.append(_Waiting(order, slot, time.monotonic()))

    def done(self, task_id: str) -> None:
        """The task has ended."""
        for tally in (self._blind, self._nodes, self._store):
            tally.pop(task_id, None)

    def died(self, order: WorkOrder, slot: int, clip: int, why: str) -> str:
        """A worker ended at a clip (-1: nobody knows which); gives the line that says so.

        Raises:
            ClusterError: its workers die even when every clip is left out.
        """
        deaths, task_id = dict(order.deaths), order.task.task_id
        if clip >= 0:
            deaths[clip] = deaths.get(clip, 0) + 1
        else:
            self._blind[task_id] += 1
            if self._blind[task_id] > 2 * BLIND_DEATHS:
                raise ClusterError(
                    f"task {task_id} kills its decoder even with every clip left out ({why}); "
                    "what is committed stands; please report it",
                    kind="decoders_die",
                )
            if self._blind[task_id] == BLIND_DEATHS:
                deaths = dict.fromkeys(range(len(order.task.clips)), self._attempts)
        self._again(replace(order, deaths=deaths), slot, 0.0)
        where = f", at {order.task.clips[clip].video.uri}" if clip >= 0 else ""
        return f"{why}{where}; {_again(order)}"

    def lost_node(self, order: WorkOrder, slot: int, why: str) -> str:
        """A node went away under its worker. Raises ClusterError as `died` does."""
        self._nodes[order.task.task_id] += 1
        if self._nodes[order.task.task_id] > NODE_LOSSES:
            return self.died(order, slot, -1, why)
        self._again(order, slot, 0.0)
        return f"a node was lost; {_again(order)}"

    def store_failed(self, order: WorkOrder, slot: int, error: InfraError) -> str:
        """The output's store failed under it: again after a pause. Raises `error` in the end."""
        task_id = order.task.task_id
        self._store[task_id] += 1
        if self._store[task_id] >= STORE_TRIES:
            raise error
        self._again(order, slot, STORE_PAUSE_S * 2.0 ** (self._store[task_id] - 1))
        return f"{error.message}; {_again(order)}"

    def _again(self, order: WorkOrder, slot: int, pause_s: float) -> None:
        order = replace(order, attempt=order.attempt + 1)
        self._waiting.append(_Waiting(order, slot, time.monotonic() + pause_s))


def _again(order: WorkOrder) -> str:
    return f"task {order.task.task_id} goes again (attempt {order.attempt} ended)"
