"""One small network through every adapter: the same frames, the same numbers.

It is a ResNet of the transformers library with random weights, saved as that library saves it, as
an exported program, as ONNX, and as the weights of a class that a user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from tests import tiny_models
from tests.decoding import decode
from tests.small_jobs import rows, run_models, write_model
from tests.tiny_networks import save_onnx, save_program, sha256
from vidbatch.data import Batch, Frames, Predictions, Sample, Singles
from vidbatch.errors import ModelError
from vidbatch.models.registry import create_model, resolve_model
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

SIZE = 28
LABELS = ["cat", "dog", "crane", "van"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
VIDEO = "real/mdn__flower.mp4"
TOLERANCE = 2e-5
"""Of scores: float32 sums in another order."""
STATED: dict[str, Any] = {
    "gives": ["logits"],
    "labels": LABELS,
    "input": {"mean": MEAN, "std": STD},
    "geometry": {"width_px": SIZE, "height_px": SIZE},
    "top_k": 4,
}

PYTHON = """
class Model:
    geometry = Geometry(width_px=28, height_px=28)
    labels = ("cat", "dog", "crane", "van")
    top_k = 4
    precisions = ("fp32", "bf16", "fp16", "int8")
    compiles = True

    def load(self, device):
        import io
        self.network = torch.export.load(io.BytesIO(self.files["network.pt2"])).module()

    def predict(self, batch):
        mean = torch.tensor([0.485, 0.456, 0.406])
        std = torch.tensor([0.229, 0.224, 0.225])
        pixels = ((batch.pixels / 255 - mean) / std).permute(0, 3, 1, 2)
        return {"scores": self.network(pixels).softmax(dim=1)}
