"""One task from its first byte to its commits: read, decode, predict, rows, part files, record.

Knows nothing of Ray: decoding and predicting come in as objects with two methods each. A clip
that fails is an outcome, never an exception; only what stops the whole task (the output's store,
a bug) is raised.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from vidbatch.data import (
    FRAMES,
    Clip,
    ClipEnd,
    DecodeEvent,
    Failure,
    Frames,
    ModelSpec,
    Outcome,
    Output,
    Predictions,
    VideoInfo,
)
from vidbatch.errors import (
    DecoderDied,
    MediaError,
    ModelError,
    NotFoundInStore,
    SourceChanged,
    StoreError,
    VidbatchError,
)
from vidbatch.ledger import Ledger
from vidbatch.pipeline.order import (
    ClipDecoder,
    NoWatch,
    Predictor,
    RunSpec,
    TaskReport,
    Watch,
    WorkOrder,
)
from vidbatch.progress import Counts, StageClock
from vidbatch.storage import open_source, open_store
from vidbatch.tables import OutputRows, redact

MAX_PENDING = 8
"""Chunks of one task whose predictions are out; a predictor with credits may hold fewer."""


def to_failure(error: VidbatchError, stage: str) -> Failure:
    """An exception as the facts of a `failures` row."""
    advice = error.advice
    if not advice and error.retryable:
        advice = "comes back by itself on the next runs; `vidbatch retry` brings it back at once"
    return Failure(
        stage=stage,
        kind=error.kind,
        message=redact(error.message),
        advice=advice or "rests until the object changes",
        retryable=error.retryable,
    )


@dataclass(slots=True)
class _ClipState:
    """What is known of one clip while its task runs."""

    clip: Clip
    end: ClipEnd | None = None
    failure: Failure | None = None
    model_failures: dict[str, Failure] = field(default_factory=dict)
    frames: int = 0
    attempts: int = 1


class TaskWork:
    """The clips of one work order going through decode and predict into rows.

    Args:
        decoder, predictor, watch: see the protocols above.
        ledger: of the output; parts and records go there.
    """

    def __init__(
        self,
        order: WorkOrder,
        spec: RunSpec,
        *,
        ledger: Ledger,
        decoder: ClipDecoder,
        predictor: Predictor,
        watch: Watch | None = None,
    ) -> None:
        self.order, self.spec, self.ledger = order, spec, ledger
        self.decoder, self.predictor, self.watch = decoder, predictor, watch or NoWatch()
        self.task = order.task
        self.task_id = order.task.task_id
        self.outputs = [spec.output(fp) for fp in order.outputs]
        specs: list[ModelSpec] = [o.spec for o in self.outputs if o.spec is not None]
        self.models = tuple(s.name for s in specs)
        self.geometries = tuple({s.geometry.key: s.geometry for s in specs}.values())
        self.context = any(s.context for s in specs)
        self.rows = {o.fingerprint: OutputRows(o, self.task) for o in self.outputs}
        self.states = [_ClipState(clip=c) for c in self.task.clips]
        self.infos: dict[str, VideoInfo | None] = {}
        self.pending: deque[tuple[int, Frames, Any]] = deque()
        self.clock = StageClock()
        self.bytes_read = 0
        self.gets = 0
        self.store = open_store(spec.archive_uris[0], spec.archive_store)

    def run(self) -> TaskReport:
        """Processes every clip, commits every output. Raises InfraError for the output's store."""
        suspects = self.order.deaths
        for i in sorted(range(len(self.states)), key=lambda i: suspects.get(i, 0)):
            state = self.states[i]
            state.attempts = suspects.get(i, 0) + 1
            if state.attempts > self.spec.attempts:
                state.attempts -= 1
                self._fail(i, _given_up(state))
                continue
            self._clip(i)
        while self.pending:
            self._collect()
        return self._commit()

    # one clip ---------------------------------------------------------------------------------

    def _clip(self, i: int) -> None:
        """Decodes one clip, again if its decoder died, up to the attempts of the run."""
        state = self.states[i]
        while True:
            try:
                self._decode(i)
            except DecoderDied as error:
                self._forget(i)
                if state.attempts >= self.spec.attempts:
                    self._fail(i, to_failure(error, "decode"))
                    return
                state.attempts += 1
                continue
            except MediaError as error:
                self._fail(i, to_failure(error, "decode"))
            except StoreError as error:
                self._fail(i, _read_failure(error))
            return

    def _decode(self, i: int) -> None:
        state = self.states[i]
        video = state.clip.video
        self.watch.at(self.task_id, i, "read")
        with self.clock.stage("read"):
            source = open_source(
                self.store, video.uri, size_bytes=video.size_bytes, version=video.version
            )
        try:
            self.watch.at(self.task_id, i, "decode")
            events = self.decoder.decode(
                source,
                state.clip,
                sample=self.spec.sample,
                geometries=self.geometries,
                context=self.context,
                limits=self.spec.limits,
            )
            with self.clock.stage("decode"):
                for event in events:
                    self._event(i, event)
        finally:
            self.bytes_read += source.bytes_read
            self.gets += source.gets
            source.close()

    def _event(self, i: int, event: DecodeEvent) -> None:
        state = self.states[i]
        if isinstance(event, VideoInfo):
            self.infos[state.clip.video.video_id] = event
        elif isinstance(event, ClipEnd):
            state.end = event
        else:
            state.frames += event.num_rows
            if not self.models:
                self._add(i, event, {})
                return
            with self.clock.stage("predict"):
                ticket = self.predictor.submit(event, self.models)
            self.pending.append((i, replace(event, pixels={}), ticket))
            while len(self.pending) >= MAX_PENDING:
                self._collect()

    def _collect(self) -> None:
        """Takes the oldest chunk's predictions into the rows."""
        i, frames, ticket = self.pending.popleft()
        self.watch.at(self.task_id, i, "predict")
        with self.clock.stage("predict"):
            results = self.predictor.result(ticket)
        self._add(i, frames, results)

    def _add(self, i: int, frames: Frames, results: Mapping[str, Predictions | ModelError]) -> None:
        state = self.states[i]
        if state.failure is not None:
            return  # the clip failed after this chunk left: no row of it may stay
        for output in self.outputs:
            rows = self.rows[output.fingerprint]
            if output.name == FRAMES:
                rows.add(state.clip, frames, None)
                continue
            if output.fingerprint in state.model_failures:
                continue
            try:
                result = results[output.name]
                if isinstance(result, ModelError):
                    raise result
                rows.add(state.clip, frames, result)
            except ModelError as error:  # the model's own, or rows that its spec does not allow
                state.model_failures[output.fingerprint] = to_failure(error, "predict")
                rows.drop(state.clip)

    def _forget(self, i: int) -> None:
        """Removes every trace of an attempt at a clip that is to be decoded again."""
        while self.pending:
            self._collect()
        state = self.states[i]
        for rows in self.rows.values():
            rows.drop(state.clip)
        state.frames, state.end = 0, None
        state.model_failures.clear()

    def _fail(self, i: int, failure: Failure) -> None:
        self._forget(i)
        self.states[i].failure = failure
        self.infos.setdefault(self.states[i].clip.video.video_id, None)

    # the end ----------------------------------------------------------------------------------

    def _commit(self) -> TaskReport:
        outcomes_of: dict[str, list[Outcome]] = {}
        committed: dict[str, str] = {}
        bytes_written = puts = 0
        now = datetime.now(UTC)
        for output in self.outputs:
            self.watch.at(self.task_id, len(self.states) - 1, "commit")
            outcomes = [self._outcome(s, output) for s in self.states]
            with self.clock.stage("encode"):
                tables = self.rows[output.fingerprint].finish(
                    outcomes, infos=self.infos, run=self.spec.run, now=now
                )
            with self.clock.stage("commit"):
                result = self.ledger.commit(
                    self.task,
                    output,
                    tables,
                    outcomes,
                    sampling_partition=self.spec.sampling_partition,
                    run=self.spec.run,
                    attempt=self.order.attempt,
                    versions=self.spec.versions,
                )
            committed[output.partition] = result.status
            outcomes_of[output.name] = list(result.outcomes)
            if result.status == "new":
                bytes_written += sum(f.size_bytes for f in result.files)
                puts += len(result.files) + 1
        return TaskReport(
            task_id=self.task_id,
            counts=self._counts(outcomes_of, bytes_written, puts),
            committed=committed,
            failures=tuple(
                (o.clip.video.uri, name, o.kind or "", o.reason or "")
                for name, outcomes in outcomes_of.items()
                for o in outcomes
                if o.status != "ok"
            )[:20],
            device=self.predictor.device,
        )

    def _outcome(self, state: _ClipState, output: Output) -> Outcome:
        clip, end = state.clip, state.end
        failure = state.failure or state.model_failures.get(output.fingerprint)
        device = "cpu" if output.spec is None else self.predictor.device
        if end is None:
            info = self.infos.get(clip.video.video_id)
            known_end = info.duration_s if info and info.duration_s else clip.start_s
            end_s = clip.end_s if clip.end_s is not None else max(known_end, clip.start_s)
            end_frame = clip.end_frame if clip.end_frame is not None else clip.start_frame
            end = ClipEnd(
                status="ok", reason=None, kind=None, start_s=clip.start_s, end_s=end_s,
                start_frame=clip.start_frame, end_frame=end_frame, frames_decoded=0,
                decode_errors=0, corrupt_frames=0, fallback=None,
            )  # fmt: skip
        facts: dict[str, Any] = {
            "clip": clip, "start_s": end.start_s, "end_s": end.end_s,
            "start_frame": end.start_frame, "end_frame": end.end_frame,
            "frames_decoded": end.frames_decoded, "decode_errors": end.decode_errors,
            "corrupt_frames": end.corrupt_frames, "fallback": end.fallback,
            "device": device, "attempts": state.attempts,
        }  # fmt: skip
        if failure is not None:
            return Outcome(
                status="failed", frames=0, reason=failure.message, stage=failure.stage,
                kind=failure.kind, advice=failure.advice, retryable=failure.retryable, **facts,
            )  # fmt: skip
        if end.status == "partial":
            return Outcome(
                status="partial", frames=state.frames, reason=redact(end.reason or ""),
                stage="decode", kind=end.kind,
                advice="its good frames are kept; final until the object changes", **facts,
            )  # fmt: skip
        return Outcome(status="ok", frames=state.frames, **facts)

    def _counts(
        self, outcomes_of: Mapping[str, Sequence[Outcome]], bytes_written: int, puts: int
    ) -> Counts:
        every = [o for outcomes in outcomes_of.values() for o in outcomes]
        first = next(iter(outcomes_of.values()))
        return Counts(
            tasks=1,
            clips=len(self.states),
            videos=sum(s.clip.first_keyframe == 0 for s in self.states),
            frames=sum(s.frames for s in self.states if s.failure is None),
            frames_decoded=sum(o.frames_decoded for o in first),
            video_s=sum(o.end_s - o.start_s for o in first if o.status != "failed"),
            bytes_read=self.bytes_read,
            gets=self.gets,
            bytes_written=bytes_written,
            puts=puts,
            ok=sum(o.status == "ok" for o in every),
            partial=sum(o.status == "partial" for o in every),
            failed=sum(o.status == "failed" for o in every),
            failed_outside=sum(o.status == "failed" and o.retryable for o in every),
            fallbacks=sum(o.fallback is not None for o in first),
            stage_s=dict(self.clock.seconds),
        )


