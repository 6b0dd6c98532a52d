"""How a run ended, told to those who watch the cluster: also where there was nothing to do."""

from __future__ import annotations

import time

import ray

from vidbatch.cluster.metrics import DriverMeters
from vidbatch.cluster.pools import start_ray
from vidbatch.config import EngineConfig
from vidbatch.errors import VidbatchError
from vidbatch.progress import Progress

REPORTS = 1.2
"""Report intervals (10 s by default) that the driver stays: what is said later dies with it."""


def tell_end(engine: EngineConfig, code: int, progress: Progress) -> None:
    """Counts the run, and stays until Ray's agent has it; a cluster that is gone is only noted."""
    try:
        if not ray.is_initialized():
            start_ray(engine)
    except VidbatchError as error:
        progress.note(f"how the run ended is not told as metrics: {error.message}")
        return
    meters = DriverMeters()
    meters.add("vidbatch_runs_total", exit_code=str(code))
    listing = dict(progress.listing)
    if code in (0, 3):
        listing["last_success_s"] = time.time()
    meters.show_listing(listing)
    time.sleep(REPORTS * ray._config.metrics_report_interval_ms() / 1000)
