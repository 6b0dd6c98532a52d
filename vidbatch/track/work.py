"""`vidbatch track`: what is there, which tracker it makes, and which tasks are left for it."""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, cast

import numpy as np

from vidbatch import __version__
from vidbatch.data import ModelSpec, Output, Task, digest
from vidbatch.errors import UsageError
from vidbatch.ledger import Ledger, PlanLog
from vidbatch.storage import StoreSettings, open_store
from vidbatch.tables import SCHEMA_VERSION, outcomes_from_json, output_of
from vidbatch.track.associate import SEMANTICS, load_matcher
from vidbatch.track.rule import TrackRule, TrackWhat
from vidbatch.track.sources import (
    Held,
    Source,
    crop_embeddings,
    holdings,
    key_of,
    pick,
    read_record,
)
from vidbatch.track.tasks import Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackReport:
    """What one call of `track` did and what it left."""

    model: str
    """The value of `model=` of the tracks."""
    of_model: str
    """The value of `model=` of the boxes."""
    sample: str
    """The value of `sample=`."""
    appearance: str | None
    """The model whose embeddings of the boxes were used; null: motion alone."""
    rate_fps: float
    """Samples a second, the median of the videos."""
    tasks: int
    """Committed by this call: 0 where nothing was new."""
    tasks_before: int
    """Committed earlier."""
    videos: int
    """Of those tasks, with tracks."""
    tracks: int
    boxes: int
    tracked_boxes: int
    """Boxes that are no part of a track are of too low a score to begin one."""
    waiting_videos: int
    """Left out: a clip of them, or of their task, is not done yet or comes back by itself."""
    failed: Mapping[str, int]
    """Why clips have no tracks → their number: `no_boxes`, `no_embeddings`, `too_sparse`."""
    cured_clips: int
    """Cured after they had been passed over: a new version of the tracker takes them."""


def track(
    output: str,
    settings: StoreSettings | None = None,
    *,
    rule: TrackRule | None = None,
    model: str | None = None,
    appearance: str | None = None,
    sample: str | None = None,
    now: datetime | None = None,
) -> TrackReport:
    """Tracks what is new of a detector's boxes, video by video; reads no video.

    Args:
        output: the output folder.
        rule: of a tracker file; without it the defaults, for the detector `model` or the only one.
        model: name of the detector, where there is no `rule`.
        appearance: name of the model that gives embeddings of the boxes, before that of `rule`.
        sample: the value of `sample=` or its beginning, where there are several.

    Raises:
        UsageError: nothing here has boxes; it is not clear which are meant; the extra is missing;
            or the samples are too sparse for motion and no model gives embeddings of the boxes.
        InfraError: the store cannot be read or written.
    """
    match = load_matcher()
    ledger = Ledger(open_store(output, settings or StoreSettings()))
    if ledger.pinned() is None:
        raise UsageError(f"{ledger.store.uri} holds no run of vidbatch — check the path")
    if rule is not None and model not in (None, rule.what.on):
        raise UsageError(f"--model {model}: the tracker file says on: {rule.what.on}; drop one")
    found = holdings(ledger)
    detectors = [held for held in found if "detections" in held.tables]
    boxes = pick(detectors, "detections", name=rule.what.on if rule else model, sample=sample)
    rule = rule or TrackRule(name=f"{boxes.name}-tracks", what=TrackWhat(on=boxes.name))
    if any(h.name == rule.name and "tracks" not in h.tables for h in found):
        raise UsageError(f"{rule.name} is a model of this output — give the tracker another name")
    log = ledger.read_plan(boxes.sampling)
    source = Source(ledger, log, boxes)
    rate_fps = source.rate_fps(log)
    wanted = appearance or rule.what.appearance
    looks = None
    if wanted or (source.done and not rule.what.is_dense(rate_fps)):
        candidates = crop_embeddings(ledger, found, boxes)
        looks = _choose(candidates, wanted, boxes, rule.what.min_fps, rate_fps)
    what = rule.what.settled(looks.name if looks else None)
    made = _output(rule, what, boxes, looks)
    moment = now or datetime.now(UTC)
    done = ledger.done(made.fingerprint)
    tracker = Tracker(
        ledger,
        made,
        source=source,
        looks=Source(ledger, log, looks) if looks else None,
        done=done,
        what=what,
        match=match,
        run=f"{moment:%Y%m%dT%H%M%S}-{moment.microsecond // 1000:03d}-{secrets.token_hex(3)}",
        versions={
            "vidbatch": __version__,
            "scipy": version("scipy"),
            "opencv": version("opencv-python-headless"),
        },
    )
    cured = _take_all(tracker, log, moment)
    tally = tracker.tally
    return TrackReport(
        model=made.partition,
        of_model=boxes.partition,
        sample=boxes.sample,
        appearance=what.appearance,
        rate_fps=round(rate_fps, 3),
        tasks=tally.tasks,
        tasks_before=len(done),
        videos=len(tally.videos),
        tracks=tally.tracks,
        boxes=tally.boxes,
        tracked_boxes=tally.tracked_boxes,
        waiting_videos=len(tally.waiting),
        failed=dict(tally.failed),
        cured_clips=cured,
    )


