"""Crops of any geometry show their box, and what a model file may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made_frames import make_frames
from tests.small_jobs import write_model
from tests.test_chains import PARENT_SIZE, SIZE, TONE, chain
from vidbatch.data import CropRule, Geometry
from vidbatch.errors import UsageError
from vidbatch.models.crops import crop_boxes, cut_crops
from vidbatch.models.registry import create_model, resolve_model, resolve_models


class TestCrops:
    PICTURE = np.zeros((90, 160, 3), np.uint8)
    PICTURE[30:60, 40:80] = (200, 100, 50)
    BOX = np.array([[40 / 160, 30 / 90, 80 / 160, 60 / 90]], np.float32)

    @pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
    @pytest.mark.parametrize(("width", "height"), [(160, 90), (64, 64), (50, 100)])
    def test_of_any_geometry_show_the_box(self, fit: Any, width: int, height: int) -> None:
        geometry = Geometry(width_px=width, height_px=height, fit=fit)
        frames = make_frames([self.PICTURE], [geometry])
        inner = self.BOX + np.array([[0.03, 0.05, -0.03, -0.05]], np.float32)
        rule = CropRule(on="x", size=Geometry(width_px=9, height_px=7))
        where, size = crop_boxes(rule, geometry, inner, frames.source_px)
        if fit == "crop" and (width, height) == (50, 100):
            return  # the box is outside what the picture shows
        pixels = torch.from_numpy(frames.pixels[geometry.key].copy())
        crop = cut_crops(pixels, np.zeros(1, np.int64), where, rule.size)[0].numpy()
        assert crop.shape == (7, 9, 3)
        assert np.abs(crop.astype(int) - (200, 100, 50)).max() < 40  # pixels at the edge are mixed
        assert np.abs(np.median(crop, axis=(0, 1)) - (200, 100, 50)).max() <= 1
        assert np.abs(size - [[30, 21]]).max() <= 1

    def test_margin_ends_at_the_frame(self) -> None:
        geometry = Geometry(width_px=100, height_px=50)
        rule = CropRule(on="x", size=geometry, margin=0.5)
        boxes = np.array([[0.4, 0.4, 0.6, 0.6], [0, 0, 0.5, 0.1], [0.9, 0.9, 1, 1]], np.float32)
        where, size = crop_boxes(rule, geometry, boxes, np.full((3, 2), 1000))
        assert np.abs(where - [[30, 15, 70, 35], [0, 0, 75, 8], [85, 42, 100, 50]]).max() <= 1
        assert np.abs(size - [[400, 400], [750, 150], [150, 150]]).max() <= 1

    @pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
    def test_there_is_always_a_pixel(self, fit: Any) -> None:
        """Also of boxes without area, at the edges, and outside of what is shown."""
        geometry = Geometry(width_px=20, height_px=30, fit=fit)
        corners = np.linspace(0, 1, 5, dtype=np.float32)
        boxes = np.array([[x, y, x, y] for x in corners for y in corners], np.float32)
        rule = CropRule(on="x", size=Geometry(width_px=4, height_px=4))
        where, _ = crop_boxes(rule, geometry, boxes, np.tile([[160, 90]], (25, 1)))
        assert (where[:, :2] >= 0).all() and (where[:, 2:] <= [20, 30]).all()
        assert (where[:, 2:] - where[:, :2] >= 1).all()

    def test_are_scaled_as_pil_scales(self) -> None:
        rng = np.random.default_rng(0)
        frames = torch.from_numpy(rng.integers(0, 255, (3, 60, 80, 3), np.uint8))
        boxes = np.array([[3, 5, 77, 59], [0, 0, 5, 4], [70, 10, 80, 60]], np.int64)
        size = Geometry(width_px=24, height_px=16)
        crops = cut_crops(frames, np.array([2, 0, 1]), boxes, size).numpy()
        for crop, i, (x0, y0, x1, y1) in zip(crops, (2, 0, 1), boxes, strict=True):
            picture = Image.fromarray(frames[i, y0:y1, x0:x1].numpy())
            by_pil = np.asarray(picture.resize((24, 16), Image.Resampling.BILINEAR))
            assert np.abs(crop.astype(int) - by_pil.astype(int)).max() <= 1


class TestEntries:
    def test_the_child_comes_last_and_knows_its_parent(self, tmp_path: Path) -> None:
        things, tone = resolve_models(chain(tmp_path), tmp_path)
        assert (things.spec.name, tone.spec.name) == ("things", "tone")
        crop = tone.spec.crop
        assert crop is not None and crop.parent == things.spec.fingerprint
        assert (crop.on, crop.version, crop.margin) == ("things", "v1", 0.25)
        assert (crop.size.width_px, crop.size.height_px) == (SIZE, SIZE)
        assert tone.spec.geometry == things.spec.geometry == PARENT_SIZE
        assert create_model(tone).plain.geometry == crop.size  # type: ignore[attr-defined]

    def test_geometry_and_size_can_be_written(self, tmp_path: Path) -> None:
        what = {"geometry": {"width_px": 192, "height_px": 108}, "crop": {"width_px": 20}}
        tone = resolve_models(chain(tmp_path, **what), tmp_path)[1].spec
        assert tone.crop is not None and tone.geometry is not None
        assert (tone.crop.size.width_px, tone.crop.size.height_px) == (20, SIZE)
        assert (tone.geometry.width_px, tone.geometry.fit) == (192, "letterbox")

    def test_its_fingerprint_changes_with_the_boxes(self, tmp_path: Path) -> None:
        def fingerprint(**parent: Any) -> str:
            child, entry = chain(tmp_path)
            entry["what"].update(parent)
            return resolve_models([child, entry], tmp_path)[1].spec.fingerprint

        assert fingerprint() == fingerprint()
        assert len({fingerprint(), fingerprint(min_score=0.3), fingerprint(top_k=7)}) == 3
        margin = resolve_models(chain(tmp_path, crop={"margin": 0.5}), tmp_path)[1].spec
        assert margin.fingerprint != fingerprint()

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            (
                {"on": "thing"},
                r"what\.on: unknown model of this job 'thing'; did you mean",
            ),
            ({"on": "quality"}, "gives labels, features, no detections"),
            ({"window": {"frames": 4}}, "window and on exclude each other"),
            ({"audio": {"rate_hz": 16000, "window_s": 1, "hop_s": 1}}, "audio and on exclude"),
            ({"crop": {"width": 3}}, "unknown key 'width'; did you mean 'width_px'"),
            ({"crop": {"margin": -1}}, r"crop\.margin: -1 is no float within 0\.\.10"),
            ({"rle": True}, r"what\.rle: goes with models that give masks"),
            ({"precision": "bf16"}, r"unknown precision of this model 'bf16'; .*known: fp32"),
        ],
    )
    def test_what_makes_no_sense_is_said(
        self, tmp_path: Path, what: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            resolve_models([*chain(tmp_path, **what), {"builtin": "quality"}], tmp_path)
        assert "\n" not in str(caught.value)

    def test_crop_alone_and_without_its_job(self, tmp_path: Path) -> None:
        alone = write_model(tmp_path, "tone", TONE, crop={"margin": 0.1})
        with pytest.raises(UsageError, match="goes with `on:`"):
            resolve_model(alone, tmp_path)
        with pytest.raises(UsageError, match="unknown model of this job 'things'; known: none"):
            resolve_model(chain(tmp_path)[0], tmp_path)

    def test_features_have_no_place(self, tmp_path: Path) -> None:
        parent = chain(tmp_path)[1]
        source = TONE.replace("dim = 3", 'features = ("size",)')
        entry = write_model(tmp_path, "tone", source, on="things")
        with pytest.raises(UsageError, match="'on' gives labels and embeddings alone; features"):
            resolve_models([entry, parent], tmp_path)
