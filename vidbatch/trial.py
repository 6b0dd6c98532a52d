"""`vidbatch try`: a model on some frames of one video, as a picture and as its rows.

A whole job in this process, into a folder that is thrown away: what is shown is what a run would
write. Then the frames are decoded once more, as the model saw them, and its rows are written on.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vidbatch.archive import list_archive
from vidbatch.config import QuickJob
from vidbatch.data import Clip, Frames, Geometry, Pixels, Video, fit_box
from vidbatch.errors import UsageError
from vidbatch.pipeline.engine import make_decoder, probe_video
from vidbatch.pipeline.order import RunSpec
from vidbatch.pipeline.resolve import archive_rule, job_outputs, run_spec
from vidbatch.pipeline.run import run_job
from vidbatch.progress import Progress
from vidbatch.query import QueryResult, result_table, sql
from vidbatch.storage import open_source, open_store

CELL_PX, COLUMNS, LINES, LINE_PX = 250, 5, 3, 14
"""Width of a picture in the sheet, pictures beside each other, lines of text below each."""

_BESIDE = Geometry(width_px=320, height_px=320, fit="letterbox")
"""What is shown where a model gets crops: the frame they are cut from."""
_HIDDEN = {"sample", "model", "dt", "video_id", "uri", "source", "pts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a model made of a video."""

    model: str
    tables: dict[str, QueryResult]
    """Table → the model's rows in it, by time."""
    sheet: Pixels | None
    """(H, W, 3) uint8 RGB; None for a model of sound, and of a video without frames."""
    note: str
    """What is wrong with the video, although there is something to show; else ""."""


