"""Packing is arithmetic: every clip once, days apart, costs bounded, order of arrival forgotten."""

from __future__ import annotations

import random
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from vidbatch.data import Clip, Video
from vidbatch.plan import (
    FIRST_TASK_S,
    LAST_TASK_S,
    LEAST_TASK_S,
    MAX_CLIPS,
    Piece,
    estimate_cost_s,
    pack,
    task_cost_s,
)

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def video(name: str, dt: str, size: int = 1_000_000) -> Video:
    return Video(
        uri=f"s3://a/{name}", version="v", size_bytes=size, modified_at=NOW, listed_at=NOW,
        captured_at=NOW, captured_from="modified", dt=dt, source="",
    )  # fmt: skip


pieces_of = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(0.01, 900)), min_size=1, max_size=30
)


@given(pieces_of, st.integers(0, 3), st.sampled_from(["newest", "oldest", "longest"]))
@settings(max_examples=200, deadline=None)
def test_every_clip_once_days_apart_costs_bounded(
    drawn: list[tuple[int, int, float]], num_first: int, order: str
) -> None:
    pieces = [
        Piece(
            clip=Clip(video=video(f"{i}.mp4", f"2026-03-0{day + 1}"), first_keyframe=k,
                      end_keyframe=k + 1),
            cost_s=cost,
        )
        for i, (day, clips, cost) in enumerate(drawn)
        for k in range(clips)
    ]  # fmt: skip
    args = {"sampling": "f" * 64, "task_s": 600.0, "num_first": num_first, "order": order}
    tasks = pack(pieces, **args)
    got = [tuple(c.identity()) for t in tasks for c in t.clips]
    assert sorted(got) == sorted(tuple(p.clip.identity()) for p in pieces)
    cost = {tuple(p.clip.identity()): p.cost_s for p in pieces}
    for i, task in enumerate(tasks):
        total = sum(cost[tuple(c.identity())] for c in task.clips)
        room = FIRST_TASK_S if i < num_first else 600.0
        assert len(task.clips) == 1 or total <= room + 1e-6
        assert len(task.clips) <= MAX_CLIPS
    days = [t.dt for t in tasks]
    assert days == sorted(days, reverse=order != "oldest")
    shuffled = pieces[:]
    random.shuffle(shuffled)
    assert [t.task_id for t in pack(shuffled, **args)] == [t.task_id for t in tasks]


def test_short_videos_of_a_day_share_a_task_long_ones_do_not() -> None:
    short = [Piece(clip=Clip(video=video(f"{i}", "2026-03-01")), cost_s=5) for i in range(10)]
    long = [Piece(clip=Clip(video=video("x", "2026-03-02"), first_keyframe=k), cost_s=400)
            for k in range(3)]  # fmt: skip
    tasks = pack(short + long, sampling="s", task_s=600)
    assert [len(t.clips) for t in tasks] == [1, 1, 1, 10]


def test_the_last_tasks_shrink_so_that_all_decoders_end_together() -> None:
    pieces = [Piece(clip=Clip(video=video(f"{i}", "2026-03-01")), cost_s=0.5) for i in range(280)]
    costs = [t.cost_s for t in pack(pieces, sampling="s", task_s=10, share=4)]
    assert costs[:10] == [10] * 10 and sum(costs) == 140
    assert costs == sorted(costs, reverse=True) and costs[-2] == LAST_TASK_S
    free = [0.0, 0.0]  # whoever is free takes the next: they end within the last task
    for cost in costs:
        free[free.index(min(free))] += cost
    assert max(free) - min(free) <= LAST_TASK_S
    assert [t.cost_s for t in pack(pieces, sampling="s", task_s=10)] == [10] * 14


def test_cost_follows_bytes() -> None:
    assert estimate_cost_s(100_000_000) > 20 * estimate_cost_s(1_000_000)


def test_a_short_archive_is_spread_over_the_decoders() -> None:
    assert task_cost_s(36_000, limit_s=600, decoders=4) == 600
    assert task_cost_s(3_200, limit_s=600, decoders=4) == 100
    assert task_cost_s(5, limit_s=600, decoders=64) == LEAST_TASK_S
    assert task_cost_s(5, limit_s=0.6, decoders=1) == 0.6
