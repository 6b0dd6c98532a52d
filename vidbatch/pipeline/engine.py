"""What carries work orders out: the `Engine` protocol, and the engine of one process.

The conductor (`run.py`) hands an engine a `Supply` of orders and receives reports. The engine on
Ray is `cluster.driver.RayEngine`; both leave equal tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vidbatch.batching import predict_chunk
from vidbatch.data import Chunk, ClipRange, DecodeLimits, Failure, Model, Predictions, Video
from vidbatch.errors import ModelError, VidbatchError
from vidbatch.ledger import Ledger
from vidbatch.models.registry import create_model
from vidbatch.models.runner import use_threads
from vidbatch.pipeline.failures import to_failure
from vidbatch.pipeline.order import NoWatch, RunSpec, TaskReport, WorkOrder
from vidbatch.pipeline.reading import Sources
from vidbatch.pipeline.task import process_task
from vidbatch.sandbox import InProcess, Sandbox
from vidbatch.storage import Store, open_source, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What probing one large video gave: the ranges it may be cut into, or why it could not."""

    video: Video
    ranges: tuple[ClipRange, ...] = ()
    """Empty: plan it as one whole clip."""
    duration_s: float | None = None
    failure: Failure | None = None


class Supply(Protocol):
    """Work orders as they become known."""

    def take(self) -> WorkOrder | None:
        """The next order, or None if there is none right now (see `finished`)."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no order will come any more."""
        ...


class Engine(Protocol):
    """Carries out orders; every order taken ends in one report unless the engine is halted."""

    def start(self) -> str:
        """Brings up whatever is needed; returns a line that says what it is (devices, pools).

        Raises:
            ClusterError: it cannot be had.
        """
        ...

    @property
    def width(self) -> int:
        """Orders that can be under work at once."""
        ...

    def probe(self, videos: Sequence[Video]) -> list[Probed]:
        """Reads the headers of some videos, in parallel if it can; never raises for one."""
        ...

    def run(self, supply: Supply) -> Iterator[TaskReport]:
        """Takes orders while there is room and yields reports as tasks end.

        Raises:
            InfraError: the output's store or the cluster failed for good.
        """
        ...

    def halt(self) -> None:
        """Take no further order; orders under work may be finished or dropped (`run` then ends)."""
        ...

    def stop(self) -> Mapping[str, Any]:
        """Takes everything down; returns facts for the summary (restarts, idle attribution)."""
        ...


def probe_video(
    store: Store, video: Video, decoder: Sandbox | InProcess, limits: DecodeLimits, length_s: float
) -> Probed:
    """Probes one video and cuts it at keyframes where its packet table allows."""
    source = open_source(store, video.uri, size_bytes=video.size_bytes, version=video.version)
    try:
        info, ranges = decoder.probe(source, limits=limits, length_s=length_s, uri=video.uri)
        return Probed(video=video, ranges=tuple(ranges), duration_s=info.duration_s)
    except VidbatchError as error:
        return Probed(video=video, failure=to_failure(error, "probe"))
    finally:
        source.close()


def make_decoder(spec: RunSpec) -> Sandbox | InProcess:
    """The decoder a worker of this run uses: isolated unless the job file says otherwise."""
    return Sandbox() if spec.isolate else InProcess()


class LocalPredictor:
    """Runs the models in this process, one chunk at a time: the sequential truth."""

    def __init__(self, spec: RunSpec, device: str = "cpu") -> None:
        self.device = device
        self._models: dict[str, Model] = {}
        if spec.models:
            use_threads(1)  # a spinning second one costs more than it gives beside the decoder
        for definition in spec.models:
            model = create_model(definition)
            model.load(device)
            self._models[model.spec.name] = model

    def submit(
        self, chunk: Chunk, models: tuple[str, ...]
    ) -> Mapping[str, Predictions | ModelError]:
        """Predicts at once."""
        return predict_chunk({n: self._models[n] for n in models}, chunk, self.device)

    def result(self, ticket: Any) -> Mapping[str, Predictions | ModelError]:
        """What `submit` found."""
        found: Mapping[str, Predictions | ModelError] = ticket
        return found

    def close(self) -> None:
        """Frees the models."""
        for model in self._models.values():
            model.close()


class LocalEngine:
    """Everything in this process, one task after the other (`engine.address: none`)."""

    width = 1

    def __init__(self, spec: RunSpec, *, length_s: float) -> None:
        self._spec, self._length_s = spec, length_s
        self._decoder: Sandbox | InProcess | None = None
        self._predictor: LocalPredictor | None = None
        self._halted = False

    def start(self) -> str:
        """Loads the models and warms the decoder."""
        self._decoder = make_decoder(self._spec)
        self._predictor = LocalPredictor(self._spec)
        self._ledger = Ledger(open_store(self._spec.output_uri, self._spec.output_store))
        self._store = open_store(self._spec.archive_uris[0], self._spec.archive_store)
        self._sources = Sources(self._store)
        return "one process without Ray, device cpu"

    def probe(self, videos: Sequence[Video]) -> list[Probed]:
        """One after the other."""
        assert self._decoder is not None, "start() first"
        return [
            probe_video(self._store, v, self._decoder, self._spec.limits, self._length_s)
            for v in videos
        ]

    def run(self, supply: Supply) -> Iterator[TaskReport]:
        """One task after the other."""
        assert self._decoder is not None and self._predictor is not None, "start() first"
        while not self._halted and (order := supply.take()) is not None:
            yield process_task(
                order,
                self._spec,
                ledger=self._ledger,
                decoder=self._decoder,
                predictor=self._predictor,
                watch=NoWatch(),
                sources=self._sources,
            )

    def halt(self) -> None:
        """The task under work is finished, no other is begun."""
        self._halted = True

    def stop(self) -> Mapping[str, Any]:
        """Ends the decoder's child and frees the models."""
        facts = {"decoder_restarts": getattr(self._decoder, "restarts", 0)}
        if self._decoder is not None:
            self._decoder.close()
            self._sources.close()
        if self._predictor is not None:
            self._predictor.close()
        return facts
