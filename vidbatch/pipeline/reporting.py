"""What a task amounted to, summed over its clips and outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from vidbatch.data import Outcome
from vidbatch.pipeline.clipstate import ClipState
from vidbatch.pipeline.order import SlowClip, TaskReport
from vidbatch.progress import Counts

MAX_SLOWEST = 3
"""Clips of a task that its report names."""

NUMBER = re.compile(r"(?<![\w:.])\d+(?![\w:]|\.\d)")
"""None that is part of a name: H.264, 4:4:4."""

MAX_FAILURES = 20
"""Of a task, told one by one; the table `failures` holds all."""


def task_report(
    task_id: str,
    states: Sequence[ClipState],
    outcomes_of: Mapping[str, Sequence[Outcome]],
    *,
    committed: Mapping[str, str],
    bytes_written: int,
    puts: int,
    device: str,
    stage_s: Mapping[str, float],
) -> TaskReport:
    """The report of a task.

    Args:
        outcomes_of: name of each output → how the clips ended in it.
        committed: partition of each output → new, adopted or exists.
    """
    bad = [
        (o.clip.video.uri, name, o.kind or "", o.reason or "")
        for name, outcomes in outcomes_of.items()
        for o in outcomes
        if o.status != "ok"
    ]
    return TaskReport(
        task_id=task_id,
        counts=_counts(states, outcomes_of, bytes_written, puts, stage_s),
        committed=committed,
        failures=tuple(bad[:MAX_FAILURES]),
        kinds=Counter(kind for _, _, kind, _ in bad),
        device=device,
        silent={
            name: next(o.reason or "" for o in reversed(outcomes) if o.stage == "predict")
            for name, outcomes in outcomes_of.items()
            if any(o.stage == "predict" for o in outcomes)
            and all(o.status == "failed" for o in outcomes)
        },
        slowest=tuple(
            SlowClip(s.clip.video.uri, s.clip.start_s, s.seconds, s.bytes_read, s.gets)
            for s in sorted(states, key=lambda s: -s.seconds)[:MAX_SLOWEST]
        ),
        fallbacks=Counter(
            NUMBER.sub("N", s.end.fallback)  # one reason, whatever its numbers
            for s in states
            if s.end is not None and s.end.fallback is not None
        ),
    )


def _counts(
    states: Sequence[ClipState],
    outcomes_of: Mapping[str, Sequence[Outcome]],
    bytes_written: int,
    puts: int,
    stage_s: Mapping[str, float],
) -> Counts:
    every = [o for outcomes in outcomes_of.values() for o in outcomes]
    first = next(iter(outcomes_of.values()))
    return Counts(
        tasks=1,
        clips=len(states),
        videos=sum(s.clip.first_keyframe == 0 for s in states),
        frames=sum(s.frames for s in states if s.failure is None),
        frames_decoded=sum(o.frames_decoded for o in first),
        video_s=sum(o.end_s - o.start_s for o in first if o.status != "failed"),
        bytes_read=sum(s.bytes_read for s in states),
        gets=sum(s.gets for s in states),
        bytes_written=bytes_written,
        puts=puts,
        ok=sum(o.status == "ok" for o in every),
        partial=sum(o.status == "partial" for o in every),
        failed=sum(o.status == "failed" for o in every),
        failed_outside=sum(o.status == "failed" and o.retryable for o in every),
        fallbacks=sum(o.fallback is not None for o in first),
        stage_s=dict(stage_s),
    )
