"""Every metric by name: what dashboards and alerts may refer to. Imports nothing of Ray.

Ray exports them on each node's metrics port with the prefix `ray_`. Counters stay there as long as
the node lives; a gauge vanishes 20 s after its process said it last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PREFIX = "ray_"
"""What Ray puts before each name."""

DECODER_STATES = ("read", "decode", "predict", "encode", "commit", "idle")
"""Where the seconds of a decoder go: `predict` is waiting for predictors, `idle` has no order."""

PREDICTOR_STATES = ("compute", "starved", "uploading", "collating", "loading")
"""Where the seconds of a predictor's compute thread go."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: who tells it, and which values each of its labels may have."""

    kind: Literal["counter", "gauge"]
    told_by: Literal["driver", "decoder", "predictor"]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label → its values; empty: at most MAX_VALUES words of ours, then `other`."""


MAX_VALUES = 40
"""Values of a label that the table does not list: failure kinds are some thirty."""

_ROLES = ("decoder", "predictor")

METRICS: dict[str, Metric] = {
    "vidbatch_runs_total": Metric(
        "counter", "driver", "Runs that ended, by exit code",
        {"exit_code": ("0", "1", "2", "3", "4", "5")},
    ),
    "vidbatch_last_success_timestamp_seconds": Metric(
        "gauge", "driver", "End of the last run that finished (exit code 0 or 3), Unix time"
    ),
    "vidbatch_videos": Metric(
        "gauge", "driver", "Videos in the listing, and those in no plan before this run",
        {"state": ("listed", "new")},
    ),
    "vidbatch_backlog_tasks": Metric("gauge", "driver", "Tasks planned and not done"),
    "vidbatch_backlog_seconds": Metric(
        "gauge", "driver", "Planned decoder seconds of the tasks not done"
    ),
    "vidbatch_actors": Metric(
        "gauge", "driver", "Actors that are up, and that were asked for",
        {"role": _ROLES, "state": ("up", "wanted")},
    ),
    "vidbatch_tasks_total": Metric("counter", "driver", "Tasks that ended"),
    "vidbatch_outputs_total": Metric(
        "counter", "driver", "Outputs of tasks by how they were committed",
        {"state": ("new", "adopted", "exists")},
    ),
    "vidbatch_clips_total": Metric(
        "counter", "driver", "Outcomes (clip x output) by how they ended",
        {"outcome": ("ok", "partial", "failed_file", "failed_outside")},
    ),
    "vidbatch_failures_total": Metric(
        "counter", "driver", "Outcomes that are not ok, by kind (at most 20 a task)", {"kind": ()}
    ),
    "vidbatch_frames_decoded_total": Metric("counter", "driver", "Frames decoded"),
    "vidbatch_frames_written_total": Metric("counter", "driver", "Sampled frames that became rows"),
    "vidbatch_video_seconds_total": Metric("counter", "driver", "Seconds of video looked at"),
    "vidbatch_bytes_read_total": Metric("counter", "driver", "Bytes read from the archive"),
    "vidbatch_gets_total": Metric("counter", "driver", "Requests to the archive"),
    "vidbatch_bytes_written_total": Metric("counter", "driver", "Bytes of part files written"),
    "vidbatch_puts_total": Metric("counter", "driver", "Objects written"),
    "vidbatch_deaths_total": Metric(
        "counter", "driver", "Actors that died and were replaced", {"role": _ROLES}
    ),
    "vidbatch_decoder_seconds_total": Metric(
        "counter", "decoder", "Seconds of decoders by state", {"state": DECODER_STATES}
    ),
    "vidbatch_predictor_seconds_total": Metric(
        "counter", "predictor", "Seconds of predictors by state", {"state": PREDICTOR_STATES}
    ),
    "vidbatch_frames_predicted_total": Metric(
        "counter", "predictor", "Frames that went through models"
    ),
    "vidbatch_batch_fill_ratio": Metric(
        "gauge", "predictor", "Frames of the last batch / a full batch"
    ),
    "vidbatch_predictor_idle_ratio": Metric(
        "gauge", "predictor", "Share of all seconds not in compute"
    ),
    "vidbatch_predictor_queue_frames": Metric("gauge", "predictor", "Frames waiting for a batch"),
}  # fmt: skip
