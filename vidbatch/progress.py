"""Counters that add up, and the two ways to show them: a bar on a terminal, plain lines elsewhere.

Knows nothing of where the numbers come from. stderr is talk: nothing here writes to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TextIO

LINE_EVERY_S = 10.0
"""Between two plain lines: a night is some thousand lines, a stall shows within a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What some work amounted to; counts of parts add up to the count of the whole."""

    tasks: int = 0
    clips: int = 0
    videos: int = 0
    """Videos whose first clip was among the clips."""
    frames: int = 0
    """Sampled frames that became rows of the frames (each counted once, whatever the models)."""
    frames_decoded: int = 0
    video_s: float = 0.0
    bytes_read: int = 0
    gets: int = 0
    bytes_written: int = 0
    puts: int = 0
    ok: int = 0
    """Outcomes (clip × output)."""
    partial: int = 0
    failed: int = 0
    failed_outside: int = 0
    """Failed outcomes whose cause is not in the file: store, worker, model."""
    fallbacks: int = 0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the decoders per stage: read, decode, predict, encode, commit."""

    def __add__(self, other: Counts) -> Counts:
        values: dict[str, Any] = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "stage_s"
        }
        keys = {**self.stage_s, **other.stage_s}
        stages = {k: self.stage_s.get(k, 0.0) + other.stage_s.get(k, 0.0) for k in keys}
        return Counts(**values, stage_s=stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON types, seconds rounded to ms."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stage_s"}
        out["video_s"] = round(self.video_s, 3)
        out["stage_s"] = {k: round(v, 3) for k, v in self.stage_s.items()}
        return out


class StageClock:
    """Attributes wall seconds of one thread to stages; nested stages are not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside, but for inner stages, counts as `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def so_far(self) -> dict[str, float]:
        """Seconds by stage up to now, the open stage's too; for another thread that looks on."""
        found, stack = dict(self.seconds), tuple(self._stack)
        if stack:
            running = max(0.0, time.perf_counter() - self._since)
            found[stack[-1]] = found.get(stack[-1], 0.0) + running
        return found

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def human_bytes(n: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def human_s(seconds: float) -> str:
    """4000 → '1 h 07 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


class Progress:
    """The progress of one run: a bar when `stream` is a terminal, else a line every ten seconds.

    Use as a context manager; `add` counts, `note` says something once, `tick` may be called
    as often as one likes.

    Args:
        log: takes (event, facts) instead of the stream, for lines that machines read.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        log: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.counts = Counts()
        self.total_tasks = 0
        self.total_cost_s = 0.0
        self.done_cost_s = 0.0
        self.listing: Mapping[str, Any] = {}
        """What the survey found, in numbers."""
        self.busy = ""
        """What the engine's actors do, in a few words."""
        self.ids: dict[str, str] = {}
        """What every event is about: the run."""
        self._quiet, self._log = quiet, log
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar: Any = None
        self._bar_task: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and self._log is None and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("[bold]vidbatch"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"),
                console=Console(file=self._stream),
                transient=False,
            )
            self._bar.start()
            self._bar_task = self._bar.add_task("run", total=None, text="starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self.tick(force=True)
            self._bar.stop()
            self._bar = None
        elif not self._quiet and self.counts.tasks:
            self._say_line()

    def expect(self, tasks: int, cost_s: float) -> None:
        """More work became known."""
        self.total_tasks += tasks
        self.total_cost_s += cost_s
        self.tick(force=True)

    def add(self, counts: Counts, cost_s: float = 0.0) -> None:
        """Counts finished work; `cost_s` is its share of the planned cost."""
        self.counts = self.counts + counts
        self.done_cost_s += cost_s
        self.tick()

    def event(self, event: str, **facts: Any) -> None:
        """Something for machines alone."""
        if self._log is not None:
            self._log(event, {**self.ids, **facts})

    def note(self, text: str) -> None:
        """One line, now."""
        self.event("note", message=text)
        if self._quiet or self._log is not None:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def tick(self, *, force: bool = False) -> None:
        """Refreshes what is shown, at most as often as makes sense."""
        if self._bar is not None:
            self._bar.update(
                self._bar_task,
                total=self.total_cost_s or None,
                completed=self.done_cost_s,
                text=self.line(),
            )
        elif not self._quiet and self.total_tasks:
            now = time.monotonic()
            if now - self._last_line >= LINE_EVERY_S:
                self._last_line = now
                self._say_line()

    def _say_line(self) -> None:
        if self._log is None:
            print(self.line(), file=self._stream, flush=True)
        counts = self.counts.as_dict()
        self.event("progress", message=self.line(), total_tasks=self.total_tasks, **counts)

    def line(self) -> str:
        """videos, frames/s, bytes read, failures, time left."""
        c, elapsed = self.counts, time.monotonic() - self._started
        left = ""
        if self.done_cost_s and self.total_cost_s > self.done_cost_s:
            left_s = elapsed * (self.total_cost_s - self.done_cost_s) / self.done_cost_s
            left = f", about {human_s(left_s)} left"
        return (
            f"{c.tasks}/{self.total_tasks} tasks, {c.videos} videos, {c.frames} frames "
            f"({c.frames / max(elapsed, 1e-9):.0f}/s), {human_bytes(c.bytes_read)} read, "
            f"{c.failed} failed, {c.partial} partial{left}"
            + (f"; {self.busy}" if self.busy else "")
        )
