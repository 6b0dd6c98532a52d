"""Pieces of chunks → buffers on the device: every pixel collated and uploaded once per input.

    pieces ── collate: per kind of item and geometry ─▶ host buffer ── own stream ─▶ device buffer

What two models get alike is one input: the frames of a geometry, windows of them, the windows of
an audio grid. torch is imported where buffers are made, not with this module.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vidbatch.data import Audio, Bools, Chunk, Frames, Ints, Model, ModelSpec, Windows

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Rows [lo, hi) of one chunk; context frames and halo are no rows."""

    ticket: Hashable
    chunk: Chunk
    lo: int
    hi: int
    models: frozenset[str] | None = None
    """Names of the models it is for; None = all that take chunks of its kind."""
    keys: Ints = field(init=False)
    """(hi − lo,) keys of the rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi <= self.chunk.num_rows:
            raise ValueError(f"rows [{self.lo}, {self.hi}) of {self.chunk!r}")
        object.__setattr__(self, "keys", self.chunk.keys[self.lo : self.hi].copy())

    def __len__(self) -> int:
        return self.hi - self.lo

    def is_for(self, spec: ModelSpec) -> bool:
        """Whether a model is to answer for it."""
        if self.models is not None:
            return spec.name in self.models
        if isinstance(self.chunk, Frames):
            return spec.window is None and spec.audio is None
        if isinstance(self.chunk, Windows):
            return spec.window is not None and spec.window.frames == self.chunk.items.shape[1]
        return spec.audio == self.chunk.grid

    def check(self, specs: Sequence[ModelSpec]) -> None:
        """Raises KeyError: it is for a model that is not among these, or gets other chunks."""
        here = {spec.name: spec for spec in specs}
        for name in self.models or ():
            if name not in here:
                raise KeyError(f"{self.ticket!r} is for {name!r}; here: {sorted(here)}")
            spec = here[name]
            kind = Audio if spec.audio else Windows if spec.window else Frames
            if not isinstance(self.chunk, kind):
                raise KeyError(f"{name!r} takes {kind.__name__}, not {self.chunk!r}")
            if spec.crop and self.models and spec.crop.on not in self.models:
                raise KeyError(f"{name!r} needs the boxes of {spec.crop.on!r} of the same frames")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Input:
    """What the models that get the same see of the pieces for them."""

    group: tuple[int, ...]
    """Positions of those pieces among all."""
    starts: Ints
    """(len(group) + 1,) where the rows of each begin; the last is their number N."""
    host: torch.Tensor
    """uint8 (P, H, W, 3), or float32 (N, S) of sound."""
    device: torch.Tensor | None
    """The same, where some model wants it on a GPU."""
    rows: Ints
    """(N,) or, of windows, (N, T): positions in the buffer."""
    previous: Ints
    """(N,) position of the sample before each row; its own where there is none."""
    has_previous: Bools
    """(N,)"""
    source_px: Ints
    """(N, 2)"""

    def rows_of(self, piece: int) -> slice:
        """The rows of the piece at that position."""
        at = self.group.index(piece)
        return slice(int(self.starts[at]), int(self.starts[at + 1]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """Some pieces, collated and on their way to the device."""

    pieces: tuple[Piece, ...]
    inputs: Mapping[Hashable, Input]
    """By `input_key`."""
    uploaded: Any
    """The event to wait for before the device's buffers are used, or None."""


def input_key(spec: ModelSpec) -> Hashable:
    """Equal for models that get the same items: a key of `Staged.inputs`."""
    if spec.audio is not None:
        return spec.audio.key
    if spec.geometry is None:
        raise ValueError(f"model {spec.name} has neither geometry nor audio")
    return (spec.geometry.key, spec.window.frames if spec.window else 0)


def on_host(model: Model) -> bool:
    """Whether it wants CPU tensors on every device (a model may say so: see `base.Facts`)."""
    return bool(getattr(model, "on_host", False))


