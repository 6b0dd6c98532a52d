"""Temporal windows: the grid, clips that never change it, and rows of whole jobs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding import make_video
from tests.small_jobs import rows, run_models, write_model
from vidbatch.batching import Batcher
from vidbatch.data import (
    Clip,
    DecodeLimits,
    Frames,
    Geometry,
    Sample,
    WindowGrid,
    Windows,
    chunk_rows,
)
from vidbatch.decode import decode_clip
from vidbatch.media import BytesSource
from vidbatch.models.registry import create_model, resolve_model
from vidbatch.models.runner import Runner
from vidbatch.pipeline.windows import WindowCutter

SMALL = Geometry(width_px=16, height_px=9)


def make_samples(lo: int, hi: int, holes: frozenset[int] = frozenset(), **facts: Any) -> Frames:
    """Samples [lo, hi) of a video of ten frames a sample, whose pixels are their ordinal."""
    ordinal = np.array([i for i in range(lo, hi) if i not in holes], np.int64)
    n = len(ordinal)
    return Frames(
        frame_index=ordinal * 10,
        pts=ordinal,
        has_pts=np.ones(n, np.bool_),
        time_s=ordinal / 2,
        covers_s=np.full(n, 0.5),
        is_keyframe=np.zeros(n, np.bool_),
        is_corrupt=np.zeros(n, np.bool_),
        source_px=np.full((n, 2), 64, np.int64),
        ordinal=ordinal,
        pixels={"a": np.tile(ordinal.astype(np.uint8)[:, None, None, None], (1, 1, 1, 3))},
        **facts,
    )


def windows_of(
    grid: WindowGrid, total: int, cuts: list[int], chunk: int, holes: frozenset[int]
) -> list[list[int]]:
    """The ordinals of every window, as the clips [cut, next cut) give them in chunks."""
    found: list[list[int]] = []
    for lo, hi in zip([0, *cuts], [*cuts, total], strict=True):
        cutter = WindowCutter(grid, ["a"])
        beyond = min(hi + grid.span - 1, total)
        gone: list[Windows | None] = []
        for start in range(lo, beyond, chunk):
            stop = min(start + chunk, beyond)
            halo = sum(i not in holes for i in range(max(start, hi), stop))
            some = make_samples(start, stop, holes)
            if len(some):
                halo_frames = make_samples(start, stop, holes, halo=halo)
                gone.append(cutter.feed(halo_frames))
        gone.append(cutter.finish(beyond))
        for windows in gone:
            if windows is not None:
                pixels = windows.frames.pixels["a"][windows.items][..., 0, 0, 0]
                assert (pixels == windows.frames.ordinal[windows.items]).all()
                assert (windows.keys == windows.frames.ordinal[windows.items[:, 0]] * 10).all()
                found += pixels.tolist()
    return found


def expected(grid: WindowGrid, total: int, holes: frozenset[int]) -> list[list[int]]:
    """The definition, written down once more."""
    found = []
    for start in range(0, total, grid.step):
        samples = [start + j * grid.stride for j in range(grid.frames)]
        if start == 0 and total < grid.span:
            samples = [min(s, total - 1) for s in samples]
        if samples[-1] < total and not holes & set(samples):
            found.append(samples)
    return found


@settings(max_examples=150, deadline=None)
@given(
    grid=st.builds(
        WindowGrid,
        frames=st.integers(1, 5),
        stride=st.integers(1, 4),
        hop=st.integers(0, 7),
    ),
    total=st.integers(1, 40),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    chunk=st.integers(1, 9),
    holes=st.frozensets(st.integers(0, 39), max_size=3),
)
def test_clips_and_chunks_never_change_the_windows(
    grid: WindowGrid, total: int, cuts: set[int], chunk: int, holes: frozenset[int]
) -> None:
    inside = sorted(c for c in cuts if c < total)
    assert windows_of(grid, total, inside, chunk, holes) == expected(grid, total, holes)


def test_what_no_later_window_needs_is_let_go() -> None:
    cutter = WindowCutter(WindowGrid(frames=2, stride=2, hop=3), ["a"])
    for start in range(0, 300, 10):
        cutter.feed(make_samples(start, start + 10))
        assert len(cutter._parts) <= 2


MIDDLE = """
class Model:
    '''Tells the frames of a window apart, their order too.'''
    geometry = Geometry(width_px=16, height_px=9)
    window = WindowGrid(frames=3, stride=2, hop=3)
    labels = ("rising", "falling")
    dim = 4
    normalised = False
    batch = 4

    def predict(self, batch):
        assert tuple(batch.pixels.shape[1:]) == (3, 9, 16, 3)
        mean = batch.pixels.float().mean(dim=(2, 3, 4)) / 255
        rise = (mean[:, 2] - mean[:, 0]).sigmoid()
        last = batch.pixels[:, 2, 4, 8, :1].float() / 255
        return {
            "scores": torch.stack([rise, 1 - rise], dim=1),
            "embeddings": torch.cat([mean, last], dim=1),
        }
