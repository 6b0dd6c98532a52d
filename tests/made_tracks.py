"""Made scenes of things whose identity is known: they cross, turn, hide, leave and come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from vidbatch.data import (
    Clip,
    Floats,
    Ints,
    ModelSpec,
    Outcome,
    Output,
    Sample,
    Singles,
    Task,
    Video,
    digest,
)
from vidbatch.ledger import Ledger, PlanLog
from vidbatch.sampling import sampling_fingerprint
from vidbatch.storage import Store
from vidbatch.tables import SCHEMAS, outcome_tables, output_of, sampling_partition, sort_rows
from vidbatch.track.associate import Boxes

SECONDS = 20.0
DIM = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """M boxes, ascending in time, as a detector would give them of a scene."""

    frame_index: Ints
    """Ordinal of the sample."""
    time_s: Floats
    xyxy: Floats
    score: Singles
    embedding: Singles
    identity: Ints
    """0, 1, … of the thing; -1: nothing is there."""


def make_scene(fps: float, *, seed: int = 0, things: int = 8, irregular: bool = False) -> Scene:
    """Things of 0.08 x 0.16 of the frame that walk at 0.08 to 0.25 frame widths a second.

    The detector errs by 4 % of the box, misses 5 %, halves the score of 10 %, and sees something
    where nothing is in 3 % of the frames. What stands before another hides it: when two boxes
    overlap by half, the one behind is not seen. The motion is the same at every rate.
    """
    rng = np.random.default_rng(seed)
    begin = np.where(np.arange(things) < things // 2, 0, rng.uniform(0, SECONDS / 2, things))
    end = np.minimum(begin + rng.uniform(8, 16, things), SECONDS)
    place = rng.uniform([0.1, 0.2], [0.9, 0.8], (things, 2))
    speed = rng.uniform(0.08, 0.25, things) * rng.choice([-1, 1], things)
    sway = rng.uniform(0.02, 0.08, things), rng.uniform(0.1, 0.3, things), rng.uniform(0, 6, things)
    looks = rng.normal(size=(things, DIM))
    noise = np.random.default_rng([seed, round(fps * 100)])
    times = np.arange(0, SECONDS, 1 / fps)
    if irregular:
        times = np.sort(times + noise.uniform(-0.4, 0.4, len(times)) / fps)
    rows: list[tuple[int, Floats, float, Floats, int]] = []
    for frame, t in enumerate(times):
        x = place[:, 0] + speed * (t - begin)
        x = 1 - np.abs(1 - x % 2)  # they turn round at the walls
        y = place[:, 1] + sway[0] * np.sin(2 * np.pi * sway[1] * t + sway[2])
        seen: list[Floats] = []
        for thing in np.argsort(-place[:, 1]):  # the lowest stands in front
            if not begin[thing] <= t < end[thing]:
                continue
            box = np.array([x[thing] - 0.04, y[thing] - 0.08, x[thing] + 0.04, y[thing] + 0.08])
            hidden = any(_share(box, other) > 0.5 for other in seen)
            seen.append(box)
            if hidden or noise.random() < 0.05:
                continue
            score = noise.uniform(0.6, 0.95) * (0.5 if noise.random() < 0.1 else 1)
            box = box + noise.normal(0, 0.04, 4) * np.array([0.08, 0.16, 0.08, 0.16])
            rows.append((frame, box, score, looks[thing] + noise.normal(0, 0.6, DIM), int(thing)))
        if noise.random() < 0.03:
            corner = noise.uniform(0.1, 0.8, 2)
            box = np.concatenate([corner, corner + np.array([0.08, 0.16])])
            rows.append((frame, box, 0.55, noise.normal(size=DIM), -1))
    embedding = np.array([row[3] for row in rows], np.float32)
    frames = np.array([row[0] for row in rows], np.int64)
    return Scene(
        frame_index=frames,
        time_s=times[frames],
        xyxy=np.clip(np.array([row[1] for row in rows]), 0, 1),
        score=np.array([row[2] for row in rows], np.float32),
        embedding=embedding / np.linalg.norm(embedding, axis=1, keepdims=True),
        identity=np.array([row[4] for row in rows], np.int64),
    )


def _share(box: Floats, other: Floats) -> float:
    """Share of `box` that `other` covers."""
    size = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    return float(np.prod(np.maximum(size, 0)) / np.prod(box[2:] - box[:2]))


def boxes_of(scene: Scene, *, appearance: bool) -> Boxes:
    """The scene as the linker takes it; all boxes have one label."""
    return Boxes(
        frame_index=scene.frame_index,
        time_s=scene.time_s,
        label_id=np.zeros(len(scene.time_s), np.int64),
        score=scene.score,
        xyxy=scene.xyxy,
        embedding=scene.embedding if appearance else scene.embedding[:, :0],
    )


def idf1(identity: Ints, track: Ints) -> float:
    """2 · boxes that the best one-to-one naming gets right ÷ (true boxes + tracked boxes)."""
    from scipy.optimize import linear_sum_assignment

    both = (identity >= 0) & (track > 0)
    table = np.zeros((identity.max() + 1, track.max() + 1))
    np.add.at(table, (identity[both], track[both]), 1)
    right = table[linear_sum_assignment(table, maximize=True)].sum()
    return float(2 * right / ((identity >= 0).sum() + (track > 0).sum()))


def switches(identity: Ints, track: Ints) -> int:
    """How often a thing's next tracked box is of another track than the one before."""
    total = 0
    for thing in range(identity.max() + 1):
        tracks = track[(identity == thing) & (track > 0)]
        total += int((np.diff(tracks) != 0).sum())
    return total


