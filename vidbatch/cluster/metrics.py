"""What Prometheus sees, through Ray's agent on each node; the names are in `metric_names`.

Labels are few and bounded: an outcome, a state, never a key. Without Ray's dashboard agent the
numbers go nowhere.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from vidbatch.cluster.metric_names import MAX_VALUES, METRICS
from vidbatch.pipeline.order import TaskReport
from vidbatch.progress import Progress


class Meters:
    """The metrics that one role tells. For one thread, after Ray is joined."""

    def __init__(self, role: str) -> None:
        self._meters = {
            name: (Counter if m.kind == "counter" else Gauge)(name, m.help, tuple(m.labels))
            for name, m in METRICS.items()
            if m.told_by == role
        }
        self._seen: dict[str, set[str]] = {}
        self._told: dict[tuple[str, str], float] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Counts `value` more; nothing where it is not above zero."""
        if value > 0:
            self._meters[name].inc(value, self._bounded(name, labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """The value of a gauge now."""
        self._meters[name].set(value, self._bounded(name, labels))

    def add_states(self, name: str, totals: Mapping[str, float]) -> None:
        """Counts seconds by state, given their totals since the process began."""
        for state, total in totals.items():
            told = self._told.get((name, state), 0.0)
            if total > told:
                self.add(name, total - told, state=state)
                self._told[name, state] = total

    def _bounded(self, name: str, labels: Mapping[str, str]) -> dict[str, str]:
        known = METRICS[name].labels
        if labels.keys() != known.keys():
            raise ValueError(f"{name} has the labels {sorted(known)}, got {sorted(labels)}")
        found = {}
        for label, value in labels.items():
            if known[label]:
                fits = value in known[label]
            else:
                seen = self._seen.setdefault(f"{name}.{label}", set())
                fits = value in seen or len(seen) < MAX_VALUES
                if fits:
                    seen.add(value)
            found[label] = value if fits else "other"
        return found


class DriverMeters(Meters):
    """What the driver tells: work done, work left, and in the end how the run went."""

    def __init__(self) -> None:
        super().__init__("driver")

    def count(self, report: TaskReport) -> None:
        """Adds what a task amounted to."""
        c = report.counts
        self.add("vidbatch_tasks_total")
        for outcome, n in (
            ("ok", c.ok),
            ("partial", c.partial),
            ("failed_outside", c.failed_outside),
            ("failed_file", c.failed - c.failed_outside),
        ):
            self.add("vidbatch_clips_total", n, outcome=outcome)
        for state, n in Tally(report.committed.values()).items():
            self.add("vidbatch_outputs_total", n, state=state)
        for kind, n in report.kinds.items():
            self.add("vidbatch_failures_total", n, kind=kind)
        for name, value in {
            "frames_decoded": c.frames_decoded, "frames_written": c.frames,
            "video_seconds": c.video_s, "bytes_read": c.bytes_read, "gets": c.gets,
            "bytes_written": c.bytes_written, "puts": c.puts,
        }.items():  # fmt: skip
            self.add(f"vidbatch_{name}_total", value)

    def show(self, progress: Progress, actors: Mapping[str, tuple[int, int]]) -> None:
        """What is left to do; `actors` is role → (up, wanted)."""
        self.set("vidbatch_backlog_tasks", progress.total_tasks - progress.counts.tasks)
        left_s = max(0.0, progress.total_cost_s - progress.done_cost_s)
        self.set("vidbatch_backlog_seconds", left_s)
        self.show_listing(progress.listing)
        for role, (up, wanted) in actors.items():
            self.set("vidbatch_actors", up, role=role, state="up")
            self.set("vidbatch_actors", wanted, role=role, state="wanted")

    def show_listing(self, listing: Mapping[str, Any]) -> None:
        """What the survey found, and when the last good run ended."""
        for state, fact in (("listed", "videos"), ("new", "new")):
            if fact in listing:
                self.set("vidbatch_videos", listing[fact], state=state)
        if listing.get("last_success_s"):
            self.set("vidbatch_last_success_timestamp_seconds", listing["last_success_s"])


class PredictorMeters(Meters):
    """What a predictor tells: `count` from the thread that computes, `show` from the one asked."""

    def __init__(self) -> None:
        super().__init__("predictor")

    def count(self, *, frames: int, fill: float, queued: int) -> None:
        """Adds a batch."""
        self.add("vidbatch_frames_predicted_total", frames)
        self.set("vidbatch_batch_fill_ratio", fill)
        self.set("vidbatch_predictor_queue_frames", queued)

    def show(self, seconds: Mapping[str, float]) -> None:
        """The states' totals so far."""
        self.add_states("vidbatch_predictor_seconds_total", seconds)
        if (whole := sum(seconds.values())) > 0:
            self.set("vidbatch_predictor_idle_ratio", 1 - seconds.get("compute", 0.0) / whole)
