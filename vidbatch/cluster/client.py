"""A decoder's way to the predictors: chunks through the object store, within byte credits.

    submit ─▶ room? ─▶ ray.put ─▶ predict(chunk) at a predictor ─▶ result
               │ no: wait for the oldest           ✗ it died: the chunk is a suspect and goes
               └──────────────────────               alone to the next predictor that is up

A chunk that was at two predictors when they died, with nothing else beside it, is given up: it is
the cause, or as good as. Others that happened to be there are answered by the next predictor.
"""

from __future__ import annotations

import pickle
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from vidbatch.cluster.faults import DEATHS, one_line
from vidbatch.data import Chunk, Predictions
from vidbatch.errors import ModelError

CHUNK_SHARE = 0.8
"""Of the object store's cap for chunks; the rest is for predictions and what Ray needs itself."""

MAX_DEATHS = 2
"""Predictors that died while they had one chunk and nothing else."""

MAX_SENDS = 20
"""Of one chunk: predictors that die for other reasons must come to an end as well."""

ASK_AGAIN_S = 0.5
"""Between two questions whether a predictor that is being started again is up."""


def credit_bytes(cap_bytes: int, decoders: int, nodes: int, predictor_nodes: int) -> int:
    """Bytes of frames one decoder may have under way, so that no node's object store spills.

    A chunk lies on its decoder's node and, until it is answered, on its predictor's. With D
    decoders on N nodes, predictors on P of them, a node sees the chunks of at most
    max(⌈D / N⌉, ⌈D / P⌉) decoders, and

        credit = CHUNK_SHARE · cap / max(⌈D / N⌉, ⌈D / P⌉)

    A decoder with nothing under way may always send one chunk, whatever its size.

    >>> credit_bytes(2 * 2**30, decoders=8, nodes=1, predictor_nodes=1) // 2**20
    204
    """
    sharing = max(-(-decoders // max(nodes, 1)), -(-decoders // max(predictor_nodes, 1)), 1)
    return int(CHUNK_SHARE * cap_bytes / sharing)


@dataclass(slots=True, eq=False)
class Ticket:
    """A chunk under way."""

    chunk: Any
    """ObjectRef of the Chunk; None once answered, so that the store can let it go."""
    nbytes: int
    models: tuple[str, ...]
    predictor: int = -1
    reply: Any = None
    sends: int = 0
    deaths: int = 0
    answers: Mapping[str, Predictions | ModelError] | None = None


class PredictorPool:
    """The `Predictor` of a decoder actor. For one thread.

    Args:
        predictors: handles of the actors; some may not be up yet.
        credit: bytes of frames under way, see `credit_bytes`.
        wait_s: how long no predictor may be up, and how long one answer may take.
        waiting: told True before a wait for a predictor and False after it.
    """

    def __init__(
        self,
        predictors: Sequence[Any],
        *,
        device: str,
        credit: int,
        wait_s: float,
        seed: int,
        waiting: Callable[[bool], None],
    ) -> None:
        self.device = device
        self.answered = 0
        """Chunks answered so far: the watchdog sees that things move."""
        self._predictors = list(predictors)
        self._credit, self._wait_s, self._waiting = credit, wait_s, waiting
        self._random = random.Random(seed)
        self._asked: dict[Any, int] = {}
        self._nodes: dict[int, str] = {}
        """Predictors that are up → their node."""
        self._out: deque[Ticket] = deque()
        self._out_bytes = 0
        self._load = [0] * len(self._predictors)
        self._here = ray.get_runtime_context().get_node_id()
        for i in range(len(self._predictors)):
            self._ask(i)

    def submit(self, chunk: Chunk, models: tuple[str, ...]) -> Ticket:
        """Sends a chunk, or keeps it till a predictor is up; waits while the credit is used up."""
        n = chunk.nbytes
        while self._out and self._out_bytes + n > self._credit:
            self._settle(self._out[0])
        ticket = Ticket(chunk=ray.put(chunk), nbytes=n, models=models)
        self._out.append(ticket)
        self._out_bytes += n
        for unsent in [t for t in self._out if not t.sends]:
            self._send(unsent, 0.0)  # before a predictor is up, decoding goes on within the credit
        return ticket

    def result(self, ticket: Any) -> Mapping[str, Predictions | ModelError]:
        """The answers for a chunk; a ModelError of kind `predictor_lost` if none could be had."""
        self._settle(ticket)
        answers: Mapping[str, Predictions | ModelError] = ticket.answers
        return answers

    def forget(self) -> None:
        """Lets go of everything under way: its task has ended without asking for it."""
        for ticket in self._out:
            ticket.chunk = ticket.reply = None
        self._out.clear()
        self._out_bytes = 0
        self._load = [0] * len(self._predictors)

    # one chunk --------------------------------------------------------------------------------

    def _settle(self, ticket: Ticket) -> None:
        """Makes sure that a ticket has its answers."""
        if ticket.answers is not None:
            return
        self._waiting(True)
        try:
            if not ticket.sends:
                self._send(ticket, self._wait_s)
            while ticket.answers is None:
                self._receive(ticket)
        finally:
            self._waiting(False)
        ticket.chunk = ticket.reply = None
        self._out.remove(ticket)
        self._out_bytes -= ticket.nbytes
        self.answered += 1

    def _receive(self, ticket: Ticket) -> None:
        """One try to get the answers of a ticket that was sent; sends it again if it is lost."""
        try:
            if ticket.reply is None:
                raise GetTimeoutError("no predictor is up")
            data = ray.get(ticket.reply, timeout=self._wait_s)
            self._load[ticket.predictor] -= ticket.nbytes
            ticket.answers = pickle.loads(data)
        except (*DEATHS, GetTimeoutError) as error:
            self._lost(ticket, error)
            if ticket.answers is None:
                self._send_alone(ticket)
        except RayTaskError as error:
            self._load[ticket.predictor] -= ticket.nbytes
            self._give_up(ticket, one_line(error), kind="predictor_raised")

    def _send(self, ticket: Ticket, wait_s: float) -> None:
        """Sends a ticket, unless no predictor is up within `wait_s`."""
        ticket.predictor = self._choose(wait_s)
        if ticket.predictor < 0:
            return
        ticket.sends += 1
        self._load[ticket.predictor] += ticket.nbytes
        handle = self._predictors[ticket.predictor]
        ticket.reply = handle.predict.remote(ticket.chunk, ticket.models)

    def _send_alone(self, ticket: Ticket) -> None:
        """Sends a suspect and waits for its answers, or for a death that is its own."""
        ticket.predictor = self._choose(self._wait_s)
        if ticket.predictor < 0:
            self._give_up(ticket, f"no predictor was up for {self._wait_s:.0f} s")
            return
        ticket.sends += 1
        self._load[ticket.predictor] += ticket.nbytes
        handle = self._predictors[ticket.predictor]
        replies = handle.predict_alone.options(num_returns="streaming").remote(
            ticket.chunk, ticket.models
        )
        begun = False
        try:
            for _ in range(2):
                ready, _ = ray.wait([replies], timeout=self._wait_s)
                if not ready:
                    raise GetTimeoutError("a predictor gave no answer")
                data = ray.get(next(replies))
                begun = True
            ticket.answers = pickle.loads(data)
            self._load[ticket.predictor] -= ticket.nbytes
        except (*DEATHS, GetTimeoutError) as error:
            ticket.deaths += begun
            self._lost(ticket, error)
        except RayTaskError as error:
            self._load[ticket.predictor] -= ticket.nbytes
            self._give_up(ticket, one_line(error), kind="predictor_raised")

    def _lost(self, ticket: Ticket, error: BaseException) -> None:
        """A predictor is gone, and a chunk with it: give up, or let it be sent again."""
        lost, ticket.reply = ticket.predictor, None
        if lost >= 0:
            self._load[lost] = max(0, self._load[lost] - ticket.nbytes)
            if self._nodes.pop(lost, None) is not None:
                self._ask(lost)
        if ticket.deaths >= MAX_DEATHS:
            self._give_up(
                ticket,
                f"{ticket.deaths} predictors died while they had these frames and no others; "
                f"the last one: {one_line(error)}",
            )
        elif ticket.sends >= MAX_SENDS:
            self._give_up(ticket, f"lost with {ticket.sends} predictors: {one_line(error)}")

    def _give_up(self, ticket: Ticket, what: str, *, kind: str = "predictor_lost") -> None:
        error = ModelError(f"{what}; the rows of these frames are left out", kind=kind)
        ticket.answers = dict.fromkeys(ticket.models, error)

    # which predictor --------------------------------------------------------------------------

    def _ask(self, i: int) -> None:
        handle = self._predictors[i]
        self._asked[handle.ready.options(concurrency_group="control").remote()] = i

    def _hear(self, timeout_s: float) -> None:
        """Takes in which predictors have come up; waits for the first of those asked."""
        if not self._asked:
            return
        ready, _ = ray.wait(list(self._asked), timeout=timeout_s)
        for ref in ready:
            i = self._asked.pop(ref)
            try:
                facts = ray.get(ref)
            except DEATHS:
                facts = {"error": "died"}
            if facts["error"] is None:
                self._nodes[i] = facts["node"]
            else:
                time.sleep(min(timeout_s, ASK_AGAIN_S))
                self._ask(i)

    def _choose(self, wait_s: float) -> int:
        """A predictor that is up: on this node if there is one, else the freer of two; -1: none."""
        if self._asked:
            self._hear(0.0)
        deadline = time.monotonic() + wait_s
        while not self._nodes and (left := deadline - time.monotonic()) > 0:
            self._hear(min(left, ASK_AGAIN_S))
        near = [i for i, node in self._nodes.items() if node == self._here]
        some = near or list(self._nodes)
        if len(some) > 2 and not near:
            some = self._random.sample(some, 2)
        return min(some, key=lambda i: self._load[i], default=-1)
