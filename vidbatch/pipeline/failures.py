"""What went wrong with a clip or a video, as the facts of a `failures` row."""

from __future__ import annotations

from dataclasses import replace

from vidbatch.data import Failure
from vidbatch.errors import NotFoundInStore, SourceChanged, StoreError, VidbatchError
from vidbatch.tables import redact


def to_failure(error: VidbatchError, stage: str) -> Failure:
    """An exception as the facts of a `failures` row."""
    advice = error.advice
    if not advice and error.retryable:
        advice = "comes back by itself on the next runs; `vidbatch retry` brings it back at once"
    return Failure(
        stage=stage,
        kind=error.kind,
        message=redact(error.message),
        advice=advice or "rests until the object changes",
        retryable=error.retryable,
    )


def read_failure(error: StoreError) -> Failure:
    """The same for an object whose bytes could not be had."""
    failure = to_failure(error, "read")
    if isinstance(error, SourceChanged):
        return replace(
            failure, kind="source_changed", advice="the next run plans the new version by itself"
        )
    if isinstance(error, NotFoundInStore):
        return replace(failure, kind="not_found", advice="the object was removed after the listing")
    return failure


def given_up(deaths: int) -> Failure:
    """The same for a clip at which so many workers died."""
    return Failure(
        stage="decode",
        kind="worker_died",
        message=(
            f"{deaths} workers died while this clip was under work; it was left out and "
            "the rest of its task committed"
        ),
        advice="look at the video in isolation; `vidbatch retry --kind worker_died` tries again",
        retryable=True,
    )
