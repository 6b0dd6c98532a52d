"""What becomes of a job whose model fails: its own rows alone, said in full; then the job stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clips import make_clip
from tests.small_jobs import rows, run_models, write_model
from vidbatch.pipeline.run import SILENT_TASKS

GOOD = """
class Model:
    geometry = Geometry(width_px=16, height_px=16)
    features = ("mean",)

    def predict(self, batch):
        return {"features": batch.pixels.float().mean(dim=(1, 2, 3))[:, None]}
"""
BAD = """
class Model:
    geometry = Geometry(width_px=16, height_px=16)
    dim = 2

    def predict(self, batch):
        n = len(batch.source_px)
        %s
"""
FAULTS = {
    "raise ValueError('no such thing')": "raised ValueError on {} frames (frame_index 0..",
    "return {'embeddings': torch.ones(n, 3)}": "embeddings is ({0}, 3), expected ({0}, 2)",
    "return {'embeddings': torch.full((n, 2), torch.nan)}": "embeddings holds {1} numbers that are",
    "return {'embeddings': torch.ones(n - 1, 2)}": "embeddings is ({2}, 2), expected ({0}, 2)",
}
ONE_EACH = 0.0001
"""Minutes of a task, so that each video is one."""


def make_archive(folder: Path, videos: int) -> Path:
    folder.mkdir()
    for i in range(videos):
        (folder / f"{i}.mp4").write_bytes(make_clip(first_number=i))
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.split("(")[0][:40])
def test_a_failing_model_costs_its_own_rows_alone(fault: str, tmp_path: Path) -> None:
    archive, output = make_archive(tmp_path / "archive", 1), tmp_path / "tables"
    models = [
        write_model(tmp_path, "bad", BAD % fault, how={"batch": 4}),
        write_model(tmp_path, "good", GOOD),
    ]
    result = run_models(tmp_path, archive, output, models, fps=2, check=False)
    assert result.exit_code == 0, "one task is no row of three"
    ((seen,),) = rows(output, "select count(*) from features where model like 'good-%'")
    assert seen > 4
    ((said, stage),) = rows(output, "select message, stage from failures")
    assert stage == "predict" and said.startswith("model bad: "), said
    assert FAULTS[fault].format(4, 8, 3) in said
    assert "frame_index 0.." in said and "pixels (4, 16, 16, 3)" in said
    assert not rows(output, "select 1 from embeddings")


def test_three_tasks_in_a_row_stop_the_job(tmp_path: Path) -> None:
    """Exit 4, the model named; what the others made of those tasks is kept."""
    archive, output = make_archive(tmp_path / "archive", 6), tmp_path / "tables"
    models = [
        write_model(tmp_path, "bad", BAD % "raise ValueError('no such thing')"),
        write_model(tmp_path, "good", GOOD),
    ]
    result = run_models(
        tmp_path, archive, output, models, fps=2, check=False, task_minutes=ONE_EACH
    )
    assert result.exit_code == 4
    stopped = result.summary["stopped"]
    assert stopped.startswith(
        f"bad failed on every clip of {SILENT_TASKS} tasks in a row: model bad"
    )
    assert "no such thing" in stopped
    assert result.summary["counts"]["tasks"] == SILENT_TASKS
    ((videos,),) = rows(output, "select count(distinct video_id) from features")
    assert videos == SILENT_TASKS


def test_a_good_task_between_starts_the_count_anew(tmp_path: Path) -> None:
    archive, output = make_archive(tmp_path / "archive", 6), tmp_path / "tables"
    source = BAD % "\n        ".join(
        (
            "Model.calls = getattr(Model, 'calls', 0) + 1",
            "if Model.calls % 3: raise ValueError('two of three')",
            "return {'embeddings': torch.ones(n, 2)}",
        )
    )
    models = [write_model(tmp_path, "moody", source)]
    result = run_models(
        tmp_path, archive, output, models, fps=2, check=False, task_minutes=ONE_EACH
    )
    assert (result.exit_code, result.summary["counts"]["tasks"]) == (0, 6)
