"""What a person writes as a model, and what stands around it: floors, geometry.

A *plain* model is any class with a `predict`; its facts are class attributes or are set by
`__init__` from `what.params` (see `Facts`). `configs/models/redness.py` is one of ten lines.
`PlainAdapter` makes a `data.Model` of it. Knows no files and no fingerprints: see `registry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np

from vidbatch.data import (
    AudioGrid,
    Batch,
    Geometry,
    Ints,
    ModelSpec,
    Predictions,
    Singles,
    WindowGrid,
    fit_box,
)
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.answers import every_label, keep_boxes, keep_labels
from vidbatch.models.masks import mask_rows
from vidbatch.models.precision import ready


class PlainModel(Protocol):
    """What a person writes; everything but `predict` may be left out (defaults: `Facts`)."""

    def predict(self, batch: Batch) -> Predictions | Mapping[str, Any]:
        """Answers for every item, as Predictions or as a mapping with any of

        - `features`: (B, F) array or tensor in the order of `features`; NaN = no row
        - `embeddings`: (B, D) array or tensor; brought to length 1 unless `normalised = False`
        - `scores`: (B, K) array or tensor, 0..1 in the order of `labels`
        - `boxes`: BoxRows, coordinates 0..1 of the upright frame (see `undo_fit`)
        - `masks`: (B, h, w) integer array or tensor of any size, the class of each pixel of what
          it saw in the order of `labels`; negative = none
        - `cuts`: (B,) array or tensor, 0..1 where a shot begins with the item, NaN elsewhere
        """
        ...


class Facts:
    """The attributes of a plain model and what holds where one is missing."""

    geometry: Geometry
    """No default: the size and fit of the frames (or crops) it wants; not of models of sound."""
    window: WindowGrid | None = None
    """It wants windows of frames; `what.window` overrides."""
    audio: AudioGrid | None = None
    """It wants windows of sound; `what.audio` overrides."""
    kind = ""
    """A word for the table `models`; derived from what it gives when empty."""
    labels: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dim = 0
    detects = False
    """Whether its labels name boxes (table `detections`) and not frames (table `labels`)."""
    segments = False
    """Whether its labels name the classes of pixels (table `masks`)."""
    cuts = False
    """Whether it finds the beginnings of shots (table `shots`)."""
    normalised = True
    context = 0
    """1: `batch.previous` holds the sampled frame before each item."""
    batch = 64
    top_k = 0
    """Labels kept per frame, 0 = all; `what.top_k` overrides."""
    min_score = 0.0
    """Labels and boxes below it are dropped; `what.min_score` overrides."""
    on_host = False
    """Whether it wants CPU tensors whatever the device of the predictor is."""
    precisions: tuple[str, ...] = ("fp32",)
    """Those it can run in; it finds the one it shall in `self.spec.precision`. Of a torch module
    that it keeps as `self.network` all of `precision.PRECISIONS` are done for it after `load`."""
    compiles = False
    """Whether it heeds `self.spec.compile`; done for it likewise."""
    semantics = 1
    """Counted up when the same pixels give other rows; part of the fingerprint."""


def fact(plain: object, name: str) -> Any:
    """The attribute of a plain model, or the default of `Facts`."""
    return getattr(plain, name, getattr(Facts, name, None))


class PlainAdapter:
    """A `data.Model` around a plain model: device, floors, tensors → Predictions, errors."""

    def __init__(
        self, spec: ModelSpec, plain: Any, *, top_k: int, min_score: float, rle: bool = False
    ) -> None:
        self._spec, self.plain = spec, plain
        self._top_k, self._min_score, self._rle = top_k, min_score, rle
        self.on_host: bool = bool(fact(plain, "on_host"))

    @property
    def spec(self) -> ModelSpec:
        """Facts that need no weights in memory."""
        return self._spec

    def load(self, device: str) -> None:
        """Calls the plain model's `load(device)` if it has one, then brings a `network` that it has
        to the precision of the spec. Raises ModelError."""
        load = getattr(self.plain, "load", None)
        try:
            if load is not None:
                load(device)
            changed = self._spec.precision != "fp32" or self._spec.compile
            if changed and (network := getattr(self.plain, "network", None)) is not None:
                self.plain.network = ready(network, self._spec, device)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model {self._spec.name}: load on {device} raised {type(error).__name__}: {error}"
                "; it can answer no frame; `vidbatch models bench` runs it alone",
                kind="model_load",
            ) from error

    def predict(self, batch: Batch) -> Predictions:
        """Answers for every item of the batch, floors applied; what it raises passes as it is."""
        n = len(batch.source_px)
        answer = self.plain.predict(batch)
        if not isinstance(answer, Predictions):
            answer = self._collect(n, answer, batch.source_px)
        return replace(
            answer,
            labels=keep_labels(answer.labels, top_k=self._top_k, min_score=self._min_score),
            boxes=keep_boxes(answer.boxes, min_score=self._min_score),
        )

    def close(self) -> None:
        """Calls the plain model's `close()` if it has one."""
        close = getattr(self.plain, "close", None)
        if close is not None:
            close()

    def _collect(self, n: int, answer: Mapping[str, Any], source_px: Ints) -> Predictions:
        unknown = set(answer) - set(_ANSWERS)
        if unknown:
            raise ModelError(
                f"model {self._spec.name}: predict returned {sorted(unknown)}; known: "
                f"{', '.join(_ANSWERS)}",
                kind="model_answer",
            )
        widths = {
            "features": len(self._spec.features),
            "embeddings": self._spec.dim,
            "scores": len(self._spec.labels),
            "cuts": 1,
        }
        found = {key: answer[key] for key in widths if key in answer}
        if "cuts" in found:
            found["cuts"] = found["cuts"].reshape(-1, 1)
        for key, value in found.items():
            if tuple(value.shape) != (n, widths[key]):
                raise ModelError(
                    f"model {self._spec.name}: {key} is {tuple(value.shape)}, expected "
                    f"({n}, {widths[key]})",
                    kind="model_answer",
                )
        arrays = _to_host(found, normalise=self._spec.normalised)
        rows: dict[str, Any] = {k: arrays[k] for k in ("features", "embeddings") if k in arrays}
        if "scores" in arrays:
            rows["labels"] = every_label(arrays["scores"])
        if "cuts" in arrays:
            rows["cuts"] = arrays["cuts"][:, 0]
        if "boxes" in answer:
            rows["boxes"] = answer["boxes"]
        if "masks" in answer:
            rows["masks"] = mask_rows(self._spec, answer["masks"], source_px, rle=self._rle)
        return Predictions(n=n, **rows)


