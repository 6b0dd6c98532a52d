"""How fast a model is, what it takes, and how far its precision is from fp32; also a first trial.

Items go the way they go in a job: collated, uploaded, answered, checked. A model on the boxes of
another gets whole frames of the size of its crops.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vidbatch.config import read_yaml
from vidbatch.data import Audio, Chunk, Frames, Geometry, Ints, ModelSpec, Predictions, Windows
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.answers import join_predictions
from vidbatch.models.registry import ModelDef, create_model, resolve_model
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

MATCH_IOU = 0.5
"""Boxes of one label that share as much are the same box, in the error of detections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `bench_model` found."""

    model: str
    device: str
    precision: str
    compiled: bool
    batch: int
    items: int
    """Distinct frames or windows it was measured on."""
    items_per_s: float
    """The median over batches, after two to warm up."""
    load_s: float
    memory_bytes: int
    """On a GPU the peak of what torch took there; else how much the peak of the process grew."""
    error: Mapping[str, float]
    """Against fp32 on the same items, see `error_of`; {} for fp32."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_model(
    defn: ModelDef,
    *,
    device: str = "cpu",
    batch: int | None = None,
    chunk: Chunk | None = None,
    seconds: float = 5.0,
) -> Measured:
    """Measures a model.

    Args:
        batch: instead of the file's.
        chunk: items for it (of `uncropped`, where it is on boxes); made ones without.
        seconds: for how long, at least 5 batches.

    Raises:
        ModelError: it cannot be loaded, or failed on the items.
        UsageError: there is no such device.
    """
    import torch

    gpu = device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU is visible here; write --device cpu")
    defn = uncropped(defn)
    spec = replace(defn.spec, batch=batch or defn.spec.batch)
    defn = replace(defn, spec=spec)
    chunk = chunk if chunk is not None else made_items(spec, max(2 * spec.batch, 16))
    if not chunk.num_rows:
        raise UsageError(f"{spec.name}: there is nothing for it in these items; take another video")
    before = _memory(gpu)
    started = time.perf_counter()
    runner = Runner([create_model(defn)], device)
    runner.load()
    load_s = time.perf_counter() - started
    answer = _answer(runner, spec, chunk)
    times: list[float] = []
    pieces = _pieces(chunk, spec.batch)
    while len(times) < 7 or (sum(times) < seconds and len(times) < 10_000):
        piece = pieces[len(times) % len(pieces)]
        started = time.perf_counter()
        _check(runner.run([piece])[0][spec.name])
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / len(piece))
    memory = _memory(gpu) - before
    runner.close()
    error: dict[str, float] = {}
    if spec.precision != "fp32":
        whole = Runner(
            [create_model(replace(defn, spec=replace(spec, precision="fp32", compile=False)))],
            device,
        )
        whole.load()
        error = error_of(spec, answer, _answer(whole, spec, chunk))
        whole.close()
    return Measured(
        model=f"{spec.name}-{spec.version}",
        device=torch.cuda.get_device_name() if gpu else "cpu",
        precision=spec.precision,
        compiled=spec.compile,
        batch=spec.batch,
        items=chunk.num_rows,
        items_per_s=1 / float(np.median(times[2:])),
        load_s=load_s,
        memory_bytes=max(0, memory),
        error=error,
    )


def read_alone(model: str) -> ModelDef:
    """A model file by its path, or a builtin by its name; one on boxes as `uncropped`.

    Raises:
        UsageError: as `registry.resolve_model`.
    """
    if not model.endswith((".yaml", ".yml")):
        return resolve_model({"builtin": model}, Path())
    path = Path(model).expanduser()
    tree = read_yaml(path) if path.is_file() else {}
    what = tree.get("what")
    if not isinstance(what, Mapping) or "on" not in what:
        return resolve_model({"file": str(path.absolute())}, Path())
    crop = what.get("crop")
    size = {k: v for k, v in crop.items() if k != "margin"} if isinstance(crop, Mapping) else {}
    alone = {k: v for k, v in what.items() if k not in ("on", "crop", "geometry")}
    if size:
        alone["geometry"] = size
    return resolve_model({**tree, "what": alone}, path.parent.absolute(), where=str(path))


