"""An actor that holds all models of the job and fills batches across clips, tasks and decoders.

    predict(chunk) ─▶ batcher ─▶ staging thread: collate, upload ─▶ compute thread: models
          ▲                                                              │
          └────────────────── answers of a whole chunk ◀── scatter ──────┘

The event loop takes chunks in and gives answers out; frames are touched by the two threads alone.
A batch goes off when it is full, or when the compute thread has nothing to do and the oldest
frame has waited STRAGGLER_S.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import ray

import vidbatch
from vidbatch.batching import Batcher
from vidbatch.cluster.metric_names import PREDICTOR_STATES
from vidbatch.cluster.metrics import PredictorMeters
from vidbatch.data import Chunk
from vidbatch.errors import ModelError, VidbatchError
from vidbatch.models.registry import ModelDef, create_model
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

if TYPE_CHECKING:
    from vidbatch.models.runner import Answers
    from vidbatch.models.staging import Staged

STRAGGLER_S = 0.004
"""A chunk of the same moment from another decoder arrives within it; decoding one takes longer."""

BEGUN_S = 0.1
"""The word that a suspect is begun must have left this process before the suspect can kill it:
without a pause 6 of 15 were lost, with it none."""

RELOAD_S = 30.0
"""After models could not be loaded again in a restarted process."""

QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""torch's threads wait asleep: spinning ones fight the decoders for the same cores, and 2142 frames
took 27 s where they take 3 (2 cores, 2 decoders, 2 threads)."""

CHIP_LOST = 70
"""Exit status when the accelerator is lost to this process: Ray starts another."""


