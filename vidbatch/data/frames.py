"""Of decoding: the bytes that go in, the chunks of frames and the verdict that come out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from vidbatch.data.video import VideoInfo

Pixels = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frames:
    """A chunk of sampled frames of one clip, in display order.

    Item 0 may be a *context* frame: the sampled frame before the chunk's first one, decoded for
    models with `context: 1`; it is no row. Only the first chunk of a video has none. The last
    items may be *halo*: sampled frames after the clip's end, for windows that begin in it.
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
    ordinal: Ints
    """(N,) position among the sampled frames of the video; frames that cannot be decoded count."""
    pixels: Mapping[str, Pixels]
    """Geometry key → (N, H, W, 3) uint8 RGB, C-contiguous."""
    context: bool = False
    """Whether item 0 is a context frame."""
    halo: int = 0
    """Last items that belong to the clips after this one: no rows."""

    def __post_init__(self) -> None:
        n = len(self.frame_index)
        if not 0 <= self.halo <= n - self.context:
            raise ValueError(f"halo {self.halo} of {n} items, context {self.context}")
        for name in (
            "ordinal",
            "pts",
            "has_pts",
            "time_s",
            "covers_s",
            "is_keyframe",
            "is_corrupt",
            "source_px",
        ):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} items, frame_index {n}")
        for key, array in self.pixels.items():
            if array.dtype != np.uint8 or array.ndim != 4 or len(array) != n or array.shape[3] != 3:
                raise ValueError(
                    f"pixels[{key}] is {array.dtype}{array.shape}, not uint8({n},H,W,3)"
                )

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
        """Frames that become rows (all but context and halo)."""
        return len(self) - int(self.context) - self.halo

    @property
    def keys(self) -> Ints:
        """(num_rows,) frame_index of the rows."""
        return self.frame_index[chunk_rows(self)]

    def pick(self, items: Ints, geometries: Collection[str]) -> Frames:
        """Copies of some items, with the pixels of some geometries; neither context nor halo."""
        columns = {name: getattr(self, name)[items] for name in _COLUMNS}
        pixels = {key: array[items] for key, array in self.pixels.items() if key in geometries}
        return Frames(**columns, pixels=pixels)

    @staticmethod
    def join(parts: Sequence[Frames]) -> Frames:
        """Chunks (≥ 1) of the same geometries as one; neither context nor halo."""
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(p, name) for p in parts]) for name in _COLUMNS
        }
        pixels = {key: np.concatenate([p.pixels[key] for p in parts]) for key in parts[0].pixels}
        return Frames(**columns, pixels=pixels)

    def cut(self, stop: int, *, keep: Mapping[str, Pixels] | None = None) -> Frames:
        """Items [0, stop) without halo; with the pixels of `keep` alone if it is given."""
        pixels = self.pixels if keep is None else keep
        columns = {name: getattr(self, name)[:stop] for name in _COLUMNS}
        cut = {key: array[:stop] for key, array in pixels.items()}
        return Frames(**columns, pixels=cut, context=self.context)


_COLUMNS = (
    "frame_index", "pts", "has_pts", "time_s", "covers_s", "is_keyframe", "is_corrupt",
    "source_px", "ordinal",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """W temporal windows of T sampled frames each, of one clip; each begins in that clip."""

    frames: Frames
    """The frames they are made of, with the pixels of the window models alone."""
    items: Ints
    """(W, T) positions in `frames`; the last frame is repeated where the video is shorter."""

    def __post_init__(self) -> None:
        if self.items.ndim != 2 or not self.items.shape[1]:
            raise ValueError(f"items is {self.items.shape}, not (W, T)")
        if self.items.size and not 0 <= int(self.items.min()) <= int(self.items.max()) < len(
            self.frames
        ):
            raise ValueError(f"items are outside the {len(self.frames)} frames")

    @property
    def num_rows(self) -> int:
        """Windows."""
        return len(self.items)

    @property
    def keys(self) -> Ints:
        """(W,) frame_index of the first frame of each."""
        return self.frames.frame_index[self.items[:, 0]]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.frames.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioGrid:
    """Windows of sound, anchored at frame 0 of the video: window k covers [k·hop, k·hop + window).

    There are windows where there is sound; what it does not fill is silence (see `audio`).
    """

    rate_hz: int
    """Samples a second that the model wants; mono."""
    window_s: Fraction
    hop_s: Fraction

    def __post_init__(self) -> None:
        if not 1000 <= self.rate_hz <= 192_000:
            raise ValueError(f"rate_hz {self.rate_hz} is not within 1000..192000")
        if not 0 < self.hop_s <= self.window_s or not 1 <= self.samples <= 4_000_000:
            raise ValueError(f"hop_s {self.hop_s}, window_s {self.window_s}: 0 < hop ≤ window")

    @property
    def samples(self) -> int:
        """Samples of one window."""
        return round(self.window_s * self.rate_hz)

    @property
    def key(self) -> str:
        """Names the grid in mappings: equal keys, equal windows."""
        return f"{self.rate_hz}hz-{self.window_s}-{self.hop_s}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Audio:
    """A chunk of W sound windows of one clip, on a grid; each begins in that clip."""

    grid: AudioGrid
    keys: Ints
    """(W,) ordinals on the grid; negative where sound begins before the first frame."""
    samples: Singles
    """(W, grid.samples) mono, -1..1."""

    def __post_init__(self) -> None:
        if self.samples.dtype != np.float32 or self.samples.shape != (
            len(self.keys),
            self.grid.samples,
        ):
            raise ValueError(f"samples is {self.samples.dtype}{self.samples.shape}")

    @property
    def num_rows(self) -> int:
        """Windows."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return self.samples.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioEnd:
    """How the decoding of a clip's sound went; the last thing it yields."""

    windows: int
    seconds: float
    """Of sound decoded."""
    reason: str | None = None
    """Null when all went well, else a short sentence with numbers: `partial`."""
    kind: str | None = None


Chunk = Frames | Windows | Audio
"""What goes to a predictor in one piece: `num_rows` items of one clip, told apart by `keys`."""


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
    samples: int = 0
    """Sampled frames from the beginning of the video to the last looked at, halo included; those
    that cannot be decoded count."""


DecodeEvent = VideoInfo | Frames | ClipEnd
"""A decode yields one VideoInfo, any number of Frames, one ClipEnd; or raises MediaError."""


class ByteSource(Protocol):
    """Random access to the bytes of one pinned object version."""

    size_bytes: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly the bytes [offset, min(offset+length, size)); short only at its end.

        Raises:
            StoreError: the bytes cannot be had (SourceChanged: another version is there now).
        """
        ...

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Says which half-open ranges of bytes will be read, rising: they may be fetched at once.

        Other reads still work. Replaces an earlier list; [] leaves the source to guess. Never
        waits, never fails; a source may do nothing.
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


def chunk_rows(frames: Frames) -> slice:
    """The items of a chunk that are rows: all but context and halo."""
    return slice(int(frames.context), len(frames) - frames.halo)
