"""The nouns that flow from stage to stage: frozen, validated, units in names.

Knows nothing of stores, Ray, PyAV or torch. Shapes: N frames, H W C pixels, M rows, K classes,
D embedding, F features. Intervals are half-open. Identity is content: see `digest`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

FRAMES = "frames"
"""The output that every run writes: the tables `videos` and `frames`."""


def digest(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value` (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


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

    @property
    def video_id(self) -> str:
        """20 base32 characters of the hash of (uri, version)."""
        raw = bytes.fromhex(digest([self.uri, self.version]))
        return base64.b32encode(raw)[:20].decode("ascii").lower()


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
        if self.tolerance_s and (self.fps is None or not 0 < self.tolerance_s <= 1 / (2 * self.fps)):
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

    def __post_init__(self) -> None:
        if not self.clips or len({c.video.dt for c in self.clips}) != 1:
            raise ValueError("a task has at least one clip and all its clips share one dt")

    @property
    def task_id(self) -> str:
        """26 base32 characters; the same clips, rule and generation give the same id for ever."""
        clips = sorted(c.identity() for c in self.clips)
        raw = bytes.fromhex(digest([self.sampling, clips, self.generation, self.output]))
        return base64.b32encode(raw)[:26].decode("ascii").lower()

    @property
    def dt(self) -> str:
        """The one partition date of all its clips."""
        return self.clips[0].video.dt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frames:
    """A chunk of sampled frames of one clip, in display order.

    Item 0 may be a *context* frame: the sampled frame before the chunk's first one, decoded for
    models with `context: 1`; it is no row. Only the first chunk of a video has none.
    """

    frame_index: Ints
    """(N,) ordinal in the video."""
    pts: Ints
    """(N,); meaningless where not has_pts."""
    has_pts: Bools
    """(N,)"""
    time_s: Floats
    """(N,) from frame 0."""
    covers_s: Floats
    """(N,) seconds of the video each row stands for."""
    is_keyframe: Bools
    is_corrupt: Bools
    source_px: Ints
    """(N, 2) upright width and height of the frame before scaling."""
    pixels: Mapping[str, Pixels]
    """Geometry key → (N, H, W, 3) uint8 RGB, C-contiguous."""
    context: bool = False
    """Whether item 0 is a context frame."""

    def __post_init__(self) -> None:
        n = len(self.frame_index)
        for name in ("pts", "has_pts", "time_s", "covers_s", "is_keyframe", "is_corrupt", "source_px"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} items, frame_index {n}")
        for key, array in self.pixels.items():
            if array.dtype != np.uint8 or array.ndim != 4 or len(array) != n or array.shape[3] != 3:
                raise ValueError(f"pixels[{key}] is {array.dtype}{array.shape}, not uint8({n},H,W,3)")

    def __len__(self) -> int:
        return len(self.frame_index)

    def __repr__(self) -> str:
        shapes = {k: v.shape for k, v in self.pixels.items()}
        first = self.frame_index[0] if len(self) else "-"
        return f"Frames(n={len(self)}, first={first}, context={self.context}, pixels={shapes})"

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return sum(a.nbytes for a in self.pixels.values())

    @property
    def num_rows(self) -> int:
        """Frames that become rows (all but the context frame)."""
        return len(self) - int(self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipEnd:
    """How the decoding of a clip went; the last thing a decode yields."""

    status: Literal["ok", "partial"]
    reason: str | None
    """Null when ok, else a short sentence with numbers."""
    kind: str | None
    """Null when ok, else a stable word (`truncated`, `corrupt`, `count_mismatch`, …)."""
    start_s: float
    end_s: float
    start_frame: int
    end_frame: int
    """Frame ordinals [start, end) that the clip turned out to hold."""
    frames_decoded: int
    decode_errors: int
    corrupt_frames: int
    fallback: str | None
    """Null, or why decoding was sequential where it could have skipped."""


DecodeEvent = VideoInfo | Frames | ClipEnd
"""A decode yields one VideoInfo, any number of Frames, one ClipEnd; or raises MediaError."""


class ByteSource(Protocol):
    """Random access to the bytes of one pinned object version."""

    size_bytes: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, min(offset+length, size)); short only at the end of the object.

        Raises:
            StoreError: the bytes cannot be had (SourceChanged: another version is there now).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What one decode may use."""

    max_pixels: int = 134_217_728
    """Pixels of one coded frame (width x height)."""
    chunk_bytes: int = 16 * 2**20
    """Upper bound of the pixels of one Frames chunk (one frame may exceed it alone)."""
    chunk_frames: int = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelRows:
    """Labels kept, M rows; `item` is the position of the frame in the batch or chunk."""

    item: Ints
    label_id: Ints
    score: Singles


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoxRows:
    """Boxes found, M rows, coordinates 0..1 of the upright frame; any order."""

    item: Ints
    label_id: Ints
    score: Singles
    xyxy: Singles
    """(M, 4): x_min, y_min, x_max, y_max."""