def process_task(
    order: WorkOrder,
    spec: RunSpec,
    *,
    ledger: Ledger,
    decoder: ClipDecoder,
    predictor: Predictor,
    watch: Watch | None = None,
) -> TaskReport:
    """Takes one task from its first byte to its commits.

    Raises:
        InfraError: the output's store failed for good: nothing of what was not committed counts,
            and the same task may run again anywhere.
    """
    started = time.perf_counter()
    work = TaskWork(order, spec, ledger=ledger, decoder=decoder, predictor=predictor, watch=watch)
    report = work.run()
    seconds = {**report.counts.stage_s, "task": time.perf_counter() - started}
    return replace(report, counts=replace(report.counts, stage_s=seconds))


def _given_up(state: _ClipState) -> Failure:
    return Failure(
        stage="decode",
        kind="worker_died",
        message=(
            f"{state.attempts} workers died while this clip was under work; it was left out and "
            "the rest of its task committed"
        ),
        advice="look at the video in isolation; `vidbatch retry --kind worker_died` tries again",
        retryable=True,
    )


def _read_failure(error: StoreError) -> Failure:
    failure = to_failure(error, "read")
    if isinstance(error, SourceChanged):
        return replace(
            failure, kind="source_changed", advice="the next run plans the new version by itself"
        )
    if isinstance(error, NotFoundInStore):
        return replace(failure, kind="not_found", advice="the object was removed after the listing")
    return failure