def try_model(defn: ModelDef) -> None:
    """Loads a model on the CPU and shows it two made items.

    Raises:
        UsageError: it cannot be loaded, or does not answer as its model file says.
    """
    defn = uncropped(defn)
    spec = replace(defn.spec, compile=False)  # compiling takes minutes and changes no shape
    try:
        runner = Runner([create_model(replace(defn, spec=spec))])
        runner.load()
        _answer(runner, spec, made_items(spec, 2))
        runner.close()
    except ModelError as error:
        message = error.message.removeprefix(f"model {spec.name}: ")
        raise UsageError(f"model {spec.name}: {message}") from error


def uncropped(defn: ModelDef) -> ModelDef:
    """The same model on whole frames of the size of its crops."""
    crop = defn.spec.crop
    if crop is None:
        return defn
    return replace(defn, spec=replace(defn.spec, crop=None, geometry=crop.size))


def made_items(spec: ModelSpec, n: int) -> Chunk:
    """Items of the kind a model gets: smooth noise that moves, or noisy tones; seeded."""
    rng = np.random.default_rng(0)
    if spec.audio is not None:
        t = np.arange(spec.audio.samples) / spec.audio.rate_hz
        tones = np.sin(2 * np.pi * t * rng.uniform(80, 2000, (n, 1)))
        sound = 0.3 * tones + 0.05 * rng.standard_normal((n, len(t)))
        keys = np.arange(n, dtype=np.int64)
        return Audio(grid=spec.audio, keys=keys, samples=sound.astype(np.float32))
    assert spec.geometry is not None
    if spec.window is None:
        return _frames(spec.geometry, n, rng)
    starts = np.arange(n, dtype=np.int64) * min(spec.window.step, 4)
    offsets = np.arange(spec.window.frames, dtype=np.int64) * spec.window.stride
    items: Ints = starts[:, None] + offsets
    return Windows(frames=_frames(spec.geometry, int(items.max()) + 1, rng), items=items)


def error_of(spec: ModelSpec, found: Predictions, exact: Predictions) -> dict[str, float]:
    """How far answers are from exact ones for the same items, per kind of answer.

    - labels: `score_max` and `score_mean`, differences of the scores that both kept;
      `same_first`, share of items with the same first label
    - embeddings: `cosine_max` and `cosine_mean`, 1 − cosine
    - features: `feature_max`, differences
    - detections: `boxes_found`, share of the exact boxes that are there with MATCH_IOU and the same
      label; `box_score_max`, differences of the scores of those; `boxes_extra`, share without
      a counterpart
    - masks: `area_max`, differences of the shares of the frame
    """
    error: dict[str, float] = {}
    if len(exact.labels.item):
        one, other = (_by_key(p.labels.item, p.labels.label_id, p.labels.score)
                      for p in (found, exact))  # fmt: skip
        apart = [abs(one[key] - other[key]) for key in one.keys() & other.keys()]
        if apart:
            error |= {"score_max": max(apart), "score_mean": float(np.mean(apart))}
        error["same_first"] = float(np.mean(_first(found) == _first(exact)))
    if exact.embeddings.size:
        a, b = found.embeddings.astype(np.float64), exact.embeddings.astype(np.float64)
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        apart_cos = 1 - (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)
        error |= {"cosine_max": float(apart_cos.max()), "cosine_mean": float(apart_cos.mean())}
    if exact.features.size:
        error["feature_max"] = float(np.nanmax(np.abs(found.features - exact.features)))
    if len(exact.boxes.item):
        pairs = _match(found, exact)
        error["boxes_found"] = len(pairs) / len(exact.boxes.item)
        error["boxes_extra"] = 1 - len(pairs) / max(1, len(found.boxes.item))
        scores = [abs(float(found.boxes.score[i] - exact.boxes.score[j])) for i, j in pairs]
        error["box_score_max"] = max(scores, default=0.0)
    if len(exact.masks.item):
        a_, b_ = (_by_key(p.masks.item, p.masks.label_id, p.masks.area) for p in (found, exact))
        keys = a_.keys() | b_.keys()
        error["area_max"] = max(abs(a_.get(k, 0.0) - b_.get(k, 0.0)) for k in keys)
    return error


