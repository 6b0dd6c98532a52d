"""Which instants, which frame for each: pure arithmetic on the times of frames.

    time   0 s        1 s        2 s        3 s
    target 0          1          2          3          fps 1: target k is the instant k / fps
    frame  |a   |b   |c   |d   |e        |f            on screen at 0 1 2 3: a c e f

The frame of a target is the last one whose time ≤ the target; a frame on screen at several targets
is one row, which stands for (covers) all of them. Frame i answers the targets in
[time_i, time_i+1), so it is taken iff ceil(fps·time_i) < ceil(fps·time_i+1); the last frame answers
only a target equal to its own time. With `tolerance_s` ≤ half the interval a target takes the
nearest keyframe if that is near enough (tie: the earlier), else the frame on screen. Everything is
anchored at frame 0 of the video and exact (integers and Fractions), so clips and whole videos give
the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from vidbatch.data import Bools, Floats, Ints, Sample, digest

DECODE_SEMANTICS = 1
"""Raised when the same rule and video would give other rows than before (index, time, pixels)."""

DEFAULT_RATE = Fraction(25)
"""Frames a second where neither timestamps nor the header say."""
MAX_STEP_BACK_S = 1
"""A larger step back in time is a discontinuity: the clock goes on; a smaller one is held."""

_INT64_SAFE = 2**62


def sample_name(sample: Sample) -> str:
    """The readable part of the partition value: fps1, fps30000-1001, fps1-tol0.5, every30, all."""
    if sample.kind == "fps" and sample.fps is not None:
        tolerance = f"-tol{_number(sample.tolerance_s)}" if sample.tolerance_s else ""
        return f"fps{str(sample.fps).replace('/', '-')}{tolerance}"
    if sample.kind == "every":
        return f"every{sample.every}"
    return sample.kind


def sampling_fingerprint(sample: Sample) -> str:
    """64 hex digits: the rule and the version of what decoding means."""
    rule = [sample.kind, str(sample.fps), sample.every, str(sample.tolerance_s)]
    return digest({"decode": DECODE_SEMANTICS, "rule": rule})


def _number(value: Fraction) -> str:
    exact = Fraction(repr(float(value)))
    return repr(float(value)) if exact == value else str(value).replace("/", "-")


class Clock:
    """Gives every frame, in display order, its exact time from frame 0; never steps back.

    Time is (pts − pts of frame 0) × time base; where a pts is missing, frame_index ÷ rate.
    """

    def __init__(
        self, time_base: Fraction, rate: Fraction | None, origin_pts: int | None = None
    ) -> None:
        self._time_base = time_base
        self._rate = rate or DEFAULT_RATE
        self._origin = None if origin_pts is None else origin_pts * time_base
        self._step: Fraction | None = None
        self.largest = Fraction(0)
        """Time of the latest frame."""
        self.start: Fraction = self._origin or Fraction(0)
        """Frame 0 on the container's clock."""
        self.missing_pts = 0
        self.discontinuities = 0

    @property
    def frame_s(self) -> Fraction:
        """How long a frame lasts: the latest step forward, else 1 ÷ rate."""
        return self._step or 1 / self._rate

    def time(self, pts: int | None, frame_index: int) -> Fraction:
        """Time in seconds of the next frame."""
        if pts is None:
            self.missing_pts += 1
            time = frame_index / self._rate
        else:
            clock = pts * self._time_base
            if self._origin is None:
                self._origin = self.start = clock - frame_index / self._rate
            time = clock - self._origin
            if time < self.largest - MAX_STEP_BACK_S:
                self.discontinuities += 1
                time = self.largest + self.frame_s
                self._origin = clock - time
        if time > self.largest:
            self._step = time - self.largest
            self.largest = time
        return self.largest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """The rows a rule takes of one video, in display order."""

    frame_index: Ints
    covers_s: Floats
    """Seconds of the video that each row stands for."""


