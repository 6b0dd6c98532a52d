"""Counters add up, stages are charged once, and the lines say what people ask at night."""

from __future__ import annotations

import io
import time

from vidbatch.progress import Counts, Progress, StageClock, human_bytes, human_s


def test_counts_add_up() -> None:
    parts = [Counts(tasks=1, frames=n, ok=n, stage_s={"decode": n}) for n in range(5)]
    whole = Counts()
    for part in parts:
        whole = whole + part
    assert (whole.tasks, whole.frames, whole.ok) == (5, 10, 10)
    assert whole.stage_s == {"decode": 10}
    assert Counts(**whole.as_dict()) == whole


def test_a_stage_inside_another_is_charged_once() -> None:
    clock = StageClock()
    started = time.perf_counter()
    with clock.stage("decode"):
        time.sleep(0.01)
        with clock.stage("predict"):
            time.sleep(0.02)
    total = time.perf_counter() - started
    assert clock.seconds.keys() == {"decode", "predict"}
    assert sum(clock.seconds.values()) <= total  # nothing is counted twice
    assert clock.seconds["predict"] >= 0.02


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.expect(2, 20.0)
        progress.note("one line")
        progress.add(Counts(tasks=1, videos=3, frames=7, bytes_read=2048, failed=1), 10.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "one line"
    assert lines[-1].startswith("1/2 tasks, 3 videos, 7 frames")
    assert "2.0 KiB read, 1 failed, 0 partial, about" in lines[-1]
    quiet = io.StringIO()
    with Progress(quiet=True, stream=quiet) as progress:
        progress.add(Counts(tasks=1))
    assert quiet.getvalue() == ""


def test_numbers_for_people() -> None:
    assert [human_bytes(n) for n in (0, 1536, 5 * 2**30)] == ["0 B", "1.5 KiB", "5.0 GiB"]
    assert [human_s(n) for n in (5, 65, 4000)] == ["5 s", "1 min 05 s", "1 h 06 min"]
