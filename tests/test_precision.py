"""Precision, compilation and filled-up batches of torch networks; what `models bench` says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_jobs import write_model
from tests.tiny_networks import save_program, sha256
from vidbatch.data import Audio, Windows
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.bench import bench_model, made_items, read_alone, try_model
from vidbatch.models.precision import PRECISIONS, padded, settle
from vidbatch.models.registry import resolve_model
from vidbatch.pipeline.excerpt import first_items

ERRORS = {"fp32": 0.0, "fp16": 2e-3, "bf16": 2e-2, "int8": 2e-2}
"""Of a network of two layers, relative to the norm of its answers."""


class Mixer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(3 * 16 * 16, 64)
        self.second = torch.nn.Linear(64, 24, bias=False)
        self.odd = torch.nn.Linear(24, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.gelu(self.first(pixels.flatten(1)))
        return self.odd(torch.nn.functional.gelu(self.second(found)))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixer")
    return save_program(Mixer(), torch.zeros(2, 3, 16, 16), place / "mixer.pt2")


def entry(program: Path, how: dict[str, Any], **what: Any) -> dict[str, Any]:
    base = {
        "adapter": "torch_export", "file": str(program), "gives": ["logits"],
        "sha256": {program.name: sha256(program)}, "labels": list("abcde"),
        "geometry": {"width_px": 16, "height_px": 16},
        "input": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    }  # fmt: skip
    return {"name": "mixer", "version": "v1", "what": base | what, "how": how}


@pytest.mark.parametrize("exported", [False, True], ids=["module", "exported"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_has_its_error(precision: str, exported: bool, program: Path) -> None:
    network = Mixer().eval()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = network(pixels)
        made = torch.export.load(program).module() if exported else copy.deepcopy(network)
        settled, dtype = settle(made, precision, "cpu")
        found = settled(pixels.to(dtype)).float()
    error = float((found - exact).norm() / exact.norm())
    assert error <= ERRORS[precision]
    assert (error > 0) == (precision != "fp32")
    if precision == "int8":
        kinds = [type(m).__name__ for m in settled.modules()]
        assert kinds.count("Int8Linear") == 2, "the widths of the last are no multiples of 8"


def test_int8_of_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="this network has none; write bf16 or fp32"):
        settle(torch.nn.Conv2d(3, 8, 3), "int8", "cpu")


def test_batches_are_filled_up_and_cut() -> None:
    seen: list[int] = []

    def call(values: torch.Tensor) -> dict[str, Any]:
        seen.append(len(values))
        return {"twice": 2 * values, "parts": (values[:, 0],)}

    values = torch.arange(14.0).reshape(7, 2)
    found = padded(call, 3)(values)
    assert seen == [3, 3, 3]
    assert torch.equal(found["twice"], 2 * values)
    assert torch.equal(found["parts"][0], values[:, 0])


def test_a_compiled_network_meets_one_shape_alone(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled here is counted, not built: that takes a C++ compiler and a minute."""
    shapes: list[tuple[int, ...]] = []

    def compile_it(network: Any, **options: Any) -> Any:
        assert options == {"dynamic": False}

        def run(values: torch.Tensor) -> Any:
            shapes.append(tuple(values.shape))
            return network(values)

        return run

    monkeypatch.setattr(torch, "compile", compile_it)
    definition = resolve_model(entry(program, {"batch": 8, "compile": True}), program.parent)
    assert (
        definition.spec.fingerprint
        == resolve_model(entry(program, {}), program.parent).spec.fingerprint
    )
    found = bench_model(definition, chunk=made_items(definition.spec, 21), seconds=0)
    assert found.compiled and set(shapes) == {(8, 3, 16, 16)}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_bench_states_the_error_against_fp32(precision: str, program: Path) -> None:
    definition = resolve_model(entry(program, {"batch": 4}, precision=precision), program.parent)
    found = bench_model(definition, seconds=0)
    assert (found.model, found.precision, found.batch, found.items) == (
        "mixer-v1",
        precision,
        4,
        16,
    )
    assert found.items_per_s > 0 and found.load_s > 0
    assert 0 < found.error["score_mean"] <= found.error["score_max"] < 0.05
    assert 0.5 < found.error["same_first"] <= 1
    exact = bench_model(resolve_model(entry(program, {}), program.parent), seconds=0, batch=2)
    assert (exact.error, exact.batch) == ({}, 2)


