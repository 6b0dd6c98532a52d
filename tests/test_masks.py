"""Masks: area shares whatever the geometry, run lengths as pycocotools reads them, whole jobs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from tests.made_frames import make_frames
from tests.small_jobs import rows, run_models, write_model
from vidbatch.batching import predict_chunk
from vidbatch.data import Model, Predictions, fit_box
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.masks import encode_rle
from vidbatch.models.registry import create_model, resolve_model

# pycocotools' own arrays, not ours
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = """
class Model:
    '''Class 0 where red leads, 1 where green does, else none; at half the resolution.'''
    geometry = Geometry(width_px=64, height_px=64, fit="letterbox")
    labels = ("red", "green", "never")
    segments = True

    def predict(self, batch):
        pixels = batch.pixels[:, ::2, ::2].int()
        red, green, blue = pixels.unbind(dim=3)
        classes = torch.full_like(red, -1)
        classes[(red > green) & (red > blue)] = 0
        classes[(green > red) & (green > blue)] = 1
        return {"masks": classes}
"""

FRAME = np.zeros((90, 160, 3), np.uint8)
FRAME[:, :80, 0] = 200
FRAME[45:, 80:, 1] = 200


def model_of(folder: Path, source: str = CLASSES, **what: Any) -> Model:
    model = create_model(resolve_model(write_model(folder, "classes", source, **what), folder))
    model.load("cpu")
    return model


def predict(model: Model, *pictures: Any) -> Predictions | ModelError:
    assert model.spec.geometry is not None
    frames = make_frames(pictures, [model.spec.geometry])
    return predict_chunk({"classes": model}, frames, "cpu")["classes"]


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 70))))
def test_run_lengths_are_those_of_coco(mask: np.ndarray[Any, Any]) -> None:
    wanted = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert encode_rle(mask) == wanted
    size = list(mask.shape)
    assert np.array_equal(coco.decode({"size": size, "counts": encode_rle(mask)}), mask)


def test_long_runs() -> None:
    mask = np.zeros((2000, 1000), np.bool_)
    mask[:, 300:] = True
    mask[0, 0] = True
    wanted = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert encode_rle(mask) == wanted


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_area_is_a_share_of_the_upright_frame(tmp_path: Path, fit: str) -> None:
    model = model_of(tmp_path, geometry={"fit": fit}, rle=True)
    said = predict(model, FRAME, np.zeros_like(FRAME), FRAME[:, ::-1].copy())
    assert isinstance(said, Predictions)
    masks = said.masks
    assert list(zip(masks.item, masks.label_id, strict=True)) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    shown = 1.0
    if fit == "crop":  # the middle square
        assert model.spec.geometry is not None
        shown = 64 / fit_box(model.spec.geometry, 160, 90)[0]
    assert np.allclose(masks.area[[0, 2]], 0.5 * shown, atol=0.02)
    assert np.allclose(masks.area[[1, 3]], 0.25 * shown, atol=0.02)
    size = {"stretch": (32, 32), "letterbox": (32, 18), "crop": (32, 32)}[fit]
    assert {tuple(s) for s in masks.size_px.tolist()} == {size}
    for rle, area in zip(masks.rle, masks.area, strict=True):
        found = coco.decode({"size": [size[1], size[0]], "counts": rle})
        assert found.mean() * shown == pytest.approx(area, abs=1e-5)


def test_without_rle_there_is_none(tmp_path: Path) -> None:
    said = predict(model_of(tmp_path), FRAME)
    assert isinstance(said, Predictions) and said.masks.rle == (None, None)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("classes + 3", r"masks hold a class outside 0\.\.2, which has no label"),
        ("classes.float()", r"masks is torch\.float32\(1, 32, 32\), expected integers \(1, h, w\)"),
        ("classes[0]", r"expected integers \(1, h, w\)"),
    ],
)
def test_a_wrong_map_is_an_error_of_the_model(tmp_path: Path, answer: str, words: str) -> None:
    source = CLASSES.replace('{"masks": classes}', f'{{"masks": {answer}}}')
    with pytest.raises(ModelError, match=words):
        said = predict(model_of(tmp_path, source), FRAME)
        assert isinstance(said, ModelError)
        raise said


def test_labels_name_boxes_or_masks(tmp_path: Path) -> None:
    source = CLASSES.replace("segments = True", "segments = detects = True")
    with pytest.raises(UsageError, match="boxes or masks"):
        model_of(tmp_path, source)


def test_a_job_leaves_masks(tmp_path: Path, shared_videos: Path) -> None:
    archive = tmp_path / "videos"
    archive.mkdir()
    shutil.copy(shared_videos / "real" / "mdn__flower.mp4", archive)
    entry = write_model(tmp_path, "classes", CLASSES, rle=True, how={"batch": 3})
    run_models(tmp_path, archive, tmp_path / "out", [entry], fps=2)
    run_models(tmp_path, archive, tmp_path / "cut", [entry], fps=2, length_s=1)
    query = (
        "SELECT frame_index, label, label_id, area, mask_rle, mask_width_px, mask_height_px "
        "FROM masks ORDER BY ALL"
    )
    found = rows(tmp_path / "out", query)
    assert rows(tmp_path / "cut", query) == found and len(found) >= 10
    assert {r[1:3] for r in found} <= {("red", 0), ("green", 1)}
    for _, _, _, area, rle, width, height in found:
        assert (width, height) == (32, 18)
        assert coco.decode({"size": [height, width], "counts": rle}).mean() == pytest.approx(area)
    frames = rows(tmp_path / "out", "SELECT count(*) FROM frames")[0][0]
    assert frames == len({r[0] for r in found})  # every frame of a meadow has some green
