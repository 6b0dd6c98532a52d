"""What a task needs and what it leaves: run spec, work order, report, protocols of its parts.

All of it is picklable and free of torch, Ray and secrets, so that it travels to any worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vidbatch.data import (
    Audio,
    AudioEnd,
    AudioGrid,
    ByteSource,
    Chunk,
    Clip,
    DecodeEvent,
    DecodeLimits,
    Geometry,
    Ints,
    Output,
    Predictions,
    Sample,
    Task,
)
from vidbatch.errors import ModelError
from vidbatch.ledger import PlanLog
from vidbatch.progress import Counts
from vidbatch.storage import StoreSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that a worker must know of a run: picklable, and free of torch, Ray and secrets."""

    run: str
    sample: Sample
    sampling: str
    """Fingerprint of the sampling rule, 64 hex digits."""
    sampling_partition: str
    """The value of `sample=`."""
    outputs: tuple[Output, ...]
    """`frames` first, then the models in the order of the job file."""
    models: tuple[Any, ...]
    """registry.ModelDef per model, in the same order."""
    archive_uris: tuple[str, ...]
    archive_store: StoreSettings
    output_uri: str
    output_store: StoreSettings
    limits: DecodeLimits
    attempts: int
    isolate: bool
    versions: Mapping[str, str]

    def output(self, fingerprint: str) -> Output:
        """The output of that fingerprint."""
        return next(o for o in self.outputs if o.fingerprint == fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """A task, the outputs of it that are to be made, and what happened to it before."""

    task: Task
    outputs: tuple[str, ...]
    """Fingerprints."""
    deaths: Mapping[int, int] = field(default_factory=dict)
    """Clip position → workers that died at it in this run."""
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Some work of the plan log, made into orders one by one."""

    log: PlanLog
    positions: Ints
    """In the log, in the order of work."""
    lacking: Mapping[int, tuple[str, ...]]
    """Position → fingerprints of the outputs that lack the task."""
    every: tuple[str, ...]
    """Fingerprints of all outputs: what tasks lack that are not in `lacking`."""

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[WorkOrder]:
        for position, task in zip(self.positions, self.log.tasks(self.positions), strict=True):
            yield WorkOrder(task=task, outputs=self.lacking.get(int(position), self.every))

    @property
    def cost_s(self) -> float:
        """Planned core seconds."""
        return float(self.log.costs_s[self.positions].sum())


class SlowClip(NamedTuple):
    """What reading and decoding one clip took."""

    uri: str
    start_s: float
    seconds: float
    bytes_read: int
    gets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """What a task amounted to; small enough to send a million of them to the driver."""

    task_id: str
    counts: Counts
    committed: Mapping[str, str]
    """Output partition → new, adopted or exists."""
    failures: tuple[tuple[str, str, str, str], ...]
    """Up to 20 of (uri, output name, kind, message)."""
    kinds: Mapping[str, int]
    """Kind → clips × outputs that failed or are partial."""
    device: str
    slowest: tuple[SlowClip, ...] = ()
    """Up to 3 clips, the slowest first."""
    silent: Mapping[str, str] = field(default_factory=dict)
    """Model that failed on every clip it was asked about → why it failed on the last one."""
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Why clips were decoded in order, without the numbers → clips."""


class ClipDecoder(Protocol):
    """Decodes in this process or in a child: `sandbox.InProcess`, `sandbox.Sandbox`."""

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
        """See decode.decode_clip; raises DecoderDied as well."""
        ...

    def audio(
        self,
        source: ByteSource,
        clip: Clip,
        *,
        grids: Sequence[AudioGrid],
        start_s: float,
        limits: DecodeLimits,
    ) -> Iterator[Audio | AudioEnd]:
        """See audio.decode_audio; raises DecoderDied as well."""
        ...


class Predictor(Protocol):
    """Runs models on chunks: in this process, or an actor pool behind `cluster.predictor`."""

    device: str

    def submit(self, chunk: Chunk, models: tuple[str, ...]) -> Any:
        """Takes a chunk for models of its kind, with one on crops also that it is on; waits while
        too many bytes are under way."""
        ...

    def result(self, ticket: Any) -> Mapping[str, Predictions | ModelError]:
        """Model name → predictions for the chunk's rows, or how that model failed."""
        ...


class Watch(Protocol):
    """Is told what a task is doing, for progress calls and the watchdog."""

    def at(self, task_id: str, clip: int, stage: str) -> None:
        """Work on that clip position begins this stage."""
        ...


class NoWatch:
    """Nobody looks."""

    def at(self, task_id: str, clip: int, stage: str) -> None:
        """Does nothing."""
