"""`vidbatch init` and `vidbatch config check`: a job file from an archive, and what it means."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from vidbatch.archive import DEFAULT_INCLUDE
from vidbatch.config import Job, parse_job
from vidbatch.errors import NotFoundInStore, UsageError
from vidbatch.ledger import Ledger
from vidbatch.models.bench import try_model
from vidbatch.pipeline.resolve import job_models, job_outputs, settings_of
from vidbatch.progress import human_bytes
from vidbatch.storage import StoreSettings, open_store

DATE_PATTERNS = {
    r"(?P<date>\d{4}/\d{2}/\d{2})/(?P<time>\d{6})": "…/2026/03/01/080000…",
    r"(?P<date>\d{4}/\d{2}/\d{2})": "…/2026/03/01/…",
    r"(?P<date>\d{4}-\d{2}-\d{2})": "…2026-03-01…",
    r"(?P<date>20\d{2}[01]\d[0-3]\d)": "…20260301…",
}


def init_job(uri: str, settings: StoreSettings | None = None) -> str:
    """The text of a job file for an archive: suffixes, sizes and dates as they were found.

    Raises:
        UsageError: nothing is there, or nothing that looks like a video.
    """
    store = open_store(uri, settings or StoreSettings())
    suffixes: Counter[str] = Counter()
    dated: Counter[str] = Counter()
    videos = size = 0
    known = {p.rsplit(".", 1)[-1].lower() for p in DEFAULT_INCLUDE}
    for entry in store.list():
        suffix = PurePosixPath(entry.key).suffix.lstrip(".").lower()
        suffixes[suffix or "(none)"] += 1
        if suffix in known:
            videos, size = videos + 1, size + entry.size_bytes
            for pattern in DATE_PATTERNS:
                if re.search(pattern, entry.key):
                    dated[pattern] += 1
                    break
    if not videos:
        seen = ", ".join(f"{n} .{s}" for s, n in suffixes.most_common(5)) or "nothing at all"
        raise UsageError(f"{uri}: no video found (found {seen}); nothing was written")
    pattern, hits = dated.most_common(1)[0] if dated else ("", 0)
    if hits > videos * 0.9:
        date = f"date: {{from: key, pattern: '{pattern}', tz: UTC, otherwise: modified}}"
        date += f"   # {hits} of {videos} keys look like {DATE_PATTERNS[pattern]}"
    else:
        date = "date: {from: modified, tz: UTC}   # no date found in the keys"
    used = ", ".join(f'"**/*.{s}"' for s in sorted(suffixes) if s in known)
    name = uri.rstrip("/").rsplit("/", 1)[-1] or "videos"
    return f"""\
# vidbatch run job.yaml
# {videos} videos, {human_bytes(size)} in {uri}
# WHAT: changing these changes which rows there are
archive:
  uri: {json.dumps(uri)}
  include: [{used}]
  {date}
  # since: 3d          # only videos captured in the last three days (also: until, modified_since)
  # settle: 15m        # leave objects younger than this to the next run
sample: {{fps: 1}}        # or every: 30 | keyframes: true | all: true
models:
  - builtin: quality    # brightness, contrast, sharpness; labels black, blurred, frozen, …
  - builtin: colour     # an embedding for "find frames like this one"
  # - builtin: faces    # boxes of frontal faces
  # - file: configs/models/my-model.yaml
output:
  uri: {json.dumps(name + "-tables")}
# HOW: changes speed only
# engine: {{address: local, decoders: auto, predictors: auto}}
# limits: {{max_failed_share: 0.05, task_minutes: 10}}
"""


def check_job(job: Job, *, load: bool = True) -> dict[str, Any]:
    """Fingerprints of a job, and what differs from the last run of its output.

    Args:
        load: whether every model is also loaded, on the CPU, and shown two made items.

    Raises:
        UsageError: a model cannot be resolved or loaded, or answers not as its file says.
    """
    sampling, outputs = job_outputs(job)
    if load:
        for definition in job_models(job):
            try_model(definition)
    found: dict[str, Any] = {
        "archive": list(job.archive.uri),
        "output": job.output.uri,
        "sampling": sampling,
        "outputs": {o.partition: o.fingerprint for o in outputs},
    }
    settings = settings_of(job.output.store)
    try:
        last = Ledger(open_store(job.output.uri, settings)).last_job()
    except NotFoundInStore:
        last = None
    if last is None:
        found["last_run"] = "none: the first run would start from nothing"
        return found
    before, now = last.job, job.dump()
    differing = sorted(k for k in now if k != "base_dir" and before.get(k) != now.get(k))
    found["last_run"] = last.run
    found["differs_in"] = {k: {"was": before.get(k), "is": now.get(k)} for k in differing}
    try:
        old = parse_job(before, base_dir=Path.cwd())
        old_outputs = {o.partition for o in job_outputs(old)[1]}
    except UsageError:
        old_outputs = set()
    found["recomputed"] = sorted({o.partition for o in outputs} - old_outputs)
    return found
