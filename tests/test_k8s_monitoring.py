"""Alerts and dashboard: valid, tested, and about metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s_manifests import K8S, ROOT, one, render, skip_or_fail
from vidbatch.cluster.metric_names import METRICS, PREFIX

MONITORING = K8S / "monitoring"

OTHERS = {
    # kube-state-metrics
    "kube_cronjob_created": {"namespace", "cronjob"},
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
    "kube_job_failed": {"namespace", "job_name", "condition"},
    "kube_job_status_start_time": {"namespace", "job_name"},
    # KubeRay's operator, since 1.4
    "kuberay_job_deployment_status": {"namespace", "name", "deployment_status"},
}
"""Metrics of others → labels that may be asked for."""

FUNCTIONS = {
    "time", "max", "min", "sum", "avg", "count", "rate", "increase", "topk", "max_over_time",
    "by", "on", "ignoring", "group_left", "and", "or", "unless",
}  # fmt: skip


@cache
def _source_of_ray() -> str:
    """Ray's own panels and the agent that tells of nodes: what it exports, by name."""
    spec = find_spec("ray")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0]) / "dashboard" / "modules"
    panels = root / "metrics" / "dashboards" / "default_dashboard_panels.py"
    return panels.read_text("utf-8") + (root / "reporter" / "reporter_agent.py").read_text("utf-8")


def _queries() -> Iterator[tuple[str, str]]:
    for group in one(render("monitoring"), "PrometheusRule")["spec"]["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in _dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def _dashboard() -> dict[str, Any]:
    config = one(render("monitoring"), "ConfigMap", "vidbatch-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    tree: dict[str, Any] = json.loads(config["data"]["vidbatch.json"])
    return tree


def test_every_metric_that_is_asked_for_exists() -> None:
    asked = set()
    for where, query in _queries():
        # grouping labels are words as well: take them out, with what is in quotes
        bare = re.sub(r'\b(by|on|ignoring|group_left)\s*\([^)]*\)|"[^"]*"', "", query)
        for name, labels in re.findall(r"([a-z_]+[a-z])\b(?!\s*\()(?:\{([^}]*)\})?", bare):
            inside = any(name in found for found in re.findall(r"\{([^}]*)\}", bare))
            if name in FUNCTIONS or inside or len(name) == 1:
                continue
            asked.add(name)
            wanted = {p.partition("=")[0].strip(" !") for p in labels.split(",") if p.strip()}
            if name in OTHERS:
                assert wanted <= OTHERS[name], f"{where}: {name}{wanted}"
            elif name.removeprefix(PREFIX) in METRICS:
                assert wanted <= set(METRICS[name.removeprefix(PREFIX)].labels), f"{where}: {name}"
            else:
                assert name.startswith(PREFIX) and name.removeprefix(PREFIX) in _source_of_ray(), (
                    f"{where} asks for {name}, which nobody exports"
                )
    assert "ray_vidbatch_clips_total" in asked and "ray_node_gpus_available" in asked
    assert asked & set(OTHERS) == set(OTHERS), "what is listed is used"


def test_every_value_of_a_label_that_is_asked_for_is_told() -> None:
    for where, query in _queries():
        for name, labels in re.findall(rf"{PREFIX}(vidbatch_\w+)\{{([^}}]*)\}}", query):
            for label, sign, text in re.findall(r'(\w+)\s*(=~|!=|=)\s*"([^"]*)"', labels):
                known = METRICS[name].labels[label]
                for value in text.split("|") if sign == "=~" else [text]:
                    assert not known or value in known, f"{where}: {name} {label}={value}"


def test_rates_are_of_counters_and_levels_of_gauges() -> None:
    for where, query in _queries():
        for function, name in re.findall(rf"(\w+)\({PREFIX}(vidbatch_\w+)", query):
            if function in ("rate", "increase"):
                assert METRICS[name].kind == "counter", f"{where}: {function} of {name}"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The groups as Prometheus reads them from a file, beside their unit tests."""
    if shutil.which("promtool") is None:
        skip_or_fail("no promtool", "FAIL_WITHOUT_PROMTOOL")
    spec = one(render("monitoring"), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    return tmp_path


def test_prometheus_takes_the_rules(rules: Path) -> None:
    run = subprocess.run(
        ["promtool", "check", "rules", "rules.yaml"], cwd=rules, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_alerts_fire_when_they_should_and_not_before(rules: Path) -> None:
    run = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"], cwd=rules, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_dashboards_queries_are_taken_by_prometheus(rules: Path) -> None:
    record = [{"record": f"panel:{i}", "expr": query} for i, (_, query) in enumerate(_queries())]
    (rules / "panels.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": record}]})
    )
    run = subprocess.run(
        ["promtool", "check", "rules", "panels.yaml"], cwd=rules, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_is_tested_and_has_its_page() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text("utf-8"))["tests"]
    fired = {
        case["alertname"] for test in tests for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }  # fmt: skip
    pages = (ROOT / "docs" / "operations.md").read_text("utf-8")
    groups = one(render("monitoring"), "PrometheusRule")["spec"]["groups"]
    alerts = {r["alert"]: r for g in groups for r in g["rules"]}
    assert set(alerts) == fired
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.search(rf"^### {name}$", pages, re.M), f"no page for {name}"


def test_panels_lie_side_by_side() -> None:
    panels = _dashboard()["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)


def test_the_scraper_asks_the_ports_that_pods_have() -> None:
    monitor = one(render("monitoring"), "PodMonitor")["spec"]
    cluster = one(render("overlays/gpu"), "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    asked = {e["port"] for e in monitor["podMetricsEndpoints"]}
    assert asked <= {p["name"] for p in head} and "metrics" in asked
    for group in cluster["workerGroupSpecs"]:
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert {"name": "metrics", "containerPort": 8080} in ports
    assert monitor["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    every = [int(e["interval"].removesuffix("s")) for e in monitor["podMetricsEndpoints"]]
    keeps = cluster and min(
        r["condition"]["ttlSeconds"]
        for r in one(render("overlays/gpu"), "RayCronJob")["spec"]["jobTemplate"][
            "deletionStrategy"
        ]["deletionRules"]
    )
    assert max(every) * 10 < keeps, "the last counts are scraped before the head goes"
