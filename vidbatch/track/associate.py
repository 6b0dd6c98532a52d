"""Which boxes of a video are the same thing: boxes in the order of time → track ids. Pure.

    frame at t:   tracks not seen since t - lost_s end
                  boxes of high score  ↔ tracks     best total similarity, above a gate
                  boxes of low score   ↔ the rest   they continue a track, they begin none
                  high ones left over               begin a track

The scheme of ByteTrack (Zhang et al. 2022) with every gate in seconds, so that frames may lie
at any distance. Similarity is the IoU with the box where the track is expected (motion), or
the cosine of the crops' embeddings and, for those that look alike, where the box is (appearance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vidbatch.data import Floats, Ints, Singles
from vidbatch.errors import UsageError
from vidbatch.track.rule import TrackWhat

SEMANTICS = 1
"""Part of every tracker's fingerprint: rises when the same boxes could get other tracks."""

_POSITION_NOISE = 0.05
"""Standard deviation of a detector's box, in widths and heights of the box."""

_ACCELERATION = 8.0
"""Standard deviation of what moves things, in widths and heights of the box per s² (swept from 1
to 32 on the made scenes: IDF1 at 8 fps 0.60 0.76 0.84 0.88 0.91 0.84)."""

_FIRST_SPEED = 2.0
"""Standard deviation of the speed of what was seen once, in widths and heights per second."""

_NEW_LOOK = 0.3
"""Weight of the newest embedding in what a track looks like."""

_APART = -1e6
"""Similarity of a pair that must not be matched."""

Matcher = Callable[[Floats], tuple[Ints, Ints]]
"""(T, M) similarities → rows and columns of the pairs with the greatest sum."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Boxes:
    """M boxes of one video, in the order of its frames."""

    frame_index: Ints
    """(M,)"""
    time_s: Floats
    """(M,)"""
    label_id: Ints
    """(M,)"""
    score: Singles
    """(M,)"""
    xyxy: Floats
    """(M, 4) of the upright frame, 0..1."""
    embedding: Singles
    """(M, D) of unit length; NaN where a box has none. (M, 0): motion alone."""


def load_matcher() -> Matcher:
    """The assignment solver. Raises UsageError: the extra that brings it is not installed."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise UsageError(
            f"tracking needs {error.name}, which is not installed here — nothing was written — "
            "pip install 'vidbatch[track]'"
        ) from error
    return lambda similarity: linear_sum_assignment(similarity, maximize=True)


class Linker:
    """Gives the boxes of one video their tracks, stretch by stretch. Deterministic.

    Args:
        what: settled (see `TrackWhat.settled`).
        match: of `load_matcher`.
    """

    def __init__(self, what: TrackWhat, match: Matcher) -> None:
        if what.lost_s is None:
            raise ValueError("the rule is not settled")
        self.what, self.match, self.lost_s = what, match, what.lost_s
        self.begun = 0
        """Tracks so far."""
        self._alive: list[_Track] = []

    def link(self, boxes: Boxes) -> Ints:
        """(M,) the track of each box: 1, 2, … by first appearance, 0 for none.

        Args:
            boxes: of frames after those of the call before.
        """
        ids = np.zeros(len(boxes.time_s), np.int64)
        high = boxes.score >= self.what.high_score
        for here in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(boxes.frame_index)) + 1):
            if len(here):
                self._see_frame(boxes, here[high[here]], here[~high[here]], ids)
        return ids

    def _see_frame(self, boxes: Boxes, high: Ints, low: Ints, ids: Ints) -> None:
        now_s = float(boxes.time_s[(high if len(high) else low)[0]])
        self._alive = [t for t in self._alive if now_s - t.seen_s <= self.lost_s]
        for track in self._alive:
            track.move_to(now_s)
        waiting = self._alive
        for chosen, gate in ((high, self.what.min_iou), (low, self.what.low_iou)):
            pairs = _pairs(waiting, boxes, chosen, gate, self.what, self.match)
            for row, column in pairs:
                waiting[row].see(boxes, int(chosen[column]))
                ids[chosen[column]] = waiting[row].id
            matched = {row for row, _ in pairs}
            waiting = [track for row, track in enumerate(waiting) if row not in matched]
        for i in high[ids[high] == 0]:
            self.begun += 1
            ids[i] = self.begun
            self._alive.append(_Track.begin(self.begun, boxes, int(i)))


