"""A real S3 server for the tests, and one bucket per test.

The server is Ceph's radosgw (one monitor, one OSD, one gateway, on loopback); Debian has it:
`apt-get install --no-install-recommends ceph-mon ceph-osd radosgw`. Where it is missing, moto's
mock takes its place and the summary of the test run says so; FAIL_WITHOUT_S3=1 forbids that.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "osdmaptool")
START_S = 60
REGION = "us-east-1"

CONF = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{mon_port}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
run_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
# a gateway wants an encrypted session with the monitor, which needs keys
ms_mon_client_mode = crc
# the waits between tries at a start, which are seconds by default
mon_client_hunt_interval = 0.1
mon_client_hunt_interval_backoff = 1.0
objecter_tick_interval = 0.2
objecter_timeout = 0.5
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
# one copy of everything
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
[mon]
mon_data = {folder}/mon
mon_cluster_log_file = {folder}/cluster.log
mon_allow_pool_size_one = true
mon_data_avail_crit = 0
mon_data_avail_warn = 1
[osd]
osd_data = {folder}/osd
osd_objectstore = {objects}
osd_crush_update_on_start = false
osd_mon_shutdown_timeout = 1
# how long a new bucket waits for a gateway that was killed to be given up
osd_client_watch_timeout = 2
memstore_device_bytes = {size_bytes}
bluestore_block_size = {size_bytes}
bluestore_fsck_on_mkfs = false
bluestore_rocksdb_cf = false
bdev_aio_poll_ms = 10
[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
"""


class Server(Protocol):
    """Where the tests' S3 is and how to get in."""

    endpoint_url: str
    access_key: str
    secret_key: str
    real: bool
    name: str


