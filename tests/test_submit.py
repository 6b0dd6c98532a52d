"""What travels with a job, which clusters are refused, and a night on three raylets, one killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.outputs import check_no_key_twice, check_same, read_tables
from tests.raylets import Raylets, raylets
from tests.s3 import REGION, Server, boto_client, make_bucket, use_server
from vidbatch.cluster.jobs import check_closed
from vidbatch.cluster.metric_names import METRICS, PREFIX
from vidbatch.config import load_job, parse_job
from vidbatch.demo import DATE_PATTERN, make_archive
from vidbatch.errors import ClusterError, UsageError
from vidbatch.ledger import COMMITS
from vidbatch.pipeline.run import run_job
from vidbatch.storage import open_store
from vidbatch.submit import collect_files, entrypoint, rayjob

ROOT = Path(__file__).resolve().parents[1]

MODEL = """
name: mean
version: v1
what: {adapter: python, class: "own.mean:Mean", files: [weights.bin], params: {path: mean.txt}}
"""

TEMPLATE = """
apiVersion: ray.io/v1
kind: RayCronJob
metadata: {name: vidbatch-nightly, namespace: video}
spec:
  suspend: true
  jobTemplate:
    entrypoint: python /app/jobs/nightly.py /job/job.yaml
    rayClusterSpec:
      headGroupSpec:
        template: {spec: {volumes: &v [{name: job, configMap: {name: old}}, {name: tmp}]}}
      workerGroupSpecs:
        - template: {spec: {volumes: *v}}
"""


# what travels -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job file with a model file, its class and its weights; and a file that nobody names."""
    (tmp_path / "models" / "own").mkdir(parents=True)
    tree = {
        "archive": {"uri": "s3://bucket/videos"},
        "sample": {"fps": 1},
        "models": [{"builtin": "quality"}, {"file": "models/mean.yaml"}],
        "output": {"uri": "s3://bucket/tables"},
        "engine": {"device": "cpu"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "models" / "mean.yaml").write_text(MODEL)
    (tmp_path / "models" / "own" / "mean.py").write_text("class Mean: ...")
    (tmp_path / "models" / "weights.bin").write_bytes(bytes([0, 159, 146]))
    (tmp_path / "secrets.env").write_text("nobody names me")
    return tmp_path


def test_what_the_job_names_travels_and_nothing_else(folder: Path) -> None:
    files = collect_files(load_job(folder / "job.yaml", ["limits.attempts=2"]))
    assert sorted(files) == [
        "job.yaml", "models/mean.yaml", "models/own/mean.py", "models/weights.bin"
    ]  # fmt: skip
    job = parse_job(yaml.safe_load(files["job.yaml"]), base_dir=Path("/somewhere"))
    assert job.engine.address == "auto" and job.limits.attempts == 2
    assert job.base_dir == "/somewhere"
    with_script = collect_files(load_job(folder / "job.yaml"), ROOT / "jobs" / "backfill.py")
    assert with_script["backfill.py"] == (ROOT / "jobs" / "backfill.py").read_bytes()


def test_what_may_not_travel(folder: Path, tmp_path: Path) -> None:
    def refused(says: str, *overrides: str) -> None:
        with pytest.raises(UsageError, match=says):
            collect_files(load_job(folder / "job.yaml", overrides))

    refused("write cuda or cpu", "engine.device=auto")
    refused("looks like a credential", "archive.uri=s3://me:password@bucket")
    (folder / "models" / "own" / "mean.py").write_text("aws_secret_access_key = 'x'")
    refused(r"mean\.py: holds what looks like a credential")
    (folder / "models" / "own" / "mean.py").write_text("class Mean: ...")
    with (folder / "models" / "weights.bin").open("wb") as file:
        file.truncate(65 * 2**20)
    refused("put weights into a store")
    (folder / "below").mkdir()
    job = folder / "below" / "job.yaml"
    job.write_text((folder / "job.yaml").read_text().replace("models/", "../models/"))
    with pytest.raises(UsageError, match="lies outside"):
        collect_files(load_job(job))


def test_the_command_of_a_job() -> None:
    assert entrypoint(None, ["--strict"]) == "exec python -m vidbatch run job.yaml --strict"
    said = entrypoint(Path("jobs/backfill.py"), ["--set", "a=b c"])
    assert said == "exec python backfill.py job.yaml --set 'a=b c'"


def test_a_rayjob_is_its_template_with_this_job(folder: Path) -> None:
    files = collect_files(load_job(folder / "job.yaml"))
    text = rayjob(TEMPLATE, files, ["--strict"])
    assert "&id" not in text and "job.yaml: |" in text
    config, job = yaml.safe_load_all(text)
    assert config["kind"] == "ConfigMap" and config["metadata"]["namespace"] == "video"
    assert yaml.safe_load(config["data"]["job.yaml"])["engine"]["address"] == "auto"
    assert config["binaryData"].keys() == {"models__weights.bin"}
    assert job["kind"] == "RayJob" and job["metadata"]["generateName"] == "vidbatch-nightly-"
    assert job["spec"]["entrypoint"].endswith("/job/job.yaml --strict")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        mounted, other = group["template"]["spec"]["volumes"]
        assert other == {"name": "tmp"}
        assert mounted["configMap"]["name"] == config["metadata"]["name"]
        assert {i["path"] for i in mounted["configMap"]["items"]} == files.keys()
        keys = {i["key"] for i in mounted["configMap"]["items"]}
        assert keys == config["data"].keys() | config["binaryData"].keys()
    assert rayjob(TEMPLATE, files, []).count("vidbatch-job-") == 3
    with pytest.raises(UsageError, match="no RayJob"):
        rayjob("kind: Pod", files, [])
    with pytest.raises(UsageError, match="no volume named `job`"):
        rayjob(TEMPLATE.replace("name: job", "name: jobs"), files, [])
    with pytest.raises(UsageError, match="more than a ConfigMap takes"):
        rayjob(TEMPLATE, {**files, "large": bytes(2**20)}, [])


def test_the_shipped_template_takes_a_job(folder: Path) -> None:
    template = (ROOT / "k8s" / "base" / "template.yaml").read_text()
    _, job = yaml.safe_load_all(rayjob(template, collect_files(load_job(folder / "job.yaml")), []))
    (given,) = (d["spec"]["jobTemplate"] for d in yaml.safe_load_all(template))
    assert job["spec"].keys() == given.keys()
    assert job["spec"]["rayClusterSpec"].keys() == given["rayClusterSpec"].keys()


# which clusters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (401, None, ""),
        (403, None, ""),
        (302, None, ""),
        (200, UsageError, "answers without a token: whoever reaches it can run code there"),
        (404, ClusterError, "is no Ray dashboard, or none that works: it answered 404"),
        (500, ClusterError, "it answered 500"),
    ],
)
def test_a_dashboard_is_asked_without_a_token_first(
    status: int, error: type[Exception] | None, says: str
) -> None:
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        if error is None:
            check_closed(address)
        else:
            with pytest.raises(error, match=says):
                check_closed(address)
        thread.join()
    assert asked == [("/api/jobs/", None)]