class Predictor:
    """See the module. Every method but `__init__` runs on an event loop and returns quickly.

    Args:
        batch: the largest of the models' batches; the models come with `ready`.
        device: "cpu" or "cuda" (the GPU that Ray gave this actor).
        threads: of torch on the CPU.
    """

    def __init__(self, batch: int, device: str, threads: int) -> None:
        self._models: tuple[ModelDef, ...] = ()
        self._told = threading.Event()
        self._device = "cuda:0" if device == "cuda" else device
        self._threads = threads
        self._more = threading.Condition()
        self._batcher = Batcher(batch)
        self._runner: Runner | None = None
        self._staged: Staged | None = None
        self._staging = self._computing = self._paused = False
        self._since = 0.0
        """When the oldest frame in the batcher came."""
        self._begun = 0.0
        """When the batch under work began."""
        self._waits_since = 0.0
        """Since when the compute thread has nothing; 0: it has something."""
        self._waiting: dict[int, Callable[[Answers], Any]] = {}
        self._tickets = count()
        self._alone = asyncio.Lock()
        self._error: VidbatchError | None = None
        self._loaded = threading.Event()
        self._seconds = dict.fromkeys(PREDICTOR_STATES, 0.0)
        self._frames = self._batches = 0
        self._meters = PredictorMeters()
        for work in (self._load, self._stage):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    # calls ------------------------------------------------------------------------------------

    async def ready(self, packed: bytes | None = None) -> dict[str, Any]:
        """Waits for the models, which the driver tells; `error` is why they cannot be had."""
        if packed is not None and not self._told.is_set():
            self._models = pickle.loads(packed).models
            self._told.set()
        while not self._loaded.is_set() and self._error is None:
            await asyncio.sleep(0.02)
        return {
            "error": self._error,
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "version": vidbatch.__version__,
        }

    async def predict(self, chunk: Chunk, models: tuple[str, ...]) -> bytes:
        """Pickled `Answers` for a chunk: in one piece, so that none of it stays in the store."""
        return pickle.dumps(await self._answers(chunk, models), protocol=5)

    async def predict_alone(
        self, chunk: Chunk, models: tuple[str, ...]
    ) -> AsyncIterator[bytes | None]:
        """A chunk that was here when a predictor died: nothing else runs beside it.

        Yields None when it begins, then as `predict`: so that a second death is its own.
        """
        async with self._alone:
            await asyncio.to_thread(self._pause)
            try:
                yield None
                await asyncio.sleep(BEGUN_S)
                piece = Piece(
                    ticket=0, chunk=chunk, lo=0, hi=chunk.num_rows, models=frozenset(models)
                )
                (answers,) = await asyncio.to_thread(self._run, [piece])
            finally:
                self._resume()
            yield pickle.dumps(answers, protocol=5)

    async def stay(self) -> None:
        """Never returns: the call ends when the process does."""
        while True:
            await asyncio.sleep(3600)

    async def stats(self) -> dict[str, Any]:
        """Seconds by state, counts, and for how long the batch under work has been."""
        runner = self._runner
        seconds = dict(self._seconds)
        if (since := self._waits_since) and not self._staging:
            seconds["starved"] += time.monotonic() - since
        self._meters.show(seconds)
        return {
            "seconds": seconds,
            "frames": self._frames,
            "batches": self._batches,
            "halved": runner.halved if runner else 0,
            "busy_s": time.monotonic() - self._begun if self._computing else 0.0,
            "pid": os.getpid(),
        }

    async def _answers(self, chunk: Chunk, models: tuple[str, ...]) -> Answers:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answers] = loop.create_future()
        ticket = next(self._tickets)

        def give(found: Answers) -> None:
            loop.call_soon_threadsafe(answered.set_result, found)

        self._waiting[ticket] = give
        with self._more:
            if not len(self._batcher):
                self._since = time.monotonic()
            self._batcher.add(ticket, chunk, frozenset(models))
            self._more.notify_all()
        return await answered

    # the two threads --------------------------------------------------------------------------

    def _load(self) -> None:
        """Loads the models, then computes for ever; tries again if they cannot be had."""
        for name, value in QUIET_THREADS.items():
            os.environ.setdefault(name, value)  # read when torch is first imported
        import torch

        torch.set_num_threads(self._threads)
        self._told.wait()
        started = time.monotonic()
        while self._runner is None:
            try:
                runner = Runner([create_model(m) for m in self._models], self._device)
                runner.load()
                self._runner, self._error = runner, None
            except VidbatchError as error:
                self._error = error
            except Exception as error:  # whatever a runtime raises while it reads weights
                text = " ".join(str(error).split())
                self._error = ModelError(
                    f"models cannot be loaded on {self._device}: {type(error).__name__}: {text}; "
                    "nothing can be predicted; `vidbatch models bench` runs a model alone",
                    kind="model_load",
                )
            if self._error is not None:
                time.sleep(RELOAD_S)
        self._seconds["loading"] = time.monotonic() - started
        self._loaded.set()
        with self._more:
            self._more.notify_all()
        while True:
            self._compute_one()

    def _stage(self) -> None:
        """Takes pieces when a batch is full or nothing else is to be done, and stages them."""
        self._loaded.wait()
        while True:
            with self._more:
                while not self._due():
                    soon = self._idle() and len(self._batcher) and not self._paused
                    self._more.wait(STRAGGLER_S if soon else None)
                pieces = self._batcher.take()
                self._since = time.monotonic()
                self._staging = True
            try:
                staged = self._runner_of().stage(pieces)
            except Exception as error:
                self._scatter(pieces, self._refused(pieces, error))
                staged = None
            with self._more:
                while self._staged is not None:
                    self._more.wait()
                self._staged, self._staging = staged, False
                self._more.notify_all()

    def _due(self) -> bool:
        if self._paused or not len(self._batcher):
            return False
        if len(self._batcher) >= self._batcher.batch:
            return True
        return self._idle() and time.monotonic() - self._since >= STRAGGLER_S

    def _idle(self) -> bool:
        return not self._computing and self._staged is None

    def _compute_one(self) -> None:
        before, copied = time.monotonic(), self._copied()
        self._waits_since = before
        with self._more:
            while self._staged is None:
                self._more.wait()
            staged, self._staged = self._staged, None
            self._computing, self._begun = True, time.monotonic()
            self._more.notify_all()
        self._waits_since = 0.0
        self._charge_wait(self._begun - before, copied)
        rows = sum(len(p) for p in staged.pieces)
        self._scatter(staged.pieces, self._run_staged(staged))
        with self._more:
            self._seconds["compute"] += time.monotonic() - self._begun
            self._computing = False
            self._frames += rows
            self._batches += 1
            queued = len(self._batcher)
            self._more.notify_all()
        fill = rows / self._batcher.batch
        self._meters.count(frames=rows, fill=fill, queued=queued)

    def _run(self, pieces: list[Piece]) -> list[Answers]:
        try:
            staged = self._runner_of().stage(pieces)
        except Exception as error:
            return self._refused(pieces, error)
        return self._run_staged(staged)

    def _run_staged(self, staged: Staged) -> list[Answers]:
        import torch

        try:
            return self._runner_of().compute(staged)
        except torch.AcceleratorError:
            os._exit(CHIP_LOST)  # nothing else in this process can use it either
        except Exception as error:
            return self._refused(staged.pieces, error)

    def _refused(self, pieces: Any, error: Exception) -> list[Answers]:
        """A fault of ours costs the frames it met, never the thread that serves everybody."""
        text = " ".join(str(error).split())[:300]
        why = ModelError(
            f"the predictor raised {type(error).__name__}: {text}; the rows of these frames are "
            "left out; please report it",
            kind="predictor_raised",
        )
        every = [m.spec.name for m in self._models]
        return [dict.fromkeys(p.models or every, why) for p in pieces]

    def _scatter(self, pieces: Any, answers: list[Answers]) -> None:
        with self._more:
            complete = self._batcher.scatter(pieces, answers)
        for ticket, found in complete:
            assert isinstance(ticket, int)
            self._waiting.pop(ticket)(found)

    def _pause(self) -> None:
        """Returns when both threads hold nothing; they take nothing until resumed."""
        self._loaded.wait()
        with self._more:
            self._paused = True
            while self._computing or self._staging or self._staged is not None:
                self._more.wait()

    def _resume(self) -> None:
        with self._more:
            self._paused = False
            self._more.notify_all()

    # seconds ----------------------------------------------------------------------------------

    def _runner_of(self) -> Runner:
        assert self._runner is not None, "load first"
        return self._runner

    def _copied(self) -> dict[str, float]:
        return {s: self._runner_of().seconds[s] for s in ("collating", "uploading")}

    def _charge_wait(self, waited_s: float, before: dict[str, float]) -> None:
        """What the compute thread waited for: frames being copied, or no frames at all."""
        for state, now in self._copied().items():
            share = min(waited_s, now - before[state])
            self._seconds[state] += share
            waited_s -= share
        self._seconds["starved"] += max(0.0, waited_s)
