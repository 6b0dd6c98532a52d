"""What Prometheus sees of decoders and predictors, and why predictors were idle.

Labels are few and bounded: an outcome, a state, never a key. Ray exports the metrics with the
prefix `ray_` on each node's metrics port; without Ray's dashboard agent they go nowhere.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

from vidbatch.pipeline.order import TaskReport

STATES = ("compute", "starved", "uploading", "collating", "loading")
"""Where the seconds of a predictor's compute thread go."""


class DecoderMetrics:
    """Counted once per task, in the decoder."""

    def __init__(self) -> None:
        self._clips = Counter(
            "vidbatch_clips_total", "Outcomes (clip x output) by how they ended", ("outcome",)
        )
        self._tasks = Counter(
            "vidbatch_outputs_total", "Outputs of tasks by how they were committed", ("state",)
        )
        self._plain = {
            name: Counter(f"vidbatch_{name}_total", text)
            for name, text in (
                ("frames_decoded", "Frames decoded"),
                ("frames_written", "Sampled frames that became rows"),
                ("bytes_read", "Bytes read from the archive"),
                ("gets", "Requests to the archive"),
                ("bytes_written", "Bytes of part files written"),
                ("puts", "Objects written"),
            )
        }
        self._seconds = Counter(
            "vidbatch_decoder_seconds_total", "Seconds of decoders by stage", ("stage",)
        )

    def count(self, report: TaskReport) -> None:
        """Adds what a task amounted to."""
        c = report.counts
        for outcome, n in (
            ("ok", c.ok),
            ("partial", c.partial),
            ("failed_outside", c.failed_outside),
            ("failed_file", c.failed - c.failed_outside),
        ):
            if n:
                self._clips.inc(n, {"outcome": outcome})
        for state, n in Tally(report.committed.values()).items():
            self._tasks.inc(n, {"state": state})
        values = {"frames_decoded": c.frames_decoded, "frames_written": c.frames, "gets": c.gets}
        values |= {"bytes_read": c.bytes_read, "bytes_written": c.bytes_written, "puts": c.puts}
        for name, value in values.items():
            if value:
                self._plain[name].inc(value)
        for stage, seconds in c.stage_s.items():
            if seconds > 0:
                self._seconds.inc(seconds, {"stage": stage})


class PredictorMetrics:
    """Counted once per batch, in the predictor."""

    def __init__(self) -> None:
        self._frames = Counter("vidbatch_frames_predicted_total", "Frames that went through models")
        self._seconds = Counter(
            "vidbatch_predictor_seconds_total", "Seconds of predictors by state", ("state",)
        )
        self._fill = Gauge("vidbatch_batch_fill_ratio", "Frames of the last batch / a full batch")
        self._idle = Gauge("vidbatch_predictor_idle_ratio", "Share of all seconds not in compute")
        self._queue = Gauge("vidbatch_predictor_queue_frames", "Frames waiting for a batch")
        self._told: dict[str, float] = {}

    def count(self, *, frames: int, fill: float, queued: int, seconds: Mapping[str, float]) -> None:
        """Adds a batch; `seconds` are the states' totals so far."""
        if frames:
            self._frames.inc(frames)
        self._fill.set(fill)
        self._queue.set(queued)
        for state, total in seconds.items():
            if (more := total - self._told.get(state, 0.0)) > 0:
                self._seconds.inc(more, {"state": state})
                self._told[state] = total
        whole = sum(seconds.values())
        if whole > 0:
            self._idle.set(1 - seconds.get("compute", 0.0) / whole)


def attribute(stats: Sequence[Mapping[str, Any]], device: str) -> dict[str, Any]:
    """Seconds of all predictors by state, and the sentence that follows from them.

    Args:
        stats: of each predictor, what `Predictor.stats` gave; loading does not count as idle.
    """
    seconds = {s: round(sum(p["seconds"].get(s, 0.0) for p in stats), 3) for s in STATES}
    working = sum(v for s, v in seconds.items() if s != "loading")
    share = {s: v / working if working else 0.0 for s, v in seconds.items()}
    who = "GPUs" if device == "cuda" else "predictors"
    if not working:
        sentence = "no model was run"
    elif share["starved"] >= 0.2:
        sentence = (
            f"{who} starved {share['starved']:.0%}: decoders are the limit; more CPUs or "
            "sample.tolerance_s would fill them"
        )
    elif share["collating"] + share["uploading"] >= 0.2:
        moved = share["collating"] + share["uploading"]
        sentence = f"{who} waited {moved:.0%} for frames to be copied: larger batches would help"
    else:
        sentence = f"{who} busy {share['compute']:.0%}: they are the limit; more of them would help"
    return {
        "predictor_seconds": seconds,
        "frames": sum(p["frames"] for p in stats),
        "batches": sum(p["batches"] for p in stats),
        "batches_halved": sum(p["halved"] for p in stats),
        "sentence": sentence,
    }
