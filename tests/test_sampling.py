"""The rule as a stream, as a table and as a naive loop over targets give the same rows."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vidbatch.data import Sample
from vidbatch.sampling import Clock, Sampler, sample_name, sampling_fingerprint, take

TIME_BASE = Fraction(1, 1000)
SAMPLES = [
    Sample(kind="fps", fps=Fraction(1)),
    Sample(kind="fps", fps=Fraction(30000, 1001)),
    Sample(kind="fps", fps=Fraction(2, 7)),
    Sample(kind="fps", fps=Fraction(2), tolerance_s=Fraction(1, 4)),
    Sample(kind="fps", fps=Fraction(1), tolerance_s=Fraction(1, 10)),
    Sample(kind="fps", fps=Fraction(25, 2), tolerance_s=Fraction(1, 25)),
    Sample(kind="every", every=3),
    Sample(kind="keyframes"),
    Sample(kind="all"),
]


def naive(sample: Sample, ticks: list[int], keys: list[bool], end: Fraction) -> dict[int, Fraction]:
    """Rows by looking at every target and every frame: {frame: seconds it covers}."""
    times = [t * TIME_BASE for t in ticks]
    if sample.kind != "fps":
        n = sample.every or 1
        index = [
            i for i in range(len(times)) if (keys[i] if sample.kind == "keyframes" else i % n == 0)
        ]
        ends = [*(times[i] for i in index[1:]), end]
        return {i: e - times[i] for i, e in zip(index, ends, strict=True)}
    assert sample.fps is not None
    rows: dict[int, Fraction] = {}
    for k in range(math.floor(sample.fps * times[-1]) + 1):
        target = k / sample.fps
        frame = max(i for i, t in enumerate(times) if t <= target)
        if sample.tolerance_s:
            near = [(abs(t - target), t, i) for i, t in enumerate(times) if keys[i]]
            near = [c for c in near if c[0] <= sample.tolerance_s]
            frame = min(near)[2] if near else frame
        rows[frame] = rows.get(frame, Fraction(0)) + 1 / sample.fps
    return rows


def stream(
    sample: Sample, ticks: list[int], keys: list[bool], end: Fraction
) -> dict[int, Fraction]:
    """Rows by the streaming rule; checks what it promises about `held` on the way."""
    sampler = Sampler(sample)
    taken: list[int] = []
    available: set[int] = set()
    for i, (tick, key) in enumerate(zip(ticks, keys, strict=True)):
        available.add(i)
        new = sampler.push(tick * TIME_BASE, key)
        assert available.issuperset(new)
        taken += new
        available = sampler.held
    new = sampler.finish(end)
    assert available.issuperset(new)
    taken += new
    rows = dict(sampler.settle())
    assert taken == sorted(set(taken)) == list(rows)
    return rows


@st.composite
def videos(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Frame times in ms (runs of equal times, gaps, exact grid points) and sync flags."""
    steps = draw(
        st.lists(
            st.one_of(
                st.integers(0, 3),
                st.sampled_from([33, 34, 40, 100, 250, 500, 1000]),
                st.integers(4, 4000),
            ),
            max_size=40,
        )
    )
    ticks = [0, *np.cumsum(steps).tolist()] if steps else [0]
    keys = draw(st.lists(st.booleans(), min_size=len(ticks), max_size=len(ticks)))
    return ticks, [True, *keys[1:]]


@pytest.mark.parametrize("sample", SAMPLES, ids=sample_name)
@settings(max_examples=150, deadline=None)
@given(video=videos())
@example(video=([0, 0, 0, 4, 200, 200], [True, False, False, False, False, True]))
def test_stream_table_and_naive_loop_agree(
    sample: Sample, video: tuple[list[int], list[bool]]
) -> None:
    ticks, keys = video
    end = ticks[-1] * TIME_BASE + Fraction(1, 25)
    expected = naive(sample, ticks, keys, end)
    assert stream(sample, ticks, keys, end) == dict(sorted(expected.items()))
    taken = take(sample, np.array(ticks, np.int64), TIME_BASE, np.array(keys), end)
    assert taken.frame_index.tolist() == sorted(expected)
    assert taken.covers_s.tolist() == [float(expected[i]) for i in sorted(expected)]


