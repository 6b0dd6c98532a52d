"""Starts or joins Ray, decides how many actors of which size, and makes them.

A cluster of our own listens on this machine's network like any Ray cluster, so it always gets a
token, made for the process and written nowhere. Ray's client port is never used.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

import vidbatch
from vidbatch.cluster.client import credit_bytes
from vidbatch.config import EngineConfig
from vidbatch.errors import ClusterError, UsageError
from vidbatch.pipeline.order import RunSpec
from vidbatch.progress import human_bytes

ANSWER_S = 10.0
"""For a cluster's address to answer; ray.init waits five minutes, then ends the process."""

CPUS_PER_CPU_PREDICTOR = 8
"""On a cluster without GPUs: predicting on CPUs takes as long as decoding, give or take."""

BEAT_S = 1.0
BEATS_PER_S = 200
"""Answers of `progress` that the driver takes in per second: a tenth of its time."""

_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4

_log = logging.getLogger(__name__)
_token = secrets.token_hex(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """How many actors, and what each of them gets."""

    decoders: int
    predictors: int
    device: str
    device_reason: str
    """Why this device, where the job file left it open; else empty."""
    predictor_cpus: float
    predictor_gpus: float
    torch_threads: int
    credit_bytes: int
    """Of chunks under way, per decoder."""
    object_store: str
    """The bound on the object store, in words."""
    beat_s: float

    @property
    def line(self) -> str:
        """The pools in words."""
        reason = f" ({self.device_reason})" if self.device_reason else ""
        return (
            f"device {self.device}{reason}, {self.decoders} decoder{'s' * (self.decoders != 1)}, "
            f"{self.predictors} predictor{'s' * (self.predictors != 1)}"
        )


# Ray ------------------------------------------------------------------------------------------


def start_ray(engine: EngineConfig) -> bool:
    """Brings up Ray: a private cluster for `local`, else the one at the address.

    A Ray that this process uses already is used for `local`, too.

    Returns:
        Whether it was started here, and so is ours to shut down.

    Raises:
        ClusterError: nothing answers, or not as it should.
        UsageError: the address is of a kind that is not used.
    """
    address = engine.address
    if address.startswith(("ray://", "http://", "https://")):
        raise UsageError(
            f"engine.address: {address!r}: Ray's client and job ports run anybody's code and are "
            "not used; submit the run as a Ray job and write `auto`, or give HOST:PORT of the head"
        )
    local = address == "local"
    if local and ray.is_initialized():
        return False
    if not local:
        _check_answers(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if local:
        numbers = {} if engine.decoders == "auto" else {"num_cpus": engine.decoders}
        options |= {
            "include_dashboard": False,
            "object_store_memory": engine.object_store_cap,
            **numbers,
        }
    try:
        with _environment(local), _own_signals():
            ray.init(address=address, **options)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:200]
        what = "Ray did not start here" if local else f"the Ray cluster at {address} was not joined"
        raise ClusterError(
            f"{what}: {text}; nothing was begun; the driver must have the cluster's versions of "
            "Ray and Python and its token (RAY_AUTH_TOKEN_PATH; a closed cluster without tokens: "
            "RAY_AUTH_MODE=disabled)",
            kind="no_ray",
        ) from error
    _quiet()
    return local


def _check_answers(address: str) -> None:
    """Whether somebody speaks HTTP/2 (gRPC) at HOST:PORT. Raises ClusterError."""
    if address == "auto":
        return  # only what runs on this machine: found or not at once
    host, _, port = address.rpartition(":")
    why = "nothing there speaks Ray's protocol"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as sock:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            sock.sendall(_HTTP2_HELLO)
            header = sock.recv(9, socket.MSG_WAITALL)
            if len(header) == 9 and header[3] == _SETTINGS:
                return
    except ValueError:
        why = "not of the form HOST:PORT"
    except OSError as error:
        why = str(error) or type(error).__name__
    raise ClusterError(
        f"no Ray cluster answers at {address}: {why}; nothing was begun; check engine.address "
        "(`auto`: the cluster this machine belongs to, `local`: one of its own)",
        kind="no_ray",
    )


@contextmanager
def _environment(local: bool) -> Iterator[None]:
    """What Ray's processes inherit when they are started here; this process's is put back."""
    before = dict(os.environ)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        # Ray reads the mode once, on import: this is how its own `ray.init` makes it look again
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
    if local:
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = _token
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # what only a dashboard shows, and there is none: a gcs grew by 1 MB a minute of it
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        root = str(Path(vidbatch.__file__).parents[1])  # also from a source tree
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps the handler of SIGTERM, which `ray.init` replaces by one that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet() -> None:
    """Ray prints ten lines to stdout when a worker dies, and stdout is data: to our log instead."""
    import ray._private.worker as worker

    def keep(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        _log.debug("Ray says: %s", " ".join(map(str, data.get("lines", ()))))

    worker.print_to_stdstream = keep


# sizes ----------------------------------------------------------------------------------------


def plan_pools(engine: EngineConfig, *, local: bool, models: bool) -> Pools:
    """Sizes the pools from what the cluster has now, or as the job file says.

    Raises:
        ClusterError: `auto` finds no CPU, or a local `cuda` finds no GPU.
        UsageError: `device: auto` on a cluster: a node that is still to come decides nothing.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    gpus = int(total.get("GPU", 0))
    device, reason = engine.device, ""
    if device == "auto" and not local:
        raise UsageError(
            "engine.device: auto looks for a GPU on this machine only; on a cluster write cuda or "
            "cpu"
        )
    if device == "auto":
        device = "cuda" if gpus else "cpu"
        reason = "GPU found" if gpus else "no GPU found"
    if device == "cuda" and local and not gpus and models:
        raise ClusterError(
            "engine.device is cuda and this machine has no GPU that Ray can see; nothing was "
            "begun; use cpu, or a cluster with GPUs",
            kind="no_gpu",
        )
    cpus = int(free.get("CPU", total.get("CPU", 0)))
    predictors, predictor_cpus, predictor_gpus = 0, 0.0, 0.0
    if models:
        predictor_cpus = 0.0 if local else 1.0
        if device == "cuda":
            predictors = max(gpus, 1) if engine.predictors == "auto" else engine.predictors
            shared = local and predictors > gpus
            predictor_gpus = gpus / predictors if shared else 1.0
        elif engine.predictors == "auto":
            predictors = 1 if local else max(1, cpus // CPUS_PER_CPU_PREDICTOR)
        else:
            predictors = engine.predictors
    if engine.decoders != "auto":
        decoders = engine.decoders
    elif local and device == "cpu":
        decoders = max(1, cpus)
    else:
        decoders = cpus - predictors
        if decoders < 1 and not local:
            raise ClusterError(
                f"engine.decoders: auto counts the CPUs that are free now: {cpus} with "
                f"{predictors} predictors to place; write a number where nodes come later",
                kind="no_cpu",
            )
        decoders = max(1, decoders)
    alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    nodes = max(1, sum(r.get("CPU", 0) > 0 for r in alive))
    on = sum(r.get("GPU", 0) > 0 for r in alive) if device == "cuda" else nodes
    places = max(1, min(on, predictors))
    credit = credit_bytes(engine.object_store_cap, decoders, nodes, places)
    return Pools(
        decoders=decoders,
        predictors=predictors,
        device=device,
        device_reason=reason,
        predictor_cpus=predictor_cpus,
        predictor_gpus=predictor_gpus,
        torch_threads=max(1, (os.cpu_count() or 1) // (predictors or 1)) if local else 2,
        credit_bytes=credit,
        object_store=(
            f"object store: {human_bytes(credit)} of frames under way per decoder ({decoders} on "
            f"{nodes} node{'s' * (nodes != 1)}, predictors on {places}): a node holds at most "
            f"{human_bytes(engine.object_store_cap)}"
        ),
        beat_s=max(BEAT_S, decoders / BEATS_PER_S),
    )


# actors ---------------------------------------------------------------------------------------


def pack_spec(spec: RunSpec) -> Any:
    """The run's spec, as predictors are told it by `ready` each time their process starts.

    Not an argument of the actor: a model's files make it large, and Ray complains of arguments in
    the object store that a restart would need.
    """
    return ray.put(pickle.dumps(spec))


def make_predictor(cls: type[Any], batch: int, pools: Pools) -> Any:
    """A predictor actor, perhaps pending; `batch` is the largest of its models.

    Ray restarts it under the same handle as often as it dies: what kills it is found and left out
    by its clients, and the run's failure limit ends the rest.
    """
    actor = ray.remote(
        num_cpus=pools.predictor_cpus,
        num_gpus=pools.predictor_gpus,
        max_restarts=-1,
        max_task_retries=0,
        concurrency_groups={"control": 4},
    )(cls)
    return actor.remote(batch, pools.device, pools.torch_threads)


def make_decoder_actor(cls: type[Any], *args: Any) -> Any:
    """A decoder actor, perhaps pending; `args` as of `Decoder`. The driver replaces a dead one."""
    actor = ray.remote(
        num_cpus=1,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=1,
        concurrency_groups={"probe": 1, "control": 1},
        scheduling_strategy="SPREAD",
    )(cls)
    return actor.remote(*args)
