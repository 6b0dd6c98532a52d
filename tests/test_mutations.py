"""A slice of the mutated videos of `tests/chaos/mutations.py`; `make fuzz` decodes them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_inputs import flat
from tests.chaos.mutations import GROWTH_BYTES, SEEDS, TOTAL, Mutant, decode_mutant, mutant, run
from tests.decoding import ALL
from tests.outputs import check_no_key_twice, read_tables
from tests.test_inputs import rows_of
from tests.test_run import make_job
from vidbatch.pipeline.run import run_job
from vidbatch.sandbox import Sandbox
from vidbatch.storage import open_store

pytestmark = pytest.mark.chaos
SLICE = range(0, TOTAL, 23)  # coprime to the number of seeds: each has its turn
KNOWN = (8675, 12755)
"""Found a mistake once: no keyframe is shown, and the rule takes keyframes."""


def test_a_slice_of_the_mutants() -> None:
    found = run([*KNOWN, *SLICE])
    assert {n % len(SEEDS) for n in SLICE} == set(range(len(SEEDS)))
    assert found.files == len(KNOWN) + len(SLICE)
    # FFmpeg's want of memory is believed where a process has used much before
    deaths = found.outcomes["died decoder_oom"]
    assert deaths == found.restarts == len(found.died) < 3, found.died
    kinds = {outcome.partition(" ")[0] for outcome in found.outcomes}
    assert kinds >= {"ok", "partial", "failed"} and len(found.outcomes) > 8
    assert found.rss_end_bytes - found.rss_start_bytes < GROWTH_BYTES


def test_each_death_is_counted_and_the_next_mutant_decoded() -> None:
    """Between them comes a picture that is larger than the memory there is."""
    large = Mutant(-1, "large", "", flat(4096, 4096, "mjpeg", "avi", "yuvj420p"), ALL)
    with Sandbox(memory_bytes=2**27) as roomy, Sandbox(memory_bytes=2**24) as tight:
        assert decode_mutant(roomy, large) == ("ok", 1)
        for number in range(60, 72):
            if number % 3 == 0:
                assert decode_mutant(tight, large) == ("died decoder_oom", 0)
            assert decode_mutant(tight, mutant(number)) == decode_mutant(roomy, mutant(number))
        assert (tight.restarts, roomy.restarts) == (4, 0)


def test_no_row_for_a_rejected_mutant(tmp_path: Path) -> None:
    """A whole job over some: each has one outcome, those that failed have no row."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(7, TOTAL, 200):
        (folder / f"{number}.mp4").write_bytes(mutant(number).data)
    output = str(tmp_path / "tables")
    job = make_job(folder, output, limits={"isolate": True, "task_minutes": 1})
    assert run_job(job).exit_code == 0
    tables = read_tables(open_store(output))
    check_no_key_twice(tables)
    outcomes = {r["video_id"]: r for r in rows_of(tables, "coverage")}
    assert len(outcomes) == len(list(folder.iterdir()))
    rows = [r["video_id"] for r in rows_of(tables, "frames")]
    for video_id, row in outcomes.items():
        assert rows.count(video_id) == row["frames"]
        assert row["status"] != "failed" or row["frames"] == 0
    assert {r["status"] for r in outcomes.values()} == {"ok", "partial", "failed"}