_ANSWERS = ("features", "embeddings", "scores", "boxes", "masks", "cuts")


def _to_host(found: Mapping[str, Any], *, normalise: bool) -> dict[str, Singles]:
    """float32 numpy arrays of (B, width) tensors or arrays, with one copy from the device."""
    import torch

    parts = {key: torch.as_tensor(value).float() for key, value in found.items()}
    if normalise and "embeddings" in parts:
        parts["embeddings"] = torch.nn.functional.normalize(parts["embeddings"], dim=1)
    if not parts:
        return {}
    joined = torch.cat(list(parts.values()), dim=1).cpu().numpy()
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    return {
        key: np.ascontiguousarray(joined[:, end - part.shape[1] : end])
        for (key, part), end in zip(parts.items(), ends, strict=True)
    }


def undo_fit(geometry: Geometry, xyxy_px: Any, source_px: Ints) -> Singles:
    """Boxes in pixels of the model's picture → 0..1 of the upright frame, cut to the frame.

    `xyxy_px` is (M, 4) x_min, y_min, x_max, y_max; `source_px` (M, 2) the width and height of the
    frame each box was found in. The inverse of `data.fit_box`.
    """
    boxes = np.asarray(xyxy_px, np.float64).reshape(-1, 4)
    fits = np.array([fit_box(geometry, int(w), int(h)) for w, h in source_px], np.float64).reshape(
        -1, 4
    )
    scaled, offset = fits[:, [0, 1, 0, 1]], fits[:, [2, 3, 2, 3]]
    return np.clip((boxes + offset) / scaled, 0.0, 1.0).astype(np.float32)


def unknown_name(where: str, what: str, name: object, known: Sequence[str]) -> UsageError:
    """The error for a name that nobody knows: says the nearest and all known ones."""
    near = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"{where}: unknown {what} {name!r}; {hint}known: {', '.join(sorted(known))}")
