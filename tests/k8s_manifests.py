"""Renders k8s/ as a person would, and knows what the API server and KubeRay would say to it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
K8S = ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "kuberay"
RENDERED = ("overlays/dev", "overlays/gpu", "overlays/spot", "backfill", "interactive")
KUBERNETES = "1.33"
"""Whose schemas are asked: the oldest that upstream still patches."""

Manifest = dict[str, Any]


def skip_or_fail(missing: str, switch: str) -> None:
    """Skips a test, or fails it where the thing must be there."""
    if os.environ.get(switch) == "1":
        pytest.fail(f"{missing}, and {switch}=1")
    pytest.skip(missing)


@cache
def _kustomize_version() -> int:
    if shutil.which("kubectl") is None:
        return 0
    command = ["kubectl", "version", "--client"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Kustomize Version: v(\d+)", said)
    return int(found[1]) if found else 0


@cache
def _render(folder: Path) -> list[Manifest]:
    command = ["kubectl", "kustomize", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr, run.stderr
    return [d for d in yaml.load_all(run.stdout, Loader=yaml.CSafeLoader) if d]


def render(folder: str | Path) -> list[Manifest]:
    """Everything that `kubectl apply -k` would send: a copy for each test."""
    if _kustomize_version() < 5:
        skip_or_fail("no kubectl with kustomize 5", "FAIL_WITHOUT_KUBECTL")
    return copy.deepcopy(_render(K8S / folder))


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of a kind (and name)."""
    (found,) = [m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    return found


def ray_specs(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest | None]]:
    """Kind, spec of the RayCluster and spec of the RayJob (if any) of whatever makes a cluster."""
    for m in manifests:
        if m["kind"] == "RayCluster":
            yield m["kind"], m["spec"], None
        elif m["kind"] == "RayJob":
            yield m["kind"], m["spec"]["rayClusterSpec"], m["spec"]
        elif m["kind"] == "RayCronJob":
            job = m["spec"]["jobTemplate"]
            yield m["kind"], job["rayClusterSpec"], job


def pods(node: Any, path: str = "") -> Iterator[tuple[str, Manifest]]:
    """Every pod spec below a manifest, with the path to it."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield path, node
        for key, value in node.items():
            yield from pods(value, f"{path}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from pods(value, f"{path}/{i}")


def containers(node: Any) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Path, pod and container; also the autoscaler that KubeRay puts beside a head."""
    for path, pod in pods(node):
        for c in (*pod.get("initContainers", ()), *pod["containers"]):
            yield f"{path}/{c['name']}", pod, c
        if path.endswith("headGroupSpec/template/spec"):
            *_, spec = [s for s in _clusters(node) if _head(s) is pod]
            options = spec["autoscalerOptions"]
            yield f"{path}/autoscaler", pod, {"image": pod["containers"][0]["image"], **options}


def _head(cluster: Manifest) -> Manifest:
    head: Manifest = cluster["headGroupSpec"]["template"]["spec"]
    return head


def _clusters(node: Any) -> Iterator[Manifest]:
    if isinstance(node, dict):
        if "headGroupSpec" in node:
            yield node
        for value in node.values():
            yield from _clusters(value)


_SI = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str | float) -> float:
    """A Kubernetes quantity: 2560Mi → bytes, 250m → 0.25."""
    match = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(text))
    assert match, text
    return float(match[1]) * _SI[match[2]]


# what the API server says ---------------------------------------------------------------------


