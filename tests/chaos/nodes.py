"""Raylets that are killed: a cluster of several on this machine, in a process of its own.

As a script: starts the cluster, says its address, and replaces as many nodes as a line on stdin
says: by kill -9, then as many new ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

from tests.chaos.driver import Accidents, Driver
from tests.chaos.stage import Stage, Tally
from tests.raylets import QUICK, ROOT
from vidbatch.ledger import COMMITS

NODES, CPUS = 3, 2
RAY = {**QUICK, "RAY_AUTH_MODE": "disabled"}
VIDEOS = 32
SLOW_S = 1.0
"""Of every clip, without work: a loss meets decoders that are busy."""


def nodes(stage: Stage, n: int, tally: Tally) -> None:
    """One or two of three raylets die by SIGKILL while the night goes on, and others come."""
    rng = Random(stage.rng.random())
    with _cluster(stage.env) as (address, replace):

        def lose(driver: Driver) -> None:
            k = min(rng.choice((1, 1, 2)), n - tally.faults["node killed"])
            replace(k)
            tally.faults["node killed"] += k

        while tally.faults["node killed"] < n:
            night(stage, address, tally, lose, lambda: tally.faults["node killed"] >= n)


def night(
    stage: Stage,
    address: str,
    tally: Tally,
    strike: Callable[[Driver], None],
    enough: Callable[[], bool],
    env: Mapping[str, str] = {},
) -> None:
    """One run on a cluster that is struck whenever something was committed since the last time."""
    archive = stage.archive(VIDEOS)
    want = stage.reference(archive)
    output = stage.output()
    pools = {"device": "cpu", "decoders": 3, "predictors": 2, "object_store_cap": "100MiB"}
    tree = stage.tree(archive, output, engine={"address": address, **pools})
    store = stage.store(output)
    with stage.watched(output, tally):
        for _ in range(3):
            driver = stage.start(tree, {**RAY, **env}, Accidents(slow_s=SLOW_S))
            seen = 0
            while driver.alive and not enough():
                if (done := sum(1 for _ in store.list_keys(f"{COMMITS}/"))) > seen:
                    seen = done
                    strike(driver)
                time.sleep(0.1)
            tally.runs += 1
            if (code := driver.end()) != 1:
                break
        if code:
            tally.wrong.append(f"exit {code}: {driver.said()}")
    stage.judge(output, want, tally)


@contextmanager
def _cluster(env: Mapping[str, str]) -> Iterator[tuple[str, Callable[[int], None]]]:
    """Address of a cluster, and what replaces some of its nodes."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as home:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nodes"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": home,
                 "RAY_TMPDIR": home, **RAY, **env},
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        with process:
            assert process.stdin is not None and process.stdout is not None
            to, said = process.stdin, process.stdout

            def replace(k: int) -> None:
                to.write(f"{k}\n")
                to.flush()
                assert _line(said) == "replaced"

            yield _line(said), replace


def _line(said: Any) -> str:
    """The next line that begins with a colon, which nothing of Ray's does."""
    line: str = next((x for x in said if x.startswith(":")), "")
    return line[1:].strip()


def _main() -> None:
    from ray.cluster_utils import Cluster

    size = {"object_store_memory": 200 * 2**20, "dashboard_agent_listen_port": 0}
    head = {"num_cpus": 0, "include_dashboard": False, **size}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    workers = [cluster.add_node(num_cpus=CPUS, **size) for _ in range(NODES)]
    print(f":{cluster.address}", flush=True)
    rng = Random(1)
    for line in sys.stdin:
        for _ in range(int(line)):
            cluster.remove_node(workers.pop(rng.randrange(len(workers))), allow_graceful=False)
        workers += [cluster.add_node(wait=False, num_cpus=CPUS, **size) for _ in range(int(line))]
        print(":replaced", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main()
