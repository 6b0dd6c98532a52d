"""What each builtin model says of made pictures; entries → definitions; fingerprints; errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch

from tests.made_frames import make_frames
from vidbatch import tables
from vidbatch.batching import predict_chunk
from vidbatch.data import (
    BoxRows,
    Geometry,
    LabelRows,
    ModelSpec,
    Pixels,
    Predictions,
    fit_box,
)
from vidbatch.errors import ModelError, UsageError
from vidbatch.models import registry
from vidbatch.models.base import (
    check_predictions,
    cut_predictions,
    join_predictions,
    keep_labels,
    undo_fit,
)
from vidbatch.models.registry import create_model, resolve_model, resolve_models

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "models"


def predict(entry: dict[str, Any], pictures: list[Pixels], context: bool = False) -> Predictions:
    model = create_model(resolve_model(entry, CONFIGS))
    model.load("cpu")
    frames = make_frames(pictures, [model.spec.geometry], context=context)
    answer = predict_chunk({model.spec.name: model}, frames, "cpu")[model.spec.name]
    assert isinstance(answer, Predictions), answer
    return answer


def scene(seed: int = 0, size: tuple[int, int] = (360, 640)) -> Pixels:
    """Coloured shapes on a ramp: edges, areas and no noise."""
    rng = np.random.default_rng(seed)
    h, w = size
    image = np.zeros((360, 640, 3), np.uint8)
    image[:] = np.linspace(60, 190, 640).astype(np.uint8)[None, :, None]
    for _ in range(25):
        centre = tuple(int(v) for v in rng.integers((0, 0), (640, 360)))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        cv2.circle(image, centre, int(rng.integers(10, 60)), colour, -1)
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)


def labels_of(answer: Predictions, item: int) -> set[str]:
    names = ("black", "dark", "bright", "blurred", "frozen")
    return {names[k] for k in answer.labels.label_id[answer.labels.item == item]}


def blur(picture: Pixels, share: float) -> Pixels:
    return cv2.GaussianBlur(picture, (0, 0), share * picture.shape[1])


class TestQuality:
    def test_labels(self) -> None:
        black = np.full((360, 640, 3), 4, np.uint8)
        white = np.full((360, 640, 3), 250, np.uint8)
        sharp = scene()
        night = (scene() * 0.15).astype(np.uint8)
        answer = predict(
            {"builtin": "quality"},
            [black, white, sharp, blur(sharp, 1 / 40), night, scene(1), scene(1)],
        )
        found = [labels_of(answer, i) for i in range(7)]
        assert found[0] == {"black", "dark"}
        assert found[1] == {"bright"}
        assert found[2] == set()
        assert found[3] == {"blurred"}
        assert found[4] == {"dark"}
        assert found[5] == set()
        assert found[6] == {"frozen"}

    def test_the_first_sample_of_a_video_is_not_frozen(self) -> None:
        answer = predict({"builtin": "quality"}, [scene()])
        assert "frozen" not in labels_of(answer, 0)

    def test_the_context_frame_is_compared_and_no_row(self) -> None:
        answer = predict({"builtin": "quality"}, [scene(), scene()], context=True)
        assert answer.n == 1 and labels_of(answer, 0) == {"frozen"}

    def test_a_small_thing_that_moves_is_not_frozen(self) -> None:
        before, after = scene(), scene()
        cv2.circle(after, (320, 180), 12, (255, 255, 255), -1)  # 0.2 % of the picture
        answer = predict({"builtin": "quality"}, [before, after])
        assert "frozen" not in labels_of(answer, 1)

    def test_features_are_their_formulas(self) -> None:
        rng = np.random.default_rng(1)
        picture = rng.integers(0, 256, (90, 160, 3), np.uint8)
        brightness, contrast, sharpness, colourfulness = predict(
            {"builtin": "quality"}, [picture]
        ).features[0]
        r, g, b = (picture[..., k].astype(np.float64) for k in range(3))
        y = (77 * r + 150 * g + 29 * b) / 256
        laplacian = cv2.Laplacian(y, cv2.CV_64F)[1:-1, 1:-1]
        rg, yb = r - g, (r + g) / 2 - b
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert brightness == pytest.approx(y.mean() / 255, rel=1e-5)
        assert contrast == pytest.approx(y.std() / 255, rel=1e-5)
        assert sharpness == pytest.approx(laplacian.var(), rel=1e-4)
        assert colourfulness == pytest.approx(expected, rel=1e-4)


def test_colour_sees_hue_and_not_place() -> None:
    picture = np.full((90, 160, 3), (200, 40, 40), np.uint8)
    picture[:45] = (40, 40, 200)
    shifted = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    shifted[..., 0] = (shifted[..., 0] + 60) % 180  # a third of a turn
    turned = cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB)
    e = predict({"builtin": "colour"}, [picture, picture[::-1], turned]).embeddings
    assert e[0] @ e[1] == pytest.approx(1, abs=1e-5)
    assert e[0] @ e[2] == pytest.approx(0.5, abs=1e-4)  # blue → red, red → green: half in common


def test_colour_gives_greys_no_hue() -> None:
    warm = np.full((90, 160, 3), (128, 126, 122), np.uint8)
    cold = np.full((90, 160, 3), (122, 126, 128), np.uint8)
    e = predict({"builtin": "colour"}, [warm, cold]).embeddings
    assert e[0] @ e[1] == pytest.approx(1)


def test_shape_sees_the_direction_of_edges() -> None:
    stripes = ((np.arange(160) // 8 % 2) * 255).astype(np.uint8)
    upright = np.ascontiguousarray(np.broadcast_to(stripes[None, :, None], (90, 160, 3)))
    lying = np.ascontiguousarray(np.broadcast_to(stripes[:90][:, None, None], (90, 160, 3)))
    flat = np.full((90, 160, 3), 99, np.uint8)
    e = predict({"builtin": "shape"}, [upright, 255 - upright, lying, flat]).embeddings
    assert e[0] @ e[1] > 0.99  # light and dark exchanged
    assert e[0] @ e[2] < 0.1
    np.testing.assert_allclose(e[3], 1 / np.sqrt(128), atol=1e-6)
    first = e[0].reshape(4, 4, 8)  # orientation 0: the gradient lies along x
    assert (first[..., 0] > first[..., 1:].max(axis=-1)).all()


def test_motion_is_the_mean_difference() -> None:
    a = np.full((90, 160, 3), 50, np.uint8)
    b = a.copy()
    b[:45] += 51
    features = predict({"builtin": "motion"}, [a, b, b]).features[:, 0]
    assert np.isnan(features[0])
    np.testing.assert_allclose(features[1:], [0.1, 0.0], atol=1e-6)


def hamming(a: Any, b: Any) -> int:
    return round(32 * (1 - float(a @ b)))


def test_phash_is_stable_for_one_picture_and_differs_between_two() -> None:
    picture = scene()
    ok, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 40])
    assert ok
    same = [
        picture,
        cv2.resize(picture, (320, 180), interpolation=cv2.INTER_AREA),
        cv2.imdecode(jpeg, cv2.IMREAD_COLOR),
        np.clip(picture * 0.9 + 12, 0, 255).astype(np.uint8),
    ]
    e = predict({"builtin": "phash"}, [*same, scene(1), scene(2)]).embeddings
    assert set(np.unique(np.abs(e))) == {np.float32(0.125)}
    assert max(hamming(e[0], x) for x in e[1:4]) <= 6
    assert min(hamming(e[0], e[4]), hamming(e[0], e[5]), hamming(e[4], e[5])) >= 18


def test_phash_of_flat_frames_is_one_value() -> None:
    pictures = [np.full((90, 160, 3), v, np.uint8) for v in (0, 17, 130, 255)]
    e = predict({"builtin": "phash"}, pictures).embeddings
    assert (e == -0.125).all()


def sampled(path: Path, every: int, most: int = 12) -> list[Pixels]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        found = []
        for i, frame in enumerate(container.decode(stream)):
            if i % every == 0:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == most:
                break
        return found


class TestFaces:
    def test_finds_a_woman_who_looks_at_the_camera(self, shared_videos: Path) -> None:
        pictures = sampled(shared_videos / "real" / "lp__d6.mp4", 20, 6)
        boxes = predict({"builtin": "faces"}, pictures).boxes
        best = [int(i) for i in range(6) if (boxes.item == i).any()]
        assert best == list(range(6))  # in every frame
        middle = (boxes.xyxy[:, :2] + boxes.xyxy[:, 2:]) / 2
        sizes = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
        main = boxes.score > 0.6
        assert main.sum() >= 6
        assert (np.abs(middle[main] - (0.5, 0.4)) < 0.25).all()  # letterbox undone: square film
        assert (sizes[main] > 0.25).all()

    @pytest.mark.parametrize(
        ("name", "every", "at_least"),
        [("facenet__video_tracked.mp4", 8, 1), ("mdn__friday.mp4", 15, 4)],
    )
    def test_finds_some_in_a_crowd_and_in_a_dark_film(
        self, shared_videos: Path, name: str, every: int, at_least: int
    ) -> None:
        boxes = predict({"builtin": "faces"}, sampled(shared_videos / "real" / name, every)).boxes
        assert len(boxes.item) >= at_least
        assert (boxes.score >= 0.4).all() and (boxes.score < 1).all()

    def test_nothing_in_nothing(self) -> None:
        assert (
            len(predict({"builtin": "faces"}, [np.zeros((180, 320, 3), np.uint8)]).boxes.item) == 0
        )

    def test_a_cascade_of_ones_own_travels_with_its_content(self, tmp_path: Path) -> None:
        carried = Path(cv2.data.haarcascades) / "haarcascade_eye.xml"
        (tmp_path / "mine.xml").write_bytes(carried.read_bytes())
        what = {"adapter": "opencv", "cascade": "mine.xml", "params": {"label": "eye"}}
        defn = resolve_model({"name": "eyes", "version": "v1", "what": what}, tmp_path)
        (tmp_path / "mine.xml").unlink()
        model = create_model(defn)
        model.load("cpu")
        assert model.spec.labels == ("eye",)

    def test_a_file_that_is_no_cascade(self, tmp_path: Path) -> None:
        (tmp_path / "mine.xml").write_text("<?xml version='1.0'?><opencv_storage></opencv_storage>")
        what = {"adapter": "opencv", "cascade": "mine.xml"}
        model = create_model(resolve_model({"name": "x", "version": "v1", "what": what}, tmp_path))
        with pytest.raises(ModelError, match=r"mine\.xml"):
            model.load("cpu")


class TestBoxesAndFits:
    def test_fit_box_by_hand(self) -> None:
        def fit(kind: Any, w: int, h: int) -> tuple[int, int, int, int]:
            return fit_box(Geometry(width_px=224, height_px=224, fit=kind), w, h)

        assert fit("stretch", 1920, 1080) == (224, 224, 0, 0)
        assert fit("crop", 1920, 1080) == (398, 224, 87, 0)
        assert fit("crop", 1080, 1920) == (224, 398, 0, 87)
        assert fit("letterbox", 1920, 1080) == (224, 126, 0, 0)
        assert fit("letterbox", 1080, 1920) == (126, 224, 0, 0)
        assert fit("letterbox", 10_000, 3) == (224, 1, 0, 0)
        assert fit("letterbox", 224, 224) == fit("crop", 224, 224) == (224, 224, 0, 0)

    @pytest.mark.parametrize("kind", ["stretch", "crop", "letterbox"])
    @pytest.mark.parametrize("size", [(640, 360), (360, 640), (480, 480)])
    def test_undo_fit_brings_a_box_back(self, kind: Any, size: tuple[int, int]) -> None:
        g = Geometry(width_px=200, height_px=100, fit=kind)
        w, h = size
        scaled_w, scaled_h, left, top = fit_box(g, w, h)
        there = np.array([0.45, 0.48, 0.55, 0.52])
        in_picture = there * (scaled_w, scaled_h, scaled_w, scaled_h) - (left, top, left, top)
        back = undo_fit(g, in_picture[None], np.array([size]))
        np.testing.assert_allclose(back[0], there, atol=1e-6)

    def test_undo_fit_cuts_at_the_frame(self) -> None:
        g = Geometry(width_px=100, height_px=100, fit="letterbox")
        back = undo_fit(g, np.array([[-5, 10, 120, 90]]), np.array([[200, 100]]))
        np.testing.assert_allclose(back, [[0, 0.2, 1, 1]])


def rows(item: list[int], label_id: list[int], score: list[float]) -> LabelRows:
    return LabelRows(
        item=np.array(item, np.int64),
        label_id=np.array(label_id, np.int64),
        score=np.array(score, np.float32),
    )


def test_keep_labels_ranks_within_each_item() -> None:
    some = rows([1, 0, 0, 1, 0], [0, 1, 2, 3, 4], [0.9, 0.2, 0.8, 0.1, 0.5])
    kept = keep_labels(some, top_k=2, min_score=0.15)
    assert kept.item.tolist() == [0, 0, 1]
    assert kept.label_id.tolist() == [2, 4, 0]


def test_cut_and_join_are_inverse() -> None:
    answer = Predictions(
        n=3,
        embeddings=np.arange(6, dtype=np.float32).reshape(3, 2),
        labels=rows([0, 2, 2], [5, 6, 7], [0.1, 0.2, 0.3]),
    )
    parts = [cut_predictions(answer, 0, 1), cut_predictions(answer, 1, 1)]
    parts.append(cut_predictions(answer, 1, 3))
    assert parts[2].labels.item.tolist() == [1, 1]
    again = join_predictions(parts)
    np.testing.assert_array_equal(again.embeddings, answer.embeddings)
    np.testing.assert_array_equal(again.labels.item, answer.labels.item)


SPEC = ModelSpec(
    name="m",
    version="v1",
    adapter="python",
    kind="x",
    geometry=Geometry(width_px=4, height_px=4),
    gives=("detections", "labels", "embeddings", "features"),
    labels=("a", "b"),
    features=("f",),
    dim=2,
)


def answer_with(**changes: Any) -> Predictions:
    base: dict[str, Any] = {
        "n": 2,
        "embeddings": np.ones((2, 2), np.float32),
        "features": np.full((2, 1), np.nan, np.float32),
    }
    return Predictions(**{**base, **changes})


def boxes(xyxy: list[float], score: float = 0.5, label_id: int = 0) -> BoxRows:
    return BoxRows(
        item=np.zeros(1, np.int64),
        label_id=np.array([label_id]),
        score=np.array([score], np.float32),
        xyxy=np.array([xyxy], np.float32),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embeddings": np.ones((2, 3), np.float32)}, r"embeddings is \(2, 3\)"),
        ({"embeddings": np.zeros((0, 0), np.float32)}, "embeddings"),
        ({"embeddings": np.full((2, 2), np.nan, np.float32)}, "4 numbers that are not finite"),
        ({"features": np.full((2, 1), np.inf, np.float32)}, "not finite"),
        ({"labels": rows([0], [2], [0.5])}, "label_id outside"),
        ({"labels": rows([0], [-1], [0.5])}, "label_id outside"),
        ({"labels": rows([0], [0], [1.5])}, "score outside"),
        ({"labels": rows([0], [0], [float("nan")])}, "score outside"),
        ({"boxes": boxes([0.1, 0.1, 1.2, 0.5])}, "coordinate outside"),
        ({"boxes": boxes([0.5, 0.1, 0.2, 0.5])}, "minimum"),
    ],
)
def test_a_wrong_answer_is_named(changes: dict[str, Any], words: str) -> None:
    check_predictions(SPEC, answer_with(), 2)
    with pytest.raises(ModelError, match=words) as error:
        check_predictions(SPEC, answer_with(**changes), 2)
    assert error.value.kind == "model_answer"


def test_too_few_items_is_a_wrong_answer() -> None:
    with pytest.raises(ModelError, match="2 items of 3"):
        check_predictions(SPEC, answer_with(), 3)


OWN = """
import numpy as np
from vidbatch.data import Geometry

