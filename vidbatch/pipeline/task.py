"""One task from its first byte to its commits: read, decode, predict, rows, part files, record.

Knows nothing of Ray: decoding and predicting come in as objects with two methods each. A clip
that fails is an outcome, never an exception; only what stops the whole task (the output's store,
a bug) is raised.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from vidbatch.data import (
    FRAMES,
    AudioEnd,
    Chunk,
    Clip,
    ClipEnd,
    DecodeEvent,
    Failure,
    Frames,
    Outcome,
    Output,
    Predictions,
    VideoInfo,
)
from vidbatch.errors import (
    DecoderDied,
    MediaError,
    ModelError,
    StoreError,
)
from vidbatch.ledger import Boxes, Ledger
from vidbatch.pipeline.asking import ClipAsker, Demand, without_pixels
from vidbatch.pipeline.clipstate import ClipState
from vidbatch.pipeline.clocked import ClockedSource
from vidbatch.pipeline.failures import given_up, read_failure, to_failure
from vidbatch.pipeline.order import (
    ClipDecoder,
    NoWatch,
    Predictor,
    RunSpec,
    TaskReport,
    Watch,
    WorkOrder,
)
from vidbatch.pipeline.reading import Sources
from vidbatch.pipeline.reporting import task_report
from vidbatch.progress import StageClock
from vidbatch.storage import open_store
from vidbatch.tables import OutputRows

MAX_PENDING = 8
"""Chunks of one task whose predictions are out; a predictor with credits may hold fewer."""


class TaskWork:
    """The clips of one work order going through decode and predict into rows.

    Args:
        decoder, predictor, watch: see the protocols above.
        ledger: of the output; parts and records go there.
        sources: of the worker, which may have prepared the first clip.
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
        clock: StageClock | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.order, self.spec, self.ledger = order, spec, ledger
        self.decoder, self.predictor, self.watch = decoder, predictor, watch or NoWatch()
        self.task = order.task
        self.task_id = order.task.task_id
        self.outputs = [spec.output(fp) for fp in order.outputs]
        self.demand = Demand.of(self.outputs, spec.outputs)
        self.rows = {o.fingerprint: OutputRows(o, self.task) for o in self.outputs}
        self.states = [ClipState(clip=c) for c in self.task.clips]
        self.infos: dict[str, VideoInfo | None] = {}
        self.pending: deque[tuple[int, Chunk, tuple[str, ...], Any]] = deque()
        self.clock = clock or StageClock()
        self.sources = sources or Sources(open_store(spec.archive_uris[0], spec.archive_store))

    def run(self) -> TaskReport:
        """Processes every clip, commits every output. Raises InfraError for the output's store."""
        suspects, turns = self.order.deaths, []
        for i in sorted(range(len(self.states)), key=lambda i: suspects.get(i, 0)):
            self.states[i].attempts = min(suspects.get(i, 0) + 1, self.spec.attempts)
            if suspects.get(i, 0) >= self.spec.attempts:
                self._fail(i, given_up(self.spec.attempts))
            else:
                turns.append(i)
        for i, following in zip(turns, [*turns[1:], None], strict=True):
            self._clip(i, None if following is None else self.states[following].clip)
        while self.pending:
            self._collect()
        return self._commit()

    # one clip ---------------------------------------------------------------------------------

    def _clip(self, i: int, following: Clip | None) -> None:
        """Decodes one clip, again if its decoder died, up to the attempts of the run."""
        failure = self._try(i, lambda: self._decode(i, following), self._forget)
        if failure is not None:
            self._fail(i, failure)
        elif self.demand.sounds:
            failure = self._try(i, lambda: self._hear(i), self._forget_sound)
            if failure is not None:
                self._forget_sound(i)
                self.states[i].model_failures.update(
                    (o.fingerprint, failure) for o in self._of_sound()
                )

    def _try(
        self, i: int, work: Callable[[], None], forget: Callable[[int], None]
    ) -> Failure | None:
        state = self.states[i]
        while True:
            began_s = self._busy_s()
            try:
                work()
            except DecoderDied as error:
                forget(i)
                if state.attempts >= self.spec.attempts:
                    return to_failure(error, "decode")
                state.attempts += 1
                continue
            except MediaError as error:
                return to_failure(error, "decode")
            except StoreError as error:
                return read_failure(error)
            finally:
                n_bytes, gets = self.sources.spent()
                state.bytes_read += n_bytes
                state.gets += gets
                state.seconds += self._busy_s() - began_s
            return None

    def _decode(self, i: int, following: Clip | None) -> None:
        state, asker = self.states[i], ClipAsker(self.demand)
        self.watch.at(self.task_id, i, "read")
        with self.clock.stage("read"):
            source = self.sources.take(state.clip)
        self.watch.at(self.task_id, i, "decode")
        same = following is not None and following.video.video_id == state.clip.video.video_id
        events = self.decoder.decode(
            ClockedSource(source, self.clock),
            state.clip,
            sample=self.spec.sample,
            geometries=self.demand.geometries,
            context=self.demand.context,
            limits=self.spec.limits,
            halo=self.demand.halo,
            following=following if same else None,
        )
        with self.clock.stage("decode"):
            for event in events:
                if following is not None and not same:
                    self.sources.prepare(following)  # now that this clip's own reads are out
                    following = None
                self._event(i, event, asker)

    def _hear(self, i: int) -> None:
        """Decodes the sound of a clip whose frames are done."""
        state, sounds = self.states[i], self.demand.sounds
        info = self.infos.get(state.clip.video.video_id)
        self.watch.at(self.task_id, i, "decode")
        events = self.decoder.audio(
            ClockedSource(self.sources.take(state.clip), self.clock),
            state.clip,
            grids=tuple(sounds),
            start_s=(info.start_s if info else None) or 0.0,
            limits=self.spec.limits,
        )
        with self.clock.stage("decode"):
            for event in events:
                if isinstance(event, AudioEnd):
                    state.sound = event
                else:
                    self._submit(i, event, sounds[event.grid])

    def _busy_s(self) -> float:
        """Seconds of reading and decoding so far."""
        return self.clock.seconds.get("read", 0.0) + self.clock.seconds.get("decode", 0.0)

    def _event(self, i: int, event: DecodeEvent, asker: ClipAsker) -> None:
        state = self.states[i]
        if isinstance(event, VideoInfo):
            self.infos[state.clip.video.video_id] = event
        elif isinstance(event, ClipEnd):
            state.end = event
            for chunk, names in asker.finish(event.samples):
                self._submit(i, chunk, names)
        else:
            state.frames += event.num_rows
            for chunk, names in asker.feed(event):
                self._submit(i, chunk, names)

    def _submit(self, i: int, chunk: Chunk, names: tuple[str, ...]) -> None:
        """Sends a chunk to its models; what none is for is added at once."""
        if not names:
            self._add(i, chunk, names, {})
            return
        with self.clock.stage("predict"):
            ticket = self.predictor.submit(chunk, names)
        self.pending.append((i, without_pixels(chunk), names, ticket))
        while len(self.pending) >= MAX_PENDING:
            self._collect()

    def _collect(self) -> None:
        """Takes the oldest chunk's predictions into the rows."""
        i, chunk, names, ticket = self.pending.popleft()
        self.watch.at(self.task_id, i, "predict")
        with self.clock.stage("predict"):
            results = self.predictor.result(ticket)
        self._add(i, chunk, names, results)

    def _add(
        self,
        i: int,
        chunk: Chunk,
        names: tuple[str, ...],
        results: Mapping[str, Predictions | ModelError],
    ) -> None:
        state = self.states[i]
        if state.failure is not None:
            return  # the clip failed after this chunk left: no row of it may stay
        for output in self.outputs:
            rows = self.rows[output.fingerprint]
            if output.name == FRAMES and isinstance(chunk, Frames):
                rows.add(state.clip, chunk, None)
            if output.name not in names or output.fingerprint in state.model_failures:
                continue
            try:
                result = results[output.name]
                if isinstance(result, ModelError):
                    raise result
                rows.add(state.clip, chunk, result)
            except ModelError as error:  # the model's own, or rows that its spec does not allow
                state.model_failures[output.fingerprint] = to_failure(error, "predict")
                rows.drop(state.clip)

    def _forget(self, i: int) -> None:
        """Removes every trace of an attempt at a clip that is to be decoded again."""
        while self.pending:
            self._collect()
        for rows in self.rows.values():
            rows.drop(self.states[i].clip)
        self.states[i].forget()

    def _forget_sound(self, i: int) -> None:
        """The same of its sound alone."""
        while self.pending:
            self._collect()
        for output in self._of_sound():
            self.rows[output.fingerprint].drop(self.states[i].clip)
            self.states[i].model_failures.pop(output.fingerprint, None)
        self.states[i].sound = None

    def _of_sound(self) -> list[Output]:
        return [o for o in self.outputs if o.spec is not None and o.spec.audio is not None]

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
            outcomes = [
                s.outcome(
                    output,
                    info=self.infos.get(s.clip.video.video_id),
                    device=self.predictor.device,
                )
                for s in self.states
            ]
            boxes = self._boxes_of(output)
            if boxes is not None:
                outcomes = boxes.bound(outcomes)
            with self.clock.stage("encode"):
                tables = self.rows[output.fingerprint].finish(
                    outcomes, infos=self.infos, run=self.spec.run, now=now
                )
                if boxes is not None:
                    tables = boxes.kept(tables)
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
        return task_report(
            self.task_id,
            self.states,
            outcomes_of,
            committed=committed,
            bytes_written=bytes_written,
            puts=puts,
            device=self.predictor.device,
            stage_s=self.clock.seconds,
        )

    def _boxes_of(self, output: Output) -> Boxes | None:
        """What the output's rows may refer to: committed before it, in this order or another."""
        if output.of_model is None:
            return None
        parent = next(o for o in self.spec.outputs if o.partition == output.of_model)
        return self.ledger.boxes(parent, self.task)


def process_task(
    order: WorkOrder,
    spec: RunSpec,
    *,
    ledger: Ledger,
    decoder: ClipDecoder,
    predictor: Predictor,
    watch: Watch | None = None,
    clock: StageClock | None = None,
    sources: Sources | None = None,
) -> TaskReport:
    """Takes one task from its first byte to its commits.

    Args:
        clock: a fresh one, for who wants to see the seconds by stage while the task runs.
        sources: kept by who works on many tasks; without them the task closes its own.
    Raises:
        InfraError: the output's store failed for good: nothing of what was not committed counts,
            and the same task may run again anywhere.
    """
    started = time.perf_counter()
    work = TaskWork(
        order,
        spec,
        ledger=ledger,
        decoder=decoder,
        predictor=predictor,
        watch=watch,
        clock=clock,
        sources=sources,
    )
    try:
        report = work.run()
    finally:
        if sources is None:
            work.sources.close()
    seconds = {**report.counts.stage_s, "task": time.perf_counter() - started}
    return replace(report, counts=replace(report.counts, stage_s=seconds))
