"""The decode floor in Ray actors and nothing else: python bare_ray_job.py FOLDER FPS OUT.

What Ray itself and the imports cost on these cores: an actor per core decodes file after file in
its own process, one more has imported torch. No model, no tables, no isolation, no resume.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"

import ray
from ray.util import ActorPool

from tests.bench.job import decode_share


@ray.remote(num_cpus=1)
class Decoder:
    """Decodes files."""

    def decode(self, path: str, fps: str) -> int:
        """Frames sampled of one."""
        return decode_share([path], fps)[0]


@ray.remote(num_cpus=0)
class Idle:
    """What a predictor imports, and no more."""

    def ready(self) -> str:
        """The version of torch."""
        import torch

        return str(torch.__version__)


def main(folder: str, fps: str, out: str) -> None:
    """Prints how many frames were sampled."""
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2 * 2**30,
    )
    idle = Idle.remote()
    ready = idle.ready.remote()
    files = sorted(Path(folder).glob("*.mp4"), key=lambda p: -p.stat().st_size)
    cores = os.cpu_count() or 1
    pool = ActorPool([Decoder.remote() for _ in range(cores)])
    found = list(pool.map_unordered(lambda a, f: a.decode.remote(str(f), fps), files))
    ray.get(ready)
    ray.shutdown()
    print(sum(found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
