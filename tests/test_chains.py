"""Models on the boxes of another model: crops, rows against a plain loop, and what commits hold."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.decoding import make_video
from tests.made_frames import make_frames
from tests.small_jobs import rows, run_models, write_model
from vidbatch.batching import Batcher, predict_chunk
from vidbatch.data import (
    Batch,
    Clip,
    DecodeLimits,
    Frames,
    Geometry,
    Model,
    Pixels,
    Predictions,
    Sample,
    chunk_rows,
)
from vidbatch.decode import decode_clip
from vidbatch.errors import ModelError
from vidbatch.media import BytesSource
from vidbatch.models.registry import create_model, resolve_models
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

PARENT_SIZE = Geometry(width_px=96, height_px=54, fit="letterbox")
SIZE = 12

THINGS = """
import os

class Model:
    '''Three boxes in a frame, two in a dark one; MORE adds one, FAIL raises on bright ones.'''
    geometry = Geometry(width_px=96, height_px=54, fit="letterbox")
    labels = ("thing", "other")
    detects = True

    def predict(self, batch):
        mean = batch.pixels.float().mean(dim=(1, 2, 3))
        if os.environ.get("FAIL") and bool((mean > float(os.environ["FAIL"])).any()):
            raise RuntimeError("too bright")
        item, label_id, score, xyxy = [], [], [], []
        for i, bright in enumerate(mean.tolist()):
            n = (3 if bright > 60 else 2) + int(os.environ.get("MORE", 0))
            for j in range(n):
                item.append(i)
                label_id.append((j + 1) % 2)
                score.append([0.5, 0.9, 0.9, 0.2][j])
                x, y = 0.05 + 0.2 * j, 0.9 * bright / 255
                xyxy.append([x, y, x + 0.3, min(1.0, y + 0.35)])
        n = len(item)
        return {"boxes": BoxRows(
            item=np.array(item, np.int64),
            label_id=np.array(label_id, np.int64),
            score=np.array(score, np.float32),
            xyxy=np.array(xyxy, np.float32).reshape(n, 4),
        )}
"""

TONE = """
class Model:
    '''Mean colour of a crop.'''
    geometry = Geometry(width_px=12, height_px=12)
    labels = ("dark", "bright")
    dim = 3
    normalised = False
    batch = 4

    def predict(self, batch):
        assert batch.pixels.shape[1:] == (12, 12, 3) and len(batch.pixels) <= 4
        mean = batch.pixels.float().mean(dim=(1, 2)) / 255
        bright = mean.mean(dim=1)
        return {"embeddings": mean, "scores": torch.stack([1 - bright, bright], dim=1)}