class Mean:
    geometry = Geometry(width_px=8, height_px=8)
    features = ("mean",)

    def __init__(self, scale: float = 1.0, bias: int = 0):
        self.scale, self.bias = scale, bias

    def load(self, device):
        self.table = np.frombuffer(self.files["table.bin"], np.uint8) if hasattr(self, "files") else None

    def predict(self, batch):
        mean = batch.pixels.float().mean(dim=(1, 2, 3)) * self.scale + self.bias
        return {"features": mean[:, None]}
"""


def own(folder: Path, source: str = OWN, **what: Any) -> dict[str, Any]:
    (folder / "mine.py").write_text(source, encoding="utf-8")
    return {
        "name": "mean",
        "version": "v1",
        "what": {"adapter": "python", "class": "mine:Mean", **what},
    }


class TestPython:
    def test_the_example_of_the_docs(self) -> None:
        red = np.full((36, 64, 3), (255, 0, 0), np.uint8)
        answer = predict({"file": "python-example.yaml"}, [red, red[..., ::-1].copy()])
        np.testing.assert_allclose(answer.features[:, 0], [1, 0])
        assert answer.labels.item.tolist() == [0]

    def test_the_module_travels(self, tmp_path: Path) -> None:
        defn = resolve_model(own(tmp_path, params={"scale": 2.0}), tmp_path)
        (tmp_path / "mine.py").unlink()
        for name in [n for n in sys.modules if n.startswith("_vidbatch_model_")]:
            del sys.modules[name]  # as in a process that never saw it
        model = create_model(defn)
        frames = make_frames([np.full((8, 8, 3), 9, np.uint8)], [model.spec.geometry])
        answer = predict_chunk({"mean": model}, frames, "cpu")["mean"]
        assert isinstance(answer, Predictions) and answer.features[0, 0] == 18

    def test_files_travel_and_are_pinned(self, tmp_path: Path) -> None:
        (tmp_path / "table.bin").write_bytes(b"abc")
        entry = own(tmp_path, files=["table.bin"])
        defn = resolve_model(entry, tmp_path)
        (tmp_path / "table.bin").write_bytes(b"abd")
        assert resolve_model(entry, tmp_path).spec.fingerprint != defn.spec.fingerprint
        model: Any = create_model(defn)
        model.load("cpu")
        assert bytes(model.plain.table) == b"abc"
        entry["what"]["sha256"] = dict(defn.spec.weights_sha256)
        with pytest.raises(UsageError, match=r"table\.bin is not the file that was pinned"):
            resolve_model(entry, tmp_path)

    def test_source_is_part_of_the_fingerprint_and_its_place_is_not(self, tmp_path: Path) -> None:
        one = resolve_model(own(tmp_path), tmp_path).spec.fingerprint
        other = tmp_path / "elsewhere"
        other.mkdir()
        assert resolve_model(own(other), other).spec.fingerprint == one
        changed = OWN.replace("+ self.bias", "- self.bias")
        assert resolve_model(own(other, changed), other).spec.fingerprint != one

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("import no_such_package_at_all\n", "no_such_package_at_all"),
            ("x = (\n", "SyntaxError"),
            ("class Mean:\n    pass\n", "no class 'Mean' with a `predict`"),
            (OWN.replace('features = ("mean",)', "features = ()"), "gives nothing"),
            (OWN.replace('("mean",)', '"mean"'), "expected a tuple of words"),
            (OWN.replace('("mean",)', '("a", "a")'), "a word twice"),
            (OWN.replace("    geometry", "    geometrie"), "write width_px and height_px"),
        ],
    )
    def test_what_is_wrong_with_it_is_said(self, tmp_path: Path, source: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            resolve_model(own(tmp_path, source), tmp_path)

    def test_an_answer_of_the_wrong_width_names_it(self, tmp_path: Path) -> None:
        source = OWN.replace("mean[:, None]", "mean")
        model = create_model(resolve_model(own(tmp_path, source), tmp_path))
        frames = make_frames([np.zeros((8, 8, 3), np.uint8)], [model.spec.geometry])
        answer = predict_chunk({"mean": model}, frames, "cpu")["mean"]
        assert isinstance(answer, ModelError) and "expected (1, 1)" in str(answer)


INLINE: dict[str, Any] = {
    "name": "quality",
    "version": "v1",
    "what": {"adapter": "builtin", "model": "quality"},
}


def changed(**what: Any) -> dict[str, Any]:
    return {**INLINE, "what": {**INLINE["what"], **what}}


class TestFingerprints:
    def test_writing_a_default_down_changes_nothing(self) -> None:
        one = resolve_model({"builtin": "quality"}, HERE).spec
        assert resolve_model(changed(min_score=0.5, top_k=0), HERE).spec == one
        assert resolve_model(changed(geometry={"width_px": 160}), HERE).spec == one

    @pytest.mark.parametrize(
        "entry",
        [
            changed(min_score=0.6),
            changed(top_k=1),
            changed(geometry={"width_px": 320, "height_px": 180}),
            changed(geometry={"fit": "crop"}),
            changed(geometry={"interpolation": "area"}),
            {**INLINE, "version": "v2"},
            {**INLINE, "name": "other"},
            {**INLINE, "what": {"adapter": "builtin", "model": "colour"}},
        ],
        ids=str,
    )
    def test_what_changes_rows_changes_it(self, entry: dict[str, Any]) -> None:
        assert (
            resolve_model(entry, HERE).spec.fingerprint
            != resolve_model(INLINE, HERE).spec.fingerprint
        )

    def test_params_change_it(self) -> None:
        what = {"adapter": "builtin", "model": "colour", "params": {"hues": 6}}
        spec = resolve_model({"name": "colour", "version": "v1", "what": what}, HERE).spec
        assert spec.fingerprint != resolve_model({"builtin": "colour"}, HERE).spec.fingerprint
        assert spec.dim == 6 * 9 + 8
        assert json.loads(spec.config)["params"] == {"hues": 6, "saturations": 3, "values": 3}

    def test_semantics_change_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vidbatch.models.builtin.quality import Quality

        before = resolve_model(INLINE, HERE).spec.fingerprint
        monkeypatch.setattr(Quality, "semantics", 2, raising=False)
        assert resolve_model(INLINE, HERE).spec.fingerprint != before

    def test_the_schema_is_that_of_the_tables(self) -> None:
        assert registry.SCHEMA == tables.SCHEMA_VERSION


def inline(**changes: Any) -> dict[str, Any]:
    return {**INLINE, **changes}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"builtin": "qualitty"}, "unknown builtin 'qualitty'; did you mean 'quality'?"),
        ({"builtin": "quality", "hwo": {}}, "unknown key 'hwo'; did you mean 'how'?"),
        ({"file": "nowhere.yaml"}, "no such model file"),
        ({}, "name: None does not match"),
        (inline(name="frames"), "the output of the frames"),
        (inline(name="Quality"), "does not match"),
        (inline(version="1"), "does not match"),
        (inline(version=1.0), "does not match"),
        (inline(what={"adapter": "buildin"}), "did you mean 'builtin'?"),
        (inline(what=3), "what: expected a mapping"),
        (changed(model="shap"), "what.model: unknown builtin 'shap'; did you mean 'shape'?"),
        (changed(min_scor=1), "what: unknown key 'min_scor'; did you mean 'min_score'?"),
        (changed(min_score=2), "what.min_score: 2 is no float within 0..1"),
        (changed(top_k=True), "what.top_k: True is no int"),
        (changed(geometry={"width": 3}), "did you mean 'width_px'?"),
        (changed(geometry={"fit": "croop"}), "did you mean 'crop'?"),
        (changed(geometry={"width_px": 0}), "geometry 0x90 is not within"),
        (changed(params={"hues": 3}), "unknown parameter 'hues'"),
        (changed(model="colour", params={"huse": 3}), "did you mean 'hues'?"),
        (changed(model="colour", params={"hues": "3"}), "'3' is no int"),
        (changed(model="colour", params={"hues": 0}), "refuses them: hues is within"),
        (changed(sha256={"a.bin": "00"}), "unknown file 'a.bin'"),
        (inline(how={"batch": 0}), "how.batch: 0 is no int"),
        (inline(how={"bach": 8}), "how: unknown key 'bach'; did you mean 'batch'?"),
        (inline(what={"adapter": "opencv", "cascade": "haarcascade_ey"}), "did you mean"),
        (inline(what={"adapter": "opencv", "cascade": "mine.xml"}), "no such file"),
        (inline(what={"adapter": "python", "class": "mine"}), "package.module:Class"),
        (inline(what={"adapter": "python", "class": "no_such:Mean"}), "no module 'no_such'"),
    ],
    ids=str,
)
def test_what_cannot_run_is_said_in_one_line(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_model(entry, HERE)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_extra_names_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ADAPTERS, "onnx", ("no_such_runtime.adapter", "onnx"))
    with pytest.raises(UsageError, match=r"pip install 'vidbatch\[onnx\]'"):
        resolve_model(inline(what={"adapter": "onnx"}), HERE)


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"models\[1\]: a model named 'quality'"):
        resolve_models([{"builtin": "quality"}, INLINE], HERE)
    assert len(resolve_models([{"builtin": "quality"}, {"builtin": "colour"}], HERE)) == 2


def test_torch_threads_are_left_alone() -> None:
    """The engine decides how models share the cores."""
    before = torch.get_num_threads()
    predict({"builtin": "faces"}, [scene()])
    predict({"builtin": "quality"}, [scene()])
    assert torch.get_num_threads() == before
