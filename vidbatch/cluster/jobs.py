"""A job handed to a Ray cluster over HTTP (the Ray Jobs API), followed to its exit code.

Whoever reaches a dashboard that asks for no token can run code there, so such a cluster is refused.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from vidbatch.errors import ClusterError, UsageError

FAULTS = (RuntimeError, OSError, ValueError, aiohttp.ClientError, RayError)
"""What Ray's client raises; `requests` and `json` are among OSError and ValueError."""

ANSWER_S = 10.0

AGAIN_S = 2.0
"""Between two tries to reach a dashboard that stopped answering, and two looks at a status."""

SILENT_S = 300.0
"""Without an answer for so long the job is given up from sight; it may well go on."""

NOISY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell on stderr what is no news."""

STOPPED = 5
"""Exit code of a job that somebody stopped: as of a run that gets a SIGTERM."""


def check_closed(address: str) -> None:
    """Whether the dashboard refuses who has no token.

    Raises:
        UsageError: it is open to anybody, or the address is none.
        ClusterError: nothing answers there, or no dashboard of Ray.
    """
    where = urlsplit(address)
    if where.scheme not in ("http", "https") or not where.hostname or where.username:
        raise UsageError(
            f"--address {address}: expected http://HOST:PORT or https://HOST of a Ray dashboard, "
            "e.g. http://127.0.0.1:8265 behind `kubectl port-forward`"
        )
    status = _status_without_token(address)
    if status == 200:
        raise UsageError(
            f"the Ray cluster at {address} answers without a token: whoever reaches it can run "
            "code there; nothing was submitted; start it with RAY_AUTH_MODE=token (KubeRay: "
            "authOptions.mode: token)"
        )
    if status not in (401, 403) and not 300 <= status < 400:
        raise ClusterError(
            f"{address} is no Ray dashboard, or none that works: it answered {status}; nothing was "
            "submitted",
            kind="no_ray",
        )


def _status_without_token(address: str) -> int:
    where = urlsplit(address)
    assert where.hostname is not None
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            where.hostname, where.port, timeout=ANSWER_S, context=context
        )
    else:
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=ANSWER_S)
    try:
        connection.request("GET", f"{where.path.rstrip('/')}/api/jobs/")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address}: {error or type(error).__name__}; nothing was "
            "submitted; is the port forwarded, and the head up?",
            kind="no_ray",
        ) from error
    finally:
        connection.close()


def read_token() -> str:
    """The token, from where Ray itself looks for it. Raises UsageError: there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(
            f"the cluster wants a token and {path} cannot be read ({error.strerror}); nothing was "
            "submitted; set RAY_AUTH_TOKEN_PATH to a file that holds it (KubeRay: the Secret named "
            "like the RayCluster, key auth_token)"
        ) from error
    if not token:
        raise UsageError(f"{path}: is empty; nothing was submitted; it should hold the token")
    return token


class JobClient:
    """Jobs of one cluster. Raises as `check_closed` and `read_token`, and ClusterError."""

    def __init__(self, address: str) -> None:
        check_closed(address)
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address.rstrip("/")
        headers = {"Authorization": f"Bearer {read_token()}"}
        with _no_other_address(), self._answers("nothing was submitted"):
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, entrypoint: str, files: Mapping[str, bytes]) -> str:
        """Uploads the files as the job's working directory and starts it; gives its id."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            with self._answers("whether it was submitted is not known: `ray job list`"):
                job: str = self._client.submit_job(
                    entrypoint=entrypoint, runtime_env={"working_dir": folder}
                )
        return job

    def follow(self, job: str, say: Callable[[str], object]) -> int:
        """Passes the job's log on as it grows; the exit code of its command once it has ended.

        `STOPPED` where somebody stopped it, 1 where it ended in a way that is none of ours.

        Raises:
            ClusterError: nothing answered for SILENT_S.
        """
        said = 0
        heard_at = time.monotonic()
        while True:
            try:
                for text in self._log(job, said):
                    said += len(text)
                    heard_at = time.monotonic()
                    say(text)
                info = self._client.get_job_info(job)
                heard_at = time.monotonic()
            except FAULTS as error:
                if time.monotonic() - heard_at > SILENT_S:
                    raise ClusterError(
                        f"{self.address} did not answer for {SILENT_S:.0f} s: {error}; the job "
                        f"{job} may go on: `ray job status {job}`, or `vidbatch status OUTPUT`",
                        kind="no_ray",
                    ) from error
                time.sleep(AGAIN_S)
                continue
            if info.status.is_terminal():
                return _exit_code(info, say)
            time.sleep(AGAIN_S)

    def _log(self, job: str, skip: int) -> Iterator[str]:
        """The log from its character `skip` on, until the job ends or the connection does."""
        stream = self._client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        try:
            while True:
                try:
                    text = loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    return
                new, skip = text[skip:], max(0, skip - len(text))
                if new:
                    yield new
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    @contextmanager
    def _answers(self, meaning: str) -> Iterator[None]:
        try:
            yield
        except FAULTS as error:
            text = " ".join(str(error).split())[:300]
            raise ClusterError(
                f"the Ray cluster at {self.address} refused: {text}; {meaning}", kind="no_ray"
            ) from error


def _exit_code(info: Any, say: Callable[[str], object]) -> int:
    status, code = str(info.status), info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return STOPPED
    if code in range(1, 6):
        return int(code)
    first = (info.message or "").partition("\n")[0]
    say(f"the job failed and gave no exit code of vidbatch ({code}): {first}\n")
    return 1


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray prefers these to the address it is given, and so to the one that was looked at."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
