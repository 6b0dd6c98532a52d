"""The whole chaos suite: `python -m tests.chaos.run --seed N [--only SCENARIO …] [--scale 0.1]`.

Prints one table; the exit code is 1 if a row was lost or doubled, an object changed or could not
be read, or anything else was not as promised.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tests.chaos import cuts, kills, nodes, store_faults
from tests.chaos.stage import Stage, Tally
from tests.s3 import Gateway


@dataclass(frozen=True)
class Scenario:
    """A kind of fault, and how often it is to happen."""

    play: Callable[[Stage, int, Tally], None]
    n: int
    objects: Literal["memstore", "bluestore"] = "memstore"


SCENARIOS = {
    "drivers": Scenario(kills.drivers, 50),
    "workers": Scenario(kills.workers, 60),
    "children": Scenario(kills.children, 40),
    "nodes": Scenario(nodes.nodes, 20),
    "cuts": Scenario(cuts.cuts, 10),
    "zombies": Scenario(store_faults.zombies, 200),
    "lost": Scenario(store_faults.lost_answers, 300),
    "network": Scenario(store_faults.lossy_runs, 500),
    "server": Scenario(store_faults.server_killed, 5, "bluestore"),
    "credentials": Scenario(store_faults.credentials, 20),
    "replaced": Scenario(store_faults.source_replaced, 20),
}


def play(name: str, seed: int, scale: float = 1.0) -> Tally:
    """One scenario on a server of its own; what happens follows from the seed."""
    scenario = SCENARIOS[name]
    tally, began = Tally(name), time.monotonic()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        gateway = Gateway(Path(folder) / "ceph", scenario.objects)
        try:
            gateway.start()
            stage = Stage(gateway, Path(folder), seed * 1_000_003 + zlib.crc32(name.encode()))
            os.environ.update(stage.env)
            scenario.play(stage, max(1, round(scenario.n * scale)), tally)
        except Exception as error:  # the others are still to come, and the table is to be printed
            traceback.print_exc()
            tally.wrong.append(f"the scenario itself: {error!r}"[:500])
        finally:
            gateway.stop()
            os.environ.clear()
            os.environ.update(before)
    tally.seconds = time.monotonic() - began
    return tally


HEADS = ("scenario", "faults injected", "runs", "reads", "lost", "doubled", "changed", "unreadable",
         "else", "seconds")  # fmt: skip


def table(tallies: Sequence[Tally]) -> str:
    """Markdown: a row per scenario, and their sum."""
    lines = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for t in tallies:
        faults = ", ".join(f"{k} {action}" for action, k in t.faults.most_common() if k)
        cells = (t.name, faults, t.runs, t.reads, t.lost, t.doubled, t.changed, t.unreadable,
                 len(t.wrong), f"{t.seconds:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=[*SCENARIOS], default=[])
    parser.add_argument("--scale", type=float, default=1.0, help="of the faults injected")
    given = parser.parse_args()
    print(f"chaos, seed {given.seed}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", flush=True)
    tallies = []
    for name in given.only or SCENARIOS:
        tallies.append(play(name, given.seed, given.scale))
        print(table(tallies[-1:]).splitlines()[-1], flush=True)
        for line in tallies[-1].wrong[:20]:
            print(f"  WRONG: {line}", flush=True)
    print(f"\n{table(tallies)}")
    bad = [t.name for t in tallies if t.bad]
    print(
        f"\nseed {given.seed}: " + (f"NOT AS PROMISED: {', '.join(bad)}" if bad else "as promised")
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
