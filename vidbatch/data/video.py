"""Of the archive: videos, sampling rules, geometries, clips, tasks; how identities are hashed."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Any, Literal

FRAMES = "frames"
"""The output that every run writes: the tables `videos` and `frames`."""


_canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def digest(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value` (sorted keys, no spaces, UTF-8)."""
    text = _canonical(value)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _base32(value: Any, length: int) -> str:
    """The first base32 characters of the digest, in lower case."""
    return base64.b32encode(bytes.fromhex(digest(value)))[:length].decode("ascii").lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One version of one object of the archive, as the listing shows it."""

    uri: str
    """scheme://bucket/key unquoted, or an absolute local path."""
    version: str
    """The etag without quotes, else "<size>-<mtime in ns>"."""
    size_bytes: int
    modified_at: datetime
    listed_at: datetime
    captured_at: datetime | None
    """UTC, null if unknown."""
    captured_from: Literal["key", "container", "modified"]
    dt: str
    """The partition: the local date (date rule's time zone) of captured_at, YYYY-MM-DD."""
    source: str
    """The camera or channel; "" when the date rule names none."""
    key_fields: str = "{}"
    """JSON object of the date pattern's other named groups."""
    _id: str = field(default="", init=False, repr=False, compare=False)

    @property
    def video_id(self) -> str:
        """20 base32 characters of the hash of (uri, version)."""
        if not self._id:  # asked for again and again, of a million videos
            object.__setattr__(self, "_id", _base32([self.uri, self.version], 20))
        return self._id


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What the headers of a video say."""

    container: str
    codec: str
    width_px: int
    """Upright, after rotation."""
    height_px: int
    rotation_deg: int
    """Clockwise turn that makes the coded picture upright: 0, 90, 180, 270."""
    time_base: Fraction
    rate: Fraction | None
    """Average frame rate as the header says."""
    start_s: float | None
    """The container's clock at frame 0."""
    duration_s: float | None
    frame_count: int | None
    """Null if the header does not say."""
    audio_codec: str | None
    audio_rate_hz: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The rule that picks frames, anchored at the first frame of the video."""

    kind: Literal["fps", "every", "keyframes", "all"]
    fps: Fraction | None = None
    every: int | None = None
    tolerance_s: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if (self.kind == "fps") != (self.fps is not None) or (self.kind == "every") != (
            self.every is not None
        ):
            raise ValueError(f"{self!r}: fps goes with kind 'fps', every with kind 'every'")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps {self.fps} is not within (0, 1000]")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every {self.every} is less than 1")
        if self.tolerance_s and (
            self.fps is None or not 0 < self.tolerance_s <= 1 / (2 * self.fps)
        ):
            raise ValueError(f"tolerance_s {self.tolerance_s} is not within (0, 1/(2 fps)]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a frame is brought to the size a model wants; the decoder makes one array per geometry.

    `stretch` ignores the aspect ratio, `crop` scales the short side and cuts the centre,
    `letterbox` scales the long side and pads the right and bottom with `pad` (grey level).
    Width 0 or height 0 are not allowed; frames are RGB, upright, uint8.
    """

    width_px: int
    height_px: int
    fit: Literal["stretch", "crop", "letterbox"] = "stretch"
    interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear"
    pad: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.width_px <= 8192 and 1 <= self.height_px <= 8192):
            raise ValueError(f"geometry {self.width_px}x{self.height_px} is not within 1..8192")

    @property
    def key(self) -> str:
        """Names the geometry in mappings: equal keys, equal pixels."""
        pad = f"-pad{self.pad}" if self.fit == "letterbox" else ""
        return f"{self.width_px}x{self.height_px}-{self.fit}-{self.interpolation}{pad}"

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame (H·W·3)."""
        return self.width_px * self.height_px * 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """A half-open range of keyframes of one video; [0, None) is all of it.

    Clips of a video tile it. Cut once per sampling rule, for ever, and only where the packet
    table can be trusted; `keyframe` counts the sync packets in decode order.
    """

    video: Video
    first_keyframe: int = 0
    end_keyframe: int | None = None
    start_s: float = 0.0
    """Time of the clip's first frame from frame 0 of the video."""
    end_s: float | None = None
    """Time of the first frame shown after it; null at the end of the video."""
    start_frame: int = 0
    end_frame: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the clip is the whole video."""
        return self.first_keyframe == 0 and self.end_keyframe is None

    def identity(self) -> list[Any]:
        """What the task id hashes."""
        return [self.video.video_id, self.first_keyframe, self.end_keyframe]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRange:
    """Where one clip of a probed video begins and ends, before it belongs to a Video."""

    first_keyframe: int
    end_keyframe: int | None
    start_s: float
    end_s: float | None
    start_frame: int
    end_frame: int | None
    packet_bytes: int
    """Media bytes of its packets."""
    frames: int
    """Displayable frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Some clips of one day: the unit of scheduling, retry and commit. Names no model."""

    clips: tuple[Clip, ...]
    sampling: str
    """Fingerprint of the sampling rule."""
    generation: int = 0
    output: str | None = None
    """Fingerprint of the one output a retry is for; null for a first-generation task."""
    cost_s: float = 0.0
    """Planned core seconds."""
    _id: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.clips or len({c.video.dt for c in self.clips}) != 1:
            raise ValueError("a task has at least one clip and all its clips share one dt")

    @property
    def task_id(self) -> str:
        """26 base32 characters; the same clips, rule and generation give the same id for ever."""
        if not self._id:
            clips = sorted(c.identity() for c in self.clips)
            value = [self.sampling, clips, self.generation, self.output]
            object.__setattr__(self, "_id", _base32(value, 26))
        return self._id

    @property
    def dt(self) -> str:
        """The one partition date of all its clips."""
        return self.clips[0].video.dt


def fit_box(geometry: Geometry, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """Where an upright frame lands: (scaled_w, scaled_h, offset_x, offset_y) in pixels.

    The whole frame is scaled to scaled_w x scaled_h, then the model's picture begins at the offset
    of the scaled frame. A 1920x1080 frame in 224x224:

        stretch    224 224   0 0    both axes on their own
        crop       398 224  87 0    the short side fits, the centre is cut
        letterbox  224 126   0 0    the long side fits, content top-left, padded right and below

    The free side is rounded down in a crop, as the processors of vision models do, and half up, to
    at least 1 px, in a letterbox.
    """
    w, h = geometry.width_px, geometry.height_px
    if geometry.fit == "stretch":
        return w, h, 0, 0
    letterbox = geometry.fit == "letterbox"
    half_w, half_h = (width_px, height_px) if letterbox else (0, 0)
    if (width_px * h >= height_px * w) == letterbox:  # the width fits, the height follows
        scaled_w, scaled_h = w, max(1, (2 * height_px * w + half_w) // (2 * width_px))
    else:
        scaled_w, scaled_h = max(1, (2 * width_px * h + half_h) // (2 * height_px)), h
    if letterbox:
        return scaled_w, scaled_h, 0, 0
    return scaled_w, scaled_h, (scaled_w - w) // 2, (scaled_h - h) // 2
