"""What an output holds: failures and what to do about them, models, and whether all is whole."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vidbatch.errors import UsageError
from vidbatch.ledger import Ledger
from vidbatch.query import sql
from vidbatch.storage import StoreSettings, open_store
from vidbatch.verify import SWEEP_AFTER_S, sweep, verify

_FAILURES = """
SELECT f.uri, f.source, f.dt, f.sample, f.model, f.start_s, f.end_s, c.status, f.stage, f.kind,
       f.message, f.advice, f.attempts, f.retryable, f.generation, f.run, f.failed_at
FROM {failures} f
JOIN coverage_all c USING (sample, model, video_id, start_s, generation)
ORDER BY f.failed_at DESC, f.uri, f.start_s, f.sample, f.model
"""


def failures(
    output: str, settings: StoreSettings | None = None, *, history: bool = False
) -> list[dict[str, Any]]:
    """What failed or is partial, why, and what to do: a row per clip and output, newest first.

    Args:
        history: also what was cured, and what a newer version or model made obsolete.

    Raises:
        UsageError: no run has ever written there.
        InfraError: the store cannot be read.
    """
    table = "failures_all" if history else "failures"
    return _rows(output, _FAILURES.format(failures=table), settings)


_MODELS = """
SELECT m.name, m.version, m.model, m.adapter, m.kind, m.dim, m.labels, m.first_run, m.fingerprint,
       count(DISTINCT c.video_id) AS videos, coalesce(sum(c.frames), 0) AS frames,
       count(DISTINCT n.video_id) AS videos_current
FROM models m
LEFT JOIN coverage_all c ON c.model = m.model AND c.status IN ('ok', 'partial')
LEFT JOIN current_models n ON n.model = c.model AND n.sample = c.sample
    AND n.video_id = c.video_id
GROUP BY ALL ORDER BY m.name, m.first_run, m.model
"""


def known_models(
    output: str | None = None, settings: StoreSettings | None = None
) -> dict[str, Any]:
    """Built-in models, adapters with the extra each needs, and the models that an output holds."""
    from vidbatch.models.builtin import BUILTINS
    from vidbatch.models.registry import ADAPTERS

    return {
        "builtin": sorted(BUILTINS),
        "adapters": {name: extra for name, (_, extra) in sorted(ADAPTERS.items())},
        "output": _rows(output, _MODELS, settings) if output is not None else [],
    }


def _rows(output: str, query: str, settings: StoreSettings | None) -> list[dict[str, Any]]:
    _begun(output, settings)
    found = sql(output, query, settings)
    return [
        {c: v.isoformat() if hasattr(v, "isoformat") else v
         for c, v in zip(found.columns, row, strict=True)}
        for row in found.rows
    ]  # fmt: skip


def verify_output(output: str, settings: StoreSettings | None = None) -> dict[str, Any]:
    """`verify.verify` as JSON types; `problems` is empty when all is proved.

    Raises:
        UsageError: no run has ever written there.
        InfraError: the store does not answer, or the plan log is broken.
    """
    return asdict(verify(_begun(output, settings)))


def sweep_output(
    output: str, settings: StoreSettings | None = None, *, older_than_s: float = SWEEP_AFTER_S
) -> dict[str, Any]:
    """`verify.sweep` as JSON types. Raises as `verify_output`."""
    return asdict(sweep(_begun(output, settings), older_than_s=older_than_s))


def _begun(output: str, settings: StoreSettings | None) -> Ledger:
    """The ledger of an output that a run has begun: of a mistyped path nothing may look well."""
    ledger = Ledger(open_store(output, settings or StoreSettings()))
    if ledger.pinned() is None:
        raise UsageError(f"{ledger.store.uri} holds no run of vidbatch — check the path")
    return ledger
