"""The manifests: what the API server and KubeRay say, and whether their numbers fit each other."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.k8s_manifests import (
    KUBERNETES,
    RENDERED,
    Manifest,
    crd_schema,
    job_refusals,
    one,
    quantity,
    ray_specs,
    refusals,
    render,
)
from vidbatch.cluster.driver import HALT_S
from vidbatch.config import Job, parse_job
from vidbatch.submit import rayjob

SHOWN = (*RENDERED, "monitoring")
PROMETHEUS = {"PodMonitor", "PrometheusRule"}
"""Kinds whose schemas are not at hand; tests/test_k8s_monitoring.py looks at what they hold."""


@pytest.mark.parametrize("folder", SHOWN)
def test_the_api_server_takes_it(folder: str) -> None:
    manifests = render(folder)
    names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    for m in manifests:
        if m["apiVersion"] == "ray.io/v1":
            crd_schema(m["kind"]).validate(m)
        elif m["kind"] not in PROMETHEUS:
            kubernetes_validate.validate(m, KUBERNETES, strict=True)
        if m["kind"] != "Namespace":
            assert m["metadata"]["namespace"] == "vidbatch", m["metadata"]["name"]
        assert m["metadata"]["labels"]["app.kubernetes.io/part-of"] == "vidbatch"


@pytest.mark.parametrize("folder", RENDERED)
def test_kuberay_takes_it(folder: str) -> None:
    found = [m for m in render(folder) if m["apiVersion"] == "ray.io/v1"]
    assert found
    for m in found:
        assert not refusals(m)


def test_an_unknown_field_is_an_error() -> None:
    template = copy.deepcopy(one(render("overlays/gpu"), "RayCronJob"))
    group = template["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["securityContext"]["runAsNonroot"] = True
    (error,) = crd_schema("RayCronJob").iter_errors(template)
    assert "runAsNonroot" in error.message


def _set(**values: Any) -> Callable[[Manifest], None]:
    return lambda job: job.update(values)


def _group(**values: Any) -> Callable[[Manifest], None]:
    return lambda job: job["rayClusterSpec"]["workerGroupSpecs"][0].update(values)


def _rules(*rules: tuple[str, str, int]) -> Callable[[Manifest], None]:
    found = [{"policy": p, "condition": {"jobStatus": s, "ttlSeconds": t}} for p, s, t in rules]
    return _set(deletionStrategy={"deletionRules": found})


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_set(shutdownAfterJobFinishes=True), "deletionRules with shutdown"),
        (_set(ttlSecondsAfterFinished=60), "ttlSecondsAfterFinished without"),
        (_set(suspend=True), "suspend without"),
        (_set(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}), "empty"),
        (_rules(("DeleteWorkers", "FAILED", 0)), "DeleteWorkers with autoscaler"),
        (_rules(("DeleteCluster", "FAILED", 9), ("DeleteSelf", "FAILED", 3)), "workers before"),
        (_rules(("DeleteCluster", "FAILED", 9), ("DeleteCluster", "FAILED", 3)), "twice"),
        (_set(submissionMode="SidecarMode"), "SidecarMode"),
        (_set(activeDeadlineSeconds=0), "is positive"),
        (_set(runtimeEnvYAML="[pip]"), "runtimeEnvYAML"),
        (_group(maxReplicas=0, replicas=2), "out of bounds"),
        (_group(groupName="predictors"), "two groups"),
        (_group(resources={"cpu": "7"}), "two places"),
        (_group(rayStartParams={"num-cpus": 7}), "strings"),
        (lambda job: job["rayClusterSpec"].update(rayVersion="2.51.0"), "2.52"),
    ],
)
def test_the_rules_of_kuberay_bite(change: Callable[[Manifest], None], refusal: str) -> None:
    manifest = copy.deepcopy(one(render("overlays/gpu"), "RayCronJob"))
    change(manifest["spec"]["jobTemplate"])
    assert any(refusal in said for said in refusals(manifest))
    manifest["metadata"]["name"] = "n" * 37
    assert any("name" in said for said in refusals(manifest))


# what is in it --------------------------------------------------------------------------------


def _entrypoint(job: Manifest) -> tuple[list[str], dict[str, str]]:
    words = shlex.split(job["entrypoint"])
    sets = [words[i + 1] for i, w in enumerate(words) if w == "--set"]
    return words, dict(s.split("=", 1) for s in sets)


def _job(manifests: list[Manifest], job: Manifest) -> Job:
    """The job file of the ConfigMap as the entrypoint reads it."""
    text = one(manifests, "ConfigMap", "vidbatch-job")["data"]["job.yaml"]
    _, sets = _entrypoint(job)
    overrides = [f"{k}={v}" for k, v in sets.items()]
    return parse_job(yaml.safe_load(text), base_dir=Path("/job"), overrides=overrides)


@pytest.mark.parametrize("folder", ["overlays/dev", "overlays/gpu", "overlays/spot", "backfill"])
def test_pools_fit_the_worker_groups(folder: str) -> None:
    manifests = render(folder)
    for _, cluster, spec in ray_specs(manifests):
        assert spec is not None
        job = _job(manifests, spec)
        engine = job.engine
        groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
        assert engine.address == "auto"
        assert engine.decoders != "auto" and engine.predictors != "auto"
        cpus = groups["decoders"]["maxReplicas"] * int(
            groups["decoders"]["rayStartParams"]["num-cpus"]
        )
        on_cpu = engine.predictors if engine.device == "cpu" else 0
        assert cpus == engine.decoders + on_cpu, "a decoder without a CPU waits for ever"
        gpu = {n: g for n, g in groups.items() if n.startswith("predictors")}
        assert bool(gpu) == (engine.device == "cuda")
        for name, group in gpu.items():
            start = group["rayStartParams"]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == start["num-gpus"] == "1"
            assert int(start["num-cpus"]) >= 1, "a predictor takes a CPU of Ray's on a cluster"
            assert group["maxReplicas"] == engine.predictors, name
        for group in groups.values():
            assert group["minReplicas"] == group["replicas"] == 0, "from zero"
        for group in (cluster["headGroupSpec"], *groups.values()):
            pod = group["template"]["spec"]
            store = int(group["rayStartParams"]["object-store-memory"])
            (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
            memory = quantity(pod["containers"][0]["resources"]["limits"]["memory"])
            assert store >= engine.object_store_cap, "vidbatch fills up to its cap"
            assert shm["medium"] == "Memory"
            assert store * 1.1 < quantity(shm["sizeLimit"]) < memory / 2
            mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
            assert {"/dev/shm", "/tmp"} <= mounts
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_spot_comes_first_and_on_demand_stands_behind() -> None:
    cluster = next(ray_specs(render("overlays/spot")))[1]
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    spot, other = groups["predictors-spot"], groups["predictors"]
    assert spot["priority"] > other.get("priority", 0)
    assert spot["labels"] == {"ray.io/market-type": "spot"}
    assert other["labels"] == {"ray.io/market-type": "on-demand"}
    assert spot["maxReplicas"] == other["maxReplicas"], "either can carry the whole pool"
    assert spot["template"]["spec"]["nodeSelector"] != other["template"]["spec"]["nodeSelector"]
    env = {e["name"]: e["value"] for e in cluster["autoscalerOptions"]["env"]}
    engine = _job(render("overlays/spot"), next(ray_specs(render("overlays/spot")))[2] or {}).engine
    fallback_s = int(env["RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"])
    assert 2 * fallback_s < engine.wait_s, "the run must still wait when on-demand is asked"


@pytest.mark.parametrize("folder", RENDERED)
def test_stopping_is_given_its_time(folder: str) -> None:
    for _, cluster, job in ray_specs(render(folder)):
        head = cluster["headGroupSpec"]["template"]["spec"]
        env = {e["name"]: e.get("value") for e in head["containers"][0]["env"]}
        wait_s = int(env["RAY_JOB_STOP_WAIT_TIME_S"] or 0)
        assert HALT_S < wait_s < head["terminationGracePeriodSeconds"]
        for group in cluster["workerGroupSpecs"]:
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] > HALT_S
            assert group["idleTimeoutSeconds"] <= 60, "GPUs are freed at once"
        assert cluster["enableInTreeAutoscaling"]
        assert cluster["autoscalerOptions"]["version"] == "v2"
        if job is None:
            continue
        assert job["backoffLimit"] == 2
        assert job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"]
        parsed = _job(render(folder), job)
        words, _ = _entrypoint(job)
        if "--stop-after" in words:
            assert words[words.index("--stop-after") + 1] == "20h"
        stop_s = 20 * 3600 if "--stop-after" in words else parsed.limits.stop_after
        assert stop_s is not None and stop_s + 3600 <= job["activeDeadlineSeconds"]
        keeps = {
            str(r["condition"].get("jobStatus")): r["condition"]["ttlSeconds"]
            for r in job["deletionStrategy"]["deletionRules"]
            if r["policy"] == "DeleteCluster"
        }
        assert keeps["FAILED"] > keeps["SUCCEEDED"] >= 600, "the head's last metrics are scraped"


def test_a_night_is_one_at_a_time() -> None:
    for folder in ("overlays/dev", "overlays/gpu"):
        manifests = render(folder)
        cron = one(manifests, "CronJob")["spec"]
        template = one(manifests, "RayCronJob")["spec"]
        assert template["suspend"] is True, "it is a template; the CronJob makes the RayJobs"
        assert cron["concurrencyPolicy"] == "Forbid" and cron["timeZone"] == template["timeZone"]
        assert 0 < cron["startingDeadlineSeconds"] < 86400
        assert cron["successfulJobsHistoryLimit"] and cron["failedJobsHistoryLimit"]
        job = cron["jobTemplate"]["spec"]
        assert job["activeDeadlineSeconds"] < 86400
        rules = {r["action"]: r for r in job["podFailurePolicy"]["rules"]}
        assert rules["FailJob"]["onExitCodes"]["values"] == [1, 2, 4, 5]
        assert rules["Ignore"]["onPodConditions"][0]["type"] == "DisruptionTarget"
        assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_entrypoints_are_commands_that_exist() -> None:
    """Scripts lie in the image, their options are theirs, and KubeRay gets its exit codes."""
    root = Path(__file__).resolve().parents[1]
    image = (root / "k8s" / "Dockerfile").read_text("utf-8")
    for folder in ("overlays/dev", "overlays/gpu", "overlays/spot", "backfill"):
        for kind, _, job in ray_specs(render(folder)):
            assert job is not None
            words, sets = _entrypoint(job)
            assert words[:2] == ["exec", "python"] and words[3] == "/job/job.yaml"
            script = words[2].removeprefix("/app/")
            assert (root / script).is_file() and "COPY jobs /app/jobs" in image
            assert words[words.index("--exit-codes") + 1] == "kuberay"
            assert {"engine.address", "engine.device", "engine.decoders"} <= set(sets)
            if kind == "RayJob":
                assert {"--from", "--to", "--stop-after"} <= set(words)
            assert not job_refusals(job)
    starter = one(render("overlays/gpu"), "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    command = starter["spec"]["containers"][0]["command"]
    assert command == ["python", "/app/k8s/start.py", "vidbatch-nightly", "/job/job.yaml"]
    assert "COPY k8s/start.py /app/k8s/start.py" in image


def test_all_clusters_are_the_same() -> None:
    night = one(render("overlays/gpu"), "RayCronJob")["spec"]["jobTemplate"]
    backfill = one(render("backfill"), "RayJob")["spec"]
    assert backfill["rayClusterSpec"] == night["rayClusterSpec"]
    assert backfill["submitterPodTemplate"] == night["submitterPodTemplate"]
    assert one(render("interactive"), "RayCluster")["spec"] == night["rayClusterSpec"]


def test_a_submitted_job_takes_the_template() -> None:
    """`vidbatch submit job.yaml --k8s` over what the overlay renders is a manifest that stands."""
    text = yaml.safe_dump_all(render("overlays/gpu"))
    config, job = yaml.safe_load_all(rayjob(text, {"job.yaml": b"a: 1\n"}, ["--strict"]))
    kubernetes_validate.validate(config, KUBERNETES, strict=True)
    job["metadata"]["name"] = job["metadata"].pop("generateName") + "abcde"
    crd_schema("RayJob").validate(job)
    assert not refusals(job)
    assert job["spec"]["entrypoint"].endswith("--strict")
    assert re.search(r"jobs/nightly.py /job/job.yaml", job["spec"]["entrypoint"])
    mounted = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert config["metadata"]["name"] in [v.get("configMap", {}).get("name") for v in mounted]
