"""A place in the pool of decoders, whatever actor holds it at the moment."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import ray

from vidbatch.cluster.decoder import Beat
from vidbatch.pipeline.order import WorkOrder

SHORT_TASK_S = 5.0
"""Behind an order of at most so much planned work a second one is queued, so that the decoder need
not wait for the driver; behind a longer one it could wait while another decoder has nothing."""

STUCK_S = 180.0
"""A task without any progress for so long (or for its planned cost) is stuck. Longer than what the
decoder's own child may be silent, so that a hanging file is the child's death, not the actor's."""

VERDICT_S = 60.0
"""For Ray to say what became of an actor that does not answer."""


@dataclass(slots=True, eq=False)
class Flight:
    """An order at a decoder."""

    order: WorkOrder
    done: bool = False
    """Ended, or buried with its actor: whatever is still said of it is late."""


@dataclass(slots=True, eq=False)
class Slot:
    """See the module."""

    index: int
    handle: Any = None
    ready: bool = False
    flights: deque[Flight] = field(default_factory=deque)
    """The first is under work, the second queued behind it."""
    beat: Beat = field(default_factory=lambda: Beat(seq=0))
    moved_at: float = 0.0
    """When the order under work was last seen to make progress."""
    asking: bool = False
    """Whether a call of `progress` is out."""
    missing_since: float | None = None
    """Since when its actor does not answer."""
    past_restarts: int = 0
    """Of decoder processes, under actors before this one."""
    past_seconds: Counter[str] = field(default_factory=Counter)
    """By state, of actors before this one."""

    @property
    def has_room(self) -> bool:
        """Whether it may be given an order."""
        if not self.ready or len(self.flights) > 1:
            return False
        return not self.flights or self.flights[0].order.task.cost_s <= SHORT_TASK_S

    @property
    def seconds(self) -> Counter[str]:
        """By state, of all its actors as far as was heard."""
        return self.past_seconds + Counter(self.beat.seconds)

    @property
    def committing(self) -> bool:
        """Whether the order under work has begun to commit."""
        return self.names_order and self.beat.stage == "commit"

    @property
    def names_order(self) -> bool:
        """Whether the newest beat speaks of the order under work."""
        return bool(self.flights) and self.beat.task_id == self.flights[0].order.task.task_id

    def clip_under_work(self) -> int:
        """Position of the clip that was under work when last heard of; -1: nobody knows."""
        return self.beat.clip if self.names_order and self.beat.stage != "commit" else -1

    def is_stuck(self, now: float) -> bool:
        """Whether the order under work has not moved for too long."""
        if not (self.ready and self.flights):
            return False
        return now - self.moved_at > max(STUCK_S, self.flights[0].order.task.cost_s)

    def is_given_up(self, now: float) -> bool:
        """Marks the actor as missing; whether it has been for too long."""
        if self.missing_since is None:
            self.missing_since, self.ready = now, False
        return now - self.missing_since > VERDICT_S

    def take_on(self, order: WorkOrder) -> Flight:
        """An order goes to its actor, which prepares for it while another one is under work."""
        if not self.flights:
            self.moved_at = time.monotonic()
        else:
            call = self.handle.prepare.options(concurrency_group="control", num_returns=0)
            call.remote(order.task.clips[0])
        flight = Flight(order)
        self.flights.append(flight)
        return flight

    def hear(self, beat: Beat, now: float) -> None:
        """Takes in a beat; waiting for a predictor is nobody's standstill."""
        if beat.waiting or (beat.seq, beat.moved) != (self.beat.seq, self.beat.moved):
            self.moved_at = now
        self.beat = beat

    def occupy(self, handle: Any) -> None:
        """A new actor takes the place; it is not up yet."""
        self.past_restarts += self.beat.child_restarts
        self.past_seconds = self.seconds
        self.handle, self.ready, self.asking, self.beat = handle, False, False, Beat(seq=0)
        self.missing_since = None

    def vacate(self) -> None:
        """Ends the actor, whatever it does."""
        for flight in self.flights:
            flight.done = True
        self.flights.clear()
        if self.handle is not None:
            ray.kill(self.handle)  # it may be alive behind a broken connection
        self.handle, self.ready = None, False
