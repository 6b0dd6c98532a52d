"""Outputs of a network, told what they are by the words of `networkfile` → a model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidbatch.data import BoxRows, Geometry, Ints, ModelSpec
from vidbatch.errors import ModelError
from vidbatch.models.base import undo_fit

if TYPE_CHECKING:
    import torch


def read_outputs(
    options: Mapping[str, Any],
    spec: ModelSpec,
    geometry: Geometry | None,
    outputs: Sequence[torch.Tensor],
    source_px: Ints,
) -> dict[str, Any]:
    """A mapping as `PlainModel.predict` returns it.

    Args:
        options: `gives`, `labels`, `scores`, `boxes` as `networkfile` read them.
        geometry: of the picture the network saw; null of sound.
        outputs: one per word of `gives`.
        source_px: (B, 2) upright width and height of the frames.

    Raises:
        ModelError: an output is not of the shape that its word says.
    """
    import torch

    named = dict(zip(options["gives"], outputs, strict=True))
    n, classes = len(source_px), options.get("labels", [])
    kept = [i for i, label in enumerate(classes) if label is not None]

    def check(word: str, *shape: int | None) -> torch.Tensor:
        value = named[word]
        if len(value.shape) != len(shape) or any(
            b is not None and a != b for a, b in zip(value.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if x is None else str(x) for x in shape)
            raise ModelError(
                f"model {spec.name}: gives: {word} is {tuple(value.shape)}, expected ({wanted}): "
                f"B, then {len(classes)} labels where they count; set gives, labels or dim",
                kind="model_answer",
            )
        whole = value.dtype in (torch.int32, torch.int64)
        checked: torch.Tensor = value if whole else value.float()
        return checked

    answer: dict[str, Any] = {}
    if "embeddings" in named:
        answer["embeddings"] = check("embeddings", n, spec.dim)
    if "features" in named:
        answer["features"] = check("features", n, len(spec.features))
    if "masks" in named:
        ranks = len(named["masks"].shape)
        maps = check("masks", n, *([None] * 2 if ranks == 3 else [len(classes), None, None]))
        maps = (maps.argmax(dim=1) if ranks == 4 else maps).long()
        numbers = torch.full((len(classes) + 1,), -1, device=maps.device)
        numbers[torch.tensor(kept, device=maps.device)] = torch.arange(
            len(kept), device=maps.device
        )
        answer["masks"] = numbers[maps.clamp(-1, len(classes))]
    word = "logits" if "logits" in named else "scores"
    if word in named:
        several = (None,) if "boxes" in named else ()
        scores = check(word, n, *several, len(classes))
        if word == "logits":
            softmax = options["scores"] == "softmax"
            scores = scores.softmax(dim=-1) if softmax else scores.sigmoid()
        if "boxes" in named:
            found = (*scores.max(dim=-1), check("boxes", n, scores.shape[1], 4))
            answer["boxes"] = _rows(options, spec, geometry, found, source_px)
        else:
            answer["scores"] = scores if len(kept) == len(classes) else scores[:, kept]
    if "yolo" in named:
        found = _yolo(check("yolo", n, None, None), len(classes), spec)
        answer["boxes"] = _rows(options, spec, geometry, found, source_px)
    if "detections" in named:
        every = check("detections", n, None, 6)
        plain = {**options, "boxes": {"form": "xyxy", "unit": "px", "iou": None}}
        found = (every[..., 4], every[..., 5].long(), every[..., :4])
        answer["boxes"] = _rows(plain, spec, geometry, found, source_px)
    return answer


def _yolo(
    output: torch.Tensor, classes: int, spec: ModelSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (B, N), classes (B, N) and boxes (B, N, 4), whichever way round they came."""
    for candidates in (output.transpose(1, 2), output):
        if candidates.shape[2] - classes in (4, 5):
            scores = candidates[..., -classes:]
            if candidates.shape[2] - classes == 5:
                scores = scores * candidates[..., 4:5]
            return (*scores.max(dim=-1), candidates[..., :4])
    raise ModelError(
        f"model {spec.name}: gives: yolo is {tuple(output.shape)}, expected {4 + classes} or "
        f"{5 + classes} numbers a box for {classes} labels; write one label per class",
        kind="model_answer",
    )


def _rows(
    options: Mapping[str, Any],
    spec: ModelSpec,
    geometry: Geometry | None,
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    source_px: Ints,
) -> BoxRows:
    """The boxes above the floor, of labels that are kept, the weaker of two alike dropped."""
    assert geometry is not None
    rule, classes = options["boxes"], options["labels"]
    floor = json.loads(spec.thresholds)["min_score"]
    scores, numbers, boxes = (x.cpu().numpy() for x in found)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(classes):
        wrong = numbers[(scores >= floor) & ~((numbers >= 0) & (numbers < len(classes)))]
        if len(wrong):
            raise ModelError(
                f"model {spec.name}: class {int(wrong[0])} has no label; labels names "
                f"{len(classes)}; write one per class of the network",
                kind="model_answer",
            )
    renumbered = np.full(len(classes), -1)
    kept = [i for i, label in enumerate(classes) if label is not None]
    renumbered[kept] = np.arange(len(kept))
    item, place = np.nonzero(~(scores < floor))  # NaN stays: it is to be seen
    label_id = renumbered[numbers[item, place]]
    item, place, label_id = (x[label_id >= 0] for x in (item, place, label_id))
    score, box = scores[item, place].astype(np.float32), boxes[item, place].astype(np.float64)
    first, second = box[:, :2], box[:, 2:]
    if rule["form"] == "cxcywh":
        first, second = first - second / 2, first + second / 2
    elif rule["form"] == "xywh":
        second = first + second
    xyxy = np.concatenate([first, np.maximum(first, second)], axis=1)
    if rule["unit"] == "share":
        xyxy *= (geometry.width_px, geometry.height_px) * 2
    if rule["iou"] is not None and not np.isnan(score).any():
        stay = _strongest(item * len(classes) + label_id, xyxy, score, rule["iou"])
        item, label_id, score, xyxy = item[stay], label_id[stay], score[stay], xyxy[stay]
    return BoxRows(
        item=item,
        label_id=label_id,
        score=score,
        xyxy=undo_fit(geometry, xyxy, source_px[item]),
    )


def _strongest(groups: Ints, xyxy: Any, score: Any, iou: float) -> Ints:
    """Positions that stay where, of boxes of one group that overlap, the strongest stays."""
    import cv2

    stay: list[Ints] = []
    for group in np.unique(groups):
        at = np.flatnonzero(groups == group)
        sides = np.concatenate([xyxy[at, :2], xyxy[at, 2:] - xyxy[at, :2]], axis=1)
        left = cv2.dnn.NMSBoxes(sides.tolist(), score[at].tolist(), 0.0, iou)
        stay.append(at[np.sort(np.ravel(left)).astype(np.int64)])
    return np.sort(np.concatenate(stay)) if stay else np.zeros(0, np.int64)