"""


def chain(folder: Path, **what: Any) -> list[dict[str, Any]]:
    """The entry of the child first: its place in the file does not matter."""
    facts = {"on": "things", "crop": {"margin": 0.25}} | what
    return [write_model(folder, "tone", TONE, **facts), write_model(folder, "things", THINGS)]


def models_of(entries: list[dict[str, Any]], folder: Path) -> dict[str, Model]:
    models = {}
    for defn in resolve_models(entries, folder):
        models[defn.spec.name] = create_model(defn)
        models[defn.spec.name].load("cpu")
    return models


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, shared_videos: Path) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    shutil.copy(shared_videos / "real" / "mdn__friday.mp4", folder)
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    folder = tmp_path_factory.mktemp("both")
    run_models(folder, archive, folder / "out", chain(folder), fps=2)
    return folder / "out"


CROPS = (
    "SELECT uri, frame_index, detection_id, label, score, rank FROM labels ORDER BY ALL",
    "SELECT uri, frame_index, detection_id, embedding FROM embeddings ORDER BY ALL",
)


class TestRows:
    def test_are_those_of_a_plain_loop(self, both: Path, archive: Path, tmp_path: Path) -> None:
        """Boxes sorted by hand, cut and scaled by PIL, one frame at a time."""
        things = models_of(chain(tmp_path), tmp_path)["things"]
        wanted = {}
        for index, picture, source_px in _samples(archive / "mdn__friday.mp4"):
            said = things.predict(
                Batch(
                    pixels=torch.from_numpy(picture[None].copy()), previous=None,
                    has_previous=None, source_px=np.array([source_px]),
                )
            ).boxes  # fmt: skip
            ranked = sorted(
                zip(-said.score, said.label_id, said.xyxy.tolist(), strict=True),
                key=lambda b: (b[0], b[1]),
            )
            for k, (_, _, box) in enumerate(ranked):
                wanted[index, k] = _crop(picture, source_px, box).mean(axis=(0, 1)) / 255
        found = rows(both, "SELECT frame_index, detection_id, embedding FROM embeddings")
        assert {(f, k) for f, k, _ in found} == wanted.keys() and len(wanted) > 20
        for frame, k, vector in found:
            assert np.allclose(vector, wanted[frame, k], atol=0.004)  # PIL's own rounding

    def test_refer_to_the_boxes_of_the_other_model(self, both: Path) -> None:
        joined = """
            SELECT count(*), count(d.score), any_value(l.of_model), any_value(d.model)
            FROM {table} l LEFT JOIN detections d ON d.model = l.of_model
            AND d.sample = l.sample AND d.video_id = l.video_id
            AND d.frame_index = l.frame_index AND d.detection_id = l.detection_id"""
        boxes = rows(both, "SELECT count(*) FROM detections")[0][0]
        for table, per_box in (("labels", 2), ("embeddings", 1)):
            count, found, of_model, model = rows(both, joined.format(table=table))[0]
            assert count == found == per_box * boxes
            assert of_model == model and model.startswith("things-v1.")

    def test_are_the_same_of_clips(self, both: Path, archive: Path, tmp_path: Path) -> None:
        run_models(tmp_path, archive, tmp_path / "out", chain(tmp_path), fps=2, length_s=0.5)
        for query in CROPS:
            assert rows(tmp_path / "out", query) == rows(both, query)


class TestAddedLater:
    def test_gives_the_same_and_touches_nothing(
        self, both: Path, archive: Path, tmp_path: Path
    ) -> None:
        child, parent = chain(tmp_path)
        output = tmp_path / "out"
        run_models(tmp_path, archive, output, [parent], fps=2)
        before = {p: p.read_bytes() for p in output.rglob("detections/**/*.parquet")}
        assert before and rows(output, "SELECT count(*) FROM labels") == [(0,)]
        result = run_models(tmp_path, archive, output, [child, parent], fps=2)
        assert [name.partition("-")[0] for name in result.summary["outputs"]] == ["tone"]
        assert before == {p: p.read_bytes() for p in output.rglob("detections/**/*.parquet")}
        for query in CROPS:
            assert rows(output, query) == rows(both, query)

    def test_only_boxes_that_are_committed_have_rows(
        self, both: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second time the parent, no exact one, finds a box more in every frame."""
        child, parent = chain(tmp_path)
        output = tmp_path / "out"
        run_models(tmp_path, archive, output, [parent], fps=2)
        monkeypatch.setenv("MORE", "1")
        run_models(tmp_path, archive, output, [child, parent], fps=2)
        for query in CROPS:
            found = rows(output, query)
            assert [r[:3] for r in found] == [r[:3] for r in rows(both, query)]

    def test_boxes_that_failed_fail_it_too_until_they_are_there(
        self, both: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        child, parent = chain(tmp_path)
        output = tmp_path / "out"
        monkeypatch.setenv("FAIL", "0")
        run_models(tmp_path, archive, output, [parent], fps=2, check=False)
        monkeypatch.delenv("FAIL")
        run_models(tmp_path, archive, output, [child, parent], fps=2, check=False)
        failures = "SELECT split_part(model, '-', 1), kind, message FROM failures"
        ((name, kind, message),) = rows(output, failures)  # the boxes came back by themselves
        assert (name, kind) == ("tone", "parent_failed")
        assert "whose boxes it is on, has failed" in message and "too bright" in message
        assert rows(output, "SELECT count(*) FROM labels") == [(0,)]
        run_models(tmp_path, archive, output, [child, parent], fps=2)
        assert rows(output, failures) == []
        for query in CROPS:
            assert rows(output, query) == rows(both, query)


def test_a_parent_that_fails_takes_its_children_with_it(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "0")
    output = tmp_path / "out"
    entries = [*chain(tmp_path), {"builtin": "quality"}]
    run_models(tmp_path, archive, output, entries, fps=2, check=False)
    status = dict(rows(output, "SELECT split_part(model, '-', 1), status FROM coverage"))
    assert status == {"frames": "ok", "quality": "ok", "things": "failed", "tone": "failed"}
    message = rows(output, "SELECT message FROM failures WHERE model LIKE 'tone%'")[0][0]
    assert "tone: things, whose boxes it is on, failed" in message


class TestRunner:
    def test_answers_do_not_depend_on_the_batch(self, tmp_path: Path) -> None:
        """Chunks cut by a batch of 3 items, with others between: equal to the bit."""
        models = models_of(chain(tmp_path), tmp_path)
        geometries = [m.spec.geometry for m in models.values() if m.spec.geometry]
        rng = np.random.default_rng(1)
        chunks = [
            make_frames(_pictures(rng, 7), geometries, first=10 * i, context=bool(i))
            for i in range(3)
        ]
        batcher, runner = Batcher(3), Runner(list(models.values()))
        for i, chunk in enumerate(chunks):
            batcher.add(i, chunk)
        answers: dict[Any, Any] = {}
        while pieces := batcher.take():
            answers |= dict(batcher.scatter(pieces, runner.run(pieces)))
        for i, chunk in enumerate(chunks):
            alone = predict_chunk(models, chunk, "cpu")["tone"]
            tone = answers[i]["tone"]
            assert isinstance(alone, Predictions) and isinstance(tone, Predictions)
            assert tone.n == chunk.num_rows and tone.crops is not None
            assert alone.crops is not None and len(alone.crops.item) == alone.num_items > 10
            assert np.array_equal(tone.crops.item, alone.crops.item)
            assert np.array_equal(tone.crops.detection, alone.crops.detection)
            assert np.array_equal(tone.embeddings, alone.embeddings)
            assert np.array_equal(tone.labels.item, alone.labels.item)
            assert np.array_equal(tone.labels.score, alone.labels.score)

    def test_out_of_memory_halves_the_crops(self, tmp_path: Path) -> None:
        models = models_of(chain(tmp_path), tmp_path)
        tone: Any = models["tone"]
        frames = make_frames(_pictures(np.random.default_rng(2), 4), [PARENT_SIZE])
        whole = predict_chunk(models, frames, "cpu")["tone"]
        small, predict = tone.plain.predict, tone.plain.predict

        def starved(batch: Batch) -> Any:
            if len(batch.pixels) > 1:
                raise MemoryError
            return predict(batch)

        tone.plain.predict = starved
        runner = Runner(list(models.values()))
        (answers,) = runner.run([Piece(ticket=0, chunk=frames, lo=0, hi=4)])
        tone.plain.predict = small
        said = answers["tone"]
        assert isinstance(said, Predictions) and isinstance(whole, Predictions)
        assert runner.halved == 2 and np.array_equal(said.embeddings, whole.embeddings)

    def test_a_piece_whose_parent_fails_costs_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = models_of(chain(tmp_path), tmp_path)
        rng = np.random.default_rng(3)
        dark, bright = (
            make_frames([np.full((54, 96, 3), v, np.uint8) for _ in range(3)], [PARENT_SIZE])
            for v in (rng.integers(5, 9), 250)
        )
        monkeypatch.setenv("FAIL", "200")
        pieces = [Piece(ticket=i, chunk=c, lo=0, hi=3) for i, c in enumerate((dark, bright))]
        first, second = Runner(list(models.values())).run(pieces)
        assert isinstance(first["tone"], Predictions) and first["tone"].num_items == 6
        error = second["tone"]
        assert isinstance(error, ModelError) and "things, whose boxes it is on" in str(error)

    def test_frames_without_boxes_have_no_crops(self, tmp_path: Path) -> None:
        child, parent = chain(tmp_path)
        parent["what"]["min_score"] = 0.99
        models = models_of([child, parent], tmp_path)
        frames = make_frames(_pictures(np.random.default_rng(2), 2), [PARENT_SIZE])
        said = predict_chunk(models, frames, "cpu")["tone"]
        assert isinstance(said, Predictions) and (said.n, said.num_items) == (2, 0)
        assert said.embeddings.shape == (0, 3)

    def test_a_chunk_must_be_for_both(self, tmp_path: Path) -> None:
        models = models_of(chain(tmp_path), tmp_path)
        frames = make_frames(_pictures(np.random.default_rng(2), 2), [PARENT_SIZE])
        piece = Piece(ticket=0, chunk=frames, lo=0, hi=2, models=frozenset({"tone"}))
        with pytest.raises(KeyError, match="'tone' needs the boxes of 'things'"):
            Runner(list(models.values())).run([piece])


def _pictures(rng: np.random.Generator, n: int) -> list[Pixels]:
    """Noise that is brighter from picture to picture."""
    return [rng.integers(10 * i, 10 * i + 90, (54, 96, 3)).astype(np.uint8) for i in range(n)]


def _samples(path: Path) -> Iterator[tuple[int, Pixels, tuple[int, int]]]:
    data = path.read_bytes()
    for event in decode_clip(
        BytesSource(data),
        Clip(video=make_video(data)),
        sample=Sample(kind="fps", fps=Fraction(2)),
        geometries=[PARENT_SIZE],
        context=False,
        limits=DecodeLimits(),
    ):
        if isinstance(event, Frames):
            for i in range(len(event))[chunk_rows(event)]:
                w, h = event.source_px[i].tolist()
                yield int(event.frame_index[i]), event.pixels[PARENT_SIZE.key][i], (w, h)


def _crop(picture: Pixels, source_px: tuple[int, int], box: list[float]) -> Pixels:
    """A box with a margin of a quarter on each side, in a letterboxed picture, 12x12."""
    scale = min(96 / source_px[0], 54 / source_px[1])
    shown_w, shown_h = round(source_px[0] * scale), round(source_px[1] * scale)
    x0, y0, x1, y1 = box
    w, h = x1 - x0, y1 - y0
    left, top = max(0.0, x0 - w / 4) * shown_w, max(0.0, y0 - h / 4) * shown_h
    right, bottom = min(1.0, x1 + w / 4) * shown_w, min(1.0, y1 + h / 4) * shown_h
    cut = picture[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
    return np.asarray(Image.fromarray(cut).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
