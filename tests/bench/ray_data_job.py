"""The same work as a Ray Data pipeline: python ray_data_job.py FOLDER FPS OUT (needs decord)."""

from __future__ import annotations

import os
import sys

os.environ["RAY_AUTH_MODE"] = "disabled"

import numpy as np
import ray
from ray.data import ActorPoolStrategy


class MeanColour:
    """The model of `mean_colour.py`, on Ray Data's batches."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        frames = self.torch.from_numpy(np.stack(list(batch["frame"])))
        mean = frames[:, ::4, ::4].float().mean(dim=(1, 2)) / 255
        return {
            "path": batch["path"],
            "frame_index": batch["frame_index"],
            "embedding": (mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-9)).numpy(),
        }


def main(folder: str, fps: str, out: str) -> None:
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 * 2**30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    frames = ray.data.read_videos(
        folder, fps=int(fps), resize=(224, 224), include_paths=True, file_extensions=["mp4"]
    )
    done = frames.map_batches(MeanColour, batch_size=64, compute=ActorPoolStrategy(size=1))
    done.write_parquet(out)
    print(ray.data.read_parquet(out).count())


if __name__ == "__main__":
    main(*sys.argv[1:4])
