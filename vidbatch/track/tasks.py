"""One task of the plan: its videos' boxes → tracks → what the ledger commits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidbatch.data import Clip, Outcome, Output, Task, Video
from vidbatch.ledger import Ledger
from vidbatch.tables import SCHEMAS, outcome_tables, sort_rows
from vidbatch.track.associate import Boxes, Linker, Matcher
from vidbatch.track.rule import TrackWhat
from vidbatch.track.sources import End, Source, clips_fps, looks_of, read_record

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_BOX = ("video_id", "frame_index", "pts", "time_s", "detection_id", "label", "label_id", "score",
        *_CORNERS)  # fmt: skip
_LOOK = ("video_id", "frame_index", "of_model", "detection_id", "embedding")
_KEPT = ("frame_index", "pts", "time_s", "detection_id", "label")

_ADVICE = {
    "no_boxes": "see the detector's own failure; once cured, a new version of the tracker takes it",
    "no_embeddings": "see the failure of the model of the embeddings; once cured, a new version of "
    "the tracker takes it",
    "too_sparse": "sample more frames a second, or track by appearance: run a model that gives "
    "embeddings of the boxes",
}
"""Kind of a clip without tracks → what to do."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was counted."""

    tasks: int = 0
    waiting: set[str] = field(default_factory=set)
    """Videos."""
    videos: set[str] = field(default_factory=set)
    tracks: int = 0
    boxes: int = 0
    tracked_boxes: int = 0
    failed: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Kind → clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A clip of a video to be tracked, and how it ended in the outputs needed."""

    clip: Clip
    task_id: str
    boxes: End
    looks: End | None


class Tracker:
    """Tracks and commits tasks of one plan, in its order.

    Args:
        source: the detector's output.
        looks: that of the embeddings of its boxes; None: by motion alone.
        done: tasks committed before.
        what: settled.
        run: of `models.first_run`: a label.
    """

    def __init__(
        self,
        ledger: Ledger,
        output: Output,
        *,
        source: Source,
        looks: Source | None,
        done: set[str],
        what: TrackWhat,
        match: Matcher,
        run: str,
        versions: Mapping[str, str],
    ) -> None:
        self.ledger, self.output, self.source, self.looks = ledger, output, source, looks
        self.done, self.what, self.match, self.run = done, what, match, run
        self.versions = versions
        self.tally = Tally()
        self._rows: defaultdict[str, list[tuple[Video, pa.Table]]] = defaultdict(list)
        """Task → rows of its videos that are tracked already."""
        self._sparse: dict[str, bool] = {}
        """Of videos that are tracked: whether they are sampled too sparsely for it."""

    def take(self, task: Task, around: Sequence[Task], now: datetime) -> None:
        """Commits a task, if all clips of its videos have ended for good; else they wait.

        Args:
            around: the other first-generation tasks with clips of its videos.
        """
        videos = {clip.video.video_id: clip.video for clip in task.clips}
        found = {video_id: self._pieces(video_id, [task, *around]) for video_id in videos}
        if not all(found.values()):
            self.tally.waiting |= videos.keys()
            self._rows.pop(task.task_id, None)
            return
        if not self.tally.tasks:
            self.ledger.write_models([self.output], self.run)
        pieces: list[_Piece] = []
        for video_id, of_video in found.items():
            if video_id not in self._sparse:
                self._track(videos[video_id], of_video or [])
            pieces += [piece for piece in of_video or [] if piece.task_id == task.task_id]
        outcomes = [self._outcome(piece) for piece in pieces]
        record = read_record(self.ledger, self.source.held.fingerprint, task)
        # The run is that of the boxes: `track` is no run, and max(run) is what "last night" means.
        ends = outcome_tables(task, outcomes, run=record.run, now=now)
        tracks = self._table(self._rows.pop(task.task_id, []))
        self.ledger.commit(
            task, self.output, {"tracks": tracks, **ends}, outcomes,
            sampling_partition=record.sample, run=record.run, attempt=1, versions=self.versions,
        )  # fmt: skip
        self.tally.tasks += 1
        self.tally.tracked_boxes += len(tracks)
        self.tally.videos |= {o.clip.video.video_id for o in outcomes if o.status != "failed"}

    def _pieces(self, video_id: str, tasks: Sequence[Task]) -> list[_Piece] | None:
        """All clips of a video in its order, or None while one may still change by itself.

        Where some of its tasks are committed, the boxes are those of that time: or ids of one
        video would not go together.
        """
        tasks = [t for t in tasks if any(c.video.video_id == video_id for c in t.clips)]
        committed = [t for t in tasks if t.task_id in self.done]
        records = [read_record(self.ledger, self.output.fingerprint, t) for t in committed]
        then = min((datetime.fromisoformat(r.committed_at) for r in records), default=None)
        pieces = []
        for task in tasks:
            for clip in task.clips:
                if clip.video.video_id != video_id:
                    continue
                boxes = self.source.end(task, clip, before=then)
                looks = self.looks.end(task, clip, before=then) if self.looks else None
                if boxes is None or (self.looks and looks is None):
                    return None
                pieces.append(_Piece(clip=clip, task_id=task.task_id, boxes=boxes, looks=looks))
        return sorted(pieces, key=lambda piece: piece.clip.first_keyframe)

    def _track(self, video: Video, pieces: Sequence[_Piece]) -> None:
        """Links the boxes of a whole video, clip by clip, and keeps its rows by task."""
        good = [piece for piece in pieces if _missing(piece) is None]
        rate_fps = clips_fps([piece.boxes.outcome for piece in good])
        sparse = self.looks is None and not self.what.is_dense(rate_fps)
        self._sparse[video.video_id] = sparse
        linker = Linker(self.what, self.match)
        for piece in [] if sparse else good:
            rows = _of_clip(self.source.rows("detections", piece.boxes, _BOX), piece.clip)
            ids = linker.link(self._boxes(rows, piece))
            self.tally.boxes += len(ids)
            kept = rows.select(_KEPT).append_column("track_id", pa.array(ids))
            if piece.task_id not in self.done:
                self._rows[piece.task_id].append((video, kept.filter(pa.array(ids > 0))))
        self.tally.tracks += linker.begun

    def _boxes(self, rows: pa.Table, piece: _Piece) -> Boxes:
        looks = np.zeros((len(rows), 0), np.float32)
        if self.looks is not None and piece.looks is not None:
            table = self.looks.rows("embeddings", piece.looks, _LOOK)
            looks = looks_of(table, self.source.held, self.looks.held.dim, rows)
        return Boxes(
            frame_index=rows["frame_index"].to_numpy(),
            time_s=rows["time_s"].to_numpy(),
            label_id=rows["label_id"].to_numpy(),
            score=rows["score"].to_numpy(),
            xyxy=np.stack([rows[corner].to_numpy() for corner in _CORNERS], 1).astype(np.float64),
            embedding=looks,
        )

    def _outcome(self, piece: _Piece) -> Outcome:
        """How a clip ended in the tracker: as in the detector, or without tracks for a reason."""
        of_boxes = replace(piece.boxes.outcome, device="cpu", attempts=1, retryable=False)
        kind = _missing(piece)
        if kind is None and self._sparse[piece.clip.video.video_id]:
            kind = "too_sparse"
        if kind is None:
            return of_boxes
        reasons = {
            "no_boxes": f"its boxes are missing: {of_boxes.reason}",
            "no_embeddings": "the embeddings of its boxes are missing: "
            f"{piece.looks.outcome.reason if piece.looks else ''}",
            "too_sparse": f"sampled below {self.what.min_fps:g} frames a second: boxes cannot be "
            "followed by motion",
        }
        self.tally.failed[kind] += 1
        return replace(
            of_boxes, status="failed", frames=0, stage="predict", kind=kind, reason=reasons[kind],
            advice=_ADVICE[kind],
        )  # fmt: skip

    def _table(self, parts: Sequence[tuple[Video, pa.Table]]) -> pa.Table:
        """Rows of `tracks`, sorted."""
        schema = SCHEMAS["tracks"]
        tables = []
        for video, rows in parts:
            constant: dict[str, Any] = {
                "video_id": video.video_id,
                "uri": video.uri,
                "source": video.source,
                "of_model": self.source.held.partition,
            }
            arrays = [
                pa.repeat(pa.scalar(constant[name], pa.string()), len(rows))
                if name in constant
                else rows[name]
                for name in schema.names
            ]
            tables.append(pa.Table.from_arrays(arrays, schema=schema))
        return sort_rows("tracks", pa.concat_tables(tables) if tables else schema.empty_table())


def _missing(piece: _Piece) -> str | None:
    """Why a clip cannot be tracked, or None."""
    if piece.boxes.outcome.status == "failed":
        return "no_boxes"
    if piece.looks is not None and piece.looks.outcome.status == "failed":
        return "no_embeddings"
    return None


def _of_clip(rows: pa.Table, clip: Clip) -> pa.Table:
    """The rows of one clip: clips tile a video in frame_index."""
    mask = pc.and_(
        pc.equal(rows["video_id"], clip.video.video_id),
        pc.greater_equal(rows["frame_index"], clip.start_frame),
    )
    if clip.end_frame is not None:
        mask = pc.and_(mask, pc.less(rows["frame_index"], clip.end_frame))
    return rows.filter(mask)