@cache
def crd_schema(kind: str) -> Any:
    """A validator of KubeRay's kind in which an unknown field is an error, as `kubectl` has it."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        skip_or_fail(f"no CRD at {path}", "FAIL_WITHOUT_VIDEOS")
    tree = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)
    (v1,) = [v for v in tree["spec"]["versions"] if v["name"] == "v1"]
    schema = v1["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft202012Validator(schema)


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        open_ = schema.get("x-kubernetes-preserve-unknown-fields")
        if isinstance(schema.get("properties"), dict) and not open_:
            schema.setdefault("additionalProperties", False)
        for key, value in schema.items():
            if key == "properties":
                for below in value.values():
                    _close(below)
            elif key not in ("enum", "default", "required"):
                _close(value)


# what KubeRay's operator says -----------------------------------------------------------------

LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
"""Characters of a name."""

DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def refusals(manifest: Manifest) -> list[str]:
    """Why KubeRay 1.7 would not take a manifest that the schema lets through."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    said = []
    if len(name) > LONGEST[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        said.append(f"name {name!r}")
    for _, cluster, job in ray_specs([manifest]):
        said += cluster_refusals(cluster)
        if job is not None:
            said += job_refusals(job)
    return said


def cluster_refusals(cluster: Manifest) -> list[str]:
    """The part about the RayCluster."""
    said = []
    groups = cluster.get("workerGroupSpecs", [])
    names = [g["groupName"] for g in groups]
    if len(set(names)) != len(names):
        said.append("two groups of one name")
    autoscaling = cluster.get("enableInTreeAutoscaling", False)
    for group in (cluster["headGroupSpec"], *groups):
        who, start = group.get("groupName", "head"), group.get("rayStartParams", {})
        pod = group["template"]["spec"]
        if not pod.get("containers"):
            said.append(f"{who}: no container")
        if "labels" in start:
            said.append(f"{who}: rayStartParams.labels")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            said.append(f"{who}: resources in two places")
        if autoscaling and pod.get("restartPolicy", "Never") != "Never":
            said.append(f"{who}: restartPolicy with autoscaler v2")
        if autoscaling and group.get("suspend"):
            said.append(f"{who}: suspended with autoscaler")
        if not all(isinstance(v, str) for v in start.values()):
            said.append(f"{who}: rayStartParams are strings")
        if who != "head":
            if not {"minReplicas", "maxReplicas"} <= set(group):
                said.append(f"{who}: minReplicas and maxReplicas")
            elif not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
                said.append(f"{who}: replicas out of bounds")
        if who == "head" and not autoscaling:
            said += [e["name"] for c in pod["containers"] for e in c.get("env", ())
                     if e["name"] == "RAY_enable_autoscaler_v2"]  # fmt: skip
    version = tuple(int(p) for p in cluster.get("rayVersion", "0").split("."))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0):
        said.append("token auth needs Ray 2.52")
    return said


def job_refusals(job: Manifest) -> list[str]:
    """The part about the RayJob."""
    said = []
    shutdown = job.get("shutdownAfterJobFinishes", False)
    strategy = job.get("deletionStrategy", {})
    rules = strategy.get("deletionRules", [])
    legacy = {"onSuccess", "onFailure"} & set(strategy)
    if rules and shutdown:
        said.append("deletionRules with shutdownAfterJobFinishes")
    if rules and legacy:
        said.append("deletionRules with onSuccess or onFailure")
    if strategy and not rules and len(legacy) < 2:
        said.append("an empty deletionStrategy")
    if job.get("ttlSecondsAfterFinished", 0) and not shutdown:
        said.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    if job.get("suspend") and not shutdown:
        said.append("suspend without shutdownAfterJobFinishes")
    by_state: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        ttl = condition.pop("ttlSeconds", 0)
        if len(condition) != 1:
            said.append("a deletion rule has one of jobStatus and jobDeploymentStatus")
            continue
        ttls = by_state.setdefault(str(condition), {})
        if rule["policy"] in ttls:
            said.append(f"{rule['policy']} twice for {condition}")
        ttls[rule["policy"]] = ttl
    for ttls in by_state.values():
        in_order = [ttls[p] for p in DELETION_ORDER if p in ttls]
        if in_order != sorted(in_order):
            said.append("deletion rules: workers before cluster before itself")
    autoscaling = job["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    if autoscaling and any(r["policy"] == "DeleteWorkers" for r in rules):
        said.append("DeleteWorkers with autoscaler")
    deadlines = ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
    said += [f"{key} is positive" for key in deadlines if job.get(key, 1) <= 0]
    if job.get("backoffLimit", 0) < 0:
        said.append("backoffLimit is not negative")
    mode = job.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(job):
        said.append("SidecarMode with a submitter of one's own")
    if mode == "InteractiveMode" and job.get("backoffLimit", 0):
        said.append("InteractiveMode with backoffLimit")
    if "clusterSelector" in job:
        said.append("clusterSelector with a cluster of one's own and backoffLimit")
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        said.append("runtimeEnvYAML")
    return said