@pytest.mark.parametrize("address", ["ray://h:10001", "127.0.0.1:8265", "http://u:p@h", "http://"])
def test_an_address_is_one_of_a_dashboard(address: str) -> None:
    with pytest.raises(UsageError, match="expected http"):
        check_closed(address)


# three raylets ------------------------------------------------------------------------------------

TOKEN = "0123456789abcdef" * 4


def call(*args: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`vidbatch …` of somebody with that home and environment."""
    return subprocess.run(
        [sys.executable, "-m", "vidbatch", *args],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **env},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def clusters(
    s3_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Raylets, Raylets, Path]]:
    """Three raylets with a token, a head without one, and the file with the token."""
    if find_spec("aiohttp_cors") is None:
        if os.environ.get("FAIL_WITHOUT_RAY_DASHBOARD") == "1":
            pytest.fail("ray[default] is not installed and FAIL_WITHOUT_RAY_DASHBOARD=1")
        pytest.skip("ray[default] is not installed: there is no dashboard to submit to")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        use_server(patch, s3_server)
        store = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        store["AWS_DEFAULT_REGION"] = REGION
        homes = [Path(stack.enter_context(_short_folder())) for _ in range(2)]
        start = [
            lambda: raylets(
                homes[0], (3, 3), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **store
            ),
            lambda: raylets(homes[1], (), RAY_AUTH_MODE="disabled"),
        ]
        with ThreadPoolExecutor() as pool:  # each takes ten seconds, most of them waiting
            closed, open_to_all = pool.map(lambda one: stack.enter_context(one()), start)
        yield closed, open_to_all, token


def _short_folder() -> Any:
    """Paths of sockets may have 107 characters."""
    import tempfile

    return tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")


@pytest.mark.ray
def test_without_a_token_nothing_is_submitted(
    clusters: tuple[Raylets, Raylets, Path], folder: Path, tmp_path: Path
) -> None:
    closed, open_to_all, token = clusters
    submit = ("submit", str(folder / "job.yaml"), "--address")

    def refused(address: str, code: int, says: str, **env: str) -> None:
        done = call(*submit, address, home=tmp_path, **env)
        assert (done.returncode, done.stdout) == (code, "")
        assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr

    refused(closed.dashboard, 2, "the cluster wants a token")
    refused(closed.dashboard, 1, "Invalid authentication token", RAY_AUTH_TOKEN="x" * 64)
    # an open cluster is refused, also to those who have a token and whatever Ray's variables say
    held = {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_API_SERVER_ADDRESS": closed.dashboard}
    refused(open_to_all.dashboard, 2, "answers without a token", **held)


@pytest.mark.ray
def test_the_exit_code_of_the_job_comes_back(
    clusters: tuple[Raylets, Raylets, Path], folder: Path, tmp_path: Path
) -> None:
    closed, _, _ = clusters
    script = tmp_path / "ends.py"
    script.write_text("import os, sys\nprint(sorted(os.listdir()))\nsys.exit(int(sys.argv[2]))\n")

    def run(code: int) -> subprocess.CompletedProcess[str]:
        return call(
            "submit", str(folder / "job.yaml"), "--address", closed.dashboard,
            "--script", str(script), "--", str(code), home=tmp_path, RAY_AUTH_TOKEN=TOKEN,
        )  # fmt: skip

    codes = (0, 3, 5, 77)
    with ThreadPoolExecutor(len(codes)) as pool:
        ended = dict(zip(codes, pool.map(run, codes), strict=True))
    assert [ended[c].returncode for c in codes] == [0, 3, 5, 1]
    for done in ended.values():
        assert "['ends.py', 'job.yaml', 'models']" in done.stderr and not done.stdout
        assert TOKEN not in done.stderr
    assert "gave no exit code of vidbatch (77)" in ended[77].stderr


@pytest.mark.ray
@pytest.mark.timeout(400)  # a minute where nothing else runs
def test_a_night_on_three_raylets_of_which_one_is_killed(
    clusters: tuple[Raylets, Raylets, Path],
    s3_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed, _, token = clusters
    use_server(monkeypatch, s3_server)
    bucket = make_bucket(s3_server)
    make_archive(tmp_path / "videos", seconds=3)
    client = boto_client(s3_server.endpoint_url, s3_server.access_key, s3_server.secret_key)
    for path in sorted((tmp_path / "videos").rglob("*")):
        if path.is_file():
            client.upload_file(str(path), bucket, f"videos/{path.relative_to(tmp_path / 'videos')}")
    tree = {
        "archive": {
            "uri": f"s3://{bucket}/videos/",
            "date": {"from": "key", "pattern": DATE_PATTERN, "tz": "UTC"},
        },
        "sample": {"fps": 5},
        "models": [{"builtin": "quality"}, {"builtin": "colour"}],
        "output": {"uri": f"s3://{bucket}/tables"},
        "clips": {"length_s": 1, "split_above": "2KiB"},
        "limits": {"task_minutes": 0.02},
        # what is left after a node went holds all of them
        "engine": {"device": "cpu", "decoders": 2, "predictors": 1, "object_store_cap": "100MiB"},
    }
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(tree))
    store = open_store(f"s3://{bucket}/tables")
    killed_at: list[int] = []
    ended = threading.Event()

    def kill_in_the_middle() -> None:
        while not ended.wait(0.02):
            if done := sum(1 for _ in store.list_keys(f"{COMMITS}/")):
                closed.kill_node()
                killed_at.append(done)
                return

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    try:
        done = call(
            "submit", str(job_file), "--address", closed.dashboard,
            "--script", str(ROOT / "jobs" / "nightly.py"), "--", "--log", "json",
            home=tmp_path, RAY_AUTH_TOKEN_PATH=str(token),
        )  # fmt: skip
    finally:
        ended.set()
        killer.join()
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    summary = next(e for e in events if e["event"] == "summary")
    tables = read_tables(store)
    check_no_key_twice(tables)
    alone = {**tree, "output": {"uri": str(tmp_path / "alone")}, "engine": {"address": "none"}}
    assert run_job(parse_job(alone, base_dir=tmp_path)).exit_code == 0
    check_same(tables, read_tables(open_store(str(tmp_path / "alone"))))

    commits = sum(1 for _ in store.list_keys(f"{COMMITS}/"))
    assert killed_at and killed_at[0] < commits, "the node went in the middle"
    assert summary["engine"]["decoder_deaths"] + summary["engine"]["predictor_restarts"] >= 1
    assert {e["run"] for e in events if e["event"] == "task"} == {summary["run"]}
    assert {e["event"] for e in events} >= {"note", "started", "task", "finished", "summary"}
    assert summary["engine"]["decoder_seconds"]["decode"] > 0

    exported = scrape(closed.metrics_ports)
    assert exported.keys() <= METRICS.keys()
    assert exported["vidbatch_runs_total"] == {(("exit_code", "0"),): 1.0}
    assert exported["vidbatch_tasks_total"] == {(): summary["counts"]["tasks"]}
    told_by_head = {n for n, m in METRICS.items() if m.told_by == "driver" and m.kind == "counter"}
    missing = told_by_head - exported.keys()
    assert missing <= {"vidbatch_failures_total", "vidbatch_deaths_total"}, "nothing failed"
    for name, samples in exported.items():
        for labels in samples:
            for label, value in labels:
                known = METRICS[name].labels[label]
                assert not known or value in known, f"{name}: {label}={value}"


def scrape(ports: list[int]) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Our metrics of some nodes: name → labels (those of ours) → sum."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(
            rf"^{PREFIX}(vidbatch_\w+)\{{(.*)\}} (\S+)$", text, re.M
        ):
            ours = METRICS[name].labels if name in METRICS else {}
            key = tuple(
                sorted((k, v) for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k in ours)
            )
            of = found.setdefault(name, {})
            of[key] = of.get(key, 0.0) + float(value)
    return found
