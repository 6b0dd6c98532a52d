"""Jobs over a few videos with models written on the spot, in this process, read back by DuckDB."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidbatch import query
from vidbatch.config import parse_job
from vidbatch.ledger import Ledger
from vidbatch.pipeline.run import EngineFactory, RunResult, run_job
from vidbatch.storage import open_store
from vidbatch.verify import verify

HEAD = """
import numpy as np
import torch

from vidbatch.data import AudioGrid, BoxRows, Geometry, WindowGrid
"""


def write_model(folder: Path, name: str, source: str, **what: Any) -> dict[str, Any]:
    """An entry of `models:` for the class `Model` of a source, below HEAD; `how` is its how."""
    how = what.pop("how", {})
    (folder / f"model_{name}.py").write_text(HEAD + textwrap.dedent(source), encoding="utf-8")
    target = {"adapter": "python", "class": f"model_{name}:Model"}
    return {"name": name, "version": "v1", "what": target | what, "how": how}


def run_models(
    base_dir: Path,
    archive: Path,
    output: Path,
    models: Sequence[dict[str, Any]],
    *,
    fps: Any = 5,
    length_s: float | None = None,
    isolate: bool = False,
    check: bool = True,
    task_minutes: float = 10.0,
    make_engine: EngineFactory | None = None,
) -> RunResult:
    """One run; with `length_s` every video is cut at keyframes into clips of about that length."""
    clips = {"length_s": length_s, "split_above": 0} if length_s else {}
    tree = {
        "archive": {"uri": str(archive)},
        "sample": {"fps": fps},
        "models": list(models),
        "output": {"uri": str(output)},
        "clips": clips,
        "engine": {"address": "none"}
        if make_engine is None
        else {"decoders": 2, "object_store_cap": "200MiB"},
        "limits": {"isolate": isolate, "task_minutes": task_minutes},
    }
    result = run_job(parse_job(tree, base_dir=base_dir), make_engine=make_engine)
    if check:
        assert result.exit_code == 0, result.summary
        problems = verify(Ledger(open_store(str(output)))).problems
        assert not problems, problems
    return result


def rows(output: Path, text: str) -> list[tuple[Any, ...]]:
    """What a query over the views of an output gives."""
    return query.sql(str(output), text).rows