class Stager:
    """Collates and uploads for some models on one device."""

    def __init__(self, models: Sequence[Model], device: torch.device) -> None:
        import torch

        self._models, self._device = tuple(models), device
        self._gpu = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._gpu else None  # type: ignore[no-untyped-call]

    def stage(self, pieces: Sequence[Piece], seconds: dict[str, float]) -> Staged:
        """Collates what some model wants and starts its upload.

        Args:
            seconds: `collating` and `uploading` are added to.
        Raises:
            KeyError: a piece is for a model that is not here or gets other chunks, or its chunk
                has no pixels of the geometry of a model it is for.
        """
        import torch

        for piece in pieces:
            piece.check([m.spec for m in self._models])
        users: dict[Hashable, list[Model]] = {}
        for model in self._models:
            users.setdefault(input_key(model.spec), []).append(model)
        inputs: dict[Hashable, Input] = {}
        uploaded = None
        start = time.perf_counter()
        for key, models in users.items():
            group = [i for i, p in enumerate(pieces) if any(p.is_for(m.spec) for m in models)]
            if group:
                inputs[key] = self._collate(models, group, pieces)
        seconds["collating"] += time.perf_counter() - start
        if self._stream is not None:
            start = time.perf_counter()
            with torch.cuda.stream(self._stream):
                for key, found in inputs.items():
                    if not all(on_host(m) for m in users[key]):
                        device = found.host.to(self._device, non_blocking=True)
                        inputs[key] = replace(found, device=device)
                uploaded = self._stream.record_event()
            seconds["uploading"] += time.perf_counter() - start
        return Staged(pieces=tuple(pieces), inputs=inputs, uploaded=uploaded)

    def _collate(
        self, models: Sequence[Model], group: Sequence[int], pieces: Sequence[Piece]
    ) -> Input:
        some = [pieces[i] for i in group]
        spec = models[0].spec
        starts = np.cumsum([0, *(len(p) for p in some)])
        n = int(starts[-1])
        rows = own = np.arange(n, dtype=np.int64)
        previous, has_previous = own, np.zeros(n, np.bool_)
        source_px = np.zeros((n, 2), np.int64)
        if spec.audio is not None:
            host = self._empty((n, spec.audio.samples), sound=True)
            for start, piece in zip(starts, some, strict=False):
                assert isinstance(piece.chunk, Audio)
                host.numpy()[start : start + len(piece)] = piece.chunk.samples[piece.lo : piece.hi]
        elif spec.window is not None:
            host, rows, source_px = self._windows(spec, some)
        else:
            with_context = any(m.spec.context for m in models)
            host, previous, has_previous = self._frames(spec, some, starts, with_context)
            source_px = np.concatenate([_source_px(p) for p in some])
        return Input(
            group=tuple(group),
            starts=starts,
            host=host,
            device=None,
            rows=rows,
            previous=previous,
            has_previous=has_previous,
            source_px=source_px,
        )

    def _frames(
        self, spec: ModelSpec, some: Sequence[Piece], starts: Ints, with_context: bool
    ) -> tuple[torch.Tensor, Ints, Bools]:
        """All rows, then the samples before the first row of each piece that has one."""
        n = int(starts[-1])
        previous = np.arange(-1, n - 1, dtype=np.int64)
        has_previous = np.ones(n, np.bool_)
        heads: dict[int, int] = {}
        for i, piece in enumerate(some):
            if len(piece):
                first, head = int(starts[i]), _items(piece).start > 0
                previous[first], has_previous[first] = first, head
                if head and with_context:
                    previous[first] = heads[i] = n + len(heads)
        pixels = [_pixels(piece, spec) for piece in some]
        host = self._empty((n + len(heads), *pixels[0].shape[1:]))
        buffer = host.numpy()
        for i, piece in enumerate(some):
            items = _items(piece)
            buffer[starts[i] : starts[i + 1]] = pixels[i][items]
            if i in heads:
                buffer[heads[i]] = pixels[i][items.start - 1]
        return host, previous, has_previous

    def _windows(self, spec: ModelSpec, some: Sequence[Piece]) -> tuple[torch.Tensor, Ints, Ints]:
        """Every frame of a piece once, however many windows it is in."""
        used: list[Ints] = []
        rows, source_px = [], []
        for piece in some:
            assert isinstance(piece.chunk, Windows)
            items = piece.chunk.items[piece.lo : piece.hi]
            frames, positions = np.unique(items, return_inverse=True)
            rows.append(positions.reshape(items.shape) + sum(len(u) for u in used))
            used.append(frames)
            source_px.append(piece.chunk.frames.source_px[items[:, 0]])
        pixels = [_pixels(piece, spec) for piece in some]
        host = self._empty((sum(len(u) for u in used), *pixels[0].shape[1:]))
        buffer, start = host.numpy(), 0
        for array, frames in zip(pixels, used, strict=True):
            buffer[start : start + len(frames)] = array[frames]
            start += len(frames)
        return host, np.concatenate(rows), np.concatenate(source_px)

    def _empty(self, shape: tuple[int, ...], *, sound: bool = False) -> torch.Tensor:
        # The pinned allocator caches blocks and gives none out again before its copy is done.
        import torch

        kind = torch.float32 if sound else torch.uint8
        return torch.empty(shape, dtype=kind, pin_memory=self._gpu)


def _items(piece: Piece) -> slice:
    """The rows of a piece of Frames as items of its chunk."""
    assert isinstance(piece.chunk, Frames)
    first = int(piece.chunk.context)
    return slice(first + piece.lo, first + piece.hi)


def _source_px(piece: Piece) -> Ints:
    assert isinstance(piece.chunk, Frames)
    return piece.chunk.source_px[_items(piece)]


def _pixels(piece: Piece, spec: ModelSpec) -> Any:
    assert not isinstance(piece.chunk, Audio) and spec.geometry is not None
    frames = piece.chunk.frames if isinstance(piece.chunk, Windows) else piece.chunk
    return frames.pixels[spec.geometry.key]
