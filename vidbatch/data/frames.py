"""Of decoding: the bytes that go in, the chunks of frames and the verdict that come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

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
        for name in (
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
        """Exactly the bytes [offset, min(offset+length, size)); short only at its end.

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


def chunk_rows(frames: Frames) -> slice:
    """The items of a chunk that are rows: all, or all but the context frame."""
    return slice(int(frames.context), len(frames))