def take(sample: Sample, ticks: Ints, time_base: Fraction, keys: Bools, end: Fraction) -> Taken:
    """Applies the rule to a whole video whose times are all known: closed form, no loop.

    Args:
        ticks: (N,) (pts − pts of frame 0) of every frame in display order, not falling.
        time_base: Seconds a tick.
        keys: (N,) sync flags in display order.
        end: Time at which the last frame leaves the screen.
    """
    if sample.kind == "fps" and sample.fps is not None:
        counts = _count_targets(sample.fps, sample.tolerance_s, ticks, time_base, keys)
        index = np.flatnonzero(counts).astype(np.int64)
        per_target = np.array([float(int(n) / sample.fps) for n in counts[index]])
        return Taken(frame_index=index, covers_s=per_target.astype(np.float64))
    if sample.kind == "keyframes":
        index = np.flatnonzero(keys).astype(np.int64)
    else:
        index = np.arange(0, len(ticks), sample.every or 1, dtype=np.int64)
    times = [int(t) * time_base for t in ticks[index]]
    covers = [float(b - a) for a, b in zip(times, [*times, end][1:], strict=True)]  # also of none
    return Taken(frame_index=index, covers_s=np.array(covers, np.float64))


def _count_targets(
    fps: Fraction, tolerance_s: Fraction, ticks: Ints, time_base: Fraction, keys: Bools
) -> Any:
    """(N,) integers: how many targets each frame answers; times in units of interval / `per`."""
    n = len(ticks)
    if n == 0:
        return np.zeros(0, np.int64)
    scale = fps * time_base
    reach = fps * tolerance_s * scale.denominator
    unit = scale.numerator * reach.denominator
    per = scale.denominator * reach.denominator
    near = reach.numerator
    big = (int(ticks[-1]) + 1) * unit + per >= _INT64_SAFE
    at = ticks.astype(object) * unit if big else ticks.astype(np.int64) * unit
    first = -(-at // per)
    after = np.append(first[1:], at[-1] // per + 1)
    counts = np.maximum(after - first, 0)
    if not tolerance_s or not keys.any():
        return counts
    order = np.arange(n)
    # The keyframe at or before frame i (the earliest of several with one time), and the next one.
    key_at = np.flatnonzero(keys)
    distinct = key_at[np.append(True, at[key_at][1:] != at[key_at][:-1])]
    before = np.searchsorted(distinct, order, side="right") - 1
    following = np.searchsorted(key_at, order, side="right")
    for i in np.flatnonzero(counts):
        low, high = int(first[i]) * per, (int(after[i]) - 1) * per
        nearest: dict[int, tuple[int, int]] = {}
        if before[i] >= 0:
            key = int(distinct[before[i]])
            nearest[low] = (low - int(at[key]), key)
        if following[i] < len(key_at):
            key = int(key_at[following[i]])
            candidate = (int(at[key]) - high, key)
            if high not in nearest or candidate[0] < nearest[high][0]:
                nearest[high] = candidate
        for distance, key in nearest.values():
            if distance <= near:
                counts[i] -= 1
                counts[key] += 1
    return counts


class _Waiting(NamedTuple):
    """A target whose answer may still be a keyframe that comes within `limit` seconds after it."""

    target: Fraction
    fallback: int
    limit: Fraction
    beaten: bool
    """Whether the fallback is a keyframe as near as `limit`: it wins a tie."""


class Sampler:
    """The same rule for frames that arrive one by one: decides with the least look-ahead.

    `push` every frame in display order; it returns the indices newly known to be rows. `held` are
    the frames that may still become one. `settle` returns rows whose `covers_s` is now final.
    """

    def __init__(self, sample: Sample, first_index: int = 0) -> None:
        self._sample = sample
        self._next = first_index
        self._last: tuple[int, Fraction] | None = None
        self._key: tuple[int, Fraction] | None = None
        self._waiting: _Waiting | None = None
        self._open: tuple[int, Fraction, int] | None = None
        self._settled: list[tuple[int, Fraction]] = []

    @property
    def held(self) -> set[int]:
        """Indices that may still be taken although `push` did not name them yet."""
        held = set[int]()
        if self._sample.kind == "fps" and self._last is not None:
            held.add(self._last[0])
            tolerance = self._sample.tolerance_s
            if tolerance and self._key is not None and self._last[1] - self._key[1] <= tolerance:
                held.add(self._key[0])
            if self._waiting is not None:
                held.add(self._waiting.fallback)
        return held

    def push(self, time: Fraction, is_keyframe: bool) -> list[int]:
        """Takes note of the next frame; returns indices that are now rows (each once, rising)."""
        index = self._next
        self._next += 1
        taken: list[int] = []
        if self._sample.kind == "fps":
            if self._last is not None:
                self._answer(self._last, index, time, is_keyframe, taken)
            self._last = (index, time)
            if is_keyframe and (self._key is None or time > self._key[1]):
                self._key = (index, time)
        elif (
            self._sample.kind == "all"
            or (self._sample.kind == "every" and index % (self._sample.every or 1) == 0)
            or (self._sample.kind == "keyframes" and is_keyframe)
        ):
            self._assign(index, time, 0, taken)
        return taken

    def finish(self, end: Fraction) -> list[int]:
        """No frame comes any more; `end` is when the last one leaves the screen."""
        taken: list[int] = []
        if self._sample.kind == "fps" and self._sample.fps is not None and self._last is not None:
            index, time = self._last
            if self._waiting is not None:
                self._assign(self._waiting.fallback, time, 1, taken)
            if (self._sample.fps * time).denominator == 1:
                distance, key = self._nearest_before(time)
                tolerance = self._sample.tolerance_s
                near = tolerance and distance is not None and distance <= tolerance
                self._assign(key if near else index, time, 1, taken)
        self._last = self._waiting = None
        self._close(end)
        return taken

    def settle(self) -> list[tuple[int, Fraction]]:
        """Rows with their final covers_s, in order, each once."""
        settled, self._settled = self._settled, []
        return settled

    def _nearest_before(self, target: Fraction) -> tuple[Fraction | None, int]:
        return (target - self._key[1], self._key[0]) if self._key is not None else (None, -1)

    def _answer(
        self, shown: tuple[int, Fraction], index: int, time: Fraction, key: bool, taken: list[int]
    ) -> None:
        """Assigns the targets in [time of `shown`, time of frame `index`)."""
        fps, tolerance = self._sample.fps or DEFAULT_RATE, self._sample.tolerance_s
        if self._waiting is not None:
            self._resolve(self._waiting, index, time, key, taken)
        low, high = math.ceil(fps * shown[1]), math.ceil(fps * time) - 1
        if high < low:
            return
        if not tolerance:
            self._assign(shown[0], time, high - low + 1, taken)
            return
        # tolerance_s is at most half an interval: only the first target can be near the keyframe
        # before it, and only the last one near the keyframe that may follow.
        distance, before = self._nearest_before(low / fps)
        near = distance is not None and distance <= tolerance
        first = before if near else shown[0]
        if high == low:
            waiting = _Waiting(low / fps, first, distance if near and distance else tolerance, near)
            if near and not distance:
                self._assign(first, time, 1, taken)
                return
        else:
            self._assign(first, time, 1, taken)
            if high - low > 1:
                self._assign(shown[0], time, high - low - 1, taken)
            waiting = _Waiting(high / fps, shown[0], tolerance, False)
        self._resolve(waiting, index, time, key, taken)

    def _resolve(
        self, waiting: _Waiting, index: int, time: Fraction, key: bool, taken: list[int]
    ) -> None:
        """Gives a target to frame `index`, to its fallback, or lets it wait for a keyframe."""
        distance = time - waiting.target
        near = distance < waiting.limit or (distance == waiting.limit and not waiting.beaten)
        if key and near:
            self._assign(index, time, 1, taken)
        elif key or not near:
            self._assign(waiting.fallback, time, 1, taken)
        else:
            self._waiting = waiting
            return
        self._waiting = None

    def _assign(self, index: int, time: Fraction, targets: int, taken: list[int]) -> None:
        if self._open is not None and self._open[0] == index:
            self._open = (index, self._open[1], self._open[2] + targets)
            return
        self._close(time)
        self._open = (index, time, targets)
        taken.append(index)

    def _close(self, until: Fraction) -> None:
        if self._open is not None:
            index, time, targets = self._open
            covers = targets / self._sample.fps if self._sample.fps else until - time
            self._settled.append((index, covers))
            self._open = None