def report_lines(report: TrackReport) -> list[str]:
    """What `track` did, for people."""
    by = f"motion and {report.appearance}" if report.appearance else "motion"
    lines = [
        f"{report.model}: boxes of {report.of_model} under {report.sample} "
        f"({report.rate_fps:g} frames a second), by {by}"
    ]
    if report.tasks:
        lines.append(
            f"{report.videos} videos in {report.tasks} tasks: {report.tracks} tracks, "
            f"{report.tracked_boxes} of {report.boxes} boxes"
        )
    else:
        lines.append(f"nothing new ({report.tasks_before} tasks are done); nothing was written")
    if report.waiting_videos:
        lines.append(
            f"{report.waiting_videos} videos wait: clips of their task are not done yet or come "
            "back in the next run"
        )
    lines += [f"{n} clips without tracks: {kind}" for kind, n in sorted(report.failed.items())]
    if report.cured_clips:
        lines.append(
            f"{report.cured_clips} clips were cured after their video was tracked: a tracker file "
            "with another version takes them"
        )
    return lines


def _choose(
    candidates: Sequence[Held], wanted: str | None, boxes: Held, min_fps: float, rate_fps: float
) -> Held:
    """The model of the embeddings. Raises UsageError: it is not there, or there are several."""
    names = {held.name for held in candidates if wanted in (None, held.name)}
    if len(names) == 1:
        return next(held for held in reversed(candidates) if held.name in names)
    there = ", ".join(sorted({h.name for h in candidates})) or "no model"
    if wanted is not None:
        raise UsageError(
            f"{wanted} gives no embeddings of the boxes of {boxes.name} under {boxes.sample} — "
            f"nothing was written — {there} does"
        )
    if names:
        raise UsageError(
            f"embeddings of the boxes of {boxes.name} are there of {there} — nothing was written "
            "— say which: --appearance"
        )
    raise UsageError(
        f"{boxes.sample} has {rate_fps:.3g} frames a second, and motion can be followed from "
        f"{min_fps:g} on — nothing was written — run the job again with `sample: {{fps: "
        f"{min_fps:g}}}` or more, or add a model of embeddings `on: {boxes.name}` to it, which "
        "tells things apart at any rate"
    )


def _output(rule: TrackRule, what: TrackWhat, boxes: Held, looks: Held | None) -> Output:
    """The tracker as an output: another detector, model of embeddings or value is another one."""
    parts = {"of_model": boxes.partition, "appearance": looks.partition if looks else None}
    prints = [boxes.fingerprint, looks.fingerprint if looks else None]
    values = what.model_dump(mode="json")
    spec = ModelSpec(
        name=rule.name,
        version=rule.version,
        adapter="track",
        kind="tracks",
        geometry=None,  # sees no pixels
        gives=cast(Any, ("tracks",)),
        config=json.dumps(values | parts),
        fingerprint=digest(["tracks", SCHEMA_VERSION, SEMANTICS, values, prints]),
    )
    return output_of(spec, boxes.sampling)


def _take_all(tracker: Tracker, log: PlanLog, now: datetime) -> int:
    """Takes every task that is left; gives the clips cured after they had been passed over."""
    firsts = np.flatnonzero(log.generations == 0).tolist()
    ids = log.task_ids.to_pylist()
    todo = [p for p in firsts if ids[p] not in tracker.done]
    cured = tracker.source.cured() if tracker.done else set()
    if not todo and not cured:
        return 0
    spans: defaultdict[str, list[int]] = defaultdict(list)
    late = 0
    for position, task in zip(firsts, log.tasks(firsts), strict=True):
        for video_id in {c.video.video_id for c in task.clips if not c.whole}:
            spans[video_id].append(position)
        if task.task_id in tracker.done and any(key_of(c) in cured for c in task.clips):
            late += _passed_over(tracker, task, cured)
    for position, task in zip(todo, log.tasks(todo), strict=True):
        shared = {p for c in task.clips for p in spans.get(c.video.video_id, ())} - {position}
        tracker.take(task, list(log.tasks(sorted(shared))), now)
    return late


def _passed_over(tracker: Tracker, task: Task, cured: set[tuple[str, int]]) -> int:
    record = read_record(tracker.ledger, tracker.output.fingerprint, task)
    outcomes = outcomes_from_json(record.outcomes, task)
    return sum(o.status == "failed" and key_of(o.clip) in cured for o in outcomes)
