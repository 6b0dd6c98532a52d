"""Planning over random videos: clips tile them, and no row depends on where they are cut."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.clips import make_clip
from tests.decoding import decode, make_video, to_clip
from vidbatch.data import Clip, ClipRange, DecodeLimits, Sample
from vidbatch.decode.planned import Plan
from vidbatch.media import BytesSource, PacketTable
from vidbatch.probe import clip_ranges, probe
from vidbatch.sampling import take

BASE = Fraction(1, 1000)
INFO, _ = probe(BytesSource(make_clip(frames=2)), limits=DecodeLimits())

rules = st.one_of(
    st.builds(
        lambda fps, share: Sample(kind="fps", fps=fps, tolerance_s=share / (2 * fps)),
        st.fractions(Fraction(1, 20), 40, max_denominator=30),
        st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1)]),
    ),
    st.builds(lambda n: Sample(kind="every", every=n), st.integers(1, 20)),
    st.sampled_from([Sample(kind="keyframes"), Sample(kind="all")]),
)


@st.composite
def tables(draw: st.DrawFn) -> PacketTable:
    """Groups of pictures, shown in any order, some with pictures shown before their keyframe."""
    steps = st.one_of(st.sampled_from([33, 40, 500]), st.integers(1, 3000))
    groups = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    time, pts, keys = draw(st.integers(-5000, 5000)), list[int](), list[bool]()
    for size in groups:
        shown = [time := time + draw(steps) for _ in range(size)]
        leading = draw(st.integers(0, size - 1)) if pts and draw(st.booleans()) else 0
        pts += [shown.pop(leading), *draw(st.permutations(shown))]
        keys += [True] + [False] * (size - 1)
    hidden = np.array(draw(st.lists(st.booleans(), min_size=len(pts), max_size=len(pts))))
    hidden &= np.array(pts) < pts[0] if draw(st.booleans()) else False
    column = np.array(pts, np.int64)
    order = np.argsort(column)
    order = order[~hidden[order]]
    ordinal = np.full(len(pts), -1, np.int64)
    ordinal[order] = np.arange(len(order))
    return PacketTable(
        time_base=BASE,
        rate=Fraction(25),
        pts=column,
        dts=np.arange(len(pts), dtype=np.int64),
        pos=np.arange(len(pts), dtype=np.int64) * 100,
        size=np.full(len(pts), 100, np.int64),
        key=np.array(keys),
        ordinal=ordinal,
        order=order,
    )


@settings(max_examples=150, deadline=None)
@given(table=tables(), sample=rules, length_s=st.floats(0.001, 60), context=st.booleans())
def test_clips_tile_a_video_and_share_out_its_rows(
    table: PacketTable, sample: Sample, length_s: float, context: bool
) -> None:
    parts = clip_ranges(INFO, table, length_s)
    check_tiles(table, parts, length_s)
    clips = [to_clip(b"", part) for part in parts]
    plans = [Plan(table, clip, sample, context) for clip in clips]
    end = plans[0].end
    taken = take(sample, table.ticks, BASE, table.keys, end)
    rows = taken.frame_index.tolist()
    expected = dict(zip(rows, taken.covers_s.tolist(), strict=True))
    shared: dict[int, float] = {}
    for plan, part in zip(plans, parts, strict=True):
        assert (plan.first_frame, plan.end_frame) == (
            part.start_frame,
            part.start_frame + part.frames,
        )
        own = sorted(plan.covers)
        assert not own or part.start_frame <= own[0] <= own[-1] < plan.end_frame
        before = [row for row in rows if row < part.start_frame]
        assert plan.context == (before[-1:] if context and own else [])
        check_segments(table, plan)
        shared |= plan.covers
    assert shared == expected
    whole = Plan(table, Clip(video=make_video(b"")), sample, context)
    assert whole.covers == expected and whole.end == end


def check_tiles(table: PacketTable, parts: list[ClipRange], length_s: float) -> None:
    """Every frame and packet is in one clip, and all but the last clip are as long as asked for."""
    assert (parts[0].first_keyframe, parts[0].start_frame, parts[0].start_s) == (0, 0, 0.0)
    assert (parts[-1].end_keyframe, parts[-1].end_frame, parts[-1].end_s) == (None, None, None)
    for before, after in pairwise(parts):
        assert (before.end_keyframe, before.end_frame) == (after.first_keyframe, after.start_frame)
        assert before.end_s == after.start_s >= before.start_s + length_s - 1e-9
    assert sum(p.frames for p in parts) == len(table.order)
    assert sum(p.packet_bytes for p in parts) == int(table.size.sum())


def check_segments(table: PacketTable, plan: Plan) -> None:
    """The packets that are read hold all wanted frames, and begin where nothing crosses."""
    runs = plan.segments()
    packets = {n for run in runs for n in range(run.start, run.stop)}
    assert packets >= {int(table.order[i]) for i in [*plan.context, *plan.covers]}
    for run in runs:
        shown = {int(table.ordinal[n]) for n in range(run.start, run.stop)} - {-1}
        assert not shown or len(shown) == max(shown) - min(shown) + 1
    assert sum(run.stop - run.start for run in runs) == len(packets)


@settings(max_examples=100, deadline=None)
@given(table=tables(), rate=st.fractions(Fraction(1, 20), 40, max_denominator=30), data=st.data())
def test_the_frame_of_a_target_does_not_depend_on_clips(
    table: PacketTable, rate: Fraction, data: Any
) -> None:
    sample = Sample(kind="fps", fps=rate, tolerance_s=1 / (2 * rate))
    rows = []
    for length_s in data.draw(st.lists(st.floats(0.001, 60), min_size=2, max_size=3)):
        clips = [to_clip(b"", part) for part in clip_ranges(INFO, table, length_s)]
        rows.append(
            [row for clip in clips for row in sorted(Plan(table, clip, sample, True).covers)]
        )
    assert all(other == rows[0] for other in rows)
    exact = take(
        replace(sample, tolerance_s=Fraction(0)), table.ticks, BASE, table.keys, Fraction(0)
    )
    assert len(rows[0]) <= len(exact.frame_index) + int(table.keys.sum())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    steps=st.lists(st.integers(1, 40), min_size=2, max_size=50),
    gop=st.integers(1, 20),
    b_frames=st.integers(0, 4),
    open_gop=st.booleans(),
    codec=st.sampled_from(["libx264", "libx265"]),
    sample=rules,
    length_s=st.floats(0.01, 5),
)
def test_clips_of_encoded_videos_add_up_to_the_whole(
    steps: list[int],
    gop: int,
    b_frames: int,
    open_gop: bool,
    codec: str,
    sample: Sample,
    length_s: float,
) -> None:
    data = make_clip(
        frames=len(steps),
        pts=np.cumsum(steps).tolist(),
        time_base=Fraction(1, 100),
        gop=gop,
        b_frames=min(b_frames, gop - 1),
        open_gop=open_gop,
        codec=codec,
    )
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    parts = clip_ranges(info, table, length_s)
    whole = decode(data, sample)
    assert [row for part in parts for row in decode(data, sample, part=part).rows] == whole.rows
    assert whole.numbers() == whole.index and whole.end.status == "ok"
