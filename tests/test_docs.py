"""The examples of docs/ run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tests.made_frames import make_frames
from vidbatch.batching import predict_chunk
from vidbatch.config import read_yaml
from vidbatch.data import Predictions
from vidbatch.models.registry import create_model, resolve_model

DOCS = Path(__file__).parent.parent / "docs"
CONFIGS = DOCS.parent / "configs" / "models"


def test_the_model_of_ten_lines(tmp_path: Path) -> None:
    text = (DOCS / "models.md").read_text("utf-8")
    for language in ("python", "yaml"):
        block = re.search(rf"```{language}\n# (\S+)\n(.*?)```", text, re.DOTALL)
        assert block, language
        (tmp_path / block[1]).write_text(block[2], "utf-8")
        if language == "python":
            code = block[2].partition("class ")[2].splitlines()
            assert len([line for line in code if line.strip()]) <= 10
    model = create_model(resolve_model({"file": "my_model.yaml"}, tmp_path))
    red = np.full((36, 64, 3), (255, 0, 0), np.uint8)
    frames = make_frames([red, red // 2], [g for g in [model.spec.geometry] if g])
    answer = predict_chunk({"redness": model}, frames, "cpu")["redness"]
    assert isinstance(answer, Predictions)
    np.testing.assert_allclose(answer.features[:, 0], [1, 127 / 255])
    assert answer.labels.item.tolist() == [0]


def test_every_model_file_that_is_named_is_there() -> None:
    text = (DOCS / "models.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z-]+\.yaml)`", text))
    assert len(named) > 8
    for name in named:
        assert read_yaml(CONFIGS / name)["version"] == "v1"
