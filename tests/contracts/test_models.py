"""What holds for every model there is: the builtin ones and each file of configs/models.

Those of the adapter huggingface, whose weights are not at hand, run in `test_huggingface.py`.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.made_frames import make_frames
from vidbatch.data import Audio, Batch, Frames, Gives, Model, Pixels, Predictions
from vidbatch.models.answers import check_predictions
from vidbatch.models.builtin import BUILTINS
from vidbatch.models.registry import ModelDef, create_model, resolve_model
from vidbatch.models.runner import Runner
from vidbatch.models.staging import Piece

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"
ENTRIES: dict[str, dict[str, Any]] = {name: {"builtin": name} for name in BUILTINS} | {
    path.name: {"file": path.name}
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "s3://acme-models/" not in path.read_text("utf-8")
}


@pytest.fixture
def cuda() -> str:
    if torch.cuda.is_available():
        return "cuda:0"
    if os.environ.get("FAIL_WITHOUT_GPU") == "1":
        pytest.fail("no GPU is visible and FAIL_WITHOUT_GPU=1")
    pytest.skip("no GPU is visible")


@pytest.fixture(params=ENTRIES)
def definition(request: pytest.FixtureRequest) -> ModelDef:
    return resolve_model(ENTRIES[request.param], CONFIGS)


@pytest.fixture
def model(definition: ModelDef) -> Model:
    made = create_model(definition)
    made.load("cpu")
    return made


def pictures(n: int = 7) -> list[Pixels]:
    """Black, white, one colour, noise, ramps: whatever could upset a formula."""
    rng = np.random.default_rng(7)
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (120, 200, 3))
    some = [
        np.zeros((90, 160, 3), np.uint8),
        np.full((90, 160, 3), 255, np.uint8),
        np.full((64, 48, 3), (250, 10, 30), np.uint8),
        rng.integers(0, 256, (90, 160, 3), np.uint8),
        np.ascontiguousarray(ramp),
        np.ascontiguousarray(np.rot90(ramp)),
        rng.integers(0, 256, (5, 300, 3), np.uint8),
    ]
    return [some[i % len(some)] for i in range(n)]


def chunk_of(model: Model, n: int = 7) -> Frames | Audio:
    """Pictures, or seconds of silence, a tone, noise, a click, for a model of sound."""
    grid = model.spec.audio
    if grid is None:
        assert model.spec.geometry is not None
        return make_frames(pictures(n), [model.spec.geometry])
    rng, t = np.random.default_rng(7), np.arange(grid.samples) / grid.rate_hz
    some = [np.zeros(grid.samples), np.sin(2 * np.pi * 440 * t), rng.uniform(-1, 1, grid.samples)]
    some.append(np.eye(1, grid.samples)[0])
    sound = np.stack([some[i % len(some)] for i in range(n)]).astype(np.float32)
    return Audio(grid=grid, keys=np.arange(n, dtype=np.int64), samples=sound)


def batch_of(chunk: Frames | Audio, model: Model) -> Batch:
    if isinstance(chunk, Audio):
        none = np.zeros((chunk.num_rows, 2), np.int64)
        sound = torch.from_numpy(chunk.samples.copy())
        return Batch(
            pixels=None, previous=None, has_previous=None, source_px=none, samples=sound
        )  # fmt: skip
    assert model.spec.geometry is not None
    pixels = torch.from_numpy(chunk.pixels[model.spec.geometry.key].copy())
    if not model.spec.context:
        return Batch(pixels=pixels, previous=None, has_previous=None, source_px=chunk.source_px)
    return Batch(
        pixels=pixels,
        previous=pixels.roll(1, 0),
        has_previous=torch.arange(len(pixels)) > 0,
        source_px=chunk.source_px,
    )


def assert_same(one: Predictions, other: Predictions) -> None:
    """Keys equal, numbers within what the order of float32 sums may change."""
    assert one.n == other.n
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-5)
    np.testing.assert_allclose(one.features, other.features, rtol=1e-4, atol=1e-4)
    for a, b in ((one.labels, other.labels), (one.boxes, other.boxes)):
        np.testing.assert_array_equal(a.item, b.item)
        np.testing.assert_array_equal(a.label_id, b.label_id)
        np.testing.assert_allclose(a.score, b.score, atol=1e-4)
    np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy, atol=1e-6)
    np.testing.assert_allclose(one.cuts, other.cuts, atol=1e-5)


def test_its_facts_are_whole(definition: ModelDef) -> None:
    spec = definition.spec
    assert re.fullmatch(r"[a-z][a-z0-9_-]*", spec.name)
    assert re.fullmatch(r"[0-9a-f]{64}", spec.fingerprint)
    assert spec.gives and set(spec.gives) <= set(get_args(Gives))
    assert (spec.geometry is None) == (spec.audio is not None) == ("audio" in spec.gives)
    assert bool(spec.dim) == ("embeddings" in spec.gives)
    assert bool(spec.features) <= (not {"features", "audio"}.isdisjoint(spec.gives))
    assert spec.kind and spec.batch >= 1


def test_it_travels(definition: ModelDef) -> None:
    there = pickle.loads(pickle.dumps(definition))
    assert there == definition
    assert create_model(there).spec == definition.spec


def test_it_answers_what_its_spec_allows(model: Model) -> None:
    chunk = chunk_of(model)
    answer = model.predict(batch_of(chunk, model))
    check_predictions(model.spec, answer, chunk.num_rows)
    if model.spec.dim and model.spec.normalised:
        np.testing.assert_allclose(np.linalg.norm(answer.embeddings, axis=1), 1, atol=1e-5)


def test_it_is_pure_and_leaves_its_input_alone(model: Model) -> None:
    batch = batch_of(chunk_of(model), model)
    seen = batch.samples if batch.pixels is None else batch.pixels
    before = seen.clone()
    first = model.predict(batch)
    assert torch.equal(seen, before)
    assert_same(first, model.predict(batch))


def test_an_item_does_not_depend_on_its_neighbours(model: Model) -> None:
    chunk = chunk_of(model)
    runner = Runner([model])
    n = chunk.num_rows
    (whole,) = runner.run([Piece(ticket=0, chunk=chunk, lo=0, hi=n)])
    parts = [Piece(ticket=i, chunk=chunk, lo=i, hi=i + 1) for i in range(n)]
    alone = [answer[model.spec.name] for answer in runner.run(parts[::-1])][::-1]
    together = whole[model.spec.name]
    assert isinstance(together, Predictions)
    for i, answer in enumerate(alone):
        assert isinstance(answer, Predictions) and answer.n == 1
        np.testing.assert_allclose(answer.embeddings, together.embeddings[i : i + 1], atol=1e-5)
        np.testing.assert_allclose(
            answer.features, together.features[i : i + 1], rtol=1e-4, atol=1e-4
        )
        assert len(answer.labels.item) == int((together.labels.item == i).sum())
        assert len(answer.boxes.item) == int((together.boxes.item == i).sum())


def test_without_a_previous_frame_nothing_of_it_shows(model: Model) -> None:
    if not model.spec.context:
        assert batch_of(chunk_of(model), model).previous is None
        return
    assert model.spec.geometry is not None
    frames = make_frames(pictures(), [model.spec.geometry])
    pixels = torch.from_numpy(frames.pixels[model.spec.geometry.key].copy())
    none = torch.zeros(len(frames), dtype=torch.bool)
    answers = [
        model.predict(
            Batch(pixels=pixels, previous=p, has_previous=none, source_px=frames.source_px)
        )
        for p in (pixels, pixels.flip(0))
    ]
    assert_same(*answers)


def test_it_can_be_closed_and_loaded_again(model: Model) -> None:
    batch = batch_of(chunk_of(model), model)
    before = model.predict(batch)
    model.close()
    model.load("cpu")
    assert_same(before, model.predict(batch))


@pytest.mark.parametrize("entry", ENTRIES)
def test_how_does_not_change_the_fingerprint(entry: str) -> None:
    plain = resolve_model(ENTRIES[entry], CONFIGS).spec
    other = resolve_model({**ENTRIES[entry], "how": {"batch": 3}}, CONFIGS).spec
    assert other.batch == 3
    assert other.fingerprint == plain.fingerprint


def test_a_file_and_its_short_form_are_the_same_model() -> None:
    shared = [name for name in BUILTINS if f"{name}.yaml" in ENTRIES]
    assert set(shared) == set(BUILTINS) - {"null"}
    for name in shared:
        short = resolve_model(ENTRIES[name], CONFIGS).spec
        assert resolve_model(ENTRIES[f"{name}.yaml"], CONFIGS).spec == short


def test_each_file_opens_with_its_command() -> None:
    for path in CONFIGS.glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# vidbatch run ") and f"configs/models/{path.name}" in first


def test_planning_imports_neither_torch_nor_cv2() -> None:
    code = (
        "import sys; from pathlib import Path; import vidbatch.batching;"
        "from vidbatch.models.registry import BUILTINS, create_model, resolve_model;"
        "[create_model(resolve_model({'builtin': b}, Path())) for b in BUILTINS];"
        "print({'torch', 'cv2', 'ray', 'av'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


@pytest.mark.gpu
def test_a_gpu_gives_the_same(model: Model, cuda: str) -> None:
    chunk: Frames | Audio = chunk_of(model, 9)
    if model.spec.geometry is not None:
        chunk = make_frames(pictures(9), [model.spec.geometry], context=True)
    piece = Piece(ticket=0, chunk=chunk, lo=0, hi=chunk.num_rows)
    (here,) = Runner([model]).run([piece])
    runner = Runner([model], cuda)
    runner.load()
    (there,) = runner.run([piece])
    one, other = here[model.spec.name], there[model.spec.name]
    assert isinstance(one, Predictions) and isinstance(other, Predictions)
    assert_same(one, other)
