"""Networks in files: what their keys mean, what is refused, what their answers become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper

from tests.made_frames import make_frames
from tests.small_jobs import rows, run_models
from tests.tiny_networks import Looks, save_onnx, save_program, sha256, to_onnx, yunet
from vidbatch.config import parse_job
from vidbatch.data import Audio, Frames, Pixels, Predictions, Windows
from vidbatch.errors import ModelError, UsageError
from vidbatch.jobfile import check_job
from vidbatch.models.registry import create_model, resolve_model
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
INPUT = {"mean": [0, 0, 0], "std": [1, 1, 1]}
SQUARE = {"width_px": 32, "height_px": 32}
PLAIN: dict[str, Any] = {
    "adapter": "onnx", "file": "three.onnx", "gives": ["logits"], "labels": ["a", "b", "c"],
    "geometry": SQUARE, "input": INPUT,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    example = torch.zeros(2, 3, 32, 32)
    save_onnx(Looks(3), example, place / "three.onnx")
    save_program(Looks(3), example, place / "three.pt2")
    save_program(Looks(3), example, place / "fixed.pt2", fixed=True)
    torch.save(Looks(3).state_dict(), place / "three.pt")
    (place / "cut.pt2").write_bytes((place / "three.pt2").read_bytes()[:500])
    (place / "cut.onnx").write_bytes((place / "three.onnx").read_bytes()[:500])
    (place / "names.txt").write_text("a\n\nc\n")
    return place


def entry(what: dict[str, Any], **how: Any) -> dict[str, Any]:
    return {"name": "made", "version": "v1", "what": what, "how": how}


def constant(folder: Path, name: str, *values: Any, inputs: Any = (None, 3, 32, 32)) -> str:
    """An .onnx that gives these values (one row each) for every item, whatever it sees."""
    nodes, outputs, given = [], [], {}
    axes = list(range(1, len(inputs)))
    nodes.append(helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=axes, keepdims=0))
    nodes.append(helper.make_node("Mul", ["mean", "nought"], ["nothing"]))
    given["nought"] = np.float32(0)
    for i, value in enumerate(values):
        array = np.asarray(value, np.float32)
        given |= {f"v{i}": array[None], f"s{i}": np.int64([-1] + [1] * array.ndim)}
        nodes.append(helper.make_node("Reshape", ["nothing", f"s{i}"], [f"r{i}"]))
        nodes.append(helper.make_node("Add", [f"r{i}", f"v{i}"], [f"out{i}"]))
        outputs.append(
            helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [None, *array.shape])
        )
    shape = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, list(inputs))
    (folder / name).write_bytes(to_onnx(nodes, [shape], outputs, given))
    return name


def answer(folder: Path, what: dict[str, Any], chunk: Any) -> Predictions:
    model = create_model(resolve_model(entry(what, batch=2), folder))
    runner = Runner([model])
    runner.load()
    (found,) = runner.run([Piece(ticket=0, chunk=chunk, lo=0, hi=chunk.num_rows)])
    result = found["made"]
    if isinstance(result, ModelError):
        raise result
    return result


def pictures(n: int = 3, size: tuple[int, int] = (32, 32)) -> list[Pixels]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(n)]


def frames(folder: Path, what: dict[str, Any], some: list[Pixels]) -> Frames:
    geometry = resolve_model(entry(what), folder).spec.geometry
    assert geometry is not None
    return make_frames(some, [geometry])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"file": None}, "file: None is no .onnx file"),
    ({"file": "three.pt2"}, "'three.pt2' is no .onnx file"),
    ({"file": "nothing.onnx"}, "no such file"),
    ({"file": "nowhere/three.onnx"}, "no such file"),
    ({"gives": None}, "write a list with a word per output"),
    ({"gives": ["logit"]}, "unknown output 'logit'; did you mean 'logits'"),
    ({"gives": ["skip"]}, "must name something"),
    ({"gives": ["logits", "scores"]}, "exclude each other"),
    ({"gives": ["boxes"]}, "boxes go with logits or scores"),
    ({"gives": ["yolo", "scores"]}, "a model gives one of them"),
    ({"gives": ["embeddings"]}, "labels: goes with none of gives: [embeddings]"),
    ({"gives": ["embeddings"], "labels": None, "dim": 0}, "dim: 0 is no int within"),
    ({"labels": None}, "labels: None; write the network's classes in its order"),
    ({"labels": []}, "labels: []; write the network's classes"),
    ({"labels": "nothing.txt"}, "no such file; it has a label per line"),
    ({"labels": ["a", "a", "b"]}, "'a' stands there twice"),
    ({"labels": ["a", True, "b"]}, "quote numbers, yes and no"),
    ({"scores": "sofmax"}, "did you mean 'softmax'"),
    ({"geometry": None}, "geometry: not written; the file does not say how frames were scaled"),
    ({"input": None}, "input.mean: None; write three numbers"),
    ({"input": {"mean": [0, 0], "std": [1, 1, 1]}}, "input.mean: [0, 0]; write three numbers"),
    ({"input": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "input.std"),
    ({"input": {**INPUT, "scale": "a"}}, "input.scale"),
    ({"input": {**INPUT, "order": "rbg"}}, "unknown order 'rbg'; did you mean 'rgb'"),
    ({"input": {**INPUT, "layout": "ntchw"}}, "unknown layout 'ntchw'"),
    ({"input": {**INPUT, "means": 0}}, "unknown key 'means'; did you mean 'mean'"),
    ({"boxes": {"iou": 0.5}}, "boxes: goes with none of gives"),
    ({"gives": ["scores", "boxes"]}, "boxes.form: unknown form None"),
    ({"gives": ["yolo"], "boxes": {"iou": 2}}, "boxes.iou: 2 is no float within"),
    ({"sha256": {"three.onnx": "0" * 64}}, "is not the file that was pinned"),
    ({"precision": "int8"}, "unknown precision of this model 'int8'; known: fp32"),
    ({"labels": ["a", "b"]}, "gives: logits is (2, 3), expected (2, 2)"),
    ({"gives": ["logits", "skip"]}, "names 2 outputs, three.onnx has 1"),
    ({"input": {**INPUT, "layout": "nhwc"}}, "takes ('any', 3, 32, 32) and would get"),
    ({"geometry": {"width_px": 64, "height_px": 32}}, "geometry: three.onnx takes"),
    ({"file": "cut.onnx"}, "cannot read cut.onnx"),
    ({"adapter": "torch_export"}, "'three.onnx' is no .pt2 file"),
    ({"adapter": "torch_export", "file": "three.pt"}, "is a pickle or a script of torch"),
    ({"adapter": "torch_export", "file": "three.pt2"}, "if you trust it, write sha256: {three.pt2"),
    ({"adapter": "torch_export", "file": "cut.pt2"}, "holds no exported program"),
    ({"adapter": "opencv", "cascade": "x"}, "write one of cascade, yunet and file"),
    (
        {"adapter": "opencv", "file": None, "yunet": "three.onnx"},
        "input: goes with file, not with yunet",
    ),
    ({"adapter": "opencv", "gives": ["embeddings", "skip"]}, "several outputs"),
    ({"adapter": "opencv", "file": "cut.onnx"}, "cannot read cut.onnx"),
]


@pytest.mark.parametrize(("change", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_config_check_says_what_is_wrong_with_a_model_file(
    change: dict[str, Any], says: str, folder: Path
) -> None:
    """What the file cannot say by itself is found by loading it and showing it two frames."""
    what = {k: v for k, v in {**PLAIN, **change}.items() if v is not None}
    if change.get("file", "") is None and "yunet" not in change:
        what["file"] = None
    job = parse_job(
        {
            "archive": {"uri": "videos"}, "sample": {"fps": 1}, "output": {"uri": "tables"},
            "models": [entry(what)],
        },
        base_dir=folder,
    )  # fmt: skip
    with pytest.raises(UsageError) as caught:
        check_job(job)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_program_is_read_once_its_hash_is_written(folder: Path) -> None:
    what = {**PLAIN, "adapter": "torch_export", "file": "fixed.pt2"}
    what["sha256"] = {"fixed.pt2": sha256(folder / "fixed.pt2")}
    some = frames(folder, what, pictures())
    found = answer(folder, what, some)
    exact = answer(folder, PLAIN, some)
    np.testing.assert_allclose(found.labels.score, exact.labels.score, atol=1e-5)
    compiled = create_model(resolve_model(entry(what, batch=4, compile=True), folder))
    with pytest.raises(ModelError, match=r"batches of 2 alone .* write batch: 2"):
        compiled.load("cpu")


def test_a_fingerprint_follows_what_rows_follow(folder: Path) -> None:
    def of(**change: Any) -> str:
        return resolve_model(entry({**PLAIN, **change}), folder).spec.fingerprint

    same = [of(), of(file=str(folder / "three.onnx")), of(scores="softmax"),
            of(input={**INPUT, "scale": 1 / 255, "order": "rgb"})]  # fmt: skip
    assert len(set(same)) == 1
    other = [of(), of(scores="sigmoid"), of(labels=["a", "b", "d"]), of(min_score=0.1),
             of(input={**INPUT, "order": "bgr"}), of(input={**INPUT, "scale": 1})]  # fmt: skip
    assert len(set(other)) == len(other)


def test_labels_from_a_text_file_and_null_for_none(folder: Path) -> None:
    whole, few = PLAIN, {**PLAIN, "labels": "names.txt"}
    some = frames(folder, whole, pictures())
    every, kept = answer(folder, whole, some), answer(folder, few, some)
    assert resolve_model(entry(few), folder).spec.labels == ("a", "c")
    named = {(i, "abc"[k]): s for i, k, s in zip(every.labels.item, every.labels.label_id,
                                                 every.labels.score, strict=True)}  # fmt: skip
    assert len(kept.labels.item) == 6
    for i, k, score in zip(kept.labels.item, kept.labels.label_id, kept.labels.score, strict=True):
        assert score == pytest.approx(named[(i, "ac"[k])])


def test_pixels_reach_the_network_as_the_file_says(folder: Path) -> None:
    """The mean of what the network got, channel by channel."""
    nodes = [helper.make_node("ReduceMean", ["pixels"], ["out"], axes=[1, 2], keepdims=0)]
    shape = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 32, 32, 3])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3])
    (folder / "means.onnx").write_bytes(to_onnx(nodes, [shape], [out], {}))
    what = {
        "adapter": "onnx", "file": "means.onnx", "gives": ["features"], "features": ["x", "y", "z"],
        "geometry": SQUARE,
        "input": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1], "scale": "1/100",
                  "order": "bgr", "layout": "nhwc"},
    }  # fmt: skip
    picture = np.full((32, 32, 3), (10, 20, 30), np.uint8)
    found = answer(folder, what, frames(folder, what, [picture] * 3))
    np.testing.assert_allclose(found.features, [[0.4, 0.0, -0.2]] * 3, atol=1e-5)


def test_boxes_in_every_form_lie_where_they_are(folder: Path) -> None:
    """One box, 8..24 by 4..12 of a 32 x 32 letterbox of a frame of 320 x 160, in all spellings."""
    share = np.array([8 / 32, 4 / 32, 24 / 32, 12 / 32])
    geometry = {**SQUARE, "fit": "letterbox"}
    base = {"adapter": "onnx", "labels": ["a", None, "c"], "geometry": geometry, "input": INPUT}
    scores = [[0.1, 0.2, 0.9], [0.0, 0.9, 0.0], [0.1, 0.2, 0.6]]
    three = np.stack([share, share, share + 0.01])
    centre = np.concatenate([(three[:, :2] + three[:, 2:]) / 2, three[:, 2:] - three[:, :2]], 1)
    wide = np.concatenate([three[:, :2], three[:, 2:] - three[:, :2]], 1)
    yolo = np.concatenate([centre * 32, scores], 1)
    old = np.concatenate([centre * 32, np.full((3, 1), 0.5), scores], 1)
    final = np.concatenate([three[:1] * 32, [[0.9, 2]]], 1)
    some = [np.zeros((160, 320, 3), np.uint8)] * 3
    for gives, values, boxes, score in [
        (["scores", "boxes"], (scores, three), {"form": "xyxy", "unit": "share", "iou": 0.5}, 0.9),
        (["scores", "boxes"], (scores, centre * 32), {"form": "cxcywh", "unit": "px", "iou": 0.5},
         0.9),
        (["scores", "boxes"], (scores, wide * 32), {"form": "xywh", "unit": "px", "iou": 0.5}, 0.9),
        (["yolo"], (yolo.T,), {}, 0.9),
        (["yolo"], (yolo,), None, 0.9),
        (["yolo"], (old.T,), None, 0.45),
        (["detections", "skip"], (final, final), None, 0.9),
    ]:  # fmt: skip
        file = constant(folder, "boxes.onnx", *values)
        what = {**base, "file": file, "gives": gives}
        if boxes is not None:
            what["boxes"] = boxes
        found = answer(folder, what, frames(folder, what, some)).boxes
        assert found.item.tolist() == [0, 1, 2], gives
        assert found.label_id.tolist() == [1, 1, 1]
        np.testing.assert_allclose(found.score, score, atol=1e-6)
        expected = share * [1, 2, 1, 2]  # the picture fills half of the letterbox
        np.testing.assert_allclose(found.xyxy, np.tile(expected, (3, 1)), atol=1e-6)
    both = {**base, "file": constant(folder, "boxes.onnx", scores, three),
            "gives": ["scores", "boxes"], "boxes": {"form": "xyxy", "unit": "share"}}  # fmt: skip
    assert len(answer(folder, both, frames(folder, both, some)).boxes.item) == 6, "no NMS"
    bad = {**base, "file": constant(folder, "boxes.onnx", [[1, 1, 2, 2, 0.9, 7]]),
           "gives": ["detections"]}  # fmt: skip
    with pytest.raises(
        ModelError,
        match=r"class 7 has no label.*on 2 frames \(frame_index 0\.\.1, pixels \(2, 32, 32, 3\)\)",
    ):
        answer(folder, bad, frames(folder, bad, some))


def test_masks_windows_and_sound(folder: Path) -> None:
    ranks = np.zeros((3, 4, 4))
    ranks[0, :2], ranks[1, 2:], ranks[2, :, 0] = 1, 1, 2  # the last takes a column of both
    base = {"adapter": "onnx", "labels": [None, "b", "c"], "input": INPUT, "gives": ["masks"]}
    what = {**base, "file": constant(folder, "masks.onnx", ranks), "geometry": SQUARE}
    masks = answer(folder, what, frames(folder, what, pictures())).masks
    assert masks.label_id.tolist() == [0, 1] * 3
    np.testing.assert_allclose(masks.area, [6 / 16, 4 / 16] * 3)

    file = constant(folder, "windows.onnx", [0.0, 5.0], inputs=(None, 3, 4, 32, 32))
    what = {**PLAIN, "file": file, "labels": ["a", "b"], "window": {"frames": 4},
            "input": {**INPUT, "layout": "ncthw"}}  # fmt: skip
    windows = Windows(frames=frames(folder, what, pictures(8)), items=np.arange(8).reshape(2, 4))
    assert answer(folder, what, windows).labels.label_id.tolist() == [1, 0, 1, 0]

    file = constant(folder, "sound.onnx", [0.2, 0.7], inputs=(None, 800))
    what = {"adapter": "onnx", "file": file, "gives": ["scores"], "labels": ["a", "b"],
            "audio": {"rate_hz": 8000, "window_s": 0.1, "hop_s": 0.1}}  # fmt: skip
    grid = resolve_model(entry(what), folder).spec.audio
    assert grid is not None
    sound = Audio(grid=grid, keys=np.arange(3), samples=np.zeros((3, 800), np.float32))
    np.testing.assert_allclose(answer(folder, what, sound).labels.score, [0.7, 0.2] * 3, atol=1e-6)
    with pytest.raises(UsageError, match="gets its samples as they are"):
        resolve_model(entry({**what, "input": INPUT}), folder)


def test_onnx_with_its_weights_in_a_second_file(folder: Path, tmp_path: Path) -> None:
    model = onnx.load(folder / "three.onnx")
    onnx.save(model, tmp_path / "three.onnx", save_as_external_data=True, location="three.data",
              size_threshold=0)  # fmt: skip
    assert (tmp_path / "three.data").stat().st_size > 1000
    pins = {name: sha256(tmp_path / name) for name in ("three.onnx", "three.data")}
    some = frames(folder, PLAIN, pictures())
    found = answer(tmp_path, {**PLAIN, "sha256": pins}, some)
    np.testing.assert_allclose(found.labels.score, answer(folder, PLAIN, some).labels.score)
    with pytest.raises(ModelError, match="the second file named under sha256"):
        answer(tmp_path, PLAIN, some)


def test_yunet_finds_what_is_bright(folder: Path) -> None:
    """A white square of 32 x 32 in a letterbox: the cells of its three strides, each at its first
    corner, the smaller ones that share too much with a larger dropped."""
    (folder / "bright.onnx").write_bytes(yunet(320, 320))
    what = {"adapter": "opencv", "yunet": "bright.onnx",
            "geometry": {"width_px": 320, "height_px": 192, "fit": "letterbox"}}  # fmt: skip
    picture = np.zeros((160, 320, 3), np.uint8)
    picture[64:96, 32:64] = 255
    dark = np.zeros((200, 100, 3), np.uint8)
    found = answer(folder, what, frames(folder, what, [dark, picture, dark])).boxes
    assert set(found.item.tolist()) == {1}
    np.testing.assert_allclose(found.score, 1)
    whole = found.xyxy * (320, 160, 320, 160)
    assert any(np.allclose(box, (16, 48, 48, 80)) for box in whole), whole
    with pytest.raises(ModelError, match="cannot be run as YuNet"):
        answer(folder, {**what, "yunet": "three.onnx"}, frames(folder, what, [picture]))


def test_every_shipped_model_file_runs_to_its_table(shared_videos: Path, tmp_path: Path) -> None:
    """The files as they are but for what they name, over a real video."""
    made: dict[str, tuple[str, str]] = {
        "torch-export": ("brands.pt2", "labels"),
        "onnx": ("yolo11n.onnx", "detections"),
        "yunet": ("face_detection_yunet_2023mar.onnx", "detections"),
        "opencv-dnn": ("looks.onnx", "embeddings"),
    }
    save_program(Looks(3), torch.zeros(2, 3, 224, 224), tmp_path / "brands.pt2")
    grid = np.random.default_rng(0).uniform(0.1, 0.9, (7, 20))
    grid[:4] *= 300
    constant(tmp_path, "yolo11n.onnx", grid, inputs=(None, 3, 640, 640))
    (tmp_path / "face_detection_yunet_2023mar.onnx").write_bytes(yunet(640, 640))
    save_onnx(Looks(128), torch.zeros(1, 3, 128, 128), tmp_path / "looks.onnx", fixed=True)
    entries = []
    for name, (file, _) in made.items():
        path = CONFIGS / f"{name}.yaml"
        assert path.read_text().startswith("# vidbatch run"), "opens with its command"
        tree = yaml.safe_load(path.read_text())
        key = "yunet" if name == "yunet" else "file"
        assert tree["what"][key] == f"s3://acme-models/{tree['name']}/{file}"
        tree["what"][key] = file
        if "sha256" in tree["what"]:
            tree["what"]["sha256"] = {file: sha256(tmp_path / file)}
        entries.append(tree)
    archive, output = tmp_path / "archive", tmp_path / "tables"
    archive.mkdir()
    (archive / "a.mp4").write_bytes((shared_videos / "real" / "mdn__friday.mp4").read_bytes())
    run_models(tmp_path, archive, output, entries, fps=2)
    for tree, (_, table) in zip(entries, made.values(), strict=True):
        ((found,),) = rows(
            output, f"select count(*) from {table} where model like '{tree['name']}-v1.%'"
        )
        assert found > 0, tree["name"]
