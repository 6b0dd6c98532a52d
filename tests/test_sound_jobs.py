"""Models of sound and of shots through whole jobs: rows, clips, and what fails alone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.made_frames import make_frames
from tests.small_jobs import rows, run_models, write_model
from vidbatch.batching import Batcher
from vidbatch.data import Audio, AudioGrid
from vidbatch.errors import DecoderDied, MediaError, StoreError, UsageError
from vidbatch.models.registry import create_model, resolve_model
from vidbatch.models.runner import Runner

LEVEL = """
from fractions import Fraction

class Model:
    audio = AudioGrid(rate_hz=8000, window_s=Fraction(1, 2), hop_s=Fraction(3, 8))
    labels = ("loud", "quiet")
    features = ("rms", "peak")
    batch = 7

    def predict(self, batch):
        assert batch.pixels is None and batch.samples.shape[1:] == (4000,)
        rms = batch.samples.square().mean(dim=1).sqrt()
        loud = (rms * 4).clamp(0, 1)
        peak = batch.samples.abs().amax(dim=1)
        peak[rms == 0] = torch.nan
        return {
            "scores": torch.stack([loud, 1 - loud], dim=1),
            "features": torch.stack([rms, peak], dim=1),
        }
"""

AUDIO = "SELECT uri, start_s, end_s, kind, label, round(value, 4) FROM audio ORDER BY ALL"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, shared_videos: Path) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    shutil.copy(shared_videos / "real" / "mdn__friday.mp4", folder)  # with sound
    shutil.copy(shared_videos / "truth" / "skv__bikes.mp4", folder)  # without, six keyframes
    return folder


def entries(folder: Path) -> list[dict[str, Any]]:
    return [write_model(folder, "level", LEVEL), {"builtin": "shots"}, {"builtin": "quality"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_models(folder, archive, folder / "out", entries(folder))
    return folder / "out"


def test_sound_has_rows_and_a_video_without_has_none(whole: Path) -> None:
    per_video = rows(
        whole, "SELECT uri, count(DISTINCT start_s), min(start_s), max(end_s) FROM audio GROUP BY 1"
    )
    assert len(per_video) == 1
    uri, windows, start_s, end_s = per_video[0]
    assert uri.endswith("friday.mp4") and windows in (16, 17) and abs(start_s) < 0.4
    assert 6 < end_s < 7
    kinds = rows(whole, "SELECT kind, label, count(*), max(value) FROM audio GROUP BY 1, 2")
    assert {k[:2] for k in kinds} == {
        ("label", "loud"), ("label", "quiet"), ("feature", "rms"), ("feature", "peak"),
    }  # fmt: skip
    assert all(n == windows for _, name, n, _ in kinds if name != "peak")
    status = rows(
        whole, "SELECT status, count(*) FROM coverage WHERE model LIKE 'level%' GROUP BY 1"
    )
    assert status == [("ok", 2)]


@pytest.mark.parametrize(("length_s", "isolate"), [(1, False), (3, True)])
def test_clips_change_neither_sound_nor_shots(
    whole: Path, archive: Path, tmp_path: Path, length_s: float, isolate: bool
) -> None:
    output = tmp_path / "out"
    run_models(tmp_path, archive, output, entries(tmp_path), length_s=length_s, isolate=isolate)
    assert rows(output, "SELECT count(*) FROM coverage WHERE model = 'frames'")[0][0] > 4
    assert rows(output, AUDIO) == rows(whole, AUDIO)
    shots = (
        "SELECT uri, start_frame, end_frame, round(start_s, 6), round(end_s, 6), round(score, 5) "
        "FROM shots ORDER BY ALL"
    )
    assert rows(output, shots) == rows(whole, shots)
    open_ends = "SELECT count(*) FROM shots_all WHERE end_frame IS NULL"
    assert rows(whole, open_ends) == [(0,)] and rows(output, open_ends)[0][0] > 0


def test_shots_tile_every_video(whole: Path) -> None:
    found = rows(whole, "SELECT uri, start_frame, end_frame, start_s, end_s, score FROM shots "
                        "ORDER BY uri, start_frame")  # fmt: skip
    ends = rows(whole, "SELECT uri, end_frame, end_s FROM coverage WHERE model = 'frames'")
    for uri, end_frame, end_s in ends:
        shots = [s[1:] for s in found if s[0] == uri]
        assert shots[0][0] == shots[0][2] == 0 and shots[0][4] is None
        assert all(a[1] == b[0] and a[3] == b[2] for a, b in itertools.pairwise(shots))
        assert (shots[-1][1], shots[-1][3]) == (end_frame, end_s)
        assert all(0 < s[4] <= 1 for s in shots[1:])
    assert sum(uri.endswith("bikes.mp4") for uri, *_ in found) > 3  # it has five cuts


@pytest.mark.parametrize(
    ("error", "stage", "kind"),
    [
        (MediaError("sound of no known kind", kind="undecodable"), "decode", "undecodable"),
        (StoreError("reset", kind="reset"), "read", "reset"),
        (DecoderDied("it crashed", kind="decoder_crash"), "decode", "decoder_crash"),
    ],
)
def test_sound_that_fails_costs_the_models_of_sound_alone(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, stage: str,
    kind: str,
) -> None:  # fmt: skip
    calls = []

    def fail(source: Any, clip: Any, **rest: Any) -> Iterator[Audio]:
        calls.append(clip)
        yield Audio(
            grid=rest["grids"][0],
            keys=np.arange(2),
            samples=np.zeros((2, rest["grids"][0].samples), np.float32),
        )
        raise error

    monkeypatch.setattr("vidbatch.audio.decode_audio", fail)
    output = tmp_path / "out"
    run_models(tmp_path, archive, output, entries(tmp_path), check=False)
    assert len(calls) == (2 if kind != "decoder_crash" else 6)  # two more attempts each
    failed = rows(output, "SELECT split_part(model, '-', 1), stage, kind FROM failures")
    assert failed == [("level", stage, kind)] * 2
    assert rows(output, "SELECT count(*) FROM audio") == [(0,)]
    status = rows(output, "SELECT DISTINCT status FROM coverage WHERE model NOT LIKE 'level%'")
    assert status == [("ok",)]
    assert rows(output, "SELECT count(*) > 0 FROM shots") == [(True,)]


def test_sound_goes_through_batches_with_frames_beside_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    level, quality = (create_model(resolve_model(e, tmp_path)) for e in entries(tmp_path)[::2])
    grid = level.spec.audio
    assert isinstance(grid, AudioGrid) and quality.spec.geometry is not None
    pictures = [rng.integers(0, 255, (36, 64, 3)).astype(np.uint8) for _ in range(5)]
    sounds = [
        Audio(
            grid=grid,
            keys=np.arange(first, first + 5),
            samples=rng.uniform(-1, 1, (5, grid.samples)).astype(np.float32),
        )
        for first in (-2, 40)
    ]
    frames = make_frames(pictures, [quality.spec.geometry])
    batcher, runner = Batcher(4), Runner([level, quality])
    for i, chunk in enumerate((sounds[0], frames, sounds[1])):
        batcher.add(i, chunk)
    answers: dict[Any, Any] = {}
    while pieces := batcher.take():
        answers |= dict(batcher.scatter(pieces, runner.run(pieces)))
    assert [set(answers[i]) for i in range(3)] == [{"level"}, {"quality"}, {"level"}]
    for i, sound in ((0, sounds[0]), (2, sounds[1])):
        rms = np.sqrt((sound.samples.astype(np.float64) ** 2).mean(axis=1))
        np.testing.assert_allclose(answers[i]["level"].features[:, 0], rms, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"geometry": {"width_px": 8}}, "a model of sound gets no frames"),
        ({"audio": {"hop_s": 2}}, r"what\.audio: hop_s 2, window_s 1/2: 0 < hop"),
        ({"audio": {"rate": 2}}, "unknown key 'rate'; did you mean 'rate_hz'"),
        ({"audio": {"window_s": "long"}}, r"what\.audio: Invalid literal for Fraction: 'long'"),
        ({"window": {"frames": 3}}, "window and audio exclude each other"),
    ],
)
def test_what_makes_no_sense_of_sound_is_said(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_model(write_model(tmp_path, "level", LEVEL, **changes), tmp_path)


def test_a_grid_of_the_model_file_is_another_fingerprint(tmp_path: Path) -> None:
    def resolve(**what: Any) -> Any:
        return resolve_model(write_model(tmp_path, "level", LEVEL, **what), tmp_path).spec

    assert resolve().gives == ("audio",) and resolve().geometry is None
    same = resolve(audio={"rate_hz": 8000, "window_s": 0.5})
    assert same.fingerprint == resolve().fingerprint
    assert resolve(audio={"hop_s": "1/4"}).fingerprint != same.fingerprint
    with pytest.raises(UsageError, match="'audio' gives labels and features alone; dim"):
        source = LEVEL.replace("batch = 7", "dim = 3")
        resolve_model(write_model(tmp_path, "wide", source), tmp_path)
