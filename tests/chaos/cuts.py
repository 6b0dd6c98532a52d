"""The network between raylets is cut: every node in a network namespace of its own, one bridge.

As a script, which runs as root in namespaces of its own (`unshare -nm`): starts an S3 server, the
cluster and a run, pulls the plug of nodes, and says what came of it as a line of JSON.

    nodes 10.77.0.11 … ──── bridge 10.77.0.1: head, driver, proxy ──── loopback: the S3 server
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random

from tests.chaos.driver import Driver
from tests.chaos.nodes import CPUS, NODES, RAY, night
from tests.chaos.stage import Stage, Tally
from tests.raylets import ROOT
from tests.s3 import Gateway

HEAD = "10.77.0.1"
BLINK_S, LONG_S = 1.0, 8.0
"""Below and above the three seconds after which a node counts as dead."""


def can_cut() -> bool:
    """Whether this user may make network namespaces and join them."""
    tried = "ip link add v0 type veth peer name v1 && nsenter --version"
    found = subprocess.run(["unshare", "-nm", "sh", "-c", tried], capture_output=True, check=False)
    return found.returncode == 0


def cuts(stage: Stage, n: int, tally: Tally) -> None:
    """A node's network goes for a second, or for so long that the cluster gives it up."""
    if not can_cut():
        tally.wrong.append("network namespaces are not allowed here: nothing was cut")
        return
    script = [sys.executable, "-m", "tests.chaos.cuts", str(n), str(stage.rng.random())]
    done = subprocess.run(
        ["unshare", "-nm", *script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    tally.faults += Counter(found.pop("faults"))
    tally.wrong += found.pop("wrong")
    for name in ("runs", "reads", "lost", "doubled", "changed", "unreadable"):
        setattr(tally, name, getattr(tally, name) + found[name])


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class _Node:
    """A namespace with a cable to the bridge, and a raylet in it."""

    def __init__(self, i: int, home: str, env: dict[str, str]) -> None:
        self.plug, self._ip, self._home, self._env = f"v{i}", f"10.77.0.{11 + i}", home, env
        self.space = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        time.sleep(0.3)  # it must have its own namespace before the cable is put into it
        _sh("ip", "link", "add", self.plug, "type", "veth", "peer", "name", "eth0",
            "netns", str(self.space.pid))  # fmt: skip
        _sh("ip", "link", "set", self.plug, "master", "br0", "up")
        self._inside("ip", "addr", "add", f"{self._ip}/24", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")
        self._inside("ip", "link", "set", "lo", "up")
        self.start()

    def _inside(self, *command: str) -> None:
        _sh("nsenter", "-t", str(self.space.pid), "-n", *command)

    def start(self) -> None:
        """A raylet in it; waits for its socket, as two that start at once choose the same name."""
        sockets = Path(self._home) / "ray" / "session_latest" / "sockets"
        before = set(sockets.glob("raylet*"))
        self.raylet = subprocess.Popen(
            ["nsenter", "-t", str(self.space.pid), "-n", "ray", "start", "--block",
             f"--address={HEAD}:6379", f"--node-ip-address={self._ip}", f"--num-cpus={CPUS}",
             f"--object-store-memory={200 * 2**20}"],
            env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 60
        while self.raylet.poll() is None and time.monotonic() < until:
            if set(sockets.glob("raylet*")) - before:
                return
            time.sleep(0.1)

    def cut(self, seconds: float) -> None:
        """Pulls the plug for so long."""
        _sh("ip", "link", "set", self.plug, "down")
        time.sleep(seconds)
        _sh("ip", "link", "set", self.plug, "up")

    def end(self) -> None:
        """Ends the raylet and the namespace."""
        for process in (self.raylet, self.space):
            process.kill()
            process.wait()


def _await_head() -> None:
    until = time.monotonic() + 120
    while True:
        try:
            socket.create_connection((HEAD, 6379), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _keep(nodes: list[_Node], over: threading.Event) -> None:
    """Starts raylets again that have ended: one given up while it was cut off ends itself."""
    while not over.wait(1.0):
        for node in nodes:
            if node.raylet.poll() is not None:
                node.start()


def _main(n: int, seed: float) -> Tally:
    tally, rng = Tally("cuts"), Random(seed)
    _sh("ip", "link", "set", "lo", "up")
    _sh("ip", "link", "add", "br0", "type", "bridge")
    _sh("ip", "addr", "add", f"{HEAD}/24", "dev", "br0")
    _sh("ip", "link", "set", "br0", "up")
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp"))
        gateway = Gateway(Path(home) / "ceph", "memstore")
        stack.callback(gateway.stop)
        gateway.start()
        stage = Stage(gateway, Path(home), rng.randrange(2**31))
        os.environ.update(stage.env)
        proxy = stack.enter_context(stage.proxy(HEAD))
        env = {**stage.env, "AWS_ENDPOINT_URL": proxy.endpoint_url, **RAY, "HOME": home,
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
               "PYTHONPATH": str(ROOT), "RAY_TMPDIR": home}  # fmt: skip
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", f"--node-ip-address={HEAD}", "--port=6379",
             "--num-cpus=0", "--include-dashboard=false",
             f"--object-store-memory={200 * 2**20}"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(head.wait)
        stack.callback(head.kill)
        _await_head()
        nodes = []
        for i in range(NODES):
            nodes.append(_Node(i, home, env))
            stack.callback(nodes[-1].end)
        over = threading.Event()
        keeper = threading.Thread(target=_keep, args=(nodes, over))
        keeper.start()
        stack.callback(keeper.join)
        stack.callback(over.set)

        def strike(driver: Driver) -> None:
            node, is_long = rng.choice(nodes), rng.random() < 0.5
            node.cut(LONG_S if is_long else BLINK_S)
            tally.faults["cut for 8 s" if is_long else "cut for 1 s"] += 1

        def enough() -> bool:
            return tally.faults.total() >= n

        while not enough():
            night(stage, f"{HEAD}:6379", tally, strike, enough,
                  {"AWS_ENDPOINT_URL": proxy.endpoint_url, "RAY_TMPDIR": home})  # fmt: skip
    return tally


if __name__ == "__main__":
    print(json.dumps(vars(_main(int(sys.argv[1]), float(sys.argv[2])))))
