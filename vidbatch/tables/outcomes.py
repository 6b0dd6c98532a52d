"""How clips ended: rows of `coverage` and `failures`, and the JSON that files carry of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import datetime
from typing import Any

import pyarrow as pa

from vidbatch.data import Clip, Outcome, Task
from vidbatch.tables.schemas import SCHEMAS

MAX_MESSAGE = 500
"""Characters of a message in a table."""

_CLIP = ("video_id", "first_keyframe", "end_keyframe")
_FACTS = tuple(f for f in fields(Outcome) if f.name != "clip")

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,19}://)[^\s/@]{1,500}@", re.I), r"\1***@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,19}://[^\s?#]{1,2000})\?\S{1,4000}", re.I), r"\1?***"),
    (re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}"), "***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]{8,}"), "***"),
    (re.compile(r"\b(?:hf|ghp|gho|github_pat|glpat|xox[abp])[_-][A-Za-z0-9_-]{16,}"), "***"),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE), r"\1 ***"),
    (
        re.compile(
            r"([\w-]{0,40}(?:secret|password|passwd|token|signature|credential|authorization"
            r"|access_?key|api_?key)[\w-]{0,40}[\"']?\s{0,3}[=:]\s{0,3})(?!\s*(?:bearer|basic)\b)"
            r"(?:\"[^\"]{1,4000}\"|'[^']{1,4000}'|[^\s\"',;&)}\]]{1,4000})",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    # An AWS secret on its own: exactly 40 of its characters, neither a path nor a digest.
    (
        re.compile(
            r"(?<![\w/+=.-])(?=[a-z0-9/+]{0,39}[A-Z])(?=[A-Z0-9/+]{0,39}[a-z])"
            r"(?=[A-Za-z/+]{0,39}[0-9])[A-Za-z0-9/+]{40}(?![\w/+=.-])"
        ),
        "***",
    ),
)  # fmt: skip


def redact(text: str) -> str:
    """`text` as it may stand in a table: one line of at most 500 characters, without secrets.

    User names, passwords and queries of URLs go, and so does what looks like a key, a token or a
    signature. URIs of objects stay: a row must name its video.

    >>> redact("GET https://bob:pw@host/a.mp4?X-Amz-Signature=0f\\nfailed")
    'GET https://***@host/a.mp4?*** failed'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:20_000]).split())
    for pattern, replacement in _SECRETS:
        line = pattern.sub(replacement, line)
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


def outcomes_to_json(outcomes: Sequence[Outcome]) -> str:
    """Outcomes as JSON of columns; one that has the same value for all clips stands once.

    A task may have hundreds of clips, and each of its files carries this.
    """
    identities = [o.clip.identity() for o in outcomes]
    columns: dict[str, Any] = {
        name: [identity[i] for identity in identities] for i, name in enumerate(_CLIP)
    }
    for fact in _FACTS:
        values = [getattr(o, fact.name) for o in outcomes]
        if all(v == values[0] for v in values):
            if fact.default is MISSING or values[0] != fact.default:
                columns[fact.name] = values[0]
        else:
            columns[fact.name] = values
    return json.dumps(columns, separators=(",", ":"), allow_nan=False)


def outcomes_from_json(text: str, task: Task) -> tuple[Outcome, ...]:
    """The outcomes of `task`'s clips, in the task's order.

    Raises:
        ValueError: the text is no such JSON, or names other clips than the task has.
    """
    try:
        columns = json.loads(text)
        identities = list(zip(*(columns.pop(name) for name in _CLIP), strict=True))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not the outcomes of a task: no {error}") from error
    position = {identity: i for i, identity in enumerate(identities)}
    wanted = [(clip, tuple(clip.identity())) for clip in task.clips]
    if len(position) != len(wanted) or any(identity not in position for _, identity in wanted):
        raise ValueError(f"the outcomes are not those of the clips of task {task.task_id}")

    def facts(i: int) -> dict[str, Any]:
        return {k: v[i] if isinstance(v, list) else v for k, v in columns.items()}

    return tuple(Outcome(clip=clip, **facts(position[identity])) for clip, identity in wanted)


def outcome_tables(
    task: Task, outcomes: Sequence[Outcome], *, run: str, now: datetime
) -> dict[str, pa.Table]:
    """The tables `coverage` (a row per clip) and `failures` (a row per clip that is not ok).

    `start_s` of both is the clip's planned start, the same in every output and attempt: part of
    the key. The other bounds are what the clip turned out to hold. Rows are sorted by that key.

    Raises:
        ValueError: a bound is not finite, or a clip that failed counts frames.
    """
    rows = sorted((_row(task, o, run, now) for o in outcomes), key=_by_start)
    return {
        "coverage": pa.Table.from_pylist(rows, schema=SCHEMAS["coverage"]),
        "failures": pa.Table.from_pylist(
            [row for row in rows if row["status"] != "ok"], schema=SCHEMAS["failures"]
        ),
    }


def _by_start(row: dict[str, Any]) -> tuple[str, float]:
    return row["video_id"], row["start_s"]


def _row(task: Task, outcome: Outcome, run: str, now: datetime) -> dict[str, Any]:
    """The columns of both tables for one clip."""
    clip: Clip = outcome.clip
    row = {fact.name: getattr(outcome, fact.name) for fact in _FACTS}
    message = None if outcome.reason is None else redact(outcome.reason)
    if not (abs(clip.start_s) < float("inf") and abs(outcome.end_s) < float("inf")):
        raise ValueError(f"clip at {clip.start_s} s of {clip.video.uri} ends at {outcome.end_s}")
    if outcome.status == "failed" and outcome.frames:
        raise ValueError(f"a failed clip of {clip.video.uri} counts {outcome.frames} frames")
    return row | {
        "video_id": clip.video.video_id,
        "uri": clip.video.uri,
        "source": clip.video.source,
        "start_s": clip.start_s,
        "generation": task.generation,
        "reason": message,
        "message": message,
        "run": run,
        "committed_at": now,
        "failed_at": now,
    }