"""


class Logits(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(pixel_values=pixels).logits
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The network in all its forms."""
    hf.utils.logging.disable_progress_bar()
    place = tmp_path_factory.mktemp("networks")
    source = tiny_models.make_model("resnet", place)
    tiny_models.change_json(
        source / "preprocessor_config.json", size={"height": SIZE, "width": SIZE}, crop_pct=None,
        image_processor_type="ViTImageProcessor", image_mean=MEAN, image_std=STD, resample=2,
    )  # fmt: skip
    saved = hf.ResNetForImageClassification.from_pretrained(source)
    with torch.no_grad():
        saved.classifier[1].weight.mul_(0.05)  # so that no label takes all
    saved.save_pretrained(source)
    tiny_models.change_json(
        source / "config.json", id2label={str(i): name for i, name in enumerate(LABELS)}
    )
    network = Logits(saved).eval()
    example = torch.zeros(3, 3, SIZE, SIZE)
    save_program(network, example, place / "network.pt2")
    save_program(network, example, place / "fixed.pt2", fixed=True)
    save_onnx(network, example, place / "network.onnx")
    save_onnx(network, example, place / "fixed.onnx", fixed=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDBATCH_CACHE", str(place / "cache"))
        yield place


@pytest.fixture(scope="module")
def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Adapter, or what is special about it → its entry of a job file."""
    pins = {p.name: sha256(p) for p in folder.glob("*.pt2")}

    def entry(name: str, **what: Any) -> dict[str, Any]:
        return {"name": name, "version": "v1", "what": what}

    def program(name: str, **more: Any) -> dict[str, Any]:
        file = f"{name}.pt2"
        return {"adapter": "torch_export", "file": file, "sha256": {file: pins[file]}, **STATED}

    return {
        "huggingface": entry("huggingface", adapter="huggingface", source="resnet", top_k=4),
        "torch_export": entry("torch_export", **program("network")),
        "torch_export-fixed": entry("torch_export-fixed", **program("fixed")),
        "onnx": entry("onnx", adapter="onnx", file="network.onnx", **STATED),
        "onnx-fixed": entry("onnx-fixed", adapter="onnx", file="fixed.onnx", **STATED),
        "opencv": entry("opencv", adapter="opencv", file="network.onnx", **STATED),
        "python": write_model(folder, "python", PYTHON, files=["network.pt2"]),
    }


@pytest.fixture(scope="module")
def frames(folder: Path, entries: Any, shared_videos: Path) -> Frames:
    """Real ones, as the decoder makes them for every model: there is one geometry."""
    geometries = {resolve_model(e, folder).spec.geometry for e in entries.values()}
    assert len(geometries) == 1
    data = (shared_videos / VIDEO).read_bytes()
    got = decode(data, Sample(kind="every", every=16), geometries=[g for g in geometries if g])
    return got.chunks[0].cut(7)


@pytest.fixture(scope="module")
def expected(folder: Path, frames: Frames) -> Singles:
    """(7, 4) scores by the library alone."""
    network = hf.ResNetForImageClassification.from_pretrained(folder / "resnet").eval()
    (pixels,) = frames.pixels.values()
    plain = (torch.from_numpy(pixels / np.float32(255)) - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.inference_mode():
        logits = network(pixel_values=plain.permute(0, 3, 1, 2)).logits
    scores: Singles = logits.softmax(dim=1).numpy()
    assert scores.std(axis=0).min() > 1e-3, "frames differ"
    return scores


def scores_of(answer: Predictions | ModelError) -> Singles:
    assert isinstance(answer, Predictions), answer
    found = np.full((answer.n, len(LABELS)), np.nan, np.float32)
    found[answer.labels.item, answer.labels.label_id] = answer.labels.score
    return found


NAMES = (
    "huggingface", "torch_export", "torch_export-fixed", "onnx", "onnx-fixed", "opencv", "python",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_alone_and_in_a_runner(
    name: str, folder: Path, entries: Any, frames: Frames, expected: Singles
) -> None:
    model = create_model(resolve_model({**entries[name], "how": {"batch": 3}}, folder))
    assert model.spec.labels == tuple(LABELS)
    model.load("cpu")
    (pixels,) = frames.pixels.values()
    batch = Batch(
        pixels=torch.from_numpy(pixels[:5].copy()), previous=None, has_previous=None,
        source_px=frames.source_px[:5],
    )  # fmt: skip
    with torch.inference_mode():
        np.testing.assert_allclose(scores_of(model.predict(batch)), expected[:5], atol=TOLERANCE)
    pieces = [
        Piece(ticket=i, chunk=frames, lo=a, hi=b) for i, (a, b) in enumerate([(0, 4), (4, 7)])
    ]
    found = [scores_of(answers[name]) for answers in Runner([model]).run(pieces)]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=TOLERANCE)
    model.close()
    model.load("cpu")
    with torch.inference_mode():
        np.testing.assert_allclose(scores_of(model.predict(batch)), expected[:5], atol=TOLERANCE)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_each_precision_is_near_and_the_same_everywhere(
    precision: str, folder: Path, entries: Any, frames: Frames, expected: Singles
) -> None:
    """What has torch below it gives one answer in one precision: it is done in one place."""
    found = {}
    for name in ("huggingface", "torch_export", "python"):
        what = entries[name]["what"] | {"precision": precision}
        if precision == "int8":
            with pytest.raises(ModelError, match="this network has none; write bf16"):
                create_model(resolve_model({**entries[name], "what": what}, folder)).load("cpu")
            continue
        definition = resolve_model({**entries[name], "what": what}, folder)
        plain = resolve_model(entries[name], folder)
        assert definition.spec.fingerprint != plain.spec.fingerprint
        model = create_model(definition)
        model.load("cpu")
        piece = Piece(ticket=0, chunk=frames, lo=0, hi=7)
        found[name] = scores_of(Runner([model]).run([piece])[0][name])
        error = np.abs(found[name] - expected).max()
        assert 0 < error < (0.05 if precision == "bf16" else 0.01), error
    for scores in found.values():
        np.testing.assert_allclose(scores, found["torch_export"], atol=0.02)


def test_a_whole_job_gives_every_one_the_same_rows(
    folder: Path, entries: Any, shared_videos: Path, tmp_path: Path
) -> None:
    archive, output = tmp_path / "archive", tmp_path / "tables"
    archive.mkdir()
    (archive / "a.mp4").write_bytes((shared_videos / VIDEO).read_bytes())
    run_models(folder, archive, output, list(entries.values()), fps=2, length_s=2)
    found = rows(
        output,
        "select frame_index, label, max(score) - min(score), count(distinct model) from labels "
        "group by all order by 1, 2",
    )
    assert len(found) >= 8 * len(LABELS)
    assert {count for *_, count in found} == {len(entries)}
    assert max(spread for _, _, spread, _ in found) < 2 * TOLERANCE
