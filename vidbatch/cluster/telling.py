"""What the driver tells while it runs: metrics, the progress line's last words, the run's facts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from vidbatch.cluster.attribution import attribute, busy_line, calibration
from vidbatch.cluster.crew import Crew
from vidbatch.cluster.metrics import DriverMeters
from vidbatch.cluster.slots import Slot
from vidbatch.pipeline.order import TaskReport
from vidbatch.progress import Progress

TELL_EVERY_S = 5.0
"""Ray collects every ten seconds."""


class Telling:
    """Looks at slots and crew, and tells what it sees. For the driver's thread, Ray joined."""

    def __init__(self, slots: Sequence[Slot], crew: Crew, note: Callable[[str], None]) -> None:
        self._slots, self._crew, self._note = slots, crew, note
        self._told_at = 0.0
        self._is_calibrated = False
        self._deaths = {"decoder": 0, "predictor": 0}

    @cached_property
    def _meters(self) -> DriverMeters:
        return DriverMeters()

    def count(self, report: TaskReport) -> None:
        """A task has ended."""
        self._meters.count(report)

    def tick(self, decoder_deaths: int, device: str, progress: Progress | None) -> None:
        """To be called about once a second."""
        if (now := time.monotonic()) - self._told_at < TELL_EVERY_S:
            return
        self._told_at = now
        deaths = {"decoder": decoder_deaths, "predictor": self._crew.restarts}
        for role, n in deaths.items():
            self._meters.add("vidbatch_deaths_total", n - self._deaths[role], role=role)
        self._deaths = deaths
        if not self._is_calibrated:
            working = [s.seconds for s in self._slots if s.ready]
            if line := calibration(self._crew.stats, working, device):
                self._is_calibrated = True
                self._note(line)
        if progress is not None:
            progress.busy = busy_line(self._crew.stats, self._seconds())
            up = sum(s.ready for s in self._slots)
            actors = {
                "decoder": (up, len(self._slots)),
                "predictor": (self._crew.up, len(self._crew.handles)),
            }
            self._meters.show(progress, actors)

    def facts(self, predictors: Sequence[Mapping[str, Any]], device: str) -> dict[str, Any]:
        """Where the seconds of the run went, given the predictors' last words."""
        return attribute(predictors, device, self._seconds())

    def _seconds(self) -> list[Mapping[str, float]]:
        return [s.seconds for s in self._slots]
