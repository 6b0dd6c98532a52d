"""Of models and outputs: what goes into a model, what it says, how a clip ended in an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from vidbatch.data.frames import Ints, Singles
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
            if m and not (int(rows.item.min()) >= 0 and int(rows.item.max()) < self.n):
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


def table_names(specs: Sequence[ModelSpec]) -> tuple[str, ...]:
    """The distinct result tables of some models, in first-seen order."""
    return tuple(dict.fromkeys(name for spec in specs for name in spec.gives))
