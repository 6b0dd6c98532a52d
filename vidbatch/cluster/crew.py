"""The predictors as the driver sees them: who is up, what they say of their seconds, who hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import ray

from vidbatch.cluster.faults import DEATHS, one_line
from vidbatch.cluster.pools import Pools, make_predictor, pack_spec
from vidbatch.errors import ClusterError
from vidbatch.pipeline.order import RunSpec
from vidbatch.progress import human_s

STATS_EVERY_S = 10.0

BATCH_STUCK_S = 600.0
"""One batch in a predictor; then its process is started again."""

NONE_LINE_S = 30.0

LAST_WORD_S = 2.0
"""For the numbers at the end of a run."""


class Crew:
    """The predictor actors of a run. Ray restarts a dead one under the same handle.

    Args:
        on: `on(ref, handler, *args)` calls `handler(*args, future)` in the driver's thread.
        note: takes a line for the person who watches.
    """

    def __init__(
        self, on: Callable[..., None], note: Callable[[str], None], cls: type[Any]
    ) -> None:
        self._on, self._note, self._cls = on, note, cls
        self.handles: list[Any] = []
        self.up = 0
        """Predictors whose models are loaded."""
        self.restarts = 0
        self._past: list[Mapping[str, Any]] = []
        self._stats: dict[int, Mapping[str, Any]] = {}
        self.seen_up = False
        """Whether any has ever been."""
        self._silent: set[int] = set()
        """Those that are to be asked whether they are up."""
        self._asked_at, self._none_since = 0.0, time.monotonic()
        self._packed: Any = None

    @property
    def stats(self) -> list[Mapping[str, Any]]:
        """What each process did, as far as it is known."""
        return [s for s in (*self._past, *self._stats.values()) if s]

    def hire(self, spec: RunSpec, pools: Pools) -> None:
        """Makes the actors, which build the models of `spec`."""
        self._packed = pack_spec(spec)
        batch = max((m.spec.batch for m in spec.models), default=1)
        self.handles = [make_predictor(self._cls, batch, pools) for _ in range(pools.predictors)]
        self._silent = set(range(pools.predictors))
        self.tick()

    def tick(self) -> None:
        """To be called about once a second."""
        for i in tuple(self._silent):
            self._silent.remove(i)
            self._ask(i, "ready", self._ready, self._packed)
        now = time.monotonic()
        if self.up or not self.handles:
            self._none_since = now
        elif now - self._none_since >= NONE_LINE_S:
            self._none_since = now
            self._note(f"none of {len(self.handles)} predictors is up: decoders wait for one")
        if now - self._asked_at >= STATS_EVERY_S and self.up:
            self._asked_at = now
            for i in range(len(self.handles)):
                self._ask(i, "stats", self._told)

    def dismiss(self) -> list[Mapping[str, Any]]:
        """Takes the actors down; gives what each process did, as far as it is known."""
        if self.up:
            asked = {
                handle.stats.options(concurrency_group="control").remote(): i
                for i, handle in enumerate(self.handles)
            }
            ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LAST_WORD_S)
            for ref in ready:
                try:
                    self._stats[asked[ref]] = ray.get(ref)
                except DEATHS as error:
                    self._note(f"a predictor is gone at the end of the run: {one_line(error)}")
        for handle in self.handles:
            ray.kill(handle)
        self.handles, self.up = [], 0
        return self.stats

    def _ask(self, i: int, method: str, handler: Callable[..., None], *args: Any) -> None:
        call = getattr(self.handles[i], method).options(concurrency_group="control")
        self._on(call.remote(*args), handler, i)

    def _ready(self, i: int, answer: Future[Any]) -> None:
        error = answer.exception()
        if error is None:
            facts = answer.result()
            if facts["error"] is None:
                self.up += 1
                self.seen_up = True
                self._ask(i, "stay", self._gone)
            elif self.seen_up:  # it tries again by itself
                self._note(f"a predictor does not come back: {facts['error']}")
                self._silent.add(i)
            else:
                raise facts["error"]
        elif getattr(error, "actor_init_failed", False):
            raise ClusterError(
                f"predictors do not start: {one_line(error)}; nothing was begun; have the nodes "
                "the driver's vidbatch?",
                kind="no_actors",
            ) from error
        else:
            self._silent.add(i)

    def _gone(self, i: int, answer: Future[Any]) -> None:
        """The call that lasts as long as its process has ended."""
        if not self.handles:
            return
        error = answer.exception()
        self._note(f"a predictor died and is started again: {one_line(error) if error else ''}")
        self.up -= 1
        self.restarts += 1
        self._past.append(self._stats.pop(i, {}))
        self._silent.add(i)

    def _told(self, i: int, answer: Future[Any]) -> None:
        if answer.exception() is not None:
            return  # `_gone` knows
        self._stats[i] = new = answer.result()
        if new["busy_s"] > BATCH_STUCK_S:
            self._note(f"a predictor has had one batch for {human_s(new['busy_s'])}: restarted")
            ray.kill(self.handles[i], no_restart=False)
