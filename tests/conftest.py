"""Fixtures shared by all tests; the S3 server is in tests/s3.py, made videos in tests/clips.py."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest_plugins = ["tests.s3", "tests.s3_faults", "tests.ray_cluster", "tests.made_output"]
SHARED_VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"


@pytest.fixture(autouse=True)
def _sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds fixed, no credentials of the person who runs the tests."""
    random.seed(0)
    np.random.seed(0)
    for name in list(os.environ):
        if name.startswith(("AWS_", "RAY_AUTH")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_error_logged(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Iterator[None]:
    """A test that logged an ERROR has failed, whatever it asserts."""
    yield
    if request.node.get_closest_marker("logs_errors"):
        return
    errors = [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
    assert not errors, f"logged errors: {[r.getMessage() for r in errors]}"


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real, odd and truth videos; skips without it, fails where it must be there."""
    if not SHARED_VIDEOS.is_dir():
        if os.environ.get("FAIL_WITHOUT_VIDEOS") == "1":
            pytest.fail(f"{SHARED_VIDEOS} is missing and FAIL_WITHOUT_VIDEOS=1")
        pytest.skip(f"no real test videos at {SHARED_VIDEOS}")
    return SHARED_VIDEOS
