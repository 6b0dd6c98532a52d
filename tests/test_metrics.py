"""The metrics' table is sound, labels stay few, and the sentence follows from the seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vidbatch.cluster.attribution import attribute, busy_line, calibration
from vidbatch.cluster.metric_names import DECODER_STATES, MAX_VALUES, METRICS, PREDICTOR_STATES
from vidbatch.cluster.metrics import DriverMeters, Meters
from vidbatch.cluster.slots import Slot
from vidbatch.pipeline.order import TaskReport
from vidbatch.progress import Counts, Progress, StageClock

ROOT = Path(__file__).resolve().parents[1]


def test_names_follow_the_custom() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"vidbatch_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert metric.help and not metric.help.endswith(".")
        for values in metric.labels.values():
            assert len(set(values)) == len(values) <= MAX_VALUES


def test_the_table_can_be_had_without_ray() -> None:
    code = "import sys, vidbatch.cluster.metric_names; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class Told:
    """A meter that remembers instead of telling Ray."""

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def inc(self, value: float, labels: dict[str, str]) -> None:
        key = tuple(labels.items())
        self.values[key] = self.values.get(key, 0.0) + value

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values[tuple(labels.items())] = value


def told(meters: Meters) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Puts rememberers in; name → labels → value, as it grows."""
    remembered = {name: Told() for name in meters._meters}
    meters._meters = dict(remembered)
    return {name: one.values for name, one in remembered.items()}


def test_labels_stay_few() -> None:
    meters = DriverMeters()
    seen = told(meters)
    for i in range(2 * MAX_VALUES):
        meters.add("vidbatch_failures_total", kind=f"kind_{i}")
    assert len(seen["vidbatch_failures_total"]) == MAX_VALUES + 1
    assert seen["vidbatch_failures_total"][("kind", "other"),] == MAX_VALUES
    meters.add("vidbatch_clips_total", 2, outcome="a state of tomorrow")
    assert seen["vidbatch_clips_total"] == {(("outcome", "other"),): 2}
    with pytest.raises(ValueError, match="has the labels"):
        meters.add("vidbatch_clips_total", 1, uri="s3://bucket/key")
    with pytest.raises(KeyError):
        meters.add("vidbatch_decoder_seconds_total", 1, state="read")  # another role's


def test_a_report_is_counted_once() -> None:
    meters = DriverMeters()
    seen = told(meters)
    counts = Counts(tasks=1, ok=5, partial=1, failed=3, failed_outside=2, frames=7, gets=4)
    report = TaskReport(
        task_id="t", counts=counts, committed={"frames": "new", "quality-v1": "adopted"},
        failures=(("a", "frames", "no_video", ""),), kinds={"no_video": 2}, device="cpu",
    )  # fmt: skip
    meters.count(report)
    assert seen["vidbatch_clips_total"] == {
        (("outcome", "ok"),): 5, (("outcome", "partial"),): 1,
        (("outcome", "failed_outside"),): 2, (("outcome", "failed_file"),): 1,
    }  # fmt: skip
    assert seen["vidbatch_failures_total"] == {(("kind", "no_video"),): 2}
    assert seen["vidbatch_frames_written_total"] == {(): 7}
    assert seen["vidbatch_puts_total"] == {}, "nothing was put"


def test_states_are_told_as_what_came_since() -> None:
    meters = Meters("decoder")
    seen = told(meters)["vidbatch_decoder_seconds_total"]
    meters.add_states("vidbatch_decoder_seconds_total", {"read": 2.0, "idle": 5.0})
    meters.add_states("vidbatch_decoder_seconds_total", {"read": 3.5, "idle": 4.9})
    assert seen == {(("state", "read"),): 3.5, (("state", "idle"),): 5.0}


