"""What there is to do: listing × plan log × commits → work orders, before any engine is started.

    listing ─┬─ in the plan log? ── no ─▶ new ─┬ ≤ split_above: planned from the listing
             │                                  └ larger: probed first
             └─ yes ─▶ its tasks − LIST of each output's commits ─▶ open orders

No video byte and no commit record is read for it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from vidbatch.archive import Listing, list_archive
from vidbatch.config import Job
from vidbatch.data import Clip, Ints, Output, Task, Video
from vidbatch.errors import RefusedError
from vidbatch.ledger import Ledger, PlanLog
from vidbatch.pipeline.engine import Probed
from vidbatch.pipeline.order import Orders, RunSpec
from vidbatch.pipeline.resolve import archive_rule, run_spec
from vidbatch.plan import Piece, estimate_cost_s, pack, task_cost_s, whole
from vidbatch.progress import human_bytes
from vidbatch.query import readme_and_views
from vidbatch.storage import open_store, probe_create_only

ASSUMED_BITS_PER_S = 4e6
"""Of video whose header nobody has read: `limits.max_video_hours` acts before the first byte."""


FIRST_CHUNK_VIDEOS, CHUNK_VIDEOS = 1000, 50_000
"""Videos planned from the listing alone that go into one chunk of the log: the first, the largest
(13 MB of log; planning it takes 100 MB)."""

MAX_PROBED = 1000
"""Videos probed for one chunk: 60,000 clips if each has an hour."""


def new_run_id(now: datetime) -> str:
    """Start time to the millisecond (views order runs by it) and random; never an identity."""
    return f"{now:%Y%m%dT%H%M%S}-{now.microsecond // 1000:03d}-{secrets.token_hex(3)}"


@dataclass(slots=True, kw_only=True)
class Survey:
    """What was found, and the way to turn it into orders."""

    job: Job
    spec: RunSpec
    ledger: Ledger
    listing: Listing
    log: PlanLog
    done: Mapping[str, set[str]]
    """Output fingerprint → ids of committed tasks."""
    new: list[Video]
    """Videos in no chunk of the plan log."""
    lacking: dict[int, tuple[str, ...]]
    """Position in the log → fingerprints of the outputs that lack that task."""
    retries: list[Task]
    """Failed clips that come back by themselves, not yet in the log."""
    not_planned: dict[str, str] = field(default_factory=dict)
    """uri → why: large videos whose header could not be fetched; the next run takes them."""
    _begun: bool = False
    """Whether anything was planned."""

    @property
    def nothing_to_do(self) -> bool:
        """Every output of every listed video is committed."""
        return not (self.new or self.lacking or self.retries)

    def listing_facts(self) -> dict[str, Any]:
        """The listing in numbers, for the summary."""
        return {
            "videos": len(self.listing.videos),
            "bytes": self.listing.bytes,
            "left_out": dict(self.listing.left_out),
            "no_date": self.listing.no_date,
            "new": len(self.new),
            "open_tasks": len(self.lacking),
            "retries": len(self.retries),
        }

    def describe(self) -> list[str]:
        """The survey in a few lines for people."""
        facts = self.listing_facts()
        out = ", ".join(f"{n} {reason}" for reason, n in sorted(facts["left_out"].items()))
        lines = [
            f"archive: {facts['videos']} videos, {human_bytes(facts['bytes'])}"
            + (f"; left out: {out}" if out else "")
        ]
        if self.listing.no_date:
            lines.append(f"{self.listing.no_date} keys had no date: dated by their last change")
        if not self.nothing_to_do:
            lines.append(
                f"to do: {len(self.new)} new videos, {len(self.lacking)} planned tasks"
                + (f", {len(self.retries)} tasks to retry" if self.retries else "")
            )
        return lines

    def check_limits(self) -> None:
        """Refuses a plan larger than `limits.max_video_hours`, before the first byte.

        Raises:
            RefusedError: says how large it is, and what makes it so.
        """
        limit = self.job.limits.max_video_hours
        if limit is None:
            return
        todo = self.videos_to_do()
        hours = sum(v.size_bytes for v in todo) * 8 / ASSUMED_BITS_PER_S / 3600
        if hours <= limit:
            return
        causes = [f"{len(self.new)} videos are in no plan yet"] if self.new else []
        for output in self.spec.outputs:
            lacks = any(output.fingerprint in fps for fps in self.lacking.values())
            if lacks and not self.done[output.fingerprint]:
                causes.append(f"nothing of {output.partition} is committed: it is new or changed")
        raise RefusedError(
            f"{self.job.output.uri}: about {hours:.0f} video hours to do, more than "
            f"limits.max_video_hours {limit:g} ({'; '.join(causes) or 'unfinished work'}); "
            "nothing was started; raise the limit if this is meant"
        )

    # orders -----------------------------------------------------------------------------------

    def videos_to_do(self) -> list[Video]:
        """Every video with something to do, by uri."""
        todo = {v.video_id: v for v in self.new}
        for task in self.log.tasks(self.lacking):
            todo.update((c.video.video_id, c.video) for c in task.clips)
        return sorted(todo.values(), key=lambda v: (v.uri, v.version))

    def orders(
        self, probe: Callable[[Sequence[Video]], list[Probed]], *, width: int
    ) -> Iterator[Orders]:
        """All work: what the log has open, then new videos, planned as the iterator is asked.

        Chunks of the plan grow from a few videos to CHUNK_VIDEOS: the first tasks are there at
        once, and the log of a large archive has few chunks.

        Args:
            probe: see `Engine.probe`.
            width: orders that can be under work at once.
        """
        yield self.open_orders()
        limit = self.job.clips.split_above
        small = self._in_order(v for v in self.new if v.size_bytes <= limit)
        task_s = self._task_s(map(estimate_cost_s, (v.size_bytes for v in small)), width)
        large = self._in_order(v for v in self.new if v.size_bytes > limit)
        left = len(self.new)
        for chunk in _growing(small, FIRST_CHUNK_VIDEOS):
            left -= len(chunk)
            pieces = [whole(Clip(video=v)) for v in chunk]
            yield self._plan(pieces, task_s, width=width, last=not left)
        for chunk in _growing(large, 4 * width, most=MAX_PROBED):
            left -= len(chunk)
            yield self.plan_probed(probe(chunk), width=width, last=not left)

    def open_orders(self) -> Orders:
        """Tasks of the log that lack outputs, and automatic retries, in the job file's order."""
        if self.retries:
            self._append_retries()
        positions = np.fromiter(self.lacking, np.int64, len(self.lacking))
        days = self.log.days.take(pa.array(positions)).to_numpy(zero_copy_only=False)
        _, rank = np.unique(days.astype("U10"), return_inverse=True)
        newest = self.job.engine.order != "oldest"
        order = np.argsort(-rank if newest else rank, kind="stable")
        return self._orders(positions[order])

    def _orders(self, positions: Ints) -> Orders:
        every = tuple(o.fingerprint for o in self.spec.outputs)
        return Orders(log=self.log, positions=positions, lacking=self.lacking, every=every)

    def _in_order(self, videos: Iterable[Video]) -> list[Video]:
        newest = self.job.engine.order != "oldest"
        return sorted(videos, key=lambda v: (v.dt, v.uri), reverse=newest)

    def _task_s(self, costs_s: Iterable[float], width: int) -> float:
        limit_s = self.job.limits.task_minutes * 60
        return task_cost_s(sum(costs_s), limit_s=limit_s, decoders=width)

    def plan_probed(self, probed: Iterable[Probed], *, width: int, last: bool) -> Orders:
        """Plans large videos once their headers are known; unreadable ones as one whole clip."""
        pieces: list[Piece] = []
        for found in probed:
            video = found.video
            if found.failure is not None and found.failure.retryable:
                # cut once, for ever: a store that stammered must not make it one clip
                self.not_planned[video.uri] = found.failure.message
            elif len(found.ranges) < 2:
                pieces.append(whole(Clip(video=video)))
            else:
                media = sum(r.packet_bytes for r in found.ranges) or 1
                cost_s = estimate_cost_s(video.size_bytes)
                pieces += [
                    Piece(
                        clip=Clip(
                            video=video,
                            first_keyframe=r.first_keyframe,
                            end_keyframe=r.end_keyframe,
                            start_s=r.start_s,
                            end_s=r.end_s,
                            start_frame=r.start_frame,
                            end_frame=r.end_frame,
                        ),
                        cost_s=cost_s * r.packet_bytes / media,
                    )
                    for r in found.ranges
                ]
        task_s = self._task_s((p.cost_s for p in pieces), width)
        return self._plan(pieces, task_s, width=width, last=last)

    def _plan(self, pieces: list[Piece], task_s: float, *, width: int, last: bool) -> Orders:
        """Appends the tasks of some videos to the log; the first and the last of all are short."""
        before, mine = len(self.log), 0
        wanted = sorted({p.clip.video.video_id for p in pieces})
        num_first = 0 if self._begun else 2 * width

        def plan_new(log: PlanLog) -> list[Task]:
            nonlocal mine
            known = {v for v, old in zip(wanted, log.knows(wanted), strict=True) if old}
            tasks = pack(
                [p for p in pieces if p.clip.video.video_id not in known],
                sampling=self.spec.sampling,
                task_s=task_s,
                num_first=num_first,
                share=2 * width if last and width > 1 else 0,
                order=self.job.engine.order,
            )
            mine = len(tasks)
            return tasks

        self.log = self.ledger.append_plan(self.log, plan_new)
        self._begun = self._begun or mine > 0
        if len(self.log) == before + mine:
            return self._orders(np.arange(before, len(self.log)))
        # another driver has planned as well: its tasks of our videos are ours, too, and its
        # attempts then meet ours at the same names
        return self._orders(self.log.added(before, [v.video_id for v in self.new]))

    def _append_retries(self) -> None:
        listed = {v.video_id for v in self.listing.videos}
        for output in self.spec.outputs:
            done = self.done[output.fingerprint]

            def plan_new(
                log: PlanLog, output: Output = output, done: set[str] = done
            ) -> list[Task]:
                return self.ledger.retry_tasks(log, output, done=done, listed=listed)

            self.log = self.ledger.append_plan(self.log, plan_new)
        self.lacking = _lacking(self.log, self.spec.outputs, self.done, sorted(listed))

    # the output -------------------------------------------------------------------------------

    def open_output(self) -> None:
        """Everything the first run writes, and the run folder of this one.

        Raises:
            RefusedError: another date rule, a newer schema, a store without create-only.
            StoreError: the output cannot be written.
        """
        date = self.job.date_rule()
        if self.ledger.pinned() is None:
            verdict = probe_create_only(self.ledger.store)
            specs = [o.spec for o in self.spec.outputs if o.spec is not None]
            self.ledger.first_files(readme_and_views(specs, self.spec.sample))
            self.ledger.pin({"date": date, "store": verdict})
        else:
            self.ledger.pin({"date": date})
        self.ledger.start_run(self.spec.run, {**self.job.dump(), "versions": self.spec.versions})
        self.ledger.write_models(self.spec.outputs, self.spec.run)

    def close_run(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json` and the run's row of `runs`."""
        counts, versions = summary["counts"], self.spec.versions
        row = {
            "job": self.job.digest[:8],
            "started_at": datetime.fromisoformat(summary["started_at"]),
            "ended_at": datetime.now(UTC),
            "exit_code": summary["exit_code"],
            "videos": counts["videos"],
            "spans_ok": counts["ok"],
            "spans_partial": counts["partial"],
            "spans_failed": counts["failed"],
            "video_hours": summary["video_hours"],
            "bytes_read": counts["bytes_read"],
            "frames": counts["frames"],
            **{
                f"{n}_version": versions.get(n)
                for n in ("vidbatch", "ray", "torch", "av", "ffmpeg")
            },
        }
        self.ledger.finish_run(self.spec.run, dict(summary), row)


def _growing(
    videos: Sequence[Video], first: int, most: int = CHUNK_VIDEOS
) -> Iterator[Sequence[Video]]:
    """Cuts into pieces of `first`, then twice as many each time, up to `most`."""
    begin, size = 0, min(first, most)
    while begin < len(videos):
        yield videos[begin : begin + size]
        begin, size = begin + size, min(2 * size, most)


def _lacking(
    log: PlanLog, outputs: tuple[Output, ...], done: Mapping[str, set[str]], listed: list[str]
) -> dict[int, tuple[str, ...]]:
    """Position in the log → fingerprints of the outputs that lack the task, in log order."""
    found: dict[int, list[str]] = {}
    for output in outputs:
        fingerprint = output.fingerprint
        for position in log.todo(fingerprint, done[fingerprint], listed):
            found.setdefault(int(position), []).append(fingerprint)
    return {position: tuple(found[position]) for position in sorted(found)}


def take_survey(job: Job, *, run: str, now: datetime, limit: int | None = None) -> Survey:
    """Lists, reads the plan log, lists the commits. Writes nothing, reads no video byte.

    Args:
        limit: look at the newest so many videos only.
    Raises:
        UsageError, StoreError: archive or output cannot be used as they are.
        RefusedError: the output was begun with another date rule, or by a newer version.
    """
    spec = run_spec(job, run)
    listing = list_archive(archive_rule(job), now=now)
    if limit is not None:
        newest = sorted(listing.videos, key=lambda v: (v.dt, v.uri), reverse=True)[:limit]
        listing = replace(listing, videos=sorted(newest, key=lambda v: v.uri))
    ledger = Ledger(open_store(job.output.uri, spec.output_store))
    ledger.check({"date": job.date_rule()})
    log = ledger.read_plan(spec.sampling)
    done = {o.fingerprint: ledger.done(o.fingerprint) for o in spec.outputs}
    ids = [v.video_id for v in listing.videos]
    known = log.knows(ids)
    return Survey(
        job=job,
        spec=spec,
        ledger=ledger,
        listing=listing,
        log=log,
        done=done,
        new=[v for v, old in zip(listing.videos, known, strict=True) if not old],
        lacking=_lacking(log, spec.outputs, done, ids),
        retries=[
            task
            for output in spec.outputs
            for task in ledger.retry_tasks(
                log, output, done=done[output.fingerprint], listed=set(ids)
            )
        ],
    )


def append_retries(job: Job, *, kinds: tuple[str, ...]) -> int:
    """`vidbatch retry`: plans a new generation of what failed and may succeed.

    Args:
        kinds: only failures of these kinds; empty: all that are retryable.
    Returns:
        Tasks of a later generation that wait to be run.
    """
    spec = run_spec(job, "retry")
    ledger = Ledger(open_store(job.output.uri, spec.output_store))
    log = ledger.read_plan(spec.sampling)
    waiting = 0
    for output in spec.outputs:
        done = ledger.done(output.fingerprint)

        def plan_new(log: PlanLog, output: Output = output, done: set[str] = done) -> list[Task]:
            return ledger.retry_tasks(
                log, output, done=done, kinds=kinds or None, max_generation=None
            )

        log = ledger.append_plan(log, plan_new)
        todo = log.todo(output.fingerprint, done)
        waiting += int((log.generations[todo] > 0).sum())
    return waiting
