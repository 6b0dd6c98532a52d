"""Clips → Tasks: pure arithmetic on costs. Knows nothing of stores, models or bytes.

day 2026-03-02   [v9......][v8..][v7]  [v6.clip0 clip1]  [v6.clip2 clip3]  ...
                  one task: many short   one task: some clips of a long video
day 2026-03-01   never in a task of another day
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vidbatch.data import Clip, Task

CORE_S_PER_MB = 0.25
"""Core seconds to decode and sample one megabyte of H.264 (1080p30 at 4.5 Mbit/s: 0.14 core
seconds per second of video of 0.56 MB; smaller pictures at lower rates come out the same)."""

CORE_S_PER_VIDEO = 0.05
"""Opening, first reads and rows of one video, however short."""

MAX_CLIPS = 512
"""Of one task: bounds its commit record and what one lost decoder costs in many tiny files."""

FIRST_TASK_S = 30.0
"""Planned cost of the first tasks of a run, so that commits show within a minute."""


LEAST_TASK_S = 10.0
"""Planned cost below which no task is made smaller to spread a short archive over the decoders."""

TASKS_PER_DECODER = 8
"""At the least, where the archive has the work: the last task of a run then costs a decoder's idle
time of at most an eighth of it."""


LAST_TASK_S, LAST_SHARE = 2.0, 8
"""Planned cost to which the last tasks of a plan shrink, so that all decoders end together: to an
eighth, for each halving costs every decoder 1.4 tasks more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A clip and what it is expected to cost."""

    clip: Clip
    cost_s: float


def estimate_cost_s(size_bytes: int) -> float:
    """Planned core seconds of a whole video of `size_bytes`."""
    return CORE_S_PER_VIDEO + size_bytes / 1e6 * CORE_S_PER_MB


def task_cost_s(total_s: float, *, limit_s: float, decoders: int) -> float:
    """The most a task may cost: `limit_s`, or less where `total_s` would not fill all decoders.

    >>> task_cost_s(36_000, limit_s=600, decoders=4), task_cost_s(160, limit_s=600, decoders=2)
    (600, 10.0)
    """
    return min(limit_s, max(LEAST_TASK_S, total_s / (TASKS_PER_DECODER * decoders)))


def whole(clip_of: Clip) -> Piece:
    """A video that is one clip, at the cost of its bytes."""
    return Piece(clip=clip_of, cost_s=estimate_cost_s(clip_of.video.size_bytes))


def pack(
    pieces: Iterable[Piece],
    *,
    sampling: str,
    task_s: float,
    num_first: int = 0,
    share: int = 0,
    order: str = "newest",
) -> list[Task]:
    """Packs clips into tasks of at most `task_s` planned seconds; a task never mixes days.

    The first `num_first` tasks hold at most FIRST_TASK_S; with a `share`, none holds more than a
    `share`-th of what is left (guided self-scheduling), down to `task_s` / LAST_SHARE or
    LAST_TASK_S. Clips of one video stay in order and next to each other. `order`: newest or oldest
    day first, or the dearest videos of a day first. The result depends only on the pieces and the
    arguments, not on their order of arrival.
    """
    newest = order != "oldest"
    videos: dict[str, list[Piece]] = {}
    for piece in pieces:
        videos.setdefault(piece.clip.video.video_id, []).append(piece)
    groups = [sorted(group, key=lambda p: p.clip.first_keyframe) for group in videos.values()]

    def rank(group: list[Piece]) -> tuple[float, str]:
        cost = sum(p.cost_s for p in group)
        return (-cost if order == "longest" else 0.0, group[0].clip.video.uri)

    def day(group: list[Piece]) -> str:
        return group[0].clip.video.dt

    groups.sort(key=lambda g: (rank(g), g[0].clip.video.version))
    groups.sort(key=day, reverse=newest)
    tasks: list[Task] = []
    left_s = sum(p.cost_s for group in groups for p in group)
    for _, of_day in groupby(groups, key=day):
        held: list[Piece] = []
        cost = 0.0
        for piece in (p for group in of_day for p in group):
            room = min(FIRST_TASK_S, task_s) if len(tasks) < num_first else task_s
            if share:
                room = min(room, max(LAST_TASK_S, task_s / LAST_SHARE, (left_s + cost) / share))
            if held and (cost + piece.cost_s > room or len(held) >= MAX_CLIPS):
                tasks.append(_task(held, sampling))
                held, cost = [], 0.0
            held.append(piece)
            cost += piece.cost_s
            left_s -= piece.cost_s
        tasks.append(_task(held, sampling))
    return tasks


def _task(pieces: Sequence[Piece], sampling: str) -> Task:
    return Task(
        clips=tuple(p.clip for p in pieces),
        sampling=sampling,
        cost_s=round(sum(p.cost_s for p in pieces), 3),
    )
