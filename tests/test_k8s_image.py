"""The image: linted, built of hashed locks alone, run as nobody in particular."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.k8s_manifests import K8S, ROOT, ray_specs, render, skip_or_fail


def test_the_dockerfile_is_linted() -> None:
    found = Path(sys.executable).parent / "hadolint"
    if not found.is_file():
        skip_or_fail("no hadolint beside this Python", "FAIL_WITHOUT_HADOLINT")
    run = subprocess.run(
        [str(found), "--strict-labels", str(K8S / "Dockerfile")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_image_is_built_of_hashed_locks_and_runs_as_nobody() -> None:
    text = (K8S / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    stages = re.findall(r"^FROM (.*)$", text, re.M)
    assert stages == ["${BASE} AS build", "${BASE}"]
    final = text.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", final, re.M) == ["1000"]
    assert "pip install" not in final and "apt-get" not in final
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert len(installs) == 2
    assert {"--require-hashes", "--only-binary"} <= set(installs[0].split())
    assert {"--no-index", "--no-deps"} <= set(installs[1].split())
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in source.split():
            for variant in ("cpu", "cuda"):
                assert (ROOT / name.replace("${VARIANT}", variant)).exists(), name


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_locks_hold_a_hash_for_everything(variant: str) -> None:
    """And the versions that the tests ran with."""
    text = (K8S / f"requirements-{variant}.lock").read_text("utf-8")
    pins = {}
    for block in re.split(r"\n(?=\S)", text.replace("\\\n", "")):
        if block.startswith("#"):
            continue
        pin = re.match(r"([\w.\[\]-]+)==(\S+)", block)
        assert pin, block[:80]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), pin[1]
        pins[re.sub(r"[-_.]+", "-", pin[1]).lower()] = pin[2]
    tested = dict(
        line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )  # fmt: skip
    tested = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in tested.items()}
    other = {n: (v, tested[n]) for n, v in pins.items() if n in tested and tested[n] != v}
    other = {n: v for n, v in other.items() if v[0].split("+")[0] != v[1]}
    assert not other, f"make the locks anew, as their first lines say: {other}"
    assert {"ray", "torch", "av", "pyarrow", "s3fs", "prometheus-client", "setuptools"} <= set(pins)
    assert any(n.startswith("nvidia-") for n in pins) is (variant == "cuda")
    assert pins["torch"].endswith("+cpu") is (variant == "cpu")
    for m in render("overlays/gpu"):
        for _, cluster, _ in ray_specs([m]):
            assert cluster["rayVersion"] == pins["ray"]
