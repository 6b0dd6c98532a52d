"""Headers of many videos, read by all decoders at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from vidbatch.cluster.faults import DEATHS, one_line
from vidbatch.data import Failure, Video
from vidbatch.pipeline.engine import Probed

TRIES = 3
"""Of one video, each at another decoder, when the decoder dies."""

LOOK_S = 0.2
"""Between two looks at whether the run is being stopped."""

PAUSE_S = 1.0


def probe_videos(
    videos: Sequence[Video], handles: Callable[[], list[Any]], halted: Callable[[], bool]
) -> list[Probed]:
    """Probes each video at some decoder; a retryable failure where none could do it.

    Args:
        handles: the decoders that are up now; asked again for what a dead one left.
        halted: whether to give up.
    """
    found: dict[int, Probed] = {}
    why = "no decoder is up"
    for turn in range(TRIES):
        some = handles()
        asked: dict[Any, int] = {}
        for n, i in enumerate(i for i in range(len(videos)) if i not in found and some):
            call = some[(n + turn) % len(some)].probe.options(concurrency_group="probe")
            asked[call.remote(videos[i])] = i
        waiting = list(asked)
        while waiting and not halted():
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
            for ref in ready:
                try:
                    found[asked[ref]] = ray.get(ref)
                except DEATHS as error:
                    why = one_line(error)
        if halted() or len(found) == len(videos):
            break
        time.sleep(PAUSE_S)
    failure = Failure(
        stage="probe",
        kind="worker_died",
        message=f"its header was not read: {'the run was stopped' if halted() else why}",
        advice="comes back by itself on the next runs",
        retryable=True,
    )
    return [found.get(i) or Probed(video=v, failure=failure) for i, v in enumerate(videos)]
