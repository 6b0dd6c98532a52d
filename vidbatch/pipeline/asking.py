"""What the models of a task ask of a clip: geometries, halo, sound; and which chunks go to which.

events of a clip ─┬─ frames ──────────────▶ models of frames, those on crops with them
                  ├─ windows, per grid ───▶ models of windows
sound of a clip ──┴─ sound, per grid ─────▶ models of sound
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vidbatch.data import Audio, AudioGrid, Chunk, Frames, Geometry, ModelSpec, Output, WindowGrid
from vidbatch.pipeline.windows import WindowCutter

Asked = tuple[Chunk, tuple[str, ...]]
"""A chunk and the names of the models it is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of every clip."""

    specs: tuple[ModelSpec, ...]
    """Of the models to run."""

    @staticmethod
    def of(outputs: Sequence[Output], every: Sequence[Output]) -> Demand:
        """What the outputs of a task need; a model on crops the one it is on, whatever that has.

        Args:
            every: the outputs of the run.
        """
        specs = [o.spec for o in outputs if o.spec is not None]
        parents = {s.crop.on for s in specs if s.crop}
        known = [o.spec for o in every if o.spec is not None]
        return Demand(specs=tuple(s for s in known if s in specs or s.name in parents))

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """Distinct ones, of frames."""
        return tuple({s.geometry.key: s.geometry for s in self.specs if s.geometry}.values())

    @property
    def context(self) -> bool:
        """Whether chunks are to begin with the sampled frame before them."""
        return any(s.context for s in self.specs)

    @property
    def halo(self) -> int:
        """Samples after the end of a clip that windows which begin in it may need."""
        return max((s.window.span - 1 for s in self.specs if s.window), default=0)

    @property
    def sounds(self) -> dict[AudioGrid, tuple[str, ...]]:
        """Audio grid → models that get its windows."""
        grids = dict.fromkeys(s.audio for s in self.specs if s.audio)
        return {g: tuple(s.name for s in self.specs if s.audio == g) for g in grids if g}

    @property
    def of_frames(self) -> tuple[ModelSpec, ...]:
        """Models that get frames, or boxes of them."""
        return tuple(s for s in self.specs if s.window is None and s.audio is None)


class ClipAsker:
    """Turns the frames of one clip into the chunks that models get."""

    def __init__(self, demand: Demand) -> None:
        self._names = tuple(s.name for s in demand.of_frames)
        self._keys = {s.geometry.key for s in demand.of_frames if s.geometry}
        grids: dict[WindowGrid, list[ModelSpec]] = {}
        for spec in demand.specs:
            if spec.window is not None:
                grids.setdefault(spec.window, []).append(spec)
        self._cutters = [
            (
                WindowCutter(grid, {s.geometry.key for s in specs if s.geometry}),
                tuple(s.name for s in specs),
            )
            for grid, specs in grids.items()
        ]

    def feed(self, frames: Frames) -> Iterator[Asked]:
        """The rows of a chunk, even if no model wants them; then the windows it completes."""
        if frames.num_rows:
            pixels = {key: array for key, array in frames.pixels.items() if key in self._keys}
            yield frames.cut(len(frames) - frames.halo, keep=pixels), self._names
        for cutter, names in self._cutters:
            if (windows := cutter.feed(frames)) is not None:
                yield windows, names

    def finish(self, samples: int) -> Iterator[Asked]:
        """What is left at the end of the clip; see `WindowCutter.finish`."""
        for cutter, names in self._cutters:
            if (windows := cutter.finish(samples)) is not None:
                yield windows, names


def without_pixels(chunk: Chunk) -> Chunk:
    """The chunk as it is kept until its answers are there: all but what is large."""
    if isinstance(chunk, Frames):
        return replace(chunk, pixels={})
    if isinstance(chunk, Audio):
        return replace(chunk, samples=np.broadcast_to(np.float32(0), chunk.samples.shape))
    return replace(chunk, frames=replace(chunk.frames, pixels={}))
