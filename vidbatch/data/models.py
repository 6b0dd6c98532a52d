"""Of models and outputs: what goes into a model, what it says, how a clip ended in an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from vidbatch.data.frames import AudioGrid, Ints, Singles
from vidbatch.data.video import Clip, Geometry


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskRows:
    """Classes found in frames, M rows: at most one per item and class."""

    item: Ints
    label_id: Ints
    area: Singles
    """Share of the upright frame, 0..1."""
    rle: tuple[bytes | None, ...]
    """COCO's compressed run lengths of the mask, or null."""
    size_px: Ints
    """(M, 2) width and height of that mask: what the model saw of the frame, at its own size."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Crops:
    """What the answers of a model on crops are of: M boxes of its parent model, by item."""

    item: Ints
    """(M,)"""
    detection: Ints
    """(M,) ordinal of the box among the item's, by falling score: its detection_id."""


_NO_ROWS: dict[str, Any] = {
    "item": np.zeros(0, np.int64),
    "label_id": np.zeros(0, np.int64),
    "score": np.zeros(0, np.float32),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What one model says of N items; zero-width arrays where it has nothing of a kind.

    Items are frames, windows or sound windows, as the chunk has them. A model on crops
    answers for M crops of the N items: `crops` says which, and wherever (N, …) or `item` stands
    below, crops are meant.
    """

    n: int
    crops: Crops | None = None
    embeddings: Singles = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(N, D), or (N, 0) / (0, 0) for a model without embeddings."""
    features: Singles = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """(N, F) in the order of spec.features; NaN = no row."""
    labels: LabelRows = field(default_factory=lambda: LabelRows(**_NO_ROWS))
    boxes: BoxRows = field(
        default_factory=lambda: BoxRows(**_NO_ROWS, xyxy=np.zeros((0, 4), np.float32))
    )
    masks: MaskRows = field(
        default_factory=lambda: MaskRows(
            item=_NO_ROWS["item"],
            label_id=_NO_ROWS["label_id"],
            area=_NO_ROWS["score"],
            rle=(),
            size_px=np.zeros((0, 2), np.int64),
        )
    )
    cuts: Singles = field(default_factory=lambda: np.zeros(0, np.float32))
    """(N,) score 0..1 where a new shot begins with the item, NaN elsewhere; (0,) for others."""

    def __post_init__(self) -> None:
        n = self.num_items
        if self.crops is not None:
            item = self.crops.item
            if len(item) != len(self.crops.detection):
                raise ValueError("crops: item and detection differ in length")
            if n and not 0 <= int(item.min()) <= int(item.max()) < self.n:
                raise ValueError(f"crops.item is outside 0..{self.n - 1}")
        if len(self.cuts) not in (0, n):
            raise ValueError(f"cuts is {self.cuts.shape}, expected ({n},)")
        for name in ("embeddings", "features"):
            array = getattr(self, name)
            if array.ndim != 2 or (array.shape[1] and len(array) != n):
                raise ValueError(f"{name} is {array.shape}, expected ({n}, width)")
        for name, value in (("labels", "score"), ("boxes", "score"), ("masks", "area")):
            rows = getattr(self, name)
            m = len(rows.item)
            if len(rows.label_id) != m or len(getattr(rows, value)) != m:
                raise ValueError(f"{name}: item, label_id and {value} differ in length")
            if m and not (int(rows.item.min()) >= 0 and int(rows.item.max()) < n):
                raise ValueError(f"{name}.item is outside 0..{n - 1}")
        if not len(self.masks.rle) == len(self.masks.size_px) == len(self.masks.item):
            raise ValueError("masks: rle, size_px and item differ in length")
        if self.boxes.xyxy.shape != (len(self.boxes.item), 4):
            raise ValueError(f"boxes.xyxy is {self.boxes.xyxy.shape}")

    @property
    def num_items(self) -> int:
        """What its rows count: items, or crops of a model on crops."""
        return self.n if self.crops is None else len(self.crops.item)

    def __repr__(self) -> str:
        return (
            f"Predictions(n={self.n}, embeddings={self.embeddings.shape}, features="
            f"{self.features.shape}, labels={len(self.labels.item)}, boxes={len(self.boxes.item)})"
        )


Gives = Literal[
    "detections", "labels", "embeddings", "features", "masks", "windows", "audio", "shots"
]
"""The tables a model can fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowGrid:
    """T frames, every `stride`-th sample; window k begins at sample k·hop of the video.

    A window lies wholly in the video, but for the one of a video shorter than it: that one
    repeats the last frame.
    """

    frames: int
    stride: int = 1
    hop: int = 0
    """0: windows follow each other without overlap, every frames·stride samples."""

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= 256 or not 1 <= self.stride <= 1000 or self.hop < 0:
            raise ValueError(
                f"window of {self.frames} frames, stride {self.stride}, hop {self.hop}"
            )

    @property
    def step(self) -> int:
        """Samples from the beginning of a window to that of the next."""
        return self.hop or self.frames * self.stride

    @property
    def span(self) -> int:
        """Samples from the first frame of a window to its last, both counted."""
        return (self.frames - 1) * self.stride + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRule:
    """How a model gets the boxes of another one to see."""

    on: str
    """Name of the model of this job whose boxes are cut out."""
    size: Geometry
    """Size of a crop as the model sees it; `stretch` alone."""
    margin: float = 0.0
    """Share of the box's width and height that is added on each side, as far as the frame goes."""
    version: str = ""
    """Of that model."""
    parent: str = ""
    """Its fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What is known of a model without loading it."""

    name: str
    """`[a-z][a-z0-9_-]*`, never `frames`."""
    version: str
    adapter: str
    kind: str
    geometry: Geometry | None
    """Of the frames it gets, or that its crops are cut from; null for models of sound."""
    gives: tuple[Gives, ...]
    """The tables it fills, parents first."""
    window: WindowGrid | None = None
    """Its items are windows of frames."""
    audio: AudioGrid | None = None
    """Its items are windows of sound."""
    crop: CropRule | None = None
    """It answers for boxes of another model."""
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    compile: bool = False
    """How: by torch.compile with fixed shapes."""
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
    """What a model gets: B items of one geometry on its device (B ≤ how.batch)."""

    pixels: Any
    """torch uint8 (B, H, W, 3), RGB; (B, T, H, W, 3) for windows; None for sound."""
    previous: Any
    """torch uint8 (B, H, W, 3) for models with context 1, else None."""
    has_previous: Any
    """torch bool (B,) for models with context 1 (False: first sample of a video), else None."""
    source_px: Ints
    """(B, 2) upright width, height before scaling, for undoing crop and letterbox."""
    samples: Any = None
    """torch float32 (B, S) mono sound for models of sound, else None."""


class Model(Protocol):
    """`load` once per process, `predict` per batch, `close` at the end."""

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
    of_model: str | None = None
    """The `partition` of the output whose boxes it is of; null where it is of frames."""


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


def rank_rows(item: Ints, label_id: Ints, score: Singles) -> tuple[Ints, Ints]:
    """The order of labels or boxes in tables: by item, falling score, label_id, then as they came.

    Returns:
        (positions in that order, ordinal of each within its item from 0: `detection_id` of a box).
    """
    order = np.lexsort((label_id, -score, item))
    ordered = item[order]
    return order, np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")


def table_names(specs: Sequence[ModelSpec]) -> tuple[str, ...]:
    """The distinct result tables of some models, in first-seen order."""
    return tuple(dict.fromkeys(name for spec in specs for name in spec.gives))
