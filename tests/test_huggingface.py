"""Models of the transformers library: the same rows as the library's own, on real frames.

Two halves: our picture of a frame is the library's within a grey level; of the same picture, the
rows are those of the library's own pipeline or forward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pickle
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")

import torch
import transformers as hf
import typer
import yaml
from PIL import Image

from tests import tiny_models
from tests.decoding import decode
from tests.small_jobs import rows, run_models
from vidbatch.batching import predict_chunk
from vidbatch.cli_models import models_app
from vidbatch.config import read_yaml
from vidbatch.data import (
    Audio,
    AudioGrid,
    Batch,
    Chunk,
    Frames,
    Geometry,
    Pixels,
    Predictions,
    Sample,
    Singles,
    Windows,
)
from vidbatch.errors import ModelError, UsageError
from vidbatch.models import weights
from vidbatch.models.huggingface import pixels
from vidbatch.models.huggingface.mirror import fetch_model
from vidbatch.models.registry import ModelDef, create_model, resolve_model, resolve_models

VIDEOS = {
    "sam2__bedroom.mp4": (960, 540),
    "gpmf__hero7.mp4": (848, 480),
    "facenet__video_tracked.mp4": (640, 360),
}
"""Name → width and height: 16:9, limited and full range, BT.601 and BT.709."""
ROOM = "sam2__bedroom.mp4"
FRAMES = 4
PROMPTS = ["a photo of a cat", "a dog", "street at night"]
DETR = Geometry(width_px=96, height_px=64, fit="letterbox")
ENTRIES: dict[str, dict[str, Any]] = {
    "clip": {"prompts": PROMPTS},
    "siglip": {"prompts": PROMPTS},
    "detr": {"geometry": {"width_px": 96, "height_px": 64, "fit": "letterbox"}},
    "yolos": {"geometry": {"width_px": 96, "height_px": 48}},
    "wav2vec2": {"audio": {"window_s": 0.5}},
}
"""What a model file must say besides the source."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model of every kind; nothing here can reach the hub."""
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VIDBATCH_CACHE", str(folder / "cache"))
        for name in tiny_models.RECIPES:
            tiny_models.make_model(name, folder)
        yield folder
    made.cache_clear()


def entry(source: Path, **what: Any) -> dict[str, Any]:
    what = {"adapter": "huggingface", "source": str(source), **what}
    return {"name": "tiny", "version": "v1", "what": what}


def resolve(source: Path, **what: Any) -> ModelDef:
    return resolve_model(entry(source, **ENTRIES.get(source.name, {}) | what), source)


@cache
def made(source: Path, what: str = "{}") -> Any:
    """A loaded model; `what` is JSON of further keys."""
    model = create_model(resolve(source, **json.loads(what)))
    model.load("cpu")
    return model


@cache
def real_frames(models: Path, path: Path) -> Frames:
    """The first sampled frames of a video, as the decoder makes them for all models at once."""
    specs = [resolve(models / name).spec for name in tiny_models.RECIPES]
    got = decode(
        path.read_bytes(),
        Sample(kind="every", every=20),
        geometries=[whole_size(path), *(s.geometry for s in specs if s.geometry)],
        chunk_bytes=2**28,
    )
    return got.chunks[0].cut(FRAMES)


def whole_size(path: Path) -> Geometry:
    width, height = VIDEOS[path.name]
    return Geometry(width_px=width, height_px=height)


def answer(model: Any, chunk: Chunk) -> Predictions:
    found = predict_chunk({"tiny": model}, chunk, "cpu")["tiny"]
    assert isinstance(found, Predictions), found
    return found


def seen(models: Path, model: Any, path: Path) -> tuple[Frames, list[Pixels]]:
    """Frames for the model, and the pictures without the padding of a letterbox."""
    g = model.spec.geometry
    frames = real_frames(models, path)
    high = 54 if g.fit == "letterbox" else g.height_px  # 16:9 in 96 x 64
    return frames, [p[:high] for p in frames.pixels[g.key]]


