"""A small output with everything in it that readers must get right, written by the real ledger.

    run 1  frames, scene v1, faces, colour-mix, quality   at fps 1, videos of 1 to 3 March
    run 2  the same with scene v2; a changed video; one clip that had failed is ok; one fails again
    run 3  frames, faces                                  at fps 2, one video

One file is no video, one is cut, one has no timestamps; of one video's two clips faces failed the
second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidbatch.data import (
    BoxRows,
    Clip,
    Frames,
    Geometry,
    LabelRows,
    ModelSpec,
    Outcome,
    Output,
    Predictions,
    Sample,
    Task,
    Video,
    VideoInfo,
    digest,
)
from vidbatch.ledger import Ledger
from vidbatch.progress import Counts
from vidbatch.query import readme_and_views
from vidbatch.sampling import sampling_fingerprint
from vidbatch.storage import open_store
from vidbatch.tables import OutputRows, output_of, sampling_partition

FPS1 = Sample(kind="fps", fps=Fraction(1))
FPS2 = Sample(kind="fps", fps=Fraction(2))
SECONDS = 30
RUNS = ("20260304T010000-aaaaaa", "20260305T010000-bbbbbb", "20260306T010000-cccccc")
NIGHTS = tuple(datetime(2026, 3, day, 1, 30, tzinfo=UTC) for day in (4, 5, 6))
VERSIONS = {"vidbatch": "0.1.0"}


def _spec(name: str, version: str, gives: tuple[Any, ...], **facts: Any) -> ModelSpec:
    fingerprint = digest([name, version])
    return ModelSpec(
        name=name, version=version, adapter="python", kind="test",
        geometry=Geometry(width_px=8, height_px=8), gives=gives, fingerprint=fingerprint, **facts,
    )  # fmt: skip


SCENE_V1 = _spec("scene", "v1", ("labels", "embeddings"), labels=("street", "person"), dim=8)
SCENE_V2 = _spec("scene", "v2", ("labels", "embeddings"), labels=("street", "person"), dim=16)
FACES = _spec("faces", "v1.0", ("detections",), labels=("face",))
MIX = _spec("colour-mix", "v1", ("embeddings",), dim=300)
QUALITY = _spec(
    "quality", "v1", ("labels", "features"),
    labels=("dark", "blurred"), features=("sharpness", "brightness"),
)  # fmt: skip
SPECS_1 = (SCENE_V1, FACES, MIX, QUALITY)
SPECS_2 = (SCENE_V2, FACES, MIX, QUALITY)


def video(source: str, day: int, hour: int = 8, *, version: str = "e1", night: int = 0) -> Video:
    """One object of the made archive, as the listing of a night shows it."""
    at = datetime(2026, 3, day, hour, tzinfo=UTC)
    return Video(
        uri=f"s3://archive/{source}/2026/03/{day:02d}/{hour:02d}0000.mp4",
        version=version, size_bytes=1000 * day, modified_at=at, listed_at=NIGHTS[night],
        captured_at=at, captured_from="key", dt=f"2026-03-{day:02d}", source=source,
    )  # fmt: skip


GOOD = tuple(video(source, day) for source in ("cam-01", "cam-02") for day in (1, 2, 3))
CHANGED_OLD, CHANGED_NEW = video("cam-03", 1), video("cam-03", 1, version="e2", night=1)
NO_VIDEO, CUT, LONG = video("cam-03", 2), video("cam-03", 2, 9), video("cam-03", 3)
CURED, TWICE = video("cam-04", 1), video("cam-04", 2)
NO_PTS = GOOD[4]
INFO = VideoInfo(
    container="mov", codec="h264", width_px=320, height_px=180, rotation_deg=0,
    time_base=Fraction(1, 12800), rate=Fraction(25), start_s=0.0, duration_s=float(SECONDS),
    frame_count=25 * SECONDS, audio_codec=None, audio_rate_hz=None,
)  # fmt: skip


def frames_of(clip: Clip, sample: Sample, *, has_pts: bool = True) -> Frames:
    """The sampled frames of a clip of a 25 fps video."""
    step_s = 1 / float(sample.fps or 1)
    start_s, end_s = clip.start_s, SECONDS if clip.end_s is None else clip.end_s
    time_s = np.arange(start_s, end_s, step_s)
    n = len(time_s)
    index = np.round(time_s * 25).astype(np.int64)
    return Frames(
        frame_index=index, pts=index * 512, has_pts=np.full(n, has_pts), time_s=time_s,
        covers_s=np.full(n, step_s), is_keyframe=index % 50 == 0, is_corrupt=np.zeros(n, np.bool_),
        source_px=np.tile([320, 180], (n, 1)), ordinal=index // 12, pixels={},
    )  # fmt: skip


def predict(spec: ModelSpec, frames: Frames, seed: str) -> Predictions:
    """What a made model says: a person in the first third, a face in the first ten seconds."""
    n, t = len(frames), frames.time_s
    rng = np.random.default_rng(int(digest([spec.name, spec.version, seed])[:8], 16))
    found: dict[str, Any] = {"n": n}
    if spec.name == "scene":
        person = (t < 10).astype(np.int64)
        score = np.where(person == 1, 0.9, 0.8 if spec.version == "v1" else 0.7)
        found["labels"] = LabelRows(
            item=np.repeat(np.arange(n), 2),
            label_id=np.stack([person, 1 - person], 1).reshape(-1),
            score=np.stack([score, 1 - score], 1).reshape(-1).astype(np.float32),
        )
    elif spec.name == "quality":
        dark = np.flatnonzero(t >= 25)
        found["labels"] = LabelRows(
            item=dark, label_id=np.zeros(len(dark), np.int64), score=np.ones(len(dark), np.float32)
        )
        values = np.stack([np.full(n, 0.5), t / SECONDS], 1).astype(np.float32)
        values[t == 0, 0] = np.nan
        found["features"] = values
    elif spec.name == "faces":
        item = np.repeat(np.flatnonzero(t < 10), 2)
        score = np.tile(np.array([0.5, 0.75], np.float32), len(item) // 2)
        found["boxes"] = BoxRows(
            item=item, label_id=np.zeros(len(item), np.int64), score=score,
            xyxy=np.tile(np.array([0.25, 0.25, 0.5, 0.75], np.float32), (len(item), 1)),
        )  # fmt: skip
    if spec.dim:
        vectors = rng.normal(size=(n, spec.dim)).astype(np.float32)
        found["embeddings"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return Predictions(**found)


def outcome(clip: Clip, frames: Frames | None, **facts: Any) -> Outcome:
    """How a clip ended: ok with its frames, or as `facts` say."""
    end_s = float(SECONDS) if clip.end_s is None else clip.end_s
    values: dict[str, Any] = {
        "clip": clip, "status": "ok", "start_s": clip.start_s, "end_s": end_s,
        "start_frame": clip.start_frame, "end_frame": int(end_s * 25),
        "frames": len(frames) if frames is not None else 0, "frames_decoded": 750,
        "decode_errors": 0, "corrupt_frames": 0, "fallback": None, "device": "cpu",
    }  # fmt: skip
    return Outcome(**{**values, **facts})


NO_STREAM = {
    "status": "failed", "end_s": 0.0, "end_frame": 0, "reason": "no video stream",
    "stage": "probe", "kind": "no_video_stream", "advice": "rests until the object changes",
}  # fmt: skip
TRUNCATED = {
    "status": "partial", "end_s": 20.0, "end_frame": 500, "reason": "cut at 20 s of 30 s",
    "stage": "decode", "kind": "truncated", "advice": "final until the object changes",
}  # fmt: skip
BUSY = {
    "status": "failed", "reason": "the store answered 503", "stage": "read", "kind": "busy",
    "advice": "comes back by itself", "retryable": True,
}  # fmt: skip


@dataclass
class Maker:
    """Commits made tasks to an output."""

    ledger: Ledger

    def commit(
        self,
        clips: Sequence[Clip],
        outputs: Sequence[Output],
        sample: Sample,
        night: int,
        ends: Mapping[tuple[str, str], Mapping[str, Any]] = {},
        generation: int = 0,
    ) -> None:
        """One task through all outputs.

        Args:
            ends: (video_id, output name or "*") → how its clips ended, if not ok; the clip of a
                long video may be named by `video_id/start_s`.
        """
        task = Task(
            clips=tuple(clips), sampling=sampling_fingerprint(sample), generation=generation,
            output=outputs[0].fingerprint if generation else None, cost_s=1.0,
        )  # fmt: skip
        self.ledger.append_plan(
            self.ledger.read_plan(task.sampling),
            lambda log: [] if task.task_id in log.task_ids.to_pylist() else [task],
        )
        for output in outputs:
            rows = OutputRows(output, task)
            outcomes = []
            for clip in clips:
                names = (clip.video.video_id, f"{clip.video.video_id}/{clip.start_s:g}")
                facts = next(
                    (ends[v, o] for v in names for o in (output.name, "*") if (v, o) in ends), {}
                )
                if facts.get("status") == "failed":
                    outcomes.append(outcome(clip, None, **facts))
                    continue
                end_s = facts.get("end_s", clip.end_s)
                has_pts = clip.video != NO_PTS
                frames = frames_of(replace(clip, end_s=end_s), sample, has_pts=has_pts)
                said = None
                if output.spec is not None:
                    said = predict(output.spec, frames, clip.video.video_id)
                rows.add(clip, frames, said)
                outcomes.append(outcome(clip, frames, **facts))
            infos = {
                c.video.video_id: None if c.video == NO_VIDEO else INFO for c in clips
            }  # fmt: skip
            tables = rows.finish(outcomes, infos, run=RUNS[night], now=NIGHTS[night])
            self.ledger.commit(
                task, output, tables, outcomes, sampling_partition=sampling_partition(sample),
                run=RUNS[night], attempt=0, versions=VERSIONS,
            )  # fmt: skip


def begin(root: Path | str) -> Ledger:
    """What the first run writes before its first task."""
    ledger = Ledger(open_store(str(root)))
    ledger.first_files(readme_and_views(SPECS_1, FPS1))
    ledger.pin({"date": {"from": "key"}, "store": {}})
    return ledger


def outputs_of(specs: Sequence[ModelSpec], sample: Sample) -> list[Output]:
    """`frames` and the models under a rule."""
    return [output_of(s, sampling_fingerprint(sample)) for s in (None, *specs)]


def make_output(root: Path | str) -> Ledger:
    """The whole made output below `root`."""
    ledger = begin(root)
    maker = Maker(ledger)
    first = outputs_of(SPECS_1, FPS1)
    ledger.write_models(first, RUNS[0])
    halves = (
        Clip(video=LONG, end_keyframe=7, end_s=14.0, end_frame=350),
        Clip(video=LONG, first_keyframe=7, start_s=14.0, start_frame=350),
    )
    for day in (1, 2, 3):
        maker.commit([Clip(video=v) for v in GOOD if v.dt.endswith(str(day))], first, FPS1, 0)
    maker.commit([Clip(video=CHANGED_OLD), Clip(video=CURED)], first, FPS1, 0,
                 {(CURED.video_id, "*"): BUSY})  # fmt: skip
    maker.commit([Clip(video=NO_VIDEO), Clip(video=CUT), Clip(video=TWICE)], first, FPS1, 0,
                 {(NO_VIDEO.video_id, "*"): NO_STREAM, (CUT.video_id, "*"): TRUNCATED,
                  (TWICE.video_id, "*"): BUSY})  # fmt: skip
    broken = {**BUSY, "stage": "predict", "kind": "ModelError", "retryable": False}
    maker.commit(halves, first, FPS1, 0, {(f"{LONG.video_id}/14", "faces"): broken})

    second = outputs_of(SPECS_2, FPS1)
    scene = [o for o in second if o.spec is SCENE_V2]
    ledger.write_models(second, RUNS[1])
    maker.commit([Clip(video=CHANGED_NEW)], second, FPS1, 1)
    for day in (2, 3):  # scene v2 has not come to 1 March yet
        maker.commit([Clip(video=v) for v in GOOD if v.dt.endswith(str(day))], scene, FPS1, 1)
    for output in second:
        if output.spec is not SCENE_V2:
            maker.commit([Clip(video=CURED)], [output], FPS1, 1, generation=1)
            maker.commit([Clip(video=TWICE)], [output], FPS1, 1,
                         {(TWICE.video_id, "*"): BUSY}, generation=1)  # fmt: skip

    third = outputs_of((FACES,), FPS2)
    ledger.write_models(third, RUNS[2])
    seen_again = replace(GOOD[0], listed_at=NIGHTS[2])
    maker.commit([Clip(video=seen_again)], third, FPS2, 2)
    _write_runs(ledger, {run: [o.partition for o in (first, second, third)[i]]
                         for i, run in enumerate(RUNS)})  # fmt: skip
    return ledger


COUNTS = Counts(
    tasks=2, clips=3, videos=3, frames=60, frames_decoded=1500, video_s=60.0, bytes_read=3 * 2**20,
    gets=12, bytes_written=2**20, puts=40, ok=10, partial=4, failed=2, fallbacks=1,
    stage_s={"read": 1.0, "decode": 6.0, "predict": 3.0, "task": 10.5},
)  # fmt: skip
"""Of every task event, so that sums are known."""


def _write_runs(ledger: Ledger, outputs: Mapping[str, Sequence[str]]) -> None:
    """Run 1 was stopped, run 2 finished, run 3 has events and no summary."""
    for i, (run, partitions) in enumerate(outputs.items()):
        started = NIGHTS[i]
        ledger.start_run(run, {"archive": {"uri": ["s3://archive"]}})
        committed = dict.fromkeys(partitions, "new")
        failed = [["s3://archive/x.mp4", "frames", "busy", "the store answered 503"]]
        task: dict[str, Any] = {
            "event": "task", "task": "t", "committed": committed, "failures": failed,
            "kinds": {"busy": 1}, "counts": COUNTS.as_dict(),
        }  # fmt: skip
        begun: dict[str, Any] = {"event": "started", "engine": "local"}
        for n, events in enumerate(([begun, task], [task])):
            at = started + timedelta(seconds=20 * n)
            lines = [json.dumps({"t": at.isoformat(), **event}) for event in events]
            ledger.write_event(run, "driver", n, lines)
        if i < 2:
            code, stopped = ((5, "received SIGTERM"), (0, None))[i]
            counts = COUNTS + COUNTS
            summary = {
                "run": run, "started_at": started.isoformat(), "elapsed_s": 24.0,
                "exit_code": code, "stopped": stopped, "counts": counts.as_dict(),
                "frames_per_s": 5.0, "outputs": {p: {"new": 2} for p in partitions},
                "failures_by_kind": {"busy": 2}, "not_planned": {},
                "engine": {
                    "sentence": "GPUs starved 61 %", "decoder_deaths": 2,
                    "decoder_seconds": {"decode": 99.0, "idle": 1.0},
                    "predictor_seconds": {"compute": 39.0, "starved": 61.0}, "frames": 640,
                    "batches": 10,
                },
            }  # fmt: skip
            row = {"started_at": started, "ended_at": started + timedelta(seconds=24),
                   "exit_code": code, "frames": counts.frames}  # fmt: skip
            ledger.finish_run(run, summary, row)


def upload(root: Path, uri: str) -> None:
    """Copies an output to another store."""
    store = open_store(uri)
    paths = [path for path in root.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: store.put_new(str(p.relative_to(root)), p.read_bytes()), paths))


@pytest.fixture(scope="session")
def made_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made output, once per run of the tests; nobody writes to it."""
    root = tmp_path_factory.mktemp("made") / "tables"
    make_output(root)
    return root
