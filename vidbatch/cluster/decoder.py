"""An actor that owns a task from its first byte to its commits: a shell around `process_task`.

Three groups of one thread each: the default one works, `probe` reads headers with a process of its
own, `control` answers `progress` while the others work. `progress` is a long poll: the driver asks
again as soon as it is answered, so it knows what a worker was doing when it died.

An order that comes back after a death is worked *carefully*: each clip waits until the driver has
heard of it, so that the next death is charged to the right one (two round trips a clip).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

import vidbatch
from vidbatch.cluster.client import PredictorPool
from vidbatch.cluster.metrics import Meters
from vidbatch.data import (
    Audio,
    AudioEnd,
    AudioGrid,
    ByteSource,
    Clip,
    DecodeEvent,
    DecodeLimits,
    Geometry,
    Sample,
    Video,
)
from vidbatch.errors import InfraError
from vidbatch.ledger import Ledger
from vidbatch.pipeline.engine import Probed, make_decoder, probe_video
from vidbatch.pipeline.order import ClipDecoder, RunSpec, TaskReport, WorkOrder
from vidbatch.pipeline.reading import Sources
from vidbatch.pipeline.task import process_task
from vidbatch.progress import StageClock
from vidbatch.storage import open_store

ACK_S = 30.0
"""A careful clip begins anyway when the driver has not answered for so long: it has no time now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a decoder was doing at one moment."""

    seq: int
    task_id: str = ""
    clip: int = -1
    """Position of the clip being read or decoded; -1 before the first."""
    stage: str = ""
    moved: int = 0
    """Grows with every byte read, event decoded and chunk answered."""
    waiting: bool = False
    """For a predictor."""
    child_restarts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By state (`metric_names.DECODER_STATES`), since the actor is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An exception of ours that nobody had foreseen ended a task."""

    clip: int
    """Position of the clip under work; -1 where none was."""
    message: str


TaskEnd = TaskReport | InfraError | Fault | None
"""How a task ended; None: it was dropped because the run is being stopped."""


class DroppedError(Exception):
    """The run is being stopped and nothing of this task has been put yet."""