@pytest.mark.parametrize("video", VIDEOS)
@pytest.mark.parametrize(
    "name", [n for n in tiny_models.RECIPES if n not in ("ast", "wav2vec2", "vit_embedding")]
)
def test_pixels_are_the_librarys(models: Path, shared_videos: Path, name: str, video: str) -> None:
    path = shared_videos / "real" / video
    model = made(models / name)
    frames, _ = seen(models, model, path)
    ours = frames.pixels[model.spec.geometry.key]
    batch = torch.from_numpy(np.array(ours))
    if name == "detr":
        batch = batch[:, :54]
    got = model.plain._pixels(batch)
    processor = hf.AutoImageProcessor.from_pretrained(models / name)
    theirs = torch.stack(
        [
            _first(processor(Image.fromarray(p), return_tensors="pt"))
            for p in frames.pixels[whole_size(path).key]
        ]
    )
    assert got.shape == theirs.shape
    options = model.plain.options
    std = torch.tensor(options["std"])[:, None, None]
    levels = ((got - theirs) * std / options["scale"]).abs()  # 0..255, before normalisation
    assert float(levels.mean()) <= 1.0


def _first(features: Any) -> torch.Tensor:
    values: torch.Tensor = features["pixel_values"]
    return values.reshape(values.shape[-3:])


