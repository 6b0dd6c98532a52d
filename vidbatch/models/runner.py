"""Several models over staged frames on one device: one upload per geometry, one pass for all.

    pieces ── stage: collate per geometry ─▶ host buffer ── upload, own stream ─▶ device buffer
           ── compute: per model ≤ spec.batch frames at a time ─▶ Predictions per piece and model

`stage` may run in another thread than `compute`, so that the next frames are collated and uploaded
while the device is busy. torch is imported when a Runner is made, not with this module.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vidbatch.data import Batch, Frames, Ints, Model, Predictions
from vidbatch.errors import ModelError
from vidbatch.models.base import (
    check_predictions,
    cut_predictions,
    empty_predictions,
    join_predictions,
)

if TYPE_CHECKING:
    import torch

Answers = dict[str, Predictions | ModelError]
"""Model name → what it says of the rows of a piece, or why it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Rows [lo, hi) of one chunk; rows leave the context frame out, row 0 is the first row."""

    ticket: Hashable
    frames: Frames
    lo: int
    hi: int
    models: frozenset[str] | None = None
    """Names of the models it is for; None = all."""
    keys: Ints = field(init=False)
    """(hi − lo,) frame_index of the rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi <= self.frames.num_rows:
            raise ValueError(f"rows [{self.lo}, {self.hi}) of {self.frames!r}")
        object.__setattr__(self, "keys", self.frames.frame_index[self.items].copy())

    def __len__(self) -> int:
        return self.hi - self.lo

    @property
    def items(self) -> slice:
        """Its rows as items of the chunk."""
        first = int(self.frames.context)
        return slice(first + self.lo, first + self.hi)

    @property
    def has_head(self) -> bool:
        """Whether the chunk holds the sample before its first row."""
        return len(self) > 0 and self.items.start > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """Frames of some pieces, collated per geometry and on their way to the device."""

    pieces: tuple[Piece, ...]
    starts: Ints
    """(P + 1,) where the rows of each piece begin in the buffers; the last is the total N."""
    buffers: Mapping[tuple[str, bool], torch.Tensor]
    """(geometry key, on host) → uint8 (N + heads, H, W, 3): all rows, then the pieces' heads."""
    previous: Ints
    """(N,) position of the sample before each row in a buffer; its own where there is none."""
    has_previous: np.ndarray[Any, np.dtype[np.bool_]]
    source_px: Ints
    """(N, 2)"""
    uploaded: Any
    """The event to wait for before the buffers are used, or None."""


