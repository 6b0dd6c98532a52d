"""Every kind of model in one job: the engine on Ray leaves the tables that one process leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.outputs import check_no_key_twice, check_same, read_tables
from tests.small_jobs import run_models, write_model
from tests.test_chains import chain
from tests.test_masks import CLASSES
from tests.test_sound_jobs import LEVEL
from tests.test_windows import MIDDLE
from vidbatch.cluster.driver import RayEngine
from vidbatch.config import Job
from vidbatch.pipeline.engine import Engine
from vidbatch.pipeline.order import RunSpec
from vidbatch.storage import open_store

pytestmark = pytest.mark.ray


def test_windows_chains_masks_sound_and_shots(
    ray_cluster: None, tmp_path: Path, shared_videos: Path
) -> None:
    archive = tmp_path / "videos"
    archive.mkdir()
    shutil.copy(shared_videos / "real" / "mdn__friday.mp4", archive)
    shutil.copy(shared_videos / "truth" / "skv__bikes.mp4", archive)
    models = [
        *chain(tmp_path),
        write_model(tmp_path, "middle", MIDDLE),
        write_model(tmp_path, "level", LEVEL),
        write_model(tmp_path, "classes", CLASSES, rle=True),
        {"builtin": "shots"},
    ]
    found = []

    def on_ray(spec: RunSpec, job: Job, note: Callable[[str], None]) -> Engine:
        return RayEngine(spec, job, note=note)

    for name, make_engine in (("local", None), ("ray", on_ray)):
        output = tmp_path / name
        run_models(tmp_path, archive, output, models, fps=2, length_s=2, make_engine=make_engine)
        found.append(read_tables(open_store(str(output))))
        check_no_key_twice(found[-1])
    check_same(found[1], found[0])
    assert found[0].keys() >= {
        "detections", "labels", "embeddings", "windows", "masks", "audio", "shots",
    }  # fmt: skip