_NO_ROWS: dict[str, Any] = {
    "item": np.zeros(0, np.int64),
    "label_id": np.zeros(0, np.int64),
    "score": np.zeros(0, np.float32),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What one model says of N items; zero-width arrays where it has nothing of a kind."""

    n: int
    embeddings: Singles = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(N, D), or (N, 0) / (0, 0) for a model without embeddings."""
    features: Singles = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(N, F) in the order of spec.features; NaN = no row."""
    labels: LabelRows = field(default_factory=lambda: LabelRows(**_NO_ROWS))
    boxes: BoxRows = field(
        default_factory=lambda: BoxRows(**_NO_ROWS, xyxy=np.zeros((0, 4), np.float32))
    )

    def __post_init__(self) -> None:
        for name in ("embeddings", "features"):
            array = getattr(self, name)
            if array.ndim != 2 or (array.shape[1] and len(array) != self.n):
                raise ValueError(f"{name} is {array.shape}, expected ({self.n}, width)")
        for name in ("labels", "boxes"):
            rows = getattr(self, name)
            m = len(rows.item)
            if len(rows.label_id) != m or len(rows.score) != m:
                raise ValueError(f"{name}: item, label_id and score differ in length")
            if m and not (0 <= int(rows.item.min()) and int(rows.item.max()) < self.n):
                raise ValueError(f"{name}.item is outside 0..{self.n - 1}")
        if self.boxes.xyxy.shape != (len(self.boxes.item), 4):
            raise ValueError(f"boxes.xyxy is {self.boxes.xyxy.shape}")

    def __repr__(self) -> str:
        return (
            f"Predictions(n={self.n}, embeddings={self.embeddings.shape}, features="
            f"{self.features.shape}, labels={len(self.labels.item)}, boxes={len(self.boxes.item)})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is known of a model without loading it."""

    name: str
    """`[a-z][a-z0-9_-]*`, never `frames`."""
    version: str
    adapter: str
    kind: str
    geometry: Geometry
    gives: tuple[Literal["labels", "embeddings", "detections", "features"], ...]
    """The tables it fills, parents first."""
    labels: tuple[str, ...] = ()
    """label_id → label."""
    features: tuple[str, ...] = ()
    dim: int = 0
    normalised: bool = True
    context: Literal[0, 1] = 0
    """1: each item comes with the sampled frame before it."""
    batch: int = 64
    """How: frames at a time."""
    thresholds: str = "{}"
    """JSON of floors and top-k, for the table `models`."""
    weights_sha256: tuple[tuple[str, str], ...] = ()
    """(file, sha256) pairs."""
    config: str = "{}"
    """JSON of the whole `what:` block."""
    fingerprint: str = ""
    """Model fingerprint, 64 hex digits: changes when and only when rows could."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What a model gets: B frames of one geometry on its device (B ≤ how.batch)."""

    pixels: Any
    """torch uint8 (B, H, W, 3), RGB."""
    previous: Any
    """torch uint8 (B, H, W, 3) for models with context 1, else None."""
    has_previous: Any
    """torch bool (B,) for models with context 1 (False: first sample of a video), else None."""
    source_px: Ints
    """(B, 2) upright width, height before scaling, for undoing crop and letterbox."""


class Model(Protocol):
    """A loaded-on-demand model: `load` once per process, `predict` per batch, `close` at the end."""

    @property
    def spec(self) -> ModelSpec:
        """Facts that need no weights in memory."""
        ...

    def load(self, device: str) -> None:
        """Brings weights to `device` ("cpu", "cuda:0"). Raises ModelError."""
        ...

    def predict(self, batch: Batch) -> Predictions:
        """Answers for every item of the batch; pure: the same batch gives the same answer."""
        ...

    def close(self) -> None:
        """Frees what `load` took."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One thing a task commits: a model under a grid, or `frames`."""

    name: str
    """`frames`, or the model's name."""
    partition: str
    """The value of `model=`: `frames`, or `<name>-<version>.<8 hex of fingerprint>`."""
    fingerprint: str
    """64 hex digits of (model fingerprint, grid); names the commits folder."""
    spec: ModelSpec | None = None
    """Null for `frames`."""


Status = Literal["ok", "partial", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one clip ended in one output: a row of `coverage`, and of `failures` unless ok."""

    clip: Clip
    status: Status
    start_s: float
    end_s: float
    start_frame: int
    end_frame: int
    frames: int
    """Rows sampled for the clip (0 when failed)."""
    frames_decoded: int
    decode_errors: int
    corrupt_frames: int
    fallback: str | None
    device: str
    reason: str | None = None
    """Null when ok: a redacted sentence, ≤ 500 characters."""
    stage: str | None = None
    """Null when ok: read, probe, decode, predict, write."""
    kind: str | None = None
    advice: str | None = None
    attempts: int = 1
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception turned into facts: what a row of `failures` and a task report need."""

    stage: str
    kind: str
    message: str
    advice: str
    retryable: bool


def fit_box(geometry: Geometry, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """Where an upright width x height frame lands: (scaled_w, scaled_h, offset_x, offset_y) in pixels.

    The whole frame is scaled to scaled_w x scaled_h, then the model's picture begins at the offset
    of the scaled frame. A 1920x1080 frame in 224x224:

        stretch    224 224   0 0    both axes on their own
        crop       398 224  87 0    the short side fits, the centre is cut
        letterbox  224 126   0 0    the long side fits, content top-left, padded right and below

    The free side is rounded half up, to at least 1 px.
    """
    w, h = geometry.width_px, geometry.height_px
    if geometry.fit == "stretch":
        return w, h, 0, 0
    wider = width_px * h >= height_px * w
    if wider == (geometry.fit == "letterbox"):  # the width fits, the height follows
        scaled_w, scaled_h = w, max(1, (2 * height_px * w + width_px) // (2 * width_px))
    else:
        scaled_w, scaled_h = max(1, (2 * width_px * h + height_px) // (2 * height_px)), h
    if geometry.fit == "letterbox":
        return scaled_w, scaled_h, 0, 0
    return scaled_w, scaled_h, (scaled_w - w) // 2, (scaled_h - h) // 2


def chunk_rows(frames: Frames) -> slice:
    """The items of a chunk that are rows: all, or all but the context frame."""
    return slice(int(frames.context), len(frames))


def table_names(specs: Sequence[ModelSpec]) -> tuple[str, ...]:
    """The distinct result tables of some models, in first-seen order."""
    return tuple(dict.fromkeys(name for spec in specs for name in spec.gives))
