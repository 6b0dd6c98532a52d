"""Decoders and models that fail on order, as actors' classes that travel to the workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidbatch.cluster.decoder import Decoder
from vidbatch.data import ByteSource, Clip, DecodeEvent
from vidbatch.pipeline.order import ClipDecoder


class FaultyClips:
    """A `ClipDecoder` that meets with an accident at the first clip of some videos.

    Args:
        faults: end of the uri → (kill, raise or hang; how often).
        marks: a folder where the times are counted, whatever process dies.
    """

    def __init__(
        self, inner: ClipDecoder, faults: Mapping[str, tuple[str, int]], marks: Path
    ) -> None:
        self._inner, self._faults, self._marks = inner, faults, marks

    def decode(self, source: ByteSource, clip: Clip, **rest: Any) -> Iterator[DecodeEvent]:
        """As the inner one; the accident happens after the first event."""
        for n, event in enumerate(self._inner.decode(source, clip, **rest)):
            yield event
            if n or clip.first_keyframe:
                continue
            for end, (kind, times) in self._faults.items():
                if clip.video.uri.endswith(end) and marked(self._marks, end, times):
                    if kind == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    elif kind == "hang":
                        time.sleep(3600)
                    else:
                        raise KeyError("a case that nobody had foreseen")


def marked(marks: Path, name: str, times: int) -> bool:
    """Whether this is one of the first so many times; counts across processes."""
    for n in range(times):
        try:
            (marks / f"{name.replace('/', '_')}-{n}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


def faulty_decoder(faults: Mapping[str, tuple[str, int]], marks: Path) -> type[Decoder]:
    """A decoder actor's class with these accidents; it travels to the workers by value."""

    class Faulty(Decoder):
        def fit(self, decoder: ClipDecoder) -> ClipDecoder:
            return FaultyClips(decoder, faults, marks)

    return Faulty


KILLS_ITS_PROCESS = '''
import os, pathlib
from vidbatch.data import Geometry

class Fragile:
    """Mean brightness; its process dies at frames darker than `below`, `times` times."""

    geometry = Geometry(width_px=32, height_px=18)
    features = ("mean",)

    def __init__(self, below: float = 0.0, times: int = 0, marks: str = "", fails: bool = False):
        self.below, self.times, self.marks, self.fails = below, times, marks, fails

    def load(self, device):
        if self.fails:
            raise OSError("weights are cut")

    def predict(self, batch):
        mean = batch.pixels.float().mean(dim=(1, 2, 3))
        if (mean < self.below).any():
            for n in range(self.times):
                try:
                    (pathlib.Path(self.marks) / f"model-{n}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os._exit(1)
        return {"features": mean[:, None]}
'''