NOW = datetime(2026, 3, 2, 1, 30, tzinfo=UTC)


@dataclass
class World:
    """An output in a store with a detector and, if asked, embeddings of its boxes: no video."""

    store: Store
    fps: int
    scenes: Mapping[str, Scene]
    """Name of a video → what is to be seen in it."""
    hour: int = 0
    """Of the next commit."""
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store)
        self.sample = Sample(kind="fps", fps=Fraction(self.fps))
        self.sampling = sampling_fingerprint(self.sample)
        self.faces = self._output("faces", "detections")
        self.looks = self._output("looks", "embeddings", dim=DIM)
        self.ledger.first_files({})
        self.ledger.pin({"date": {"from": "key"}})
        self.ledger.write_models([self.faces], "run-1")

    def _output(self, name: str, table: str, **facts: Any) -> Output:
        spec = ModelSpec(
            name=name, version="v1", adapter="python", kind="test", geometry=None,
            gives=cast(Any, (table,)), fingerprint=digest([name]), **facts,
        )  # fmt: skip
        return output_of(spec, self.sampling)

    def video(self, name: str) -> Video:
        """One object of the archive."""
        return Video(
            uri=f"s3://archive/{name}.mp4", version="v1", size_bytes=1000, modified_at=NOW,
            listed_at=NOW, captured_at=None, captured_from="modified", dt="2026-03-01",
            source="cam-1",
        )  # fmt: skip

    def clips(self, name: str, count: int = 1) -> list[Clip]:
        """A video cut into equal clips."""
        if count == 1:
            return [Clip(video=self.video(name))]
        cuts = [round(SECONDS * self.fps * k / count) for k in range(count)]
        return [
            Clip(
                video=self.video(name), first_keyframe=a, end_keyframe=b, start_frame=a,
                end_frame=b, start_s=a / self.fps, end_s=None if b is None else b / self.fps,
            )
            for a, b in zip(cuts, [*cuts[1:], None], strict=True)
        ]  # fmt: skip

    def plan(self, *tasks: Sequence[Clip]) -> list[Task]:
        """Tasks of those clips, all clips of a video at once."""
        planned = [Task(clips=tuple(clips), sampling=self.sampling) for clips in tasks]
        self._append(planned)
        return planned

    def retry(self, clip: Clip) -> Task:
        """The detector's next try at a clip."""
        task = Task(
            clips=(clip,), sampling=self.sampling, generation=1, output=self.faces.fingerprint
        )
        self._append([task])
        return task

    def _append(self, tasks: list[Task]) -> None:
        def missing(log: PlanLog) -> list[Task]:
            return [] if tasks[0].task_id in log.task_ids.to_pylist() else tasks

        self.ledger.append_plan(self.ledger.read_plan(self.sampling), missing)

    def commit(
        self, task: Task, output: Output | None = None, *, failed: Sequence[Clip] = (),
        retryable: bool = True,
    ) -> None:  # fmt: skip
        """The rows of a task in the detector's output, or another; but for clips that failed."""
        output = output or self.faces
        self.hour += 1
        outcomes, rows = [], []
        for clip in task.clips:
            end_s = SECONDS if clip.end_s is None else clip.end_s
            frames = round((end_s - clip.start_s) * self.fps)
            status: Literal["ok", "failed"] = "failed" if clip in failed else "ok"
            facts: dict[str, Any] = {}
            if clip in failed:
                facts = {"reason": "busy", "stage": "read", "kind": "busy", "advice": "wait"}
            outcomes.append(
                Outcome(
                    clip=clip, status=status, start_s=clip.start_s, end_s=end_s,
                    start_frame=clip.start_frame, end_frame=clip.start_frame + frames,
                    frames=0 if clip in failed else frames, frames_decoded=frames,
                    decode_errors=0, corrupt_frames=0, fallback=None, device="cpu",
                    retryable=bool(facts) and retryable, **facts,
                )
            )  # fmt: skip
            if clip not in failed:
                rows.append(self._rows(clip, output))
        table = "detections" if output is self.faces else "embeddings"
        now = NOW + timedelta(hours=self.hour)
        found = pa.concat_tables(rows) if rows else SCHEMAS[table].empty_table()
        tables = {table: sort_rows(table, found)}
        self._put(task, output, tables, outcomes, now)
        if output is self.faces and not task.generation:
            listed = [
                {"video_id": v.video_id, "uri": v.uri, "source": v.source, "listed_at": NOW}
                for v in (c.video for c in task.clips if c.first_keyframe == 0)
            ]
            videos = pa.Table.from_pylist(listed, schema=SCHEMAS["videos"])
            own = output_of(None, self.sampling)
            self._put(task, own, {"videos": sort_rows("videos", videos)}, outcomes, now)

    def _put(
        self,
        task: Task,
        output: Output,
        tables: dict[str, pa.Table],
        outcomes: list[Outcome],
        now: datetime,
    ) -> None:
        self.ledger.commit(
            task,
            output,
            tables | outcome_tables(task, outcomes, run="run-1", now=now),
            outcomes,
            sampling_partition=sampling_partition(self.sample),
            run="run-1",
            attempt=1,
            versions={},
        )

    def _rows(self, clip: Clip, output: Output) -> pa.Table:
        name = clip.video.uri.rpartition("/")[2].removesuffix(".mp4")
        scene = self.scenes[name]
        end = clip.end_frame or len(scene.time_s) + int(scene.frame_index.max())
        at = np.flatnonzero((clip.start_frame <= scene.frame_index) & (scene.frame_index < end))
        at = at[np.lexsort((-scene.score[at], scene.frame_index[at]))]  # ordinals by falling score
        frame = scene.frame_index[at]
        first = np.searchsorted(frame, frame)
        columns: dict[str, Any] = {
            "frame_index": frame,
            "time_s": scene.time_s[at],
            "detection_id": (np.arange(len(at)) - first).astype(np.int32),
            "label": ["face"] * len(at),
            "label_id": np.zeros(len(at), np.int32),
            "score": scene.score[at],
            "embedding": list(scene.embedding[at]),
            "of_model": [self.faces.partition] * len(at),
            "video_id": [clip.video.video_id] * len(at),
            "uri": [clip.video.uri] * len(at),
            "source": ["cam-1"] * len(at),
        }
        corners = scene.xyxy[at].astype(np.float32)
        columns |= {n: corners[:, i] for i, n in enumerate(("x_min", "y_min", "x_max", "y_max"))}
        schema = SCHEMAS["detections" if output is self.faces else "embeddings"]
        return pa.table(
            {
                f.name: pa.array(columns[f.name], f.type)
                if f.name in columns
                else pa.nulls(len(at), f.type)
                for f in schema
            },
            schema=schema,
        )

    def identities(self, name: str) -> dict[tuple[int, int], int]:
        """(frame_index, detection_id) → which thing it is."""
        scene = self.scenes[name]
        order = np.lexsort((-scene.score, scene.frame_index))
        frame = scene.frame_index[order]
        ordinal = np.arange(len(order)) - np.searchsorted(frame, frame)
        keys = zip(frame.tolist(), ordinal.tolist(), strict=True)
        return dict(zip(keys, scene.identity[order].tolist(), strict=True))
