"""`vidbatch try`: the frames shown are those of the rows, and the rows those of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.clips import make_clip, read_number
from tests.small_jobs import rows, run_models, write_model
from vidbatch.cli import app
from vidbatch.errors import UsageError
from vidbatch.query import QueryResult
from vidbatch.trial import CELL_PX, LINE_PX, LINES, _Notes, try_video

FRAMES = 200

HALF = """
class Model:
    '''A box over the left half of each frame.'''
    geometry = Geometry(width_px=64, height_px=64, fit="letterbox")
    labels = ("half",)
    detects = True

    def predict(self, batch):
        n = len(batch.pixels)
        return {"boxes": BoxRows(
            item=np.arange(n), label_id=np.zeros(n, np.int64), score=np.full(n, 0.5, np.float32),
            xyxy=np.tile(np.array([0.1, 0.1, 0.5, 0.9], np.float32), (n, 1)),
        )}
"""

TONE = """
class Model:
    '''Mean grey of a crop.'''
    geometry = Geometry(width_px=8, height_px=8)
    labels = ("grey",)

    def predict(self, batch):
        return {"scores": batch.pixels.float().mean(dim=(1, 2, 3))[:, None] / 255}
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "numbered.mp4"
    path.write_bytes(make_clip(frames=FRAMES, gop=10))
    return path


def model_file(folder: Path, name: str, source: str, **what: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(write_model(folder, name, source, **what)), encoding="utf-8")
    return str(path)


def cells(sheet: np.ndarray, size_px: tuple[int, int], n: int) -> list[np.ndarray]:
    """The pictures of a sheet of five columns, brought back to (height, width)."""
    height = round(size_px[0] * CELL_PX / size_px[1])
    high = height + LINE_PX * (LINES + 1) + 6 + 6
    found = []
    for k in range(n):
        y, x = k // 5 * high, k % 5 * (CELL_PX + 6)
        cell = Image.fromarray(sheet[y : y + height, x : x + CELL_PX])
        found.append(np.asarray(cell.resize(size_px[::-1], Image.Resampling.BOX)))
    return found


def test_the_pictures_are_the_frames_of_the_rows(video: Path, tmp_path: Path) -> None:
    half = model_file(tmp_path, "half", HALF)
    found = try_video(half, str(video))
    index = [row["frame_index"] for row in found.tables["detections"].dicts()]
    assert len(index) == 20 and index == sorted(index)
    assert np.diff([0, *index, FRAMES]).max() <= 20, "over the whole video"
    assert found.sheet is not None
    shown = cells(found.sheet, (64, 64), 20)
    # the box's line is one pixel of a picture four times as large: the numbers stay legible
    assert [read_number(picture) for picture in shown] == index


def test_a_box_is_drawn_where_it_is(video: Path, tmp_path: Path) -> None:
    found = try_video(model_file(tmp_path, "half", HALF), str(video), n=1)
    assert found.sheet is not None
    yellow = np.argwhere((found.sheet[:CELL_PX] == (255, 200, 0)).all(axis=2))
    low, high = yellow.min(axis=0), yellow.max(axis=0)
    assert list(low) == [round(0.1 * CELL_PX)] * 2
    assert list(high) == [round(0.9 * CELL_PX), round(0.5 * CELL_PX)]


def test_the_rows_are_those_of_a_run(video: Path, tmp_path: Path) -> None:
    found = try_video("quality", str(video), fps="5")
    run_models(tmp_path, video.parent, tmp_path / "out", [{"builtin": "quality"}], fps=5)
    text = "select time_s, feature, value from features order by all"
    shown = [(r["time_s"], r["feature"], r["value"]) for r in found.tables["features"].dicts()]
    assert sorted(shown) == rows(tmp_path / "out", text) and len(shown) > 20


def test_a_model_on_boxes_is_shown_on_the_frames_they_are_of(video: Path, tmp_path: Path) -> None:
    half = model_file(tmp_path, "half", HALF)
    tone = model_file(tmp_path, "tone", TONE, on="half", crop={"margin": 0.0})
    with pytest.raises(UsageError, match="half"):
        try_video(tone, str(video))
    found = try_video(tone, str(video), beside=[half], n=4)
    assert list(found.tables) == ["labels"] and len(found.tables["labels"].rows) == 4
    assert found.sheet is not None and (found.sheet == (255, 200, 0)).all(axis=2).any()


@pytest.mark.parametrize("model", ["shots", "motion"])
def test_what_looks_at_changes_is_shown_at_one_frame_a_second(video: Path, model: str) -> None:
    found = try_video(model, str(video))
    assert found.sheet is not None and all(table.rows for table in found.tables.values())
    assert found.sheet.shape[0] < 2 * CELL_PX + 200, "eight frames are two rows"


def test_an_open_end_holds_every_frame_after_it() -> None:
    shot = QueryResult(columns=("start_frame", "start_s"), rows=[(30, 1.0)])
    notes = _Notes({"shots": shot}, None)
    assert (notes.over(29), notes.over(5000)) == ([], ["shot from 1.00 s"])


def test_sound_has_rows_and_no_picture(tmp_path: Path) -> None:
    from vidbatch.demo import make_archive

    video = next(p for p in make_archive(tmp_path) if p.name.endswith(".mp4"))
    picture = tmp_path / "sound.png"
    ended = CliRunner().invoke(app, ["try", "loudness", str(video), "-o", str(picture), "--json"])
    assert not ended.exit_code and not picture.exists()
    assert len(json.loads(ended.stdout)["audio"]) > 3


def test_the_picture_is_a_png(video: Path, tmp_path: Path) -> None:
    picture = tmp_path / "seen.png"
    ended = CliRunner().invoke(app, ["try", "colour", str(video), "-n", "7", "-o", str(picture)])
    assert not ended.exit_code and "embeddings of colour: 7 rows" in ended.stdout
    with Image.open(picture) as shown:
        assert shown.size[0] == 5 * (CELL_PX + 6)


@pytest.mark.parametrize(
    ("model", "name", "data", "words"),
    [
        ("quality", "text.mp4", b"not a video\n" * 20, "not a video.*nothing to show"),
        ("colour", "text.mp4", b"not a video\n" * 20, "not a video"),
        ("quality", "none.mp4", None, "does not exist"),
        ("nosuch", "text.mp4", b"x", "unknown builtin 'nosuch'"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(
    tmp_path: Path, model: str, name: str, data: bytes | None, words: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words) as said:
        try_video(model, str(tmp_path / name))
    assert "\n" not in said.value.message


def test_of_a_cut_video_what_is_there_is_shown(video: Path, tmp_path: Path) -> None:
    data = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    found = try_video("colour", str(tmp_path / "cut.mp4"))
    assert found.note.endswith("(truncated)")
    assert found.sheet is not None and 0 < len(found.tables["embeddings"].rows) < 20


def test_a_model_that_fails_says_so(video: Path, tmp_path: Path) -> None:
    source = HALF.replace("n = len(batch.pixels)", "raise RuntimeError('no such net')")
    with pytest.raises(UsageError, match=r"no such net.*nothing to show"):
        try_video(model_file(tmp_path, "half", source), str(video))


def test_a_folder_is_not_one_video(video: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(video.read_bytes())
    with pytest.raises(UsageError, match="2 videos; nothing was tried; name one video"):
        try_video("quality", str(tmp_path))
