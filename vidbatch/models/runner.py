"""Several models over staged items on one device: one upload per input, one pass for all.

    pieces ── stage: collate, upload (`staging`) ─▶ buffers on the device
           ── compute: per model ≤ spec.batch items at a time ─▶ Predictions per piece and model
                       then models on crops: boxes of their parent, cut out of the same buffers

`stage` may run in another thread than `compute`, so that the next frames are collated and uploaded
while the device is busy. torch is imported when a Runner is made, not with this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from vidbatch.data import Batch, Crops, Ints, Model, ModelSpec, Predictions, rank_rows
from vidbatch.errors import ModelError
from vidbatch.models.answers import (
    check_predictions,
    cut_predictions,
    empty_predictions,
    join_predictions,
)
from vidbatch.models.crops import crop_boxes, cut_crops
from vidbatch.models.staging import Input, Piece, Staged, Stager, input_key, on_host

if TYPE_CHECKING:
    import torch

Answers = dict[str, Predictions | ModelError]
"""Model name → what it says of the rows of a piece, or why it cannot."""


class Runner:
    """Models on one device. Not reentrant: one thread computes; one may stage beside it."""

    def __init__(self, models: Sequence[Model], device: str = "cpu") -> None:
        import torch

        self.models = tuple(sorted(models, key=lambda m: m.spec.crop is not None))
        """Those on crops come after those whose boxes they are on."""
        self.device = torch.device(device)
        self.seconds = {"loading": 0.0, "collating": 0.0, "uploading": 0.0, "compute": 0.0}
        """Seconds spent so far; on a GPU `uploading` is what issuing the copies took."""
        self.halved = 0
        """How often a batch was halved for want of memory."""
        self._sizes = {m.spec.name: m.spec.batch for m in self.models}
        self._stager = Stager(self.models, self.device)

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
        """Collates and uploads what some model wants. Raises KeyError as `Stager.stage`."""
        return self._stager.stage(pieces, self.seconds)

    def compute(self, staged: Staged) -> list[Answers]:
        """Runs every model over its pieces; a model that fails on some takes no other with it.

        Where a batch fails, its pieces are tried alone, so that one bad clip costs its rows alone.

        Raises:
            torch.AcceleratorError: the device is lost to this process for good.
        """
        import torch

        answers: list[Answers] = [{} for _ in staged.pieces]
        with self._timed("compute"), torch.inference_mode():
            if staged.uploaded is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(staged.uploaded)
                for found in staged.inputs.values():
                    if found.device is not None:
                        found.device.record_stream(stream)  # made on the other, used on this
            for model in self.models:
                spec = model.spec
                group = [i for i, p in enumerate(staged.pieces) if p.is_for(spec)]
                if spec.crop:
                    for i in list(group):
                        if isinstance(cause := answers[i][spec.crop.on], ModelError):
                            answers[i][spec.name] = _without_parent(spec, cause)
                            group.remove(i)
                for i, answer in zip(
                    group, self._answer(model, staged, group, answers), strict=True
                ):
                    answers[i][spec.name] = answer
        return answers

    def _answer(
        self, model: Model, staged: Staged, group: Sequence[int], answers: Sequence[Answers]
    ) -> list[Predictions | ModelError]:
        """One answer per piece of the group."""
        if not group:
            return []
        try:
            found = staged.inputs[input_key(model.spec)]
            if model.spec.crop is None:
                whole = self._predict_rows(model, staged, found, group)
            else:
                boxes = [answers[i][model.spec.crop.on] for i in group]
                parents = cast(list[Predictions], boxes)
                whole = self._predict_crops(model, staged, found, group, parents)
        except ModelError as error:
            if len(group) == 1:
                return [error]
            return [a for i in group for a in self._answer(model, staged, [i], answers)]
        ends = np.cumsum([len(staged.pieces[i]) for i in group])
        return [
            cut_predictions(whole, int(end) - len(staged.pieces[i]), int(end))
            for i, end in zip(group, ends, strict=True)
        ]

    def _predict_rows(
        self, model: Model, staged: Staged, found: Input, group: Sequence[int]
    ) -> Predictions:
        """The answers for the rows of a group."""
        import torch

        buffer = self._buffer(model, found)
        rows = _rows(found, group)

        def take(positions: Ints) -> torch.Tensor:
            flat = positions.ravel()
            lo, hi = int(flat[0]), int(flat[-1]) + 1
            if hi - lo == len(flat) and bool((np.diff(flat) == 1).all()):
                taken = buffer[lo:hi]  # no copy
            else:
                taken = buffer.index_select(0, torch.from_numpy(flat).to(buffer.device))
            return taken.reshape(*positions.shape, *taken.shape[1:])

        def make(lo: int, hi: int) -> Batch:
            some, context = rows[lo:hi], model.spec.context
            has_previous = torch.from_numpy(found.has_previous[some]) if context else None
            items = take(found.rows[some])
            return Batch(
                pixels=None if model.spec.audio else items,
                samples=items if model.spec.audio else None,
                previous=take(found.previous[some]) if context else None,
                has_previous=None if has_previous is None else has_previous.to(buffer.device),
                source_px=found.source_px[some],
            )

        keys = np.concatenate([staged.pieces[i].keys for i in group])
        return self._predict(model, keys, make)

    def _predict_crops(
        self,
        model: Model,
        staged: Staged,
        found: Input,
        group: Sequence[int],
        parents: Sequence[Predictions],
    ) -> Predictions:
        """The answers for the boxes that the parent found in the rows of a group."""
        rule, geometry = model.spec.crop, model.spec.geometry
        assert rule is not None and geometry is not None
        whole = join_predictions(parents)
        boxes = whole.boxes
        order, ordinal = rank_rows(boxes.item, boxes.label_id, boxes.score)
        item = boxes.item[order]
        rows = _rows(found, group)[item]
        where, size = crop_boxes(rule, geometry, boxes.xyxy[order], found.source_px[rows])
        buffer = self._buffer(model, found)

        def make(lo: int, hi: int) -> Batch:
            return Batch(
                pixels=cut_crops(buffer, found.rows[rows[lo:hi]], where[lo:hi], rule.size),
                previous=None,
                has_previous=None,
                source_px=size[lo:hi],
            )

        keys = np.concatenate([staged.pieces[i].keys for i in group])[item]
        answer = self._predict(model, keys, make)
        return replace(answer, n=whole.n, crops=Crops(item=item, detection=ordinal))

    def _predict(self, model: Model, keys: Ints, make: Callable[[int, int], Batch]) -> Predictions:
        """The answers for items, ≤ `_sizes` at a time; `make(lo, hi)` is the batch of some."""
        name, n = model.spec.name, len(keys)
        parts: list[Predictions] = []
        done = 0
        while done < n:
            some = min(self._sizes[name], n - done)
            batch = None
            try:
                batch = make(done, done + some)
                answer = model.predict(batch)
                check_predictions(model.spec, answer, some)
            except Exception as error:
                place = _place(model.spec, batch, keys[done : done + some])
                if not _out_of_memory(error):
                    raise self._model_error(model, place, error) from error
                if some == 1:
                    raise self._model_error(model, place, error, kind="out_of_memory") from error
                self._sizes[name] = max(1, some // 2)
                self.halved += 1
                continue
            parts.append(answer)
            done += some
        return join_predictions(parts) if parts else empty_predictions(model.spec)

    def _buffer(self, model: Model, found: Input) -> torch.Tensor:
        return found.host if found.device is None or on_host(model) else found.device

    def _model_error(
        self, model: Model, place: str, error: Exception, kind: str = "model_raised"
    ) -> ModelError:
        """The error of one batch; a lost device is no model's fault and passes."""
        import torch

        if isinstance(error, ModelError):
            return ModelError(f"{error.message} (on {place})", kind=error.kind, advice=error.advice)
        if isinstance(error, torch.AcceleratorError):
            raise error
        return ModelError(
            f"model {model.spec.name}: raised {type(error).__name__} on {place}: "
            f"{' '.join(str(error).split())[:240]}; its rows of these are left out; `vidbatch "
            "config check` runs it alone",
            kind=kind,
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


def _rows(found: Input, group: Sequence[int]) -> Ints:
    """The rows of some pieces, one after the other."""
    every = np.arange(found.starts[-1])
    return np.concatenate([every[found.rows_of(i)] for i in group])


def _place(spec: ModelSpec, batch: Batch | None, keys: Ints) -> str:
    """What a batch was: how many items, their keys, the shapes of its arrays."""
    kind = "crops" if spec.crop else "windows" if spec.window or spec.audio else "frames"
    key = "window" if spec.audio else "frame_index"
    arrays = {name: getattr(batch, name, None) for name in ("pixels", "previous", "samples")}
    shapes = [f", {name} {tuple(a.shape)}" for name, a in arrays.items() if a is not None]
    return f"{len(keys)} {kind} ({key} {keys[0]}..{keys[-1]}{''.join(shapes)})"


def _without_parent(spec: ModelSpec, cause: ModelError) -> ModelError:
    on = spec.crop.on if spec.crop else ""
    return ModelError(
        f"model {spec.name}: {on}, whose boxes it is on, failed: {cause.message}", kind=cause.kind
    )


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