KINDS: dict[str, tuple[str, str]] = {
    "embeddings": ("dim = 4", "'embeddings': y[:, :4]"),
    "features": ("features = ('a', 'b')", "'features': y[:, :2]"),
    "masks": ("labels = ('a', 'b'); segments = True",
              "'masks': ((y * 3000).long() % 2).abs().reshape(-1, 2, 4)",
    ),
    "boxes": ("labels = ('a',); detects = True",
              "'boxes': BoxRows(item=np.arange(len(x)), label_id=np.zeros(len(x), np.int64), "
              "score=y[:, 0].sigmoid().numpy(), xyxy=np.tile(np.float32([.1, .1, .5, .6]) + "
              "y[:, 1:2].abs().clamp(0, .1).numpy(), (1, 1)))"),
}  # fmt: skip
MEASURES = {
    "embeddings": {"cosine_max", "cosine_mean"}, "features": {"feature_max"},
    "masks": {"area_max"}, "boxes": {"boxes_found", "boxes_extra", "box_score_max"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_answer_has_its_measure(kind: str, tmp_path: Path) -> None:
    """Of a class that keeps its module as `network`: precision is done for it."""
    facts, gives = KINDS[kind]
    source = f"""
    class Model:
        geometry = Geometry(width_px=16, height_px=16)
        {facts}
        precisions = ("fp32", "bf16")

        def load(self, device):
            torch.manual_seed(0)
            self.network = torch.nn.Linear(768, 8)

        def predict(self, batch):
            x = batch.pixels.flatten(1).float() / 255
            y = self.network(x)
            return {{{gives}}}
    """
    model = write_model(tmp_path, "own", source, precision="bf16", how={"batch": 4})
    found = bench_model(resolve_model(model, tmp_path), seconds=0)
    assert found.error.keys() == MEASURES[kind]
    if kind == "boxes":
        assert found.error["boxes_found"] == 1
    assert any(value > 0 for value in found.error.values())


def test_items_are_of_the_kind_the_model_gets(
    tmp_path: Path, shared_videos: Path, program: Path
) -> None:
    source = """
    class Model:
        {}
        labels = ("a",)

        def predict(self, batch):
            items = batch.samples if batch.pixels is None else batch.pixels.float()
            return {{"scores": items.flatten(1).mean(dim=1).abs().clamp(0, 1)[:, None]}}
    """
    size = "geometry = Geometry(width_px=16, height_px=8)"
    for name, facts, kind in (
        ("windows", f"{size}; window = WindowGrid(frames=3, stride=2)", Windows),
        ("sound", "audio = AudioGrid(rate_hz=8000, window_s=1, hop_s=1)", Audio),
    ):
        definition = resolve_model(write_model(tmp_path, name, source.format(facts)), tmp_path)
        video = shared_videos / "real" / "mdn__friday.mp4"
        real = first_items(definition.spec, video, 4)
        assert isinstance(real, kind) and 1 <= real.num_rows <= 4
        assert isinstance(made_items(definition.spec, 3), kind)
        try_model(definition)
        assert bench_model(definition, chunk=real, seconds=0).items == real.num_rows
    with pytest.raises(UsageError, match="no such video file"):
        first_items(definition.spec, tmp_path / "x.mp4", 1)
    with pytest.raises(UsageError, match="no GPU is visible"):
        if torch.cuda.is_available():
            raise UsageError("no GPU is visible here, but one is")
        bench_model(definition, device="cuda")


def test_one_on_boxes_is_measured_on_whole_frames(tmp_path: Path) -> None:
    source = """
    class Model:
        geometry = Geometry(width_px=64, height_px=64)
        dim = 2

        def predict(self, batch):
            assert batch.pixels.shape[1:3] == (24, 32)
            return {"embeddings": np.ones((len(batch.pixels), 2), np.float32)}
    """
    model = write_model(tmp_path, "crops", source, on="faces")
    text = (
        "name: crops\nversion: v1\nwhat: {adapter: python, class: 'model_crops:Model', "
        "on: faces, crop: {width_px: 32, height_px: 24, margin: 0.2}}\n"
    )
    (tmp_path / "crops.yaml").write_text(text)
    found = bench_model(read_alone(str(tmp_path / "crops.yaml")), seconds=0)
    assert found.model == "crops-v1"
    faces = resolve_model({"builtin": "faces"}, tmp_path).spec
    model["what"]["crop"] = {"width_px": 32, "height_px": 24}
    try_model(resolve_model(model, tmp_path, parents={"faces": faces}))
    assert np.isfinite(bench_model(read_alone("quality"), seconds=0).items_per_s)