"""

COLUMNS = "uri, start_frame, end_frame, start_s, end_s, rank, label, label_id, score"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, shared_videos: Path) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    shutil.copy(shared_videos / "real" / "mdn__friday.mp4", folder)  # six keyframes in six seconds
    shutil.copy(shared_videos / "truth" / "asl" / "yes.mkv", folder)  # one clip however short
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_models(folder, archive, folder / "out", [write_model(folder, "middle", MIDDLE)])
    return folder / "out"


def test_windows_of_a_job_are_those_of_a_plain_loop(whole: Path, archive: Path) -> None:
    """Decoded, gathered and averaged again, frame by frame, without any of the machinery."""
    wanted = []
    for path in sorted(archive.iterdir()):
        frames = list(_samples(path))
        for start in range(0, len(frames) - 4, 3):
            some = [frames[start + j] for j in (0, 2, 4)]
            mean = [float(f[3].mean()) / 255 for f in some]
            rise = 1 / (1 + np.exp(mean[0] - mean[2]))
            wanted.append((str(path), some[0][0], some[2][0] + 1, some[0][1], some[2][2], rise))
    assert len(wanted) > 10
    found = rows(
        whole,
        "SELECT uri, start_frame, end_frame, start_s, end_s, score FROM windows "
        "WHERE label = 'rising' ORDER BY uri, start_frame",
    )
    assert [r[:3] for r in found] == [w[:3] for w in wanted]
    assert np.allclose([r[3:] for r in found], [w[3:] for w in wanted], atol=1e-5)
    ranks = rows(
        whole, "SELECT uri, start_frame, list(rank ORDER BY score DESC) FROM windows GROUP BY 1, 2"
    )
    assert {tuple(r[2]) for r in ranks} == {(1, 2)}
    vectors = rows(
        whole, "SELECT uri, frame_index, end_frame, embedding FROM embeddings ORDER BY ALL"
    )
    assert [v[:3] for v in vectors] == [w[:3] for w in wanted]
    assert all(len(v[3]) == 4 and v[3][0] != v[3][2] for v in vectors)


def _samples(path: Path) -> Iterator[tuple[int, float, float, Any]]:
    """(frame_index, start, end, picture) of the samples of a video at 5 fps."""
    data = path.read_bytes()
    for event in decode_clip(
        BytesSource(data),
        Clip(video=make_video(data)),
        sample=Sample(kind="fps", fps=Fraction(5)),
        geometries=[SMALL],
        context=False,
        limits=DecodeLimits(),
    ):
        if isinstance(event, Frames):
            items = range(len(event))[chunk_rows(event)]
            for i in items:
                time_s = float(event.time_s[i])
                picture = event.pixels[SMALL.key][i]
                yield int(event.frame_index[i]), time_s, time_s + float(event.covers_s[i]), picture


@pytest.mark.parametrize(("length_s", "isolate"), [(0.5, False), (3, True)])
def test_cut_into_clips_the_rows_are_the_same(
    whole: Path, archive: Path, tmp_path: Path, length_s: float, isolate: bool
) -> None:
    models = [write_model(tmp_path, "middle", MIDDLE), {"builtin": "quality"}]
    output = tmp_path / "out"
    run_models(tmp_path, archive, output, models, length_s=length_s, isolate=isolate)
    clips = rows(output, "SELECT count(*) FROM coverage WHERE model = 'frames'")[0][0]
    assert clips > 2
    for query in (
        f"SELECT {COLUMNS} FROM windows ORDER BY ALL",
        "SELECT uri, frame_index, end_frame, pts, time_s, embedding FROM embeddings ORDER BY ALL",
        "SELECT uri, frame_index, covers_s FROM frames ORDER BY ALL",
        "SELECT uri, sum(frames) FROM coverage WHERE model LIKE 'middle%' GROUP BY 1 ORDER BY 1",
    ):
        assert rows(output, query) == rows(whole, query)
    per_frame = "SELECT count(*), count(DISTINCT (uri, frame_index)) FROM features"
    frames = rows(output, "SELECT count(*) FROM frames")[0][0]
    assert rows(output, per_frame)[0][1] == frames  # halo frames are rows of their own clip alone


def test_a_video_shorter_than_its_window_has_one(archive: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path, "middle", MIDDLE, window={"frames": 3, "stride": 40, "hop": 1})
    for length_s in (None, 2):
        output = tmp_path / f"out-{length_s}"
        run_models(tmp_path, archive, output, [model], length_s=length_s)
        found = rows(output, "SELECT uri, start_frame, end_frame FROM windows WHERE rank = 1")
        last = rows(output, "SELECT uri, max(frame_index) + 1 FROM frames GROUP BY 1 ORDER BY 1")
        assert sorted(found) == [(uri, 0, end) for uri, end in last]


def test_a_batch_of_windows_is_put_together_from_many_clips(tmp_path: Path) -> None:
    """Overlapping windows of two chunks, cut by the batch, answered as alone."""
    model = create_model(resolve_model(write_model(tmp_path, "middle", MIDDLE), tmp_path))
    model.load("cpu")
    rng = np.random.default_rng(4)
    chunks = []
    for first in (0, 50):
        n = 12
        frames = make_samples(first, first + n)
        pixels = rng.integers(0, 255, (n, 9, 16, 3), np.uint8)
        frames = Frames(
            **{c: getattr(frames, c) for c in (
                "frame_index", "pts", "has_pts", "time_s", "covers_s", "is_keyframe",
                "is_corrupt", "source_px", "ordinal")},
            pixels={SMALL.key: pixels},
        )  # fmt: skip
        items = np.arange(6)[:, None] + np.array([0, 2, 4])
        chunks.append(Windows(frames=frames, items=items))
    batcher = Batcher(5)
    runner = Runner([model])
    for i, chunk in enumerate(chunks):
        batcher.add(i, chunk, frozenset({"middle"}))
    answers: dict[Any, Any] = {}
    while pieces := batcher.take():
        answers |= dict(batcher.scatter(pieces, runner.run(pieces)))
    for i, chunk in enumerate(chunks):
        pixels = chunk.frames.pixels[SMALL.key][chunk.items]
        said = answers[i]["middle"]
        assert np.allclose(said.embeddings[:, :3], pixels.mean(axis=(2, 3, 4)) / 255, atol=1e-6)
        assert np.allclose(said.embeddings[:, 3], pixels[:, 2, 4, 8, 0] / 255)
