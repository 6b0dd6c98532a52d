"""What each builtin model says of made and real pictures; boxes, floors and wrong answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch

from tests.made_frames import make_frames
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
from vidbatch.errors import ModelError
from vidbatch.models.answers import (
    check_predictions,
    cut_predictions,
    join_predictions,
    keep_labels,
)
from vidbatch.models.base import undo_fit
from vidbatch.models.registry import create_model, resolve_model

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
    return np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), np.uint8)


def labels_of(answer: Predictions, item: int) -> set[str]:
    names = ("black", "dark", "bright", "blurred", "frozen")
    return {names[k] for k in answer.labels.label_id[answer.labels.item == item]}


def blur(picture: Pixels, share: float) -> Pixels:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), share * picture.shape[1]), np.uint8)


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

    def test_finds_small_faces_in_a_larger_geometry(self, shared_videos: Path) -> None:
        """A crowd whose faces are 1/25 of the width, under 24 pixels in the default geometry."""
        pictures = sampled(shared_videos / "real" / "facenet__video_tracked.mp4", 8, 8)
        entry = {
            "name": "faces",
            "version": "v1",
            "what": {
                "adapter": "opencv",
                "cascade": "haarcascade_frontalface_default",
                "geometry": {"width_px": 704, "height_px": 396},
            },
        }

        def heads(answer: Predictions) -> int:
            x_min, y_min, x_max, y_max = answer.boxes.xyxy.T
            return int(((x_max - x_min < 0.06) & (y_min > 0.5) & (y_max < 0.76)).sum())

        assert heads(predict(entry, pictures)) >= 6
        assert heads(predict({"builtin": "faces"}, pictures)) == 0

    def test_nothing_in_nothing(self) -> None:
        assert (
            len(predict({"builtin": "faces"}, [np.zeros((180, 320, 3), np.uint8)]).boxes.item) == 0
        )

    def test_a_cascade_of_ones_own_travels_with_its_content(self, tmp_path: Path) -> None:
        carried = Path(cv2.__file__).parent / "data" / "haarcascade_eye.xml"
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


def test_torch_threads_are_left_alone() -> None:
    """The engine decides how models share the cores."""
    before = torch.get_num_threads()
    predict({"builtin": "faces"}, [scene()])
    predict({"builtin": "quality"}, [scene()])
    assert torch.get_num_threads() == before
