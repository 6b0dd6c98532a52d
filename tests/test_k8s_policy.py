"""What a careful reviewer asks of the manifests and the bucket policies, line by line."""

from __future__ import annotations

import fnmatch
import ipaddress
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s_manifests import (
    K8S,
    RENDERED,
    Manifest,
    containers,
    one,
    pods,
    ray_specs,
    render,
)

SECRET = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{12,}|-----BEGIN|secret_?(access_?)?key\s*[:=]\s*\S{8,}|password\s*[:=]\s*\S"
    r"|://[^/\s:@]+:[^/\s@]+@|X-Amz-Signature",
    re.IGNORECASE,
)


@pytest.mark.parametrize("folder", RENDERED)
def test_every_container_is_restricted(folder: str) -> None:
    seen = set()
    for manifest in render(folder):
        for path, pod, container in containers(manifest):
            seen.add(path.rpartition("/")[2])
            box = container["securityContext"]
            assert box["allowPrivilegeEscalation"] is False, path
            assert box["readOnlyRootFilesystem"] is True, path
            assert box["capabilities"] == {"drop": ["ALL"]}, path
            assert not box.get("privileged"), path
            who = pod["securityContext"]
            assert who["runAsNonRoot"] is True and who["runAsUser"] >= 1000, path
            assert who["seccompProfile"] == {"type": "RuntimeDefault"}, path
            for shared in ("hostNetwork", "hostPID", "hostIPC"):
                assert not pod.get(shared), path
            for volume in pod["volumes"]:
                assert set(volume) - {"name"} <= {"emptyDir", "configMap"}, volume
                assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]
            mounts = {m["mountPath"] for m in container["volumeMounts"]}
            home = {e["name"]: e.get("value") for e in container.get("env", ())}.get(
                "HOME", "/data"
            )
            assert home in mounts, f"{path}: its home must be writable"
            need = container["resources"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(need["requests"]), path
            assert {"memory", "ephemeral-storage"} <= set(need["limits"]), path
            assert need["requests"]["memory"] == need["limits"]["memory"] or "s3" in path, path
    assert {"ray-head", "autoscaler", "ray-worker", "starter", "ray-job-submitter"} <= seen
    namespace = one(render(folder), "Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("folder", RENDERED)
def test_images_come_by_digest(folder: str) -> None:
    for manifest in render(folder):
        for path, _, container in containers(manifest):
            assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", container["image"]), path
            assert container.get("imagePullPolicy", "IfNotPresent") == "IfNotPresent"


@pytest.mark.parametrize("folder", RENDERED)
def test_accounts_have_no_more_than_they_need(folder: str) -> None:
    manifests = render(folder)
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    for m in manifests:
        if m["kind"] == "ServiceAccount":
            assert m["automountServiceAccountToken"] is False
        for path, pod in pods(m):
            account = pod.get("serviceAccountName")
            assert account is None or account in accounts, path
            mounted = pod["automountServiceAccountToken"]
            assert mounted is (account in ("vidbatch-starter", "vidbatch-head")), path
    assert not [m for m in manifests if m["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    rules = one(manifests, "Role")["rules"]
    assert [(r["resources"], r["verbs"]) for r in rules] == [
        (["raycronjobs"], ["get"]),
        (["rayjobs"], ["create", "get"]),
    ]
    assert rules[0]["resourceNames"] == [one(manifests, "RayCronJob")["metadata"]["name"]]
    (subject,) = one(manifests, "RoleBinding")["subjects"]
    assert subject["name"] == "vidbatch-starter" and subject["namespace"] == "vidbatch"


@pytest.mark.parametrize("folder", RENDERED)
def test_ray_wants_its_token_and_is_not_shown_outside(folder: str) -> None:
    manifests = render(folder)
    for _, cluster, job in ray_specs(manifests):
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert "enableIngress" not in cluster["headGroupSpec"]
        ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
        assert 10001 not in [p["containerPort"] for p in ports], "Ray's client port stays shut"
        assert job is None or "runtimeEnvYAML" not in job, "what is in it, the dashboard shows"
        assert job is None or "metadata" not in job
    for m in manifests:
        assert m["kind"] != "Ingress"
        assert m["kind"] != "Service" or m["spec"].get("type", "ClusterIP") == "ClusterIP"


@pytest.mark.parametrize("folder", RENDERED)
def test_no_secret_is_in_any_manifest(folder: str) -> None:
    for m in render(folder):
        assert m["kind"] != "Secret"
        assert not SECRET.search(yaml.safe_dump(m)), m["metadata"]["name"]
        for path, _, container in containers(m):
            for entry in container.get("env", ()):
                said = re.search(r"KEY|TOKEN|SECRET|PASSWORD", entry["name"])
                assert not said or "value" not in entry, f"{path}: {entry['name']}"


def test_no_secret_is_in_any_file() -> None:
    for path in sorted(p for p in K8S.rglob("*") if p.is_file() and p.suffix != ".lock"):
        assert not SECRET.search(path.read_text("utf-8", "replace")), path


# walls ----------------------------------------------------------------------------------------

METADATA = ("169.254.169.254", "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "168.63.129.16")
"""Whose credentials are the node's: AWS, ECS, EKS, AWS over IPv6, Azure."""


def _allows(policies: list[Manifest], labels: dict[str, str], address: str, port: int) -> bool:
    """Whether a pod may open a connection to an address outside the cluster."""
    for policy in policies:
        if not _selects(policy["spec"]["podSelector"], labels):
            continue
        for rule in policy["spec"].get("egress", ()):
            ports = [p["port"] for p in rule.get("ports", ())]
            blocks = [t["ipBlock"] for t in rule.get("to", ()) if "ipBlock" in t]
            to_all = "to" not in rule
            if (not ports or port in ports) and (to_all or any(_in(b, address) for b in blocks)):
                return True
    return False


def _in(block: dict[str, Any], address: str) -> bool:
    ip = ipaddress.ip_address(address)
    inside = [ip in ipaddress.ip_network(n) for n in (block["cidr"], *block.get("except", ()))]
    return inside[0] and not any(inside[1:])


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", ())
    )


def _labels(manifests: list[Manifest]) -> dict[str, dict[str, str]]:
    """Role → the labels of its pods, those that KubeRay adds among them."""
    found = {}
    for m in manifests:
        text = yaml.safe_dump(m)
        for role in re.findall(r"vidbatch.io/role: (\w+)", text):
            found[role] = {"vidbatch.io/role": role}
    for role in ("head", "worker"):
        found[role] |= {"ray.io/is-ray-node": "yes", "ray.io/node-type": role}
    return found


@pytest.mark.parametrize("folder", RENDERED)
def test_nothing_gets_out_but_what_is_named(folder: str) -> None:
    manifests = render(folder)
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    deny = one(manifests, "NetworkPolicy", "deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    roles = _labels(manifests)
    store = {"head", "worker", "starter"}
    for role, labels in roles.items():
        for address in METADATA:
            for port in (80, 443, 988):
                assert not _allows(policies, labels, address, port), (role, address, port)
        assert _allows(policies, labels, "52.219.0.1", 443) is (role in store), role
        assert _allows(policies, labels, "10.0.0.1", 6443) is (role in {"head", "starter"}), role
        for port in (22, 80, 6379, 8265, 10001):
            assert not _allows(policies, labels, "203.0.113.9", port), (role, port)
    dns = one(manifests, "NetworkPolicy", "dns")["spec"]
    assert dns["podSelector"] == {} and {p["port"] for p in dns["egress"][0]["ports"]} == {53}


@pytest.mark.parametrize("folder", RENDERED)
def test_nothing_gets_in_but_what_is_named(folder: str) -> None:
    """Who reaches a head: Ray's own nodes, the submitter and the operator, the scraper."""
    manifests = render(folder)
    head = _labels(manifests)["head"]
    heard = []
    for m in manifests:
        if m["kind"] == "NetworkPolicy" and _selects(m["spec"]["podSelector"], head):
            for rule in m["spec"].get("ingress", ()):
                assert rule.get("from"), "never from everywhere"
                ports = sorted(p["port"] for p in rule.get("ports", ()))
                heard += [(json.dumps(f, sort_keys=True), ports) for f in rule["from"]]
    named = {
        "is-ray-node": [],
        "submitter": [8265],
        "kuberay-operator": [8265],
        "monitoring": [8080, 44217, 44227],
    }
    assert len(heard) == len(named)
    for word, ports in named.items():
        assert [p for text, p in heard if word in text] == [ports], word


def test_identities_are_roles_and_not_keys(tmp_path: Path) -> None:
    """The examples for EKS and GKE, put on as their first lines say."""
    work = tmp_path / "k8s"
    shutil.copytree(K8S, work)
    for cloud, annotation in (
        ("eks", "eks.amazonaws.com/role-arn"),
        ("gke", "iam.gke.io/gcp-service-account"),
    ):
        site = work / f"site-{cloud}"
        site.mkdir()
        (site / "kustomization.yaml").write_text(
            "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
            f"resources: [../overlays/gpu]\ncomponents: [../identity/{cloud}]\n"
        )
        manifests = render(site)
        found = {
            m["metadata"]["name"]: m["metadata"].get("annotations", {}).get(annotation, "")
            for m in manifests
            if m["kind"] == "ServiceAccount"
        }
        assert found.pop("vidbatch-submitter") == ""
        assert {"reader" if "reader" in v else "writer" for v in found.values()} == {
            "reader",
            "writer",
        }
        assert "reader" in found["vidbatch-starter"] and "writer" in found["vidbatch-worker"]
        policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
        worker = _labels(manifests)["worker"]
        # only GKE's own metadata server gives out the pod's identity, and only there is it open
        assert _allows(policies, worker, "169.254.169.254", 80) is (cloud == "gke")
        assert not _allows(policies, worker, "169.254.170.2", 80)


# buckets --------------------------------------------------------------------------------------

VIDEO = "arn:aws:s3:::acme-video"
TABLES = "arn:aws:s3:::acme-tables/video/"
FACES = f"{TABLES}v1/embeddings/sample=fps1.0a/model=faces-v1.9b/dt=2026-03-01/part-x.parquet"
COLOUR = FACES.replace("faces-v1", "colour-v1")
LABELS = FACES.replace("embeddings", "labels")


def _policy(name: str) -> list[dict[str, Any]]:
    tree = json.loads((K8S / "iam" / name).read_text("utf-8"))
    assert tree["Version"] == "2012-10-17"
    statements: list[dict[str, Any]] = tree["Statement"]
    return statements


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _may(who: str, action: str, resource: str, facts: dict[str, str], *own: str) -> bool:
    """IAM in small: an explicit Deny of role or bucket wins, else one Allow is needed."""
    arn = f"arn:aws:iam::111122223333:role/{who}"
    facts = {"aws:PrincipalArn": arn, "aws:SecureTransport": "true", **facts}
    effects = set()
    for name in (*own, "tables-bucket.json"):
        for s in _policy(name):
            principal = s.get("Principal", "*")
            named = principal == "*" or arn in _list(principal["AWS"])
            matches = any(fnmatch.fnmatchcase(action, a) for a in _list(s["Action"])) and any(
                fnmatch.fnmatchcase(resource, r) for r in _list(s["Resource"])
            )
            if named and matches and _holds(s.get("Condition", {}), facts):
                effects.add(s["Effect"])
    return effects == {"Allow"}


def _holds(condition: dict[str, dict[str, Any]], facts: dict[str, str]) -> bool:
    def test(operator: str, key: str, want: str) -> bool:
        said = facts.get(key, "")
        match operator:
            case "Null":
                return (key not in facts) == (want == "true")
            case "Bool":
                return said == want
            case "StringLike":
                return fnmatch.fnmatchcase(said, want)
            case "ArnNotEquals":
                return said != want
        raise AssertionError(f"IAM in small does not know {operator}")

    return all(
        any(test(operator, key, want) for want in _list(wants))
        for operator, keys in condition.items()
        for key, wants in keys.items()
    )


@pytest.mark.parametrize(
    ("who", "own", "action", "resource", "facts", "allowed"),
    [
        # the writer creates, once; it reads both sides and deletes nothing
        ("vidbatch-writer", "writer", "s3:PutObject", LABELS, {"s3:if-none-match": "*"}, True),
        ("vidbatch-writer", "writer", "s3:PutObject", LABELS, {}, False),
        ("vidbatch-writer", "writer", "s3:DeleteObject", LABELS, {}, False),
        ("vidbatch-writer", "writer", "s3:GetObject", LABELS, {}, True),
        ("vidbatch-writer", "writer", "s3:GetObject", f"{VIDEO}/cameras/a", {}, True),
        ("vidbatch-writer", "writer", "s3:GetObject", f"{VIDEO}/payroll", {}, False),
        ("vidbatch-writer", "writer", "s3:PutObject", f"{VIDEO}/cameras/a",
         {"s3:if-none-match": "*"}, False),
        ("vidbatch-writer", "writer", "s3:PutObject", LABELS,
         {"s3:if-none-match": "*", "aws:SecureTransport": "false"}, False),
        # the reader never writes
        ("vidbatch-reader", "reader", "s3:PutObject", LABELS, {"s3:if-none-match": "*"}, False),
        ("vidbatch-reader", "reader", "s3:GetObject", LABELS, {}, True),
        ("vidbatch-reader", "reader", "s3:ListBucket", VIDEO, {}, True),
        # analysts: every table but faces' vectors and boxes, and nothing of _vidbatch/
        ("analyst", "", "s3:GetObject", LABELS, {}, True),
        ("analyst", "", "s3:GetObject", COLOUR, {}, True),
        ("analyst", "", "s3:GetObject", FACES, {}, False),
        ("analyst", "", "s3:GetObject", FACES.replace("embeddings", "detections"), {}, False),
        ("analyst", "", "s3:GetObject", f"{TABLES}_vidbatch/output.json", {}, False),
        ("analyst", "", "s3:GetObject", f"{TABLES}README.md", {}, True),
        ("analyst", "", "s3:PutObject", LABELS, {"s3:if-none-match": "*"}, False),
        ("analyst", "", "s3:ListBucket", "arn:aws:s3:::acme-tables",
         {"s3:prefix": "video/v1/labels/"}, True),
        ("analyst", "", "s3:ListBucket", "arn:aws:s3:::acme-tables",
         {"s3:prefix": "video/_vidbatch/"}, False),
        ("analyst-faces", "", "s3:GetObject", FACES, {}, True),
        ("analyst-faces", "", "s3:DeleteObject", FACES, {}, False),
    ],
)  # fmt: skip
def test_who_may_do_what_to_the_buckets(
    who: str, own: str, action: str, resource: str, facts: dict[str, str], allowed: bool
) -> None:
    policies = (f"{own}.json",) if own else ()
    assert _may(who, action, resource, facts, *policies) is allowed


def test_no_role_deletes() -> None:
    for path in sorted((K8S / "iam").glob("*.json")):
        for s in _policy(path.name):
            if s["Effect"] == "Allow":
                assert not [a for a in _list(s["Action"]) if "*" in a or "Delete" in a], path.name
