"""The CronJob's pod against a server that speaks the three calls of the Kubernetes API it makes."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.clips import make_clip
from tests.k8s_manifests import K8S, crd_schema, one, refusals, render
from vidbatch.config import load_job
from vidbatch.launch import launch

NAME, UID = "vidbatch-nightly-29384720", "0b7e"


@pytest.fixture(scope="module")
def start() -> ModuleType:
    """k8s/start.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("k8s_start", K8S / "start.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Cluster:
    """One namespace: a template, RayJobs, and an operator that is a list of states."""

    def __init__(self) -> None:
        self.template: dict[str, Any] | None = one(render("overlays/gpu"), "RayCronJob")
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.states: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.answers: list[int] = []
        """Statuses to answer first, whatever is asked."""
        self.driver: Callable[[], object] = lambda: None
        """Runs when a RayJob is made."""

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append(f"{method} {path}")
        if self.answers:
            return self.answers.pop(0), {"message": "as the test says"}
        kind, _, name = path.partition("/")
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.rayjobs:
                return 409, {}
            made = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            body["metadata"]["creationTimestamp"] = made
            self.rayjobs[name] = body
            self.driver()
            return 201, body
        if kind == "raycronjobs":
            return (200, self.template) if self.template else (404, {})
        if name not in self.rayjobs:
            return 404, {}
        if self.states:
            self.rayjobs[name]["status"] = self.states.pop(0)
        return 200, self.rayjobs[name]


@pytest.fixture
def cluster(
    start: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """The API at the address that a pod is told, and the pod's service account."""
    found = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET", None)

        def do_POST(self) -> None:
            self._reply("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, method: str, body: Any) -> None:
            root = "/apis/ray.io/v1/namespaces/vidbatch/"
            status: int = 401
            answer: Any = {}
            if self.headers["Authorization"] == "Bearer t0ken" and self.path.startswith(root):
                status, answer = found.answer(method, self.path.removeprefix(root), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("t0ken\n")
    monkeypatch.setattr(start, "ACCOUNT", account)
    monkeypatch.setattr(start, "POLL_S", 0.01)
    monkeypatch.setattr(start, "PATIENCE_S", 0.2)
    api = start.Api
    monkeypatch.setattr(start, "Api", lambda url, *rest: api(url.replace("https", "http"), *rest))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
    monkeypatch.setenv("NAMESPACE", "vidbatch")
    monkeypatch.setenv("JOB_NAME", NAME)
    monkeypatch.setenv("JOB_UID", UID)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job over an archive of one video, to be run in this process."""
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "a.mp4").write_bytes(make_clip(frames=10))
    path = tmp_path / "job.yaml"
    tree = {
        "archive": {"uri": str(archive)},
        "sample": {"every": 5},
        "output": {"uri": str(tmp_path / "tables")},
        "engine": {"address": "none"},
        "limits": {"isolate": False},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def _run(start: ModuleType, job: Path) -> int:
    code: int = start.main(["vidbatch-nightly", str(job)])
    return code


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}


def test_a_night_from_its_rayjob_to_its_verdict(
    start: ModuleType, cluster: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.driver = lambda: launch(load_job(job))
    cluster.states = [{"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, DONE]
    assert _run(start, job) == 0
    made = cluster.rayjobs[NAME]
    crd_schema("RayJob").validate({k: v for k, v in made.items() if k != "status"})
    assert not refusals(made)
    assert cluster.template is not None
    assert made["spec"] == cluster.template["spec"]["jobTemplate"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": NAME, "uid": UID}
    said = capsys.readouterr().err
    assert said.count("state Running") == 1 and "ended with exit code 0" in said
    # the next night: all is committed, so nothing is made and no node started
    cluster.rayjobs.clear()
    cluster.calls.clear()
    assert _run(start, job) == 0
    assert cluster.calls == [f"GET rayjobs/{NAME}"]
    assert "nothing to do" in capsys.readouterr().err


def test_a_starter_that_was_lost_is_replaced(
    start: ModuleType, cluster: Cluster, job: Path
) -> None:
    """The second one finds the RayJob, neither surveys nor makes another, and waits."""
    before = datetime.now(UTC).isoformat(timespec="seconds")
    cluster.rayjobs[NAME] = {"metadata": {"creationTimestamp": before}}
    launch(load_job(job))
    cluster.states = [RUNNING, DONE]
    assert _run(start, job) == 0
    assert not [c for c in cluster.calls if c.startswith("POST")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": {"fps": 1, "every": 2}}, "exactly one of"),
        ({"limits": {"max_video_hours": 1e-9}}, "max_video_hours"),
    ],
)
def test_what_is_forbidden_starts_no_node(
    change: dict[str, Any],
    message: str,
    start: ModuleType,
    cluster: Cluster,
    job: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job.write_text(yaml.safe_dump({**yaml.safe_load(job.read_text()), **change}))
    assert _run(start, job) == 2
    assert not cluster.rayjobs
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "exit_code", "verdict"),
    [
        (DONE, 0, 0),
        (DONE, 3, 0),
        (DONE, 4, 4),  # shown to KubeRay as a success, so that it is not retried
        (DONE, 5, 5),
        (DONE, None, 2),  # the driver gave up before it began a run
        (FAILED, 1, 1),
        (FAILED, 0, 1),  # what came after the run failed
        (FAILED, None, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, None, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 5, 5),
    ],
)
def test_the_verdict_is_the_runs_own(
    end: dict[str, Any],
    exit_code: int | None,
    verdict: int,
    start: ModuleType,
    cluster: Cluster,
    job: Path,
    tmp_path: Path,
) -> None:
    def drive() -> None:
        if exit_code is not None:
            run = tmp_path / f"tables/_vidbatch/runs/{datetime.now(UTC):%Y%m%dT%H%M%S}-001-abcdef"
            run.mkdir(parents=True)
            (run / "job.yaml").write_text("{}")
            (run / "summary.json").write_text(json.dumps({"exit_code": exit_code}))

    old = tmp_path / "tables/_vidbatch/runs/20200101T000000-001-abcdef"
    old.mkdir(parents=True)
    (old / "job.yaml").write_text("{}")
    (old / "summary.json").write_text('{"exit_code": 4}')
    cluster.driver = drive
    cluster.states = [end]
    assert _run(start, job) == verdict


def test_an_api_that_stammers_is_asked_again(
    start: ModuleType, cluster: Cluster, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "PATIENCE_S", 30.0)
    cluster.answers = [503, 500, 429]
    cluster.driver = lambda: launch(load_job(job))
    cluster.states = [DONE]
    assert _run(start, job) == 0


def test_an_api_that_refuses_or_is_away_is_another_starters_matter(
    start: ModuleType, cluster: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.answers = [403]
    assert _run(start, job) == start.STARTER_FAILED
    assert "answered 403" in capsys.readouterr().err
    cluster.answers = [503] * 1000
    assert _run(start, job) == start.STARTER_FAILED
    policy = one(render("overlays/gpu"), "CronJob")["spec"]["jobTemplate"]["spec"]
    final = policy["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert start.STARTER_FAILED not in final and policy["backoffLimit"] >= 1


def test_without_a_template_the_night_fails(
    start: ModuleType, cluster: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.template = None
    assert _run(start, job) == 1
    assert "there is no RayCronJob vidbatch-nightly" in capsys.readouterr().err


def test_a_rayjob_that_is_deleted_ends_the_night(
    start: ModuleType, cluster: Cluster, job: Path
) -> None:
    cluster.driver = cluster.rayjobs.clear
    assert _run(start, job) == 1