def try_video(
    model: str,
    video: str,
    *,
    beside: Sequence[str] = (),
    fps: str | None = None,
    n: int = 20,
    progress: Progress | None = None,
) -> Trial:
    """Runs a model on a video and draws up to n of its frames.

    Args:
        model: a model file, or the name of a builtin.
        beside: models it needs as well (the one whose boxes it gets).
        fps: the sampling rule. None: n frames over the whole video, near keyframes, which is quick
            for a video of any length; one a second for models of windows, changes or sound.

    Raises:
        UsageError: the model or the video cannot be used, or the one failed on the other.
        InfraError: the video's store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="vidbatch-try-") as folder:
        quick = QuickJob(archive=video, output=folder, models=(*beside, model), fps=fps or "1")
        here = ["engine.address=none"]
        job = quick.job(here)
        found = list_archive(archive_rule(job), now=datetime.now(UTC)).videos
        if len(found) != 1:
            raise UsageError(f"{video}: {len(found)} videos; nothing was tried; name one video")
        output = job_outputs(job)[1][-1]
        spec = output.spec
        assert spec is not None
        if fps is None and spec.window is None and spec.audio is None and not spec.context:
            job = quick.job([*here, *_spread(run_spec(job, "try"), found[0], n)])
            output = job_outputs(job)[1][-1]
        run_job(job, progress=progress)
        failed = sql(folder, "select message, kind from failures_all order by all").rows
        why = "{} ({})".format(*failed[0]) if failed else ""
        spoken = f"model = '{output.partition}' and status <> 'failed'"
        if not sql(folder, f"select count(*) from coverage_all where {spoken}").rows[0][0]:
            raise UsageError(f"{video}: {why or 'not decoded'}; there is nothing to show")
        rows = f"where model = '{output.partition}' order by all"
        tables: dict[str, QueryResult] = {
            table: _told(sql(folder, f"select * from {table}_all {rows}")) for table in spec.gives
        }
        count = sql(folder, "select count(*) from frames_all").rows[0][0]
        if spec.audio is not None or not count:
            return Trial(model=spec.name, tables=tables, sheet=None, note=why)
        boxes = sql(folder, "select * from detections_all") if spec.crop else None
        notes = _Notes(tables, boxes)
        seen = _BESIDE if spec.crop or spec.geometry is None else spec.geometry
        picked = {int(i) for i in np.linspace(0, count - 1, min(n, count))}
        return Trial(
            model=spec.name,
            tables=tables,
            note=why,
            sheet=_sheet(list(_cells(run_spec(job, "try"), found[0], seen, picked, notes))),
        )


def _told(table: QueryResult) -> QueryResult:
    """Without the columns that hold nothing, or the same for the whole video."""
    kept = [
        i
        for i, name in enumerate(table.columns)
        if name not in _HIDDEN and any(row[i] is not None for row in table.rows)
    ]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in kept),
        rows=[tuple(row[i] for i in kept) for row in table.rows],
    )


def try_and_show(
    model: str,
    video: str,
    picture: Path,
    *,
    beside: Sequence[str] = (),
    fps: str | None = None,
    n: int = 20,
    as_json: bool = False,
) -> None:
    """`try_video` for people: the rows on stdout, the sheet as a PNG file."""
    import cv2
    from rich.console import Console

    with Progress() as progress:
        found = try_video(model, video, beside=beside, fps=fps, n=n, progress=progress)
    if found.note:
        print(f"{video}: {found.note}", file=sys.stderr)
    if as_json:
        rows = {name: table.dicts() for name, table in found.tables.items()}
        print(json.dumps(rows, indent=2, default=str, ensure_ascii=False))
    else:
        for name, table in found.tables.items():
            print(f"{name} of {found.model}: {len(table.rows)} rows")
            Console().print(result_table(table))
    if found.sheet is not None:
        picture.write_bytes(bytes(cv2.imencode(".png", found.sheet[..., ::-1])[1]))
        print(f"wrote {picture}: frames as {found.model} saw them", file=sys.stderr)


def _spread(spec: RunSpec, video: Video, n: int) -> list[str]:
    """What to set for n samples over the whole video. Raises UsageError."""
    store = open_store(spec.archive_uris[0], spec.archive_store)
    with make_decoder(spec) as decoder:
        probed = probe_video(store, video, decoder, spec.limits, 60.0)
    if probed.failure is not None:
        raise UsageError(f"{video.uri}: {probed.failure.message} ({probed.failure.kind})")
    if not probed.duration_s:
        return []
    fps = n / Fraction(probed.duration_s).limit_denominator(1000)
    return [f"sample.fps={fps}", f"sample.tolerance_s={1 / (2 * fps)}"]


def _cells(
    spec: RunSpec, video: Video, geometry: Geometry, picked: set[int], notes: _Notes
) -> Iterator[Pixels]:
    """The picked samples of a video (by their position among all), drawn."""
    store = open_store(spec.archive_uris[0], spec.archive_store)
    opened = open_source(store, video.uri, size_bytes=video.size_bytes, version=video.version)
    at = 0
    with closing(opened) as source, make_decoder(spec) as decoder:
        for event in decoder.decode(
            source, Clip(video=video), sample=spec.sample, geometries=(geometry,), context=False,
            limits=spec.limits,
        ):  # fmt: skip
            if isinstance(event, Frames):
                for i in range(len(event)):
                    if at + i in picked:
                        yield _cell(event, i, geometry, notes)
                at += len(event)


def _cell(frames: Frames, i: int, geometry: Geometry, notes: _Notes) -> Pixels:
    """One frame at CELL_PX, its boxes drawn, its rows below."""
    import cv2

    index = int(frames.frame_index[i])
    picture = frames.pixels[geometry.key][i]
    scale = CELL_PX / picture.shape[1]
    height = max(1, round(picture.shape[0] * scale))
    cell = cv2.resize(picture, (CELL_PX, height), interpolation=cv2.INTER_AREA)
    wide, high, left, top = fit_box(geometry, *map(int, frames.source_px[i]))
    for box in notes.boxes[index]:
        x0, x1 = (round((x * wide - left) * scale) for x in (box["x_min"], box["x_max"]))
        y0, y1 = (round((y * high - top) * scale) for y in (box["y_min"], box["y_max"]))
        cv2.rectangle(cell, (x0, y0), (x1, y1), (255, 200, 0), 1)
    text = [f"{frames.time_s[i]:.2f} s, frame {index}"]
    text += textwrap.wrap(", ".join(notes.lines[index] + notes.over(index)), 40)[:LINES]
    below = np.full((LINE_PX * (LINES + 1) + 6, CELL_PX, 3), 255, np.uint8)
    for k, line in enumerate(text):
        ascii_line = line.encode("ascii", "replace").decode()
        where = (3, LINE_PX * (k + 1) - 2)
        cv2.putText(below, ascii_line, where, cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0,) * 3, 1, 16)
    return np.vstack([cell, below])


def _sheet(cells: list[Pixels]) -> Pixels:
    """Cells in rows of COLUMNS, on white."""
    gap = 6
    high, wide = cells[0].shape[0] + gap, CELL_PX + gap
    columns = min(COLUMNS, len(cells))
    sheet = np.full((-(-len(cells) // columns) * high, columns * wide, 3), 255, np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // columns * high, k % columns * wide
        sheet[y : y + cell.shape[0], x : x + CELL_PX] = cell
    return sheet


class _Notes:
    """A model's rows as short texts, by frame.

    Args:
        boxes: all boxes of the run, for a model that speaks of those of another.
    """

    def __init__(self, tables: Mapping[str, QueryResult], boxes: QueryResult | None) -> None:
        self.lines = defaultdict[int, list[str]](list)
        self.boxes = defaultdict[int, list[dict[str, Any]]](list)
        self._stretches: list[tuple[int, float, str]] = []
        for name, table in {**tables, **({"detections": boxes} if boxes else {})}.items():
            for row in table.dicts():
                self._add(name, row)

    def _add(self, name: str, row: dict[str, Any]) -> None:
        if "frame_index" not in row:  # windows, shots
            end = math.inf if row.get("end_frame") is None else row["end_frame"]
            what = f"{row['label']} {row['score']:.2f}" if "label" in row else "shot"
            self._stretches.append((row["start_frame"], end, f"{what} from {row['start_s']:.2f} s"))
            return
        index = row["frame_index"]
        if name == "detections":
            self.boxes[index].append(row)
        value = row.get("value", row.get("score", row.get("area")))
        if name == "embeddings":
            first = ", ".join(f"{v:.2f}" for v in row["embedding"][:4])
            self.lines[index].append(f"[{first}, ...] of {len(row['embedding'])}")
        else:
            self.lines[index].append(f"{row.get('feature', row.get('label'))} {value:.4g}")

    def over(self, index: int) -> list[str]:
        """Of the windows and shots that a frame lies in."""
        return [text for start, end, text in self._stretches if start <= index < end]
