"""Entries of a job file → definitions: the python adapter, fingerprints, and what cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.made_frames import make_frames
from vidbatch import tables
from vidbatch.batching import predict_chunk
from vidbatch.data import Predictions
from vidbatch.errors import ModelError, UsageError
from vidbatch.models import registry
from vidbatch.models.builtin.quality import Quality
from vidbatch.models.registry import create_model, resolve_model, resolve_models

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "models"

OWN = """
from vidbatch.data import Geometry

class Mean:
    geometry = Geometry(width_px=8, height_px=8)
    features = ("mean",)

    def __init__(self, scale: float = 1.0, bias: int = 0):
        self.scale, self.bias = scale, bias

    files = {"table.bin": b""}

    def load(self, device):
        self.table = self.files["table.bin"]

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
        model = create_model(resolve_model({"file": "python-example.yaml"}, CONFIGS))
        red = np.full((36, 64, 3), (255, 0, 0), np.uint8)
        frames = make_frames([red, red[..., ::-1].copy()], [model.spec.geometry])
        answer = predict_chunk({"redness": model}, frames, "cpu")["redness"]
        assert isinstance(answer, Predictions)
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
        assert model.plain.table == b"abc"
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
