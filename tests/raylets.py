"""Ray clusters of several raylets on this machine, with a dashboard, in a process of their own.

As a script: starts the cluster that its environment describes, says where it is as a line of JSON,
kills a node per line on stdin (by kill -9), and ends with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STARTED = "cluster: "

QUICK = {
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "6",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "120",
}
"""A lost node is found within seconds, metrics are told every second."""


class Raylets:
    """A cluster that is up."""

    def __init__(self, process: subprocess.Popen[str], facts: Mapping[str, Any]) -> None:
        self._process = process
        self.dashboard: str = facts["dashboard"]
        self.metrics_ports: list[int] = list(facts["metrics_ports"])
        """Of the agent of each node that is left, the head's first."""

    def kill_node(self) -> None:
        """Kills the raylet of the node with most decoders, and so everything on it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        what, _, port = self._process.stdout.readline().partition(" ")
        assert what == "killed"
        self.metrics_ports.remove(int(port))


@contextmanager
def raylets(home: Path, workers: tuple[int, ...], **env: str) -> Iterator[Raylets]:
    """A head without CPUs and a node per number of CPUs in `workers`.

    Args:
        home: an empty folder; Ray's files go there.
        env: what all processes of the cluster find in their environment, besides PATH.
    """
    binaries = Path(sys.executable).parent  # `python` on a node is this one
    with (home / "cluster.err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.raylets", json.dumps(workers)],
            env={
                "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT), "HOME": str(home), "RAY_TMPDIR": str(home), **QUICK, **env,
            },
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    with process:  # closes its stdin, which ends it
        assert process.stdout is not None
        line = next((x for x in process.stdout if x.startswith(STARTED)), None)
        if line is None:
            raise RuntimeError((home / "cluster.err").read_text()[-2000:])
        yield Raylets(process, json.loads(line.removeprefix(STARTED)))


def _main() -> None:
    from ray.cluster_utils import Cluster

    # any free port for its agent: by default all nodes of a machine want the same one
    size = {"object_store_memory": 200 * 2**20, "dashboard_agent_listen_port": 0}
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0, **size}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=n, **size) for n in json.loads(sys.argv[1])]
    facts = {
        "dashboard": f"http://{cluster.head_node.webui_url}",
        "metrics_ports": [n.metrics_export_port for n in (cluster.head_node, *nodes)],
    }
    print(STARTED + json.dumps(facts), flush=True)
    for _ in sys.stdin:
        victim = max(nodes, key=_decoders_of)
        nodes.remove(victim)
        cluster.remove_node(victim, allow_graceful=False)
        print("killed", victim.metrics_export_port, flush=True)
    cluster.shutdown()


def _decoders_of(node: Any) -> int:
    """How many of a raylet's children are decoder actors."""
    raylet = node.all_processes["raylet"][0].process.pid
    n = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        n += int(parent) == raylet and title.startswith(b"ray::Decoder")
    return n


if __name__ == "__main__":
    _main()