class Pulse:
    """Where the worker thread is, for `progress`; the `Watch` of its tasks."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._changed = threading.Condition()
        self._beat = Beat(seq=0)
        self._acknowledged = 0
        self._careful = self._dropping = False

    def begin(self, order: WorkOrder, *, careful: bool) -> None:
        """A task comes under work. Raises DroppedError."""
        with self._changed:
            self._careful = careful
            self._set(task_id=order.task.task_id, clip=-1, stage="begin")

    def end(self) -> None:
        """The task has ended, one way or another."""
        with self._changed:
            self._careful = False
            self._set(task_id="", clip=-1, stage="")

    def at(self, task_id: str, clip: int, stage: str) -> None:
        """See `order.Watch`. What predictors are asked about lies behind the clip under work."""
        with self._changed:
            if stage == "predict":
                return
            known = self._beat.clip == clip
            self._set(task_id=task_id, clip=clip, stage=stage)
            if self._careful and not known:
                seq = self._beat.seq
                self._changed.wait_for(lambda: self._acknowledged >= seq, ACK_S)

    def now(
        self, seen: int, drop: bool, moved: int, waiting: bool, child_restarts: int, wait: bool
    ) -> Beat:
        """The beat; waits for a period, or in a careful task for one that differs from `seen`."""
        with self._changed:
            self._acknowledged = max(self._acknowledged, seen)
            self._dropping = self._dropping or drop
            self._changed.notify_all()
            if wait:
                self._changed.wait_for(
                    lambda: self._careful and self._beat.seq != seen, self._period_s
                )
            return replace(self._beat, moved=moved, waiting=waiting, child_restarts=child_restarts)

    def _set(self, *, task_id: str, clip: int, stage: str) -> None:
        if self._dropping and stage and self._beat.stage != "commit":
            raise DroppedError
        self._beat = Beat(seq=self._beat.seq + 1, task_id=task_id, clip=clip, stage=stage)
        self._changed.notify_all()


class Counted:
    """A `ClipDecoder` whose progress can be seen from another thread."""

    def __init__(self, inner: ClipDecoder) -> None:
        self._inner = inner
        self._events = 0
        self._source: Any = None

    @property
    def moved(self) -> int:
        """Bytes read of the object at hand, and events of all."""
        return self._events + int(getattr(self._source, "bytes_read", 0))

    def decode(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        sample: Sample,
        geometries: Sequence[Geometry],
        context: bool,
        limits: DecodeLimits,
        halo: int = 0,
        following: Clip | None = None,
    ) -> Iterator[DecodeEvent]:
        """See `ClipDecoder.decode`."""
        self._source = source
        for event in self._inner.decode(
            source,
            clip,
            sample=sample,
            geometries=geometries,
            context=context,
            limits=limits,
            halo=halo,
            following=following,
        ):
            self._events += 1
            yield event

    def audio(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        grids: Sequence[AudioGrid],
        start_s: float,
        limits: DecodeLimits,
    ) -> Iterator[Audio | AudioEnd]:
        """See `ClipDecoder.audio`."""
        self._source = source
        for event in self._inner.audio(source, clip, grids=grids, start_s=start_s, limits=limits):
            self._events += 1
            yield event


class Decoder:
    """See the module.

    Args:
        spec: of the run; its models are not needed here and are left out.
        length_s: the clip length of `probe`.
        predictors: handles of the predictor actors.
        period_s: between two answers of `progress`.
        pool: keyword arguments of `PredictorPool`.
    """

    def __init__(
        self,
        spec: RunSpec,
        length_s: float,
        predictors: Sequence[Any],
        period_s: float,
        pool: dict[str, Any],
    ) -> None:
        self._spec, self._length_s = spec, length_s
        self._store = open_store(spec.archive_uris[0], spec.archive_store)
        self._sources = Sources(self._store)
        self._ledger = Ledger(open_store(spec.output_uri, spec.output_store))
        self._inner = make_decoder(spec)
        self._decoder = Counted(self.fit(self._inner))
        self._prober = None if spec.isolate else self._inner
        self._pulse = Pulse(period_s)
        self._is_waiting = False
        self._predictor = PredictorPool(predictors, waiting=self._wait, **pool)
        self._meters = Meters("decoder")
        self._up_at = time.perf_counter()
        self._hours: tuple[Counter[str], StageClock] = (Counter(), StageClock())
        """Seconds by state of the tasks that have ended, and those of the task under work."""

    def fit(self, decoder: ClipDecoder) -> ClipDecoder:
        """The decoder that tasks use; a fault-injecting subclass wraps it."""
        return decoder

    def ready(self) -> dict[str, Any]:
        """Node, pid and version, once the actor is up."""
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "version": vidbatch.__version__,
        }

    def run_task(self, order: WorkOrder, careful: bool) -> TaskEnd:
        """Takes a task to its commits. Group: default."""
        try:
            self._pulse.begin(order, careful=careful)
            report = process_task(
                order,
                self._spec,
                ledger=self._ledger,
                decoder=self._decoder,
                predictor=self._predictor,
                watch=self._pulse,
                clock=self._hours[1],
                sources=self._sources,
            )
        except DroppedError:
            return None
        except InfraError as error:
            return error
        except Exception as error:
            text = " ".join(str(error).split())
            message = f"{type(error).__name__}: {text} ({_place(error)})"
            beat = self.progress(0, wait=False)
            return Fault(clip=-1 if beat.stage == "commit" else beat.clip, message=message)
        finally:
            self._predictor.forget()
            self._pulse.end()
            past, clock = self._hours
            self._hours = (past + Counter(clock.seconds), StageClock())
        return report

    def prepare(self, clip: Clip) -> None:
        """Fetches the first bytes of a clip whose task is queued. Group: control."""
        self._sources.prepare(clip)

    def probe(self, video: Video) -> Probed:
        """Reads the headers of a video. Group: probe."""
        if self._prober is None:
            self._prober = make_decoder(self._spec)
        return probe_video(self._store, video, self._prober, self._spec.limits, self._length_s)

    def progress(self, seen: int, drop: bool = False, wait: bool = True) -> Beat:
        """The beat, after a while (see `Pulse.now`). Group: control.

        Args:
            seen: seq of the newest beat the driver has.
            drop: the run is being stopped: from now on only commits that have begun go on.
        """
        beat = self._pulse.now(
            seen,
            drop,
            self._decoder.moved + self._predictor.answered,
            self._is_waiting,
            self._inner.restarts,
            wait and not drop,
        )
        past, clock = self._hours
        seconds: dict[str, float] = dict(past + Counter(clock.so_far()))
        whole_s = time.perf_counter() - self._up_at
        seconds["idle"] = max(0.0, whole_s - sum(seconds.values()))
        if wait:  # this thread alone tells
            self._meters.add_states("vidbatch_decoder_seconds_total", seconds)
        return replace(beat, seconds=seconds)

    def _wait(self, on: bool) -> None:
        self._is_waiting = on


def _place(error: Exception) -> str:
    """File and line where an exception came from."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None:
        return "nowhere"
    return f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
