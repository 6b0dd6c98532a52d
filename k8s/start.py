"""One night on Kubernetes: looks whether there is work, makes a RayJob, waits for its end.

    python /app/k8s/start.py TEMPLATE JOB_FILE       (the CronJob's pod; see base/nightly.yaml)

    job file, limits ── forbidden ─▶ exit 2, no node was started
         │
      survey ── nothing to do ─▶ exit 0, no node was started
         │
    RayCronJob TEMPLATE ─ its jobTemplate ─▶ RayJob, named and owned like this pod's Job
         │
      waits ─▶ exit code of the run, from its summary in the output

A starter that was lost is replaced by another of the same Job, which finds the RayJob by its name.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidbatch.config import Job, load_job
from vidbatch.errors import InfraError, NotFoundInStore, VidbatchError
from vidbatch.ledger import Ledger
from vidbatch.pipeline.resolve import run_spec
from vidbatch.pipeline.survey import new_run_id, take_survey
from vidbatch.storage import open_store

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
POLL_S = 15.0
PATIENCE_S = 900.0
"""For an API server that does not answer: longer than the upgrade of a control plane takes."""

STARTER_FAILED = 75
"""Exit code: the API could not be had. The Job starts another starter, which waits on."""

ENDED = {"Complete", "Failed", "ValidationFailed"}


class Api:
    """The few calls this pod's Role allows, on the objects of one namespace."""

    def __init__(self, url: str, namespace: str, account: Path) -> None:
        self._root = f"{url}/apis/ray.io/v1/namespaces/{namespace}"
        self._token = account / "token"
        ca = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(ca)) if ca.exists() else None

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """GET, or POST with a body; retries while nobody answers.

        Returns:
            Status and object; the status of an answer of ours to make sense of (404, 409) too.
        Raises:
            InfraError: refused, or no answer for PATIENCE_S.
        """
        give_up = time.monotonic() + PATIENCE_S
        while True:
            request = urllib.request.Request(
                f"{self._root}/{path}",
                data=None if body is None else json.dumps(body).encode(),
                headers={  # the token is read each time: it is replaced every hour
                    "Authorization": f"Bearer {self._token.read_text().strip()}",
                    "Content-Type": "application/json",
                },
            )
            try:
                with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                text = error.read().decode("utf-8", "replace")
                if error.code in (404, 409):
                    return error.code, {}
                if error.code not in (429, 500, 502, 503, 504) or time.monotonic() > give_up:
                    raise InfraError(
                        f"the Kubernetes API answered {error.code} to {path}: "
                        f"{' '.join(text.split())[:300]}; is the Role vidbatch-starter applied?",
                        kind="kubernetes_api",
                    ) from error
            except OSError as error:
                if time.monotonic() > give_up:
                    raise InfraError(
                        f"the Kubernetes API does not answer: {error}; a RayJob that was made "
                        "goes on; another starter of this Job waits for it",
                        kind="kubernetes_api",
                    ) from error
            time.sleep(min(5.0, POLL_S))


def say(text: str) -> None:
    """One line for `kubectl logs`."""
    print(f"start: {text}", file=sys.stderr, flush=True)


def has_work(job: Job) -> bool:
    """Whether any output of any listed video is not committed.

    Raises:
        UsageError: the job, or one of its limits, forbids the run.
        StoreError: archive or output cannot be read.
    """
    now = datetime.now(UTC)
    survey = take_survey(job, run=new_run_id(now), now=now)
    for line in survey.describe():
        say(line)
    survey.check_limits()
    return not survey.nothing_to_do


def make_rayjob(api: Api, template: str, name: str, uid: str) -> None:
    """Creates the RayJob, owned by this pod's Job. Raises InfraError: no template, or refused."""
    status, found = api.call(f"raycronjobs/{template}")
    if status != 200:
        raise InfraError(
            f"there is no RayCronJob {template}; apply the overlay again", kind="no_template"
        )
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": {**found["metadata"].get("labels", {}), "vidbatch.io/template": template},
            "ownerReferences": [owner],
        },
        "spec": found["spec"]["jobTemplate"],
    }
    status, _ = api.call("rayjobs", body)
    say(f"RayJob {name} {'was there already' if status == 409 else 'made'}")


def wait(api: Api, name: str) -> dict[str, Any]:
    """The RayJob once it ended; says each change of its state.

    Raises:
        InfraError: it was deleted before its end.
    """
    said = ""
    while True:
        status, found = api.call(f"rayjobs/{name}")
        if status == 404:
            raise InfraError(
                f"RayJob {name} was deleted before its end; the next run goes on", kind="deleted"
            )
        now = found.get("status", {})
        line = ", ".join(
            f"{word} {now[key]}"
            for word, key in (
                ("state", "jobDeploymentStatus"),
                ("job", "jobStatus"),
                ("reason", "reason"),
                ("retries", "failed"),
            )
            if now.get(key)
        )
        if line != said:
            said = line
            say(f"{name}: {line} {now.get('message', '')}".rstrip())
        if now.get("jobDeploymentStatus") in ENDED:
            return found
        time.sleep(POLL_S)


def run_since(job: Job, since: datetime) -> tuple[str, int | None] | None:
    """The newest run of the output that began after `since`, and its exit code (None: killed)."""
    store = open_store(job.output.uri, run_spec(job, "start").output_store)
    last = Ledger(store).last_job()
    if last is None or last.run < f"{since:%Y%m%dT%H%M%S}":
        return None
    try:
        summary = json.loads(store.get(f"_vidbatch/runs/{last.run}/summary.json"))
    except NotFoundInStore:
        return last.run, None
    return last.run, int(summary["exit_code"])


def verdict(rayjob: dict[str, Any], run: tuple[str, int | None] | None) -> int:
    """The exit code of the night, of `vidbatch run`, from RayJob and run together."""
    status = rayjob["status"]
    finished = status.get("jobStatus") == "SUCCEEDED"
    if finished and run is not None and run[1] is not None:
        say(f"run {run[0]} ended with exit code {run[1]}")
        return 0 if run[1] == 3 else run[1]
    if finished:  # the driver ended by itself, for good, and before it wrote a summary
        say("the driver ended without a run: its log says why (usage, or another run did the work)")
        return 2
    if status.get("jobStatus") == "STOPPED":
        return 5
    say(f"the RayJob ended {status.get('jobDeploymentStatus')}: {status.get('reason', '')}")
    return run[1] if run is not None and run[1] else 1


def main(argv: list[str]) -> int:
    """See the module."""
    template, job_file = argv
    name, uid = os.environ["JOB_NAME"], os.environ["JOB_UID"]
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    scheme = "http" if port == "80" else "https"
    host = f"[{host}]" if ":" in host else host
    api = Api(f"{scheme}://{host}:{port}", os.environ["NAMESPACE"], ACCOUNT)
    try:
        job = load_job(Path(job_file))
        status, _ = api.call(f"rayjobs/{name}")
        if status == 404:
            if not has_work(job):
                say("nothing to do: no cluster is started")
                return 0
            make_rayjob(api, template, name, uid)
        rayjob = wait(api, name)
        made = datetime.fromisoformat(rayjob["metadata"]["creationTimestamp"])
        return verdict(rayjob, run_since(job, made))
    except VidbatchError as error:
        say(error.message)
        return STARTER_FAILED if error.kind == "kubernetes_api" else error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