@dataclass(slots=True, eq=False)
class _Track:
    """One thing that is followed: where it is expected and what it looks like."""

    id: int
    label_id: int
    filter: Any
    """cv2.KalmanFilter of (cx, cy, w, h, vx, vy); the size changes, but not by a trend."""
    time_s: float
    seen_s: float
    look: Singles
    box: Floats = field(default_factory=lambda: np.zeros(4))
    """(4,) where it is expected now: x_min, y_min, x_max, y_max."""

    @staticmethod
    def begin(track_id: int, boxes: Boxes, i: int) -> _Track:
        import cv2

        kalman = cv2.KalmanFilter(6, 4, 0, cv2.CV_64F)
        measured = _centre(boxes.xyxy[i])
        scale = np.tile(measured[2:], 3)
        spread = scale * np.array([*[_POSITION_NOISE] * 4, *[_FIRST_SPEED] * 2])
        kalman.measurementMatrix = np.eye(4, 6)
        kalman.statePost = np.concatenate([measured, np.zeros(2)])[:, None]
        kalman.errorCovPost = np.diag(spread**2)
        now_s = float(boxes.time_s[i])
        return _Track(track_id, int(boxes.label_id[i]), kalman, now_s, now_s, boxes.embedding[i])

    def move_to(self, now_s: float) -> None:
        """Expects the box at a later time: constant speed, random acceleration."""
        dt_s = max(now_s - self.time_s, 0.0)  # damaged streams step back
        self.time_s = now_s
        step = np.eye(6)
        step[0, 4] = step[1, 5] = dt_s
        width, height = np.maximum(self.filter.statePost[2:4, 0], 1e-4)
        noise = np.zeros((6, 6))
        for place, speed, size in ((0, 4, width), (1, 5, height)):
            push = (_ACCELERATION * size) ** 2
            noise[place, place] = push * dt_s**4 / 4
            noise[place, speed] = noise[speed, place] = push * dt_s**3 / 2
            noise[speed, speed] = push * dt_s**2
            noise[place + 2, place + 2] = (_POSITION_NOISE * size) ** 2 * dt_s * 8
        self.filter.transitionMatrix, self.filter.processNoiseCov = step, noise
        cx, cy, w, h = self.filter.predict()[:4, 0]
        self.box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])

    def see(self, boxes: Boxes, i: int) -> None:
        """Takes box `i` for its own."""
        measured = _centre(boxes.xyxy[i])
        noise = _POSITION_NOISE * np.tile(measured[2:], 2)
        self.filter.measurementNoiseCov = np.diag(np.maximum(noise, 1e-5) ** 2)
        self.filter.correct(measured[:, None])
        self.seen_s = float(boxes.time_s[i])
        fresh = boxes.embedding[i]
        if not np.isnan(self.look).any() and not np.isnan(fresh).any():
            mixed = (1 - _NEW_LOOK) * self.look + _NEW_LOOK * fresh
            fresh = mixed / max(float(np.linalg.norm(mixed)), 1e-12)
        elif np.isnan(fresh).any():
            fresh = self.look
        self.look = fresh


def _pairs(
    tracks: list[_Track], boxes: Boxes, chosen: Ints, gate: float, what: TrackWhat, match: Matcher
) -> list[tuple[int, int]]:
    """(row of `tracks`, position in `chosen`) of those that belong together; `gate`: least IoU."""
    if not tracks or not len(chosen):
        return []
    expected = np.stack([track.box for track in tracks])
    iou, giou = _overlap(expected, boxes.xyxy[chosen])
    if boxes.embedding.shape[1]:
        looks = np.stack([track.look for track in tracks])
        cosine = looks.astype(np.float64) @ boxes.embedding[chosen].T.astype(np.float64)
        similarity = np.nan_to_num(cosine) + what.position_weight * (1 + giou) / 2
        fresh = np.array([track.time_s - track.seen_s <= 2 / what.min_fps for track in tracks])
        # where frames lie close, the place is enough: a turned head looks like another one
        allowed = (cosine >= what.min_cosine) | (fresh[:, None] & (iou >= what.low_iou))
    else:
        similarity, allowed = iou, iou >= gate
    labels = np.array([track.label_id for track in tracks])
    allowed &= labels[:, None] == boxes.label_id[chosen][None, :]
    rows, columns = match(np.where(allowed, similarity, _APART))
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if allowed[r, c]]


def _centre(xyxy: Floats) -> Floats:
    """x_min, y_min, x_max, y_max → cx, cy, w, h."""
    x_min, y_min, x_max, y_max = xyxy
    return np.array([(x_min + x_max) / 2, (y_min + y_max) / 2, x_max - x_min, y_max - y_min])


def _overlap(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """(T, 4), (M, 4) → IoU 0..1 and generalised IoU -1..1 (also tells how far apart), (T, M)."""
    size_a, size_b = (np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=1) for x in (a, b))
    a, b = a[:, None], b[None, :]
    inner = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    outer = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    both, hull = np.prod(np.maximum(inner, 0), axis=2), np.prod(outer, axis=2)
    either = np.maximum(size_a[:, None] + size_b[None, :] - both, 1e-12)
    iou = both / either
    return iou, iou - np.maximum(hull - either, 0) / np.maximum(hull, 1e-12)