@pytest.mark.parametrize("sample", SAMPLES, ids=sample_name)
def test_rows_cover_the_video_give_or_take_one_interval(sample: Sample) -> None:
    ticks = np.arange(0, 60_000, 40)
    keys = np.arange(len(ticks)) % 25 == 0
    taken = take(sample, ticks, TIME_BASE, keys, Fraction(60))
    interval = float(1 / sample.fps) if sample.fps else 0.0
    assert taken.covers_s.sum() == pytest.approx(60, abs=interval + 1e-9)


def test_a_long_gap_costs_no_loop_over_its_targets() -> None:
    year_ms = 365 * 24 * 3600 * 1000
    sample = Sample(kind="fps", fps=Fraction(30))
    sampler = Sampler(sample)
    assert sampler.push(Fraction(0), True) == []
    assert sampler.push(year_ms * TIME_BASE, True) == [0]
    taken = take(sample, np.array([0, year_ms]), TIME_BASE, np.array([True, True]), Fraction(0))
    assert taken.frame_index.tolist() == [0, 1]
    assert taken.covers_s[0] == year_ms / 1000


def test_times_beyond_64_bits_stay_exact() -> None:
    sample = Sample(kind="fps", fps=Fraction(30000, 1001))
    ticks = np.array([0, 2**61, 2**61 + 1])
    time_base = Fraction(1, 90_000)
    taken = take(sample, ticks, time_base, np.array([True] * 3), Fraction(0))
    at = [math.ceil(Fraction(30_000, 1001) * t * time_base) for t in ticks.tolist()]
    assert at[2] - at[1] <= 1 and at[0] == 0
    expected = [0, *([1] if at[2] > at[1] else [])]
    assert taken.frame_index.tolist() == expected
    assert taken.covers_s[0] == float(at[1] * Fraction(1001, 30_000))


def test_names_and_fingerprints_of_rules() -> None:
    half = Sample(kind="fps", fps=Fraction(1, 2))
    third = Sample(kind="fps", fps=Fraction(1), tolerance_s=Fraction(1, 3))
    tolerant = Sample(kind="fps", fps=Fraction(1), tolerance_s=Fraction("0.5"))
    rules = [*SAMPLES, half, third, tolerant]
    assert [sample_name(r) for r in rules] == [
        *["fps1", "fps30000-1001", "fps2-7", "fps2-tol0.25", "fps1-tol0.1", "fps25-2-tol0.04"],
        *["every3", "keyframes", "all", "fps1-2", "fps1-tol1-3", "fps1-tol0.5"],
    ]
    prints = {sampling_fingerprint(r) for r in rules}
    assert len(prints) == len(rules) and all(len(p) == 64 for p in prints)
    assert sampling_fingerprint(half) == sampling_fingerprint(
        Sample(kind="fps", fps=Fraction("0.5"))
    )


def clock_times(
    pts: list[int | None], rate: Fraction | None = Fraction(25)
) -> tuple[list[float], Clock]:
    clock = Clock(TIME_BASE, rate)
    return [float(clock.time(p, i)) for i, p in enumerate(pts)], clock


def test_time_counts_from_frame_0() -> None:
    assert clock_times([5000, 5040, 5080])[0] == [0, 0.04, 0.08]
    assert clock_times([-80, -40, 0])[0] == [0, 0.04, 0.08]


def test_small_steps_back_hold_the_clock() -> None:
    times, clock = clock_times([0, 80, 40, 120])
    assert times == [0, 0.08, 0.08, 0.12]
    assert clock.discontinuities == 0


def test_a_large_step_back_goes_on_one_frame_later() -> None:
    times, clock = clock_times([100_000, 100_040, 0, 40, 80])
    assert times == [0, 0.04, 0.08, 0.12, 0.16]
    assert clock.discontinuities == 1


def test_a_jump_forward_is_kept() -> None:
    assert clock_times([0, 40, 36_000_000])[0] == [0, 0.04, 36_000]


def test_missing_pts_fall_back_to_the_rate() -> None:
    times, clock = clock_times([None, None, None], Fraction(10))
    assert times == [0, 0.1, 0.2] and clock.missing_pts == 3
    assert clock_times([None, None], None)[0] == [0, 0.04]
    assert clock_times([None, 1000, 1040])[0] == [0, 0.04, 0.08]
