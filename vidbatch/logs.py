"""Lines that machines read: one JSON object per line on stderr, without secrets.

    {"time": "2026-03-01T02:10:07.213+00:00", "level": "info", "event": "failure",
     "run": "20260301T020500-114-9f3a1c", "task": "…", "video": "s3://…", "kind": "no_video", …}

`event` is note, progress, started, task, failure, finished, summary, error, or log (what a library
said at level WARNING or above).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from vidbatch.errors import VidbatchError
from vidbatch.progress import Progress


class JsonLog(logging.Handler):
    """Takes events of a `Progress` and records of `logging`; use `start` for both."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(logging.WARNING)
        self._stream = stream

    def start(self) -> JsonLog:
        """Takes every logger's warnings from now on."""
        logging.getLogger().addHandler(self)
        return self

    def say(self, event: str, facts: Mapping[str, Any], level: str = "info") -> None:
        """Writes one line."""
        head = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level}
        line = json.dumps({**head, "event": event, **_clean(dict(facts))}, ensure_ascii=False)
        print(line, file=self._stream or sys.stderr, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        facts = {"logger": record.name, "message": record.getMessage()}
        self.say("log", facts, record.levelname.lower())


def make_progress(style: str | None, *, quiet: bool = False) -> Progress:
    """The progress of a run, in lines of the style `json` or in those for people."""
    return Progress(quiet=quiet, log=JsonLog().start().say if style == "json" else None)


def say_error(error: VidbatchError, style: str | None) -> None:
    """The last word of a command that failed: one line and its advice."""
    advice = error.advice if error.advice not in error.message else ""
    if style == "json":
        facts = {"message": error.message, "kind": error.kind, "advice": advice}
        JsonLog().say("error", facts, "error")
        return
    print(f"vidbatch: {error.message}", file=sys.stderr)
    if advice:
        print(f"  {advice}", file=sys.stderr)


def _clean(value: Any) -> Any:
    """JSON types; secrets out of every text."""
    from vidbatch.tables import redact  # brings pyarrow: not for every command

    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(v) for v in value]
    if value is None or isinstance(value, int | float):
        return value
    return redact(str(value))