class Gateway:
    """Ceph's S3 in one folder. `bluestore` keeps acknowledged objects over any kill -9."""

    real = True

    def __init__(
        self, folder: Path, objects: Literal["memstore", "bluestore"], size_bytes: int = 8 * 2**30
    ) -> None:
        self.folder = folder
        mon_port, self.port = _free_ports(2)
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self.access_key, self.secret_key = uuid.uuid4().hex[:20].upper(), uuid.uuid4().hex
        self.fsid, self.mon_port = str(uuid.uuid4()), mon_port
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        self.conf = folder / "ceph.conf"
        self.conf.write_text(
            CONF.format(
                fsid=self.fsid,
                mon_port=mon_port,
                folder=folder,
                objects=objects,
                size_bytes=size_bytes,
                port=self.port,
            )
        )
        said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True)
        self.name = f"radosgw, {' '.join(said.stdout.split()[:3])}, {objects}"
        atexit.register(self.stop)

    def start(self) -> None:
        """Makes the cluster and its user, and waits until the gateway answers."""
        maps = [str(self.folder / "monmap"), str(self.folder / "osdmap")]
        address = f"[v2:127.0.0.1:{self.mon_port}]"
        mkfs = ("-i", "0", "--mkfs", "--osd-uuid", str(uuid.uuid4()))
        with (self.folder / "mkfs.out").open("wb") as out:
            disk = subprocess.Popen(
                ["ceph-osd", "-c", self.conf, *mkfs], stdout=out, stderr=subprocess.STDOUT
            )
        self._tool("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", address, maps[0])
        self._tool("osdmaptool", "-c", self.conf, maps[1], "--createsimple", "1")
        self._tool("ceph-mon", "-c", self.conf, "-i", "a", "--mkfs", "--monmap", maps[0],
                   "--osdmap", maps[1])  # fmt: skip
        self._spawn("ceph-mon", "-i", "a")
        assert disk.wait(START_S) == 0, (self.folder / "mkfs.out").read_text()[-2000:]
        self._spawn("ceph-osd", "-i", "0")
        self._spawn("radosgw", "-n", "client.rgw")
        self._tool("radosgw-admin", "-c", self.conf, "-n", "client.rgw", "user", "create",
                   "--uid=test", "--display-name=test", f"--access-key={self.access_key}",
                   f"--secret-key={self.secret_key}")  # fmt: skip
        self._await_port()

    def kill_gateway(self) -> None:
        """kill -9: requests under way get a reset, later ones are refused."""
        daemon = self.running.pop("radosgw")
        daemon.kill()
        daemon.wait()

    def start_gateway(self) -> None:
        """Brings the gateway back at the same address."""
        self._spawn("radosgw", "-n", "client.rgw")
        self._await_port()

    def pause_gateway(self, pause: bool) -> None:
        """Stops it from answering, or lets it go on."""
        self.running["radosgw"].send_signal(signal.SIGSTOP if pause else signal.SIGCONT)

    def stop(self) -> None:
        """Ends the daemons, the gateway first; a second time does nothing."""
        while self.running:
            _, daemon = self.running.popitem()
            daemon.kill()
            daemon.wait()

    def _spawn(self, binary: str, *args: str) -> None:
        # the kernel ends it with the test process, however that ends
        bound = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.folder / f"{binary}.out").open("ab") as out:
            self.running[binary] = subprocess.Popen(
                [*bound, binary, "-c", str(self.conf), *args, "-f"],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _tool(self, *command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, timeout=START_S)

    def _await_port(self) -> None:
        until = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                dead = [n for n, daemon in self.running.items() if daemon.poll() is not None]
                if dead or time.monotonic() > until:
                    raise RuntimeError(
                        f"radosgw did not start ({dead}); see {self.folder}"
                    ) from None
                time.sleep(0.02)


@dataclass
class Moto:
    """The mock: checks no credentials, and conditional writes hold only by its lock."""

    endpoint_url: str
    access_key: str = "mock"
    secret_key: str = "mock"
    real: bool = False
    name: str = "moto, a mock: radosgw is not installed"


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


_USED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def s3_server(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[Server]:
    """The session's S3 server: radosgw in memory, or moto where it is missing."""
    if all(shutil.which(b) for b in BINARIES):
        gateway = Gateway(tmp_path_factory.mktemp("ceph"), "memstore")
        try:
            gateway.start()
            pytestconfig.stash.setdefault(_USED, []).append(gateway.name)
            yield gateway
        finally:
            gateway.stop()
        return
    if os.environ.get("FAIL_WITHOUT_S3") == "1":
        pytest.fail("radosgw is not installed and FAIL_WITHOUT_S3=1")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    mock = Moto(f"http://{host}:{port}")
    pytestconfig.stash.setdefault(_USED, []).append(mock.name)
    yield mock
    server.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that asks for a server."""
    for item in items:
        if {"s3_server", "durable_s3"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("s3")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says which S3 server the tests ran on."""
    for name in config.stash.get(_USED, []):
        terminalreporter.write_line(f"S3 server: {name}")


def use_server(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """Puts the server's address and credentials where the usual chain finds them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")


def make_bucket(server: Server) -> str:
    """A new empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    boto_client(server.endpoint_url, server.access_key, server.secret_key).create_bucket(
        Bucket=name
    )
    return name


@cache
def boto_client(endpoint_url: str, access_key: str, secret_key: str) -> Any:
    """A plain client, for what the product does not do; made once, as that takes 0.3 s."""
    import boto3  # type: ignore[import-untyped]

    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name=REGION,
    )


@pytest.fixture
def s3_bucket(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of the test's own; the environment leads to it."""
    use_server(monkeypatch, s3_server)
    return make_bucket(s3_server)


@pytest.fixture
def real_s3(s3_server: Server) -> Gateway:
    """The server, for what the mock cannot show."""
    if not isinstance(s3_server, Gateway):
        pytest.skip("radosgw is not installed, and moto checks no credentials")
    return s3_server


@pytest.fixture(scope="module")
def durable_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of the module's own, on bluestore, to be killed and brought back."""
    if not all(shutil.which(b) for b in BINARIES):
        if os.environ.get("FAIL_WITHOUT_S3") == "1":
            pytest.fail("radosgw is not installed and FAIL_WITHOUT_S3=1")
        pytest.skip("radosgw is not installed, and moto loses everything when it dies")
    gateway = Gateway(tmp_path_factory.mktemp("ceph"), "bluestore")
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()