def _frames(geometry: Geometry, n: int, rng: np.random.Generator) -> Frames:
    height, width = geometry.height_px, geometry.width_px
    coarse = rng.uniform(0, 255, (8, 8, 3))
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    scene = coarse[rows][:, columns] + rng.normal(0, 12, (height, width, 3))
    pixels = np.empty((n, height, width, 3), np.uint8)
    for i in range(n):
        pixels[i] = np.clip(np.roll(scene * (0.7 + 0.6 * (i % 7) / 6), 3 * i, axis=1), 0, 255)
    index, no = np.arange(n, dtype=np.int64), np.zeros(n, np.bool_)
    return Frames(
        frame_index=index, pts=index, has_pts=~no, time_s=index / 25, covers_s=np.full(n, 0.04),
        is_keyframe=no, is_corrupt=no, ordinal=index, pixels={geometry.key: pixels},
        source_px=np.tile(np.array([[width, height]], np.int64), (n, 1)),
    )  # fmt: skip


def _pieces(chunk: Chunk, batch: int) -> list[Piece]:
    """Full batches alone, unless there are fewer items than one."""
    n = chunk.num_rows
    ends = range(batch, n + 1, batch) if n >= batch else [n]
    return [Piece(ticket=0, chunk=chunk, lo=end - min(batch, n), hi=end) for end in ends]


def _answer(runner: Runner, spec: ModelSpec, chunk: Chunk) -> Predictions:
    n = chunk.num_rows
    pieces = [
        Piece(ticket=0, chunk=chunk, lo=lo, hi=min(lo + spec.batch, n))
        for lo in range(0, n, spec.batch)
    ]
    return join_predictions([_check(runner.run([piece])[0][spec.name]) for piece in pieces])


def _check(answer: Predictions | ModelError) -> Predictions:
    if isinstance(answer, ModelError):
        raise answer
    return answer


def _memory(gpu: bool) -> int:
    """Peak so far."""
    if gpu:
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _by_key(item: Ints, label_id: Ints, value: Any) -> dict[tuple[int, int], float]:
    keys = zip(item.tolist(), label_id.tolist(), strict=True)
    return dict(zip(keys, value.tolist(), strict=True))


def _first(answer: Predictions) -> Ints:
    """(N,) label_id of the highest score of each item, -1 where there is none."""
    first = np.full(answer.n, -1, np.int64)
    items, at = np.unique(answer.labels.item, return_index=True)  # rows come by falling score
    first[items] = answer.labels.label_id[at]
    return first


def _match(found: Predictions, exact: Predictions) -> Sequence[tuple[int, int]]:
    """Pairs of positions, each box in one pair at most, the strongest first."""
    a, b = found.boxes, exact.boxes
    free = set(range(len(a.item)))
    pairs = []
    for j in np.argsort(-b.score, kind="stable").tolist():
        near = [i for i in free if (a.item[i], a.label_id[i]) == (b.item[j], b.label_id[j])]
        overlaps = [_iou(a.xyxy[i], b.xyxy[j]) for i in near]
        if near and max(overlaps) >= MATCH_IOU:
            best = near[int(np.argmax(overlaps))]
            free.remove(best)
            pairs.append((best, j))
    return pairs


def _iou(one: Any, other: Any) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    areas = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]))
    return shared / (areas - shared) if areas > shared else 0.0