def test_what_is_left_is_shown() -> None:
    meters = DriverMeters()
    seen = told(meters)
    progress = Progress(quiet=True)
    progress.listing = {"videos": 12, "new": 3, "last_success_s": None}
    progress.expect(4, 40.0)
    progress.add(Counts(tasks=1), 10.0)
    meters.show(progress, {"decoder": (1, 2), "predictor": (0, 1)})
    assert seen["vidbatch_backlog_tasks"] == {(): 3}
    assert seen["vidbatch_backlog_seconds"] == {(): 30.0}
    assert seen["vidbatch_videos"] == {(("state", "listed"),): 12, (("state", "new"),): 3}
    assert seen["vidbatch_actors"][("role", "decoder"), ("state", "wanted")] == 2
    assert seen["vidbatch_last_success_timestamp_seconds"] == {}


# where the seconds went ---------------------------------------------------------------------------


def stats(**seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "frames": 1, "batches": 1, "halved": 0}


STARVED = stats(compute=3.0, starved=7.0, loading=50.0)


@pytest.mark.parametrize(
    ("predictor", "decoder", "says"),
    [
        (STARVED, {"decode": 9.0, "read": 1.0}, "decoders are the limit; more CPUs"),
        (STARVED, {"decode": 4.0, "read": 6.0}, "waited 60% for the archive's bytes"),
        (STARVED, {"decode": 4.0, "predict": 6.0}, "object_store_cap"),
        (STARVED, {"decode": 4.0, "commit": 6.0}, "the output's store is the limit"),
        (STARVED, {"decode": 4.0, "idle": 6.0}, "had no task 60% of the time"),
        (stats(compute=9.0, starved=1.0), {"predict": 9.0}, "predictors busy 90%: they are"),
        (stats(compute=5.0, collating=5.0), {"predict": 9.0}, "larger batches would help"),
        (None, {"read": 9.0}, "no model was run; decoders waited 100%"),
    ],
)
def test_the_sentence_says_what_to_change(
    predictor: dict[str, Any] | None, decoder: dict[str, float], says: str
) -> None:
    found = attribute([predictor] if predictor else [], "cpu", [decoder])
    assert says in found["sentence"]
    assert found["per_decoder"] == [decoder]
    assert found["decoder_seconds"].keys() == set(DECODER_STATES)
    assert found["predictor_seconds"].keys() == set(PREDICTOR_STATES)


def test_the_first_work_tells_how_the_pools_suit_each_other() -> None:
    predictor = {**stats(compute=2.0, starved=30.0, collating=0.5), "frames": 1000}
    decoder = {"decode": 9.0, "read": 1.0, "predict": 3.0, "idle": 50.0}
    line = calibration([predictor], [decoder, decoder], "cpu")
    assert line == (
        "measured: a decoder gives 50 frames/s, a predictor takes 400: one keeps up with 8.0 "
        "decoders; with 2 and 1 the decoders are the limit (25% of what the predictors take)"
    )
    slow = {**predictor, "seconds": {"compute": 40.0}}
    said = calibration([slow], [decoder, decoder], "cuda")
    assert said is not None and "the GPUs are the limit (400%" in said
    assert calibration([predictor], [{"decode": 1.0}], "cpu") is None, "too little to say"
    assert calibration([], [decoder], "cpu") is None


def test_the_progress_line_ends_with_both_pools() -> None:
    line = busy_line([STARVED], [{"decode": 6.0, "read": 2.0, "commit": 2.0}, {}])
    assert line == "decoders decode 60%, read 20%; predictors starved 70%, compute 30%"
    assert busy_line([], []) == ""


def test_seconds_of_a_dead_actor_are_kept() -> None:
    from vidbatch.cluster.decoder import Beat

    slot = Slot(index=0)
    slot.hear(Beat(seq=1, seconds={"decode": 2.0, "idle": 1.0}), now=0.0)
    slot.occupy(object())
    slot.hear(Beat(seq=1, seconds={"decode": 0.5}), now=1.0)
    assert slot.seconds == {"decode": 2.5, "idle": 1.0}


def test_an_open_stage_is_seen_from_outside() -> None:
    clock = StageClock()
    with clock.stage("decode"):
        first = clock.so_far()["decode"]
        assert clock.so_far()["decode"] >= first >= 0
        assert "decode" not in clock.seconds or clock.seconds["decode"] <= first
    assert clock.so_far() == clock.seconds