class Runner:
    """Models on one device. Not reentrant: one thread computes; one may stage beside it."""

    def __init__(self, models: Sequence[Model], device: str = "cpu") -> None:
        import torch

        self.models = tuple(models)
        self.device = torch.device(device)
        self.seconds = {"loading": 0.0, "collating": 0.0, "uploading": 0.0, "compute": 0.0}
        """Seconds spent so far; on a GPU `uploading` is what issuing the copies took."""
        self.halved = 0
        """How often a batch was halved for want of memory."""
        self._sizes = {m.spec.name: m.spec.batch for m in self.models}
        self._gpu = self.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(self.device) if self._gpu else None  # type: ignore[no-untyped-call]

    def load(self) -> None:
        """Loads every model. Raises ModelError."""
        with self._timed("loading"):
            for model in self.models:
                model.load(str(self.device))

    def close(self) -> None:
        """Closes every model."""
        for model in self.models:
            model.close()

    def run(self, pieces: Sequence[Piece]) -> list[Answers]:
        """`stage` and `compute` in one: the answers of each piece, in order."""
        return self.compute(self.stage(pieces))

    def stage(self, pieces: Sequence[Piece]) -> Staged:
        """Collates the pixels of every geometry that some model wants and starts their upload.

        Raises:
            KeyError: a piece is for a model that is not here, or its chunk has no pixels of the
                geometry of a model it is for.
        """
        import torch

        here = {m.spec.name for m in self.models}
        for piece in pieces:
            if unknown := (piece.models or here) - here:
                raise KeyError(f"{piece.ticket!r} is for {sorted(unknown)}; here: {sorted(here)}")
        starts = np.cumsum([0, *(len(p) for p in pieces)])
        n = int(starts[-1])
        previous = np.arange(-1, n - 1, dtype=np.int64)
        has_previous = np.ones(n, np.bool_)
        heads = {i: k for k, i in enumerate(i for i, p in enumerate(pieces) if p.has_head)}
        for i, piece in enumerate(pieces):
            if len(piece):
                first = int(starts[i])
                previous[first] = n + heads[i] if piece.has_head else first
                has_previous[first] = piece.has_head
        buffers: dict[tuple[str, bool], torch.Tensor] = {}
        with self._timed("collating"):
            for key in {m.spec.geometry.key for m in self.models}:
                users = [m for m in self.models if m.spec.geometry.key == key]
                host = self._collate(key, users, pieces, starts, heads)
                if host is not None:
                    buffers[key, True] = host
        uploaded = None
        if self._stream is not None:
            with self._timed("uploading"), torch.cuda.stream(self._stream):
                for model in self.models:
                    key = model.spec.geometry.key
                    if (key, True) in buffers and not _on_host(model):
                        buffers[key, False] = buffers[key, True].to(self.device, non_blocking=True)
                uploaded = self._stream.record_event()
        return Staged(
            pieces=tuple(pieces),
            starts=starts,
            buffers=buffers,
            previous=previous,
            has_previous=has_previous,
            source_px=np.concatenate(
                [p.frames.source_px[p.items] for p in pieces] or [np.zeros((0, 2), np.int64)]
            ),
            uploaded=uploaded,
        )

    def compute(self, staged: Staged) -> list[Answers]:
        """Runs every model over its pieces; a model that fails on some takes no other with it.

        Where a batch fails, its pieces are tried alone, so that one bad clip costs its rows alone.

        Raises:
            torch.AcceleratorError: the device is lost to this process for good.
        """
        import torch

        found: list[Answers] = [{} for _ in staged.pieces]
        with self._timed("compute"), torch.inference_mode():
            if staged.uploaded is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(staged.uploaded)
                for (_, on_host), buffer in staged.buffers.items():
                    if not on_host:
                        buffer.record_stream(stream)  # made on the other stream, used on this
            for model in self.models:
                name = model.spec.name
                group = [
                    i for i, p in enumerate(staged.pieces) if p.models is None or name in p.models
                ]
                for i, answer in zip(group, self._answer(model, staged, group), strict=True):
                    found[i][name] = answer
        return found

    def _collate(
        self,
        key: str,
        users: Sequence[Model],
        pieces: Sequence[Piece],
        starts: Ints,
        heads: Mapping[int, int],
    ) -> torch.Tensor | None:
        """All rows, then the heads; None if no piece is for a model of this geometry."""
        import torch

        names = {m.spec.name for m in users}
        wanted = [i for i, p in enumerate(pieces) if p.models is None or p.models & names]
        if not wanted:
            return None
        if not any(m.spec.context for m in users):
            heads = {}
        n = int(starts[-1])
        shape = pieces[wanted[0]].frames.pixels[key].shape[1:]
        # The pinned allocator caches blocks and gives none out again before its copy is done.
        buffer = torch.empty((n + len(heads), *shape), dtype=torch.uint8, pin_memory=self._gpu)
        rows = buffer.numpy()
        for i in wanted:
            pixels, items = pieces[i].frames.pixels[key], pieces[i].items
            rows[starts[i] : starts[i + 1]] = pixels[items]
            if i in heads:
                rows[n + heads[i]] = pixels[items.start - 1]
        return buffer

    def _answer(
        self, model: Model, staged: Staged, group: Sequence[int]
    ) -> list[Predictions | ModelError]:
        """One answer per piece of the group."""
        if not group:
            return []
        try:
            whole = self._predict(model, staged, group)
        except ModelError as error:
            if len(group) == 1:
                return [error]
            return [a for i in group for a in self._answer(model, staged, [i])]
        ends = np.cumsum([len(staged.pieces[i]) for i in group])
        return [
            cut_predictions(whole, int(end) - len(staged.pieces[i]), int(end))
            for i, end in zip(group, ends, strict=True)
        ]

    def _predict(self, model: Model, staged: Staged, group: Sequence[int]) -> Predictions:
        """The answers for the rows of a group, ≤ `_sizes` at a time."""
        name = model.spec.name
        rows = np.concatenate(
            [np.arange(staged.starts[i], staged.starts[i + 1], dtype=np.int64) for i in group]
        )
        parts: list[Predictions] = []
        done = 0
        while done < len(rows):
            some = rows[done : done + self._sizes[name]]
            try:
                answer = model.predict(self._batch(model, staged, some))
            except Exception as error:
                if not _out_of_memory(error):
                    raise self._model_error(model, len(some), error) from error
                if len(some) == 1:
                    raise self._model_error(model, 1, error, kind="out_of_memory") from error
                self._sizes[name] = max(1, len(some) // 2)
                self.halved += 1
                continue
            check_predictions(model.spec, answer, len(some))
            parts.append(answer)
            done += len(some)
        return join_predictions(parts) if parts else empty_predictions(model.spec)

    def _batch(self, model: Model, staged: Staged, rows: Ints) -> Batch:
        import torch

        on_host = _on_host(model) or not self._gpu
        buffer = staged.buffers[model.spec.geometry.key, on_host]

        def take(positions: Ints) -> torch.Tensor:
            lo, hi = int(positions[0]), int(positions[-1]) + 1
            if hi - lo == len(positions) and bool((np.diff(positions) == 1).all()):
                return buffer[lo:hi]  # no copy
            return buffer.index_select(0, torch.from_numpy(positions).to(buffer.device))

        if not model.spec.context:
            return Batch(
                pixels=take(rows),
                previous=None,
                has_previous=None,
                source_px=staged.source_px[rows],
            )
        return Batch(
            pixels=take(rows),
            previous=take(staged.previous[rows]),
            has_previous=torch.from_numpy(staged.has_previous[rows]).to(buffer.device),
            source_px=staged.source_px[rows],
        )

    def _model_error(
        self, model: Model, n: int, error: Exception, kind: str = "model_raised"
    ) -> ModelError:
        """The error of one batch; a lost device is no model's fault and passes."""
        import torch

        if isinstance(error, ModelError):
            return error
        if isinstance(error, torch.AcceleratorError):
            raise error
        return ModelError(
            f"model {model.spec.name}: raised {type(error).__name__} on {n} frames: {error}; its "
            "rows of these frames are left out; `vidbatch try` runs it alone",
            kind=kind,
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


def _on_host(model: Model) -> bool:
    """Whether it wants CPU tensors on every device (a model may say so: see `base.Facts`)."""
    return bool(getattr(model, "on_host", False))


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return True
    # The allocator of the CPU raises a plain RuntimeError.
    return isinstance(error, MemoryError) or "not enough memory" in str(error)


def use_threads(n: int) -> None:
    """How many threads torch takes in this process; more than its share slow the decoders down."""
    import torch

    torch.set_num_threads(n)
