"""One local Ray cluster for the whole test session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

CPUS = 4
"""Logical: tests ask for two decoders and must not wait for those of the test before."""


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private cluster with a token of its own; `engine.address: local` uses it as it is."""
    import ray

    from vidbatch.cluster.pools import start_ray
    from vidbatch.config import EngineConfig

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        engine = EngineConfig.model_validate(
            {"address": "local", "decoders": CPUS, "object_store_cap": "200MiB"}
        )
        assert start_ray(engine), "Ray was running before the first test that needs it"
        assert "RAY_AUTH_TOKEN" not in os.environ, "the token stays with Ray's own processes"
    yield
    ray.shutdown()
    assert not (home / ".ray").exists(), "the token was written into HOME"
