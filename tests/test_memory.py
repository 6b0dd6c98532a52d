"""Bounded memory on a real Ray: large frames, a predictor far slower than its decoders."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clips import make_clip
from tests.small_jobs import run_models, write_model
from vidbatch.cluster.driver import RayEngine
from vidbatch.config import Job
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import RunSpec

pytestmark = pytest.mark.ray

SLOW = """
import time

class Model:
    geometry = Geometry(width_px=1920, height_px=1080)
    gives = ("features",)
    features = ("mean",)

    def predict(self, batch):
        time.sleep(0.1 * len(batch.pixels))
        return {"features": batch.pixels[:, ::64, ::64].float().mean(dim=(1, 2, 3))[:, None]}
"""
CAP_MIB = 200
"""Of the tests' cluster, and so of its object store."""


def test_a_slow_predictor_fills_no_object_store(ray_cluster: None, tmp_path: Path) -> None:
    """4K input at 6 MB a frame, 0.1 s a frame to predict: 620 MB of frames go through 200 MiB."""
    import ray
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address  # others may run a Ray on this machine
    archive = tmp_path / "videos"
    archive.mkdir()
    data = make_clip(width_px=3840, height_px=2160, frames=25, gop=25)
    for name in "abcd":
        (archive / f"{name}.mp4").write_bytes(data)
    used, spilled = [0], [""]
    notes: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            text = memory_summary(address, stats_only=True)
            spilled.extend(re.findall("Spilled .*", text))
            used.append(int(re.findall(r"Plasma memory usage (\d+) MiB", text)[0]))

    def on_ray(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Engine:
        return RayEngine(spec, job, note=lambda line: (notes.append(line), note(line))[1])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run_models(
            tmp_path, archive, tmp_path / "t", [write_model(tmp_path, "slow", SLOW)],
            fps=25, make_engine=on_ray,
        )  # fmt: skip
    finally:
        over.set()
        watcher.join()
    assert result.summary["counts"]["frames"] == 100
    assert spilled == [""], "nothing was ever spilled by this cluster"
    assert 30 < max(used) <= CAP_MIB, used
    assert any("a node holds at most 200.0 MiB" in line for line in notes), notes