class TestRows:
    @pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
    def test_image_classification(self, models: Path, shared_videos: Path, name: str) -> None:
        model = made(models / name, '{"top_k": 0}')
        frames, pictures = seen(models, model, shared_videos / "real" / ROOM)
        got = answer(model, frames)
        run = hf.pipeline("image-classification", model=str(models / name), top_k=None)
        scores = [_scores(run.model, run.image_processor, p) for p in pictures]
        for i, picture in enumerate(pictures):
            rows = got.labels.item == i
            want = scores[i]
            assert got.labels.score[rows] == pytest.approx(np.sort(want)[::-1], abs=1e-5)
            assert got.labels.label_id[rows].tolist() == np.argsort(-want).tolist()
            best = run(Image.fromarray(picture))[0]
            assert model.spec.labels[got.labels.label_id[rows][0]].startswith(best["label"])
            assert got.labels.score[rows][0] == pytest.approx(best["score"], abs=1e-5)
        assert len({tuple(x.tolist()) for x in scores}) == FRAMES, "answers differ by frame"

    @pytest.mark.parametrize("name", ["clip", "siglip"])
    def test_zero_shot(self, models: Path, shared_videos: Path, name: str) -> None:
        model = made(models / name, '{"outputs": ["labels", "embeddings"]}')
        frames, pictures = seen(models, model, shared_videos / "real" / ROOM)
        got = answer(model, frames)
        run = hf.pipeline("zero-shot-image-classification", model=str(models / name))
        scores = set()
        for i, picture in enumerate(pictures):
            want = run(Image.fromarray(picture), candidate_labels=PROMPTS, hypothesis_template="{}")
            rows = got.labels.item == i
            assert [model.spec.labels[k] for k in got.labels.label_id[rows]] == [
                w["label"] for w in want
            ]
            assert got.labels.score[rows] == pytest.approx([w["score"] for w in want], abs=1e-5)
            scores.add(want[0]["score"])
        assert len(scores) == FRAMES
        alone = answer(made(models / name, '{"prompts": null}'), frames)
        np.testing.assert_allclose(got.embeddings, alone.embeddings, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "pooling"),
        [
            ("dinov2", "cls"), ("dinov2", "mean"), ("dinov2", "pooler"), ("vit_embedding", "cls"),
            ("clip", ""), ("siglip", ""),
        ],
    )  # fmt: skip
    def test_embeddings(self, models: Path, shared_videos: Path, name: str, pooling: str) -> None:
        what = {"pooling": pooling} if pooling else {"prompts": None}
        model = made(models / name, json.dumps(what))
        frames, pictures = seen(models, model, shared_videos / "real" / ROOM)
        network = hf.AutoModel.from_pretrained(models / name).eval()
        processor = hf.AutoImageProcessor.from_pretrained(models / name)
        inputs = processor([Image.fromarray(p) for p in pictures], return_tensors="pt")
        with torch.inference_mode():
            if pooling:
                states = network(**inputs)
                want = {
                    "cls": states.last_hidden_state[:, 0],
                    "mean": states.last_hidden_state.mean(1),
                    "pooler": states.pooler_output,
                }[pooling]
            else:
                want = network.get_image_features(**inputs).pooler_output
        want = torch.nn.functional.normalize(want, dim=-1)
        np.testing.assert_allclose(answer(model, frames).embeddings, want, atol=1e-5)

    @pytest.mark.parametrize("name", ["detr", "rt_detr", "yolos"])
    def test_object_detection(self, models: Path, shared_videos: Path, name: str) -> None:
        model = made(models / name, '{"min_score": 0.1}')
        path = shared_videos / "real" / ROOM
        frames, pictures = seen(models, model, path)
        got = answer(model, frames).boxes
        network = hf.AutoModelForObjectDetection.from_pretrained(models / name).eval()
        processor = hf.AutoImageProcessor.from_pretrained(models / name)
        total = 0
        for i, picture in enumerate(pictures):
            with torch.inference_mode():
                output = network(**processor(Image.fromarray(picture), return_tensors="pt"))
            (want,) = processor.post_process_object_detection(output, 0.1, [(1.0, 1.0)])
            rows = np.flatnonzero(got.item == i)
            rows = rows[np.lexsort((got.xyxy[rows, 0], -got.score[rows].round(4)))]
            box = want["boxes"].clamp(0, 1).numpy()
            order = np.lexsort((box[:, 0], -want["scores"].numpy().round(4)))
            assert got.score[rows] == pytest.approx(want["scores"].numpy()[order], abs=1e-4)
            assert got.label_id[rows].tolist() == want["labels"][order].tolist()
            np.testing.assert_allclose(got.xyxy[rows], box[order], atol=1e-4)
            total += len(rows)
        assert total, "some boxes were compared"

    def test_classes_that_are_not_kept_are_left_out(
        self, models: Path, shared_videos: Path
    ) -> None:
        path = shared_videos / "real" / ROOM
        every = made(models / "rt_detr", '{"min_score": 0.1}')
        some = made(models / "rt_detr", '{"min_score": 0.1, "labels": ["dog", "crane (3)"]}')
        assert some.spec.labels == ("dog", "crane (3)")
        frames, _ = seen(models, every, path)
        all_boxes, boxes = answer(every, frames).boxes, answer(some, frames).boxes
        kept = np.isin(all_boxes.label_id, [1, 3])
        assert 0 < kept.sum() < len(kept)
        np.testing.assert_array_equal(boxes.xyxy, all_boxes.xyxy[kept])
        np.testing.assert_array_equal(boxes.label_id, all_boxes.label_id[kept] // 2)

    @pytest.mark.parametrize("name", ["detr", "rt_detr"])
    def test_boxes_are_of_the_upright_frame_whatever_the_geometry(
        self, models: Path, name: str
    ) -> None:
        """A frame that is half as tall fills half of the letterbox: its boxes fill the frame."""
        what = {"geometry": {"width_px": 64, "height_px": 64, "fit": "letterbox"}, "min_score": 0}
        model = made(models / name, json.dumps(what))
        picture = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
        wide = _frames(picture, model.spec.geometry, (128, 64))
        boxes = answer(model, wide).boxes
        if name == "detr":
            square = made(
                models / name, '{"geometry": {"width_px": 64, "height_px": 32}, "min_score": 0}'
            )
            cut = _frames(picture[:, :32].copy(), square.spec.geometry, (128, 64))
            np.testing.assert_allclose(boxes.xyxy, answer(square, cut).boxes.xyxy, atol=1e-5)
        else:
            full = _frames(picture, model.spec.geometry, (64, 64))
            in_square = answer(model, full).boxes.xyxy
            want = np.clip(in_square * (1, 2, 1, 2), 0, 1)
            np.testing.assert_allclose(boxes.xyxy, want, atol=1e-5)

    def test_a_batch_of_several_sizes_gives_what_each_gives_alone(self, models: Path) -> None:
        model = made(models / "detr", '{"min_score": 0}')
        noise = np.random.default_rng(1).integers(0, 255, (3, 64, 96, 3), np.uint8)
        sizes = np.array([(160, 90), (80, 80), (160, 90)])
        together = model.predict(_batch(noise, sizes)).boxes
        for i in range(3):
            alone = model.predict(_batch(noise[i : i + 1], sizes[i : i + 1])).boxes
            mine = together.item == i
            np.testing.assert_allclose(together.xyxy[mine], alone.xyxy, atol=1e-5)
            np.testing.assert_allclose(together.score[mine], alone.score, atol=1e-5)

    @pytest.mark.parametrize("kept", [None, ["dog", "cat"]])
    def test_semantic_segmentation(
        self, models: Path, shared_videos: Path, kept: list[str] | None
    ) -> None:
        model = made(models / "segformer", json.dumps({"labels": kept, "rle": True}))
        frames, pictures = seen(models, model, shared_videos / "real" / ROOM)
        got = answer(model, frames).masks
        network = hf.AutoModelForSemanticSegmentation.from_pretrained(models / "segformer").eval()
        processor = hf.AutoImageProcessor.from_pretrained(models / "segformer")
        found = 0
        for i, picture in enumerate(pictures):
            with torch.inference_mode():
                output = network(**processor(Image.fromarray(picture), return_tensors="pt"))
            (want,) = processor.post_process_semantic_segmentation(output, [(64, 64)])
            shares = np.bincount(want.ravel().numpy(), minlength=4)[: 2 if kept else 4] / 64**2
            rows = got.item == i
            assert got.label_id[rows].tolist() == np.flatnonzero(shares).tolist()
            assert got.area[rows] == pytest.approx(shares[shares > 0], abs=1e-6)
            found += int(rows.sum())
        assert found > FRAMES or kept

    @pytest.mark.parametrize("name", ["videomae", "timesformer", "vivit"])
    def test_video_classification(self, models: Path, shared_videos: Path, name: str) -> None:
        model = made(models / name, '{"top_k": 0}')
        frames, pictures = seen(models, model, shared_videos / "real" / ROOM)
        windows = Windows(frames=frames, items=np.array([[0, 1, 2, 3], [1, 2, 3, 3]]))
        got = answer(model, windows)
        network = hf.AutoModelForVideoClassification.from_pretrained(models / name).eval()
        processor = hf.AutoImageProcessor.from_pretrained(models / name)
        for i, items in enumerate(windows.items):
            inputs = processor([pictures[k] for k in items], return_tensors="pt")
            with torch.inference_mode():
                want = network(**inputs).logits[0].softmax(-1).numpy()
            rows = got.labels.item == i
            assert got.labels.label_id[rows].tolist() == np.argsort(-want).tolist()
            assert got.labels.score[rows] == pytest.approx(np.sort(want)[::-1], abs=1e-5)

    @pytest.mark.parametrize("name", ["ast", "wav2vec2"])
    def test_audio_classification(self, models: Path, name: str) -> None:
        model = made(models / name, '{"top_k": 0}')
        grid = model.spec.audio
        assert isinstance(grid, AudioGrid) and grid.rate_hz == 16000
        t = np.arange(grid.samples) / grid.rate_hz
        sound = np.stack([np.sin(2 * np.pi * f * t) * a for f, a in ((220, 0.9), (3000, 0.1))])
        chunk = Audio(grid=grid, keys=np.arange(2), samples=sound.astype(np.float32))
        got = answer(model, chunk)
        run = hf.pipeline("audio-classification", model=str(models / name), top_k=None)
        for i in range(2):
            want = sorted((w["score"] for w in run(chunk.samples[i])), reverse=True)
            rows = got.labels.item == i
            assert got.labels.score[rows] == pytest.approx(want, abs=1e-5)
        assert got.labels.score[0] != got.labels.score[4]


class TestRefusals:
    """Each before any task, in one line that says what to write."""

    @pytest.fixture
    def model(self, models: Path, tmp_path: Path) -> Path:
        """A copy to spoil."""
        return Path(shutil.copytree(models / "vit", tmp_path / "vit"))

    def refused(self, source: Path, says: str, **what: Any) -> None:
        with pytest.raises(UsageError) as caught:
            resolve(source, **what)
        assert says in caught.value.message
        assert "\n" not in caught.value.message

    def test_pickled_weights(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        self.refused(model, "holds pytorch_model.bin and no model.safetensors; reading such files")

    def test_no_weights(self, model: Path) -> None:
        (model / "model.safetensors").unlink()
        self.refused(model, "holds no model.safetensors")

    def test_a_shard_that_is_missing(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
        self.refused(model, "lacks model-2.safetensors, which its index names")

    def test_code_of_its_own(self, model: Path) -> None:
        tiny_models.change_json(model / "config.json", auto_map={"AutoModel": "evil.Model"})
        self.refused(model, "has 'auto_map': it wants code from its repository to be run")
        tiny_models.change_json(model / "config.json", auto_map=None)
        tiny_models.change_json(model / "preprocessor_config.json", auto_map={"A": "evil.B"})
        self.refused(model, "preprocessor_config.json has 'auto_map'")

    @pytest.mark.parametrize("labels", [None, {"0": "LABEL_0", "1": "LABEL_1"}, {"1": "cat"}])
    def test_no_labels(self, model: Path, labels: Any) -> None:
        tiny_models.change_json(model / "config.json", id2label=labels)
        self.refused(model, "id2label")

    def test_a_label_that_is_none_of_its_own(self, model: Path) -> None:
        self.refused(model, "unknown label 'dogg'; did you mean 'dog'?", labels=["dogg"])

    def test_another_file_than_the_pinned_one(self, model: Path) -> None:
        pins = dict(resolve(model).spec.weights_sha256)
        assert resolve(model, sha256=pins).spec.weights_sha256 == tuple(sorted(pins.items()))
        tiny_models.change_json(model / "config.json", id2label={"0": "a", "1": "b"})
        self.refused(model, "config.json is not the file that was pinned", sha256=pins)

    def test_keys(self, model: Path) -> None:
        self.refused(model, "unknown key 'promts'; did you mean 'prompts'", promts=["a"])
        self.refused(model, "prompts: goes with zero-shot", prompts=["a"])
        says = "ViTForImageClassification is for image-classification, not"
        self.refused(model, says, task="object-detection")
        self.refused(model, "did you mean 'image-classification'", task="image-clasification")
        self.refused(model, "unknown kind of score 'relu'", scores="relu")
        self.refused(model, "unknown key 'endpoint'", store={"endpoint": "x"})

    def test_without_the_extra(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: None if n == "transformers" else find(n)
        )
        self.refused(model, "needs transformers, which is not installed here; pip install")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"size": None}, "states no size that frames are scaled to"),
            ({"do_resize": False}, "states no size that frames are scaled to"),
            ({"size": {"shortest_edge": 32}}, "does not crop: the size changes with the frame"),
            ({"resample": 1}, "resample 1 (lanczos) is none of bilinear and bicubic"),
            ({"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
            ({"image_mean": None}, "normalises, but its image_mean is None"),
            (
                {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 33},
                "crops 33 x 33 from 36 x 36",
            ),
            (
                {"image_processor_type": "OtherImageProcessor", "resample": None},
                "states no `resample`",
            ),
        ],
    )
    def test_geometries(self, model: Path, change: dict[str, Any], says: str) -> None:
        tiny_models.change_json(model / "preprocessor_config.json", **change)
        self.refused(model, says)

    def test_a_geometry_that_changes_with_the_frame(self, models: Path) -> None:
        says = "such as geometry: {width_px: 96, height_px: 64, fit: letterbox}"
        self.refused(models / "detr", says, geometry=None)
        says = "such as geometry: {width_px: 96, height_px: 48, fit: stretch}"
        self.refused(models / "yolos", says, geometry=None)
        said = {"width_px": 90, "height_px": 48}
        self.refused(models / "yolos", "no multiple of 16, the patches", geometry=said)

    def test_the_model_file_may_say_what_the_other_does_not(self, model: Path) -> None:
        tiny_models.change_json(model / "preprocessor_config.json", size=None, resample=0)
        own = {"width_px": 32, "height_px": 32, "interpolation": "area"}
        assert resolve(model, geometry=own).spec.geometry == Geometry(**own)  # type: ignore[arg-type]

    def test_sound(self, models: Path) -> None:
        self.refused(models / "wav2vec2", "write audio: {window_s: 5, hop_s: 5}", audio=None)
        other = {"rate_hz": 8000, "window_s": 1}
        self.refused(models / "wav2vec2", "the model hears 16000 Hz", audio=other)

    def test_prompts(self, models: Path, tmp_path: Path) -> None:
        self.refused(models / "clip", "list of different prompts", prompts=["a", "a"])
        self.refused(models / "clip", "write `prompts:`", prompts=None, task="zero-shot")
        bare = Path(shutil.copytree(models / "clip", tmp_path / "clip"))
        (bare / "tokenizer.json").unlink()
        self.refused(bare, "holds no tokenizer.json")

    def test_weights_that_lack_tensors(self, models: Path, tmp_path: Path) -> None:
        """The library would make them up at random."""
        headless = tmp_path / "vit"
        shutil.copytree(models / "vit", headless)
        shutil.copy(models / "vit_embedding" / "model.safetensors", headless)
        model = create_model(resolve(headless))
        with pytest.raises(ModelError, match=r"classifier\.bias among them"):
            model.load("cpu")

    def test_the_hub_needs_a_commit_and_a_run_at_home(self, tmp_path: Path) -> None:
        self.refused(Path("google/vit"), "a model of the hub needs `revision:`, its commit")
        self.refused(Path("google/vit"), "at a commit of 40 digits", revision="main")
        what = entry(Path("google/vit"), revision="0" * 40)
        with pytest.raises(UsageError, match="reaches the hub only with"):
            resolve_models([what], tmp_path, hub=False)


def test_a_model_of_the_hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's own cache on this machine: nothing is asked of the network."""
    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "models--acme--vit" / "snapshots" / commit
    shutil.copytree(models / "vit", place)
    of_hub = resolve(Path("acme/vit"), revision=commit)
    assert of_hub.spec.fingerprint == resolve(models / "vit").spec.fingerprint
    with pytest.raises(UsageError, match="cannot be had from the hub"):
        resolve(Path("acme/vit"), revision="0" * 40)
    assert f"revision: {commit}\n" in fetch_model(f"acme/vit@{commit}")


class TestFingerprint:
    """Changes when and only when rows could."""

    def test_the_place_and_what_was_known_already_change_nothing(
        self, models: Path, tmp_path: Path
    ) -> None:
        one = resolve(models / "vit").spec
        elsewhere = Path(shutil.copytree(models / "vit", tmp_path / "elsewhere"))
        (elsewhere / "README.md").write_text("about")
        said = {
            "task": "image-classification",
            "scores": "softmax",
            "sha256": dict(one.weights_sha256),
            "geometry": {"width_px": 32},
        }
        assert resolve(elsewhere, **said).spec.fingerprint == one.fingerprint

    def test_what_makes_other_rows_changes_it(self, models: Path, tmp_path: Path) -> None:
        spoilt = Path(shutil.copytree(models / "vit", tmp_path / "vit"))
        content = bytearray((spoilt / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (spoilt / "model.safetensors").write_bytes(content)
        found = [
            resolve(models / "vit"),
            resolve(spoilt),
            *(
                resolve(models / "vit", **what)
                for what in (
                    {"top_k": 2}, {"min_score": 0.1}, {"labels": ["cat"]}, {"scores": "sigmoid"},
                    {"geometry": {"fit": "crop"}}, {"precision": "bf16"},
                )
            ),
            *(
                resolve(models / "clip", **what)
                for what in (
                    {}, {"prompts": ["a cat"]}, {"prompts": {"a cat": "a photo of a cat"}},
                    {"prompts": None}, {"outputs": ["labels", "embeddings"]},
                )
            ),
            resolve(models / "dinov2"),
            resolve(models / "dinov2", pooling="mean"),
        ]  # fmt: skip
        assert len({d.spec.fingerprint for d in found}) == len(found)


def noise(model: Any, n: int = 3) -> Batch:
    """Seeded items of the kind that a model takes."""
    rng, spec = np.random.default_rng(0), model.spec
    sizes = np.array([(960, 540)] * n)
    if spec.audio:
        sound = rng.normal(0, 0.1, (n, spec.audio.samples)).astype(np.float32)
        return Batch(
            pixels=None, previous=None, has_previous=None, source_px=sizes,
            samples=torch.from_numpy(sound),
        )  # fmt: skip
    items = (n, spec.window.frames) if spec.window else (n,)
    g = spec.geometry
    return _batch(rng.integers(0, 255, (*items, g.height_px, g.width_px, 3), np.uint8), sizes)


def numbers(model: Any, batch: Batch) -> np.ndarray[Any, Any]:
    """All that an answer says, in an order that does not hang on the scores."""
    with torch.inference_mode():
        found = model.predict(batch)
    labels = np.zeros((len(batch.source_px), len(model.spec.labels)))
    labels[found.labels.item, found.labels.label_id] = found.labels.score
    by_item = np.lexsort((found.boxes.score, found.boxes.item))
    parts = [labels, found.embeddings, found.boxes.score[by_item], found.masks.area]
    return np.concatenate([np.ravel(p) for p in parts])


@pytest.mark.parametrize("name", tiny_models.RECIPES)
def test_half_precision(models: Path, name: str) -> None:
    """Every kind runs in it, and says about the same; the weights here are random and so touchy."""
    every: dict[str, Any] = (
        {"min_score": 0} if name in ("detr", "rt_detr", "yolos") else {"top_k": 0}
    )
    full = made(models / name, json.dumps(every))
    half = made(models / name, json.dumps(every | {"precision": "fp16"}))
    assert next(half.plain._network.parameters()).dtype == torch.float16
    want, got = (numbers(m, noise(full)) for m in (full, half))
    assert len(want) and np.abs(want - got).max() < 0.1
    assert np.abs(want - got).max() > 0, "it was another computation"


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_compiled_networks_always_see_a_full_batch(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the backend that generates no code: the other takes minutes here."""
    seen: list[int] = []

    def backend(graph: Any, examples: list[Any]) -> Any:
        seen.extend(len(x) for x in examples if getattr(x, "shape", ())[1:] == (3, 32, 32))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = made(models / name)
    entries = entry(models / name, **ENTRIES.get(name, {})) | {"how": {"compile": True, "batch": 4}}
    model: Any = create_model(resolve_model(entries, models))
    model.load("cpu")
    for n in (4, 3, 1):
        batch = noise(plain, n)
        np.testing.assert_allclose(numbers(model, batch), numbers(plain, batch), atol=1e-5)
    assert set(seen) == {4}


SHIPPED = {
    "classify": ("vit", "labels"),
    "zero-shot": ("siglip", "labels"),
    "embed": ("dinov2", "embeddings"),
    "detect": ("rt_detr", "detections"),
    "segment": ("segformer", "masks"),
    "video-classify": ("videomae", "windows"),
    "audio-classify": ("ast", "audio"),
    "emotion": ("vit", "labels"),
}
"""Model file → the tiny model that takes the place of its source; a table it fills."""


def test_every_shipped_model_file_runs_to_its_table(
    models: Path, shared_videos: Path, tmp_path: Path
) -> None:
    """The files as they are but for source, over a real video with a face and sound."""
    here = Path(__file__).parent.parent / "configs" / "models"
    files = {p.stem: p for p in here.glob("*.yaml") if "adapter: huggingface" in p.read_text()}
    assert files.keys() == SHIPPED.keys()
    entries: list[dict[str, Any]] = [{"builtin": "faces"}]
    for name, path in files.items():
        assert path.read_text().startswith("# vidbatch run"), "opens with its command"
        file = read_yaml(path)
        source = Path(shutil.copytree(models / SHIPPED[name][0], tmp_path / name))
        labels = file["what"].get("labels", [])
        named = {str(i): x for i, x in enumerate([*labels, "a", "b", "c", "d"][:4])}
        tiny_models.change_json(source / "config.json", id2label=named)
        assert file["what"]["source"].startswith("s3://acme-models/")
        few = 0.05 if "min_score" in file["what"] else 0.0  # nothing is learnt: all are unlikely
        what = file["what"] | {"source": str(source), "min_score": few}
        entries.append(file | {"what": what})
    archive, output = tmp_path / "archive", tmp_path / "tables"
    archive.mkdir()
    (archive / "a.mp4").write_bytes((shared_videos / "real" / "moviepy__chaplin.mp4").read_bytes())
    run_models(tmp_path, archive, output, entries, fps=2)
    for name, (_, table) in SHIPPED.items():
        ((found,),) = rows(output, f"select count(*) from {table} where model like '{name}-v1.%'")
        assert found > 0, name
    on_faces = rows(
        output,
        "select l.frame_index, l.detection_id from labels l where model like 'emotion-v1.%' "
        "order by all",
    )
    assert on_faces == rows(
        output,
        "select frame_index, detection_id from detections where model like 'faces-v1.%' "
        "order by all",
    )


OLD_SPELLINGS: list[tuple[str, dict[str, Any], Geometry, tuple[int, int] | None]] = [
    (
        "vit",
        {"size": 224, "resample": 2},
        Geometry(width_px=224, height_px=224),
        None,
    ),
    (
        "clip",
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
        Geometry(width_px=224, height_px=224, fit="crop", interpolation="bicubic"),
        None,
    ),
    (
        "convnext",
        {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875},
        Geometry(width_px=256, height_px=256, fit="crop", interpolation="bicubic"),
        (224, 224),
    ),
    (
        "segformer",
        {"feature_extractor_type": "SegformerFeatureExtractor", "size": 512},
        Geometry(width_px=512, height_px=512),
        None,
    ),
    (
        "deit",
        {"size": 256, "crop_size": 224, "do_center_crop": True},
        Geometry(width_px=256, height_px=256, interpolation="bicubic"),
        (224, 224),
    ),
]


@pytest.mark.parametrize("spelling", OLD_SPELLINGS, ids=lambda s: s[0])
def test_files_of_older_versions(
    spelling: tuple[str, dict[str, Any], Geometry, tuple[int, int] | None],
) -> None:
    model_type, file, geometry, inner = spelling
    numbers = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5], "do_normalize": True}
    rule = pixels.read_pixels(file | numbers, model_type, {}, "x")
    assert (rule.geometry, rule.inner) == (geometry, inner)
    assert (rule.scale, rule.shift, rule.mean) == (1 / 255, 0, (0.5, 0.4, 0.3))
    detr = {"feature_extractor_type": "DetrFeatureExtractor", "size": 800, "max_size": 1333}
    with pytest.raises(UsageError, match="shortest edge of 800 and a longest of 1333"):
        pixels.read_pixels(detr | numbers, "detr", {}, "x")


class TestFetch:
    def test_into_a_store_and_from_there(
        self, models: Path, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(weights, "SMALL_BYTES", 4096)  # so that the tiny weights are staged
        dest = f"s3://{s3_bucket}/models/clip"
        text = fetch_model(str(models / "clip"), dest)
        assert text == fetch_model(str(models / "clip"), dest), "the same files again: nothing new"
        file = yaml.safe_load(text)
        assert file["what"]["source"] == dest
        defn = resolve_model(file, tmp_path)
        assert [w.name for w in defn.located.weights] == ["model.safetensors"]
        here = {**ENTRIES["clip"], "prompts": None}
        noise = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
        batch = _batch(noise, np.array([(32, 32)] * 2))
        model = create_model(pickle.loads(pickle.dumps(defn)))
        model.load("cpu")
        want = made(models / "clip", json.dumps(here)).predict(batch).embeddings
        np.testing.assert_array_equal(model.predict(batch).embeddings, want)

    def test_what_lies_there_is_not_touched(self, models: Path, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UsageError, match="is there and is another file"):
            fetch_model(str(models / "vit"), str(tmp_path))
        assert (tmp_path / "config.json").read_text() == "{}"

    def test_what_is_still_to_be_written_is_said(self, models: Path) -> None:
        assert fetch_model(str(models / "detr")).startswith("# still to be written: what.source: ")

    def test_the_command(self, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call(["fetch", str(models / "vit")]) == 0
        file = yaml.safe_load(capsys.readouterr().out)
        pins = file["what"]["sha256"]
        assert pins == dict(resolve(models / "vit").spec.weights_sha256)
        assert call([]) == call(["--json"]) == 0, "without a word: what there is"
        assert "huggingface" in capsys.readouterr().out


def call(arguments: list[str]) -> int:
    """`vidbatch models …`."""
    code = typer.main.get_command(models_app).main(arguments, standalone_mode=False)
    return int(code or 0)


@pytest.mark.parametrize("name", sorted(pixels.PROCESSORS.keys() - {"Timesformer"}))
def test_the_defaults_are_the_librarys(name: str) -> None:
    """Where a file is silent, `PROCESSORS` says what the library's class of that name does.

    Timesformer's is only there with torchvision; its models name VideoMAE's.
    """
    ours = pixels.PROCESSORS[name]
    theirs = getattr(hf, "VivitImageProcessor" if name == "Vivit" else f"{name}ImageProcessorPil")()
    assert int(theirs.resample) == ours.resample
    assert bool(getattr(theirs, "do_center_crop", False)) == ours.crops
    assert bool(theirs.do_normalize) == ours.normalises
    assert bool(getattr(theirs, "offset", False)) == ours.offset
    assert getattr(theirs, "crop_pct", 0.0) == ours.crop_share
    if name != "Vivit":  # which calls its helper with False, whatever the attribute says
        assert bool(getattr(theirs, "default_to_square", False)) == ours.square


def _scores(network: Any, processor: Any, picture: Pixels) -> Singles:
    with torch.inference_mode():
        logits = network(**processor(Image.fromarray(picture), return_tensors="pt")).logits[0]
    scores: Singles = logits.softmax(-1).numpy()
    return scores


def _batch(picture: Pixels, source_px: np.ndarray[Any, Any]) -> Batch:
    return Batch(
        pixels=torch.from_numpy(picture), previous=None, has_previous=None, source_px=source_px
    )


def _frames(pictures: Pixels, geometry: Geometry, source: tuple[int, int]) -> Frames:
    n = len(pictures)
    index, no = np.arange(n), np.zeros(n, np.bool_)
    return Frames(
        frame_index=index, pts=index, has_pts=~no, time_s=index / 25, covers_s=np.full(n, 0.04),
        is_keyframe=no, is_corrupt=no, source_px=np.array([source] * n), ordinal=index,
        pixels={geometry.key: pictures},
    )  # fmt: skip
