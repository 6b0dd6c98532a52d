"""A job file → what the run is made of: listing rule, outputs, the spec that workers get."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from vidbatch.archive import ArchiveRule, DateRule, parse_when
from vidbatch.config import Job
from vidbatch.data import DecodeLimits, Output
from vidbatch.models.registry import ModelDef, resolve_models
from vidbatch.pipeline.order import RunSpec
from vidbatch.sampling import sampling_fingerprint
from vidbatch.storage import StoreSettings
from vidbatch.tables import output_of, sampling_partition


def settings_of(store: Any) -> StoreSettings:
    """A job file's `store:` block as the storage layer's settings."""
    return StoreSettings(**store.model_dump())


def job_outputs(job: Job) -> tuple[str, tuple[Output, ...]]:
    """(sampling partition, outputs): `frames` first, then the models in the file's order.

    Raises:
        UsageError: a model cannot be resolved, or two share a name.
    """
    sample = job.sample.rule()
    specs = [d.spec for d in job_models(job)]
    fingerprint = sampling_fingerprint(sample)
    outputs = (output_of(None, fingerprint), *(output_of(s, fingerprint) for s in specs))
    return sampling_partition(sample), outputs


def job_models(job: Job) -> tuple[ModelDef, ...]:
    """The models of a job file; one of a hub only where the run stays on this machine.

    Raises:
        UsageError: a model cannot be resolved, or two share a name.
    """
    near = job.engine.address in ("local", "none")
    return resolve_models(job.models, Path(job.base_dir), hub=near)


def archive_rule(job: Job) -> ArchiveRule:
    """The listing's view of a job file. Raises UsageError for a date that is none."""
    a = job.archive
    return ArchiveRule(
        uris=a.uri,
        include=a.include,
        exclude=a.exclude,
        date=DateRule(
            source=a.date.source,
            pattern=a.date.pattern,
            tz=a.date.tz,
            otherwise=a.date.otherwise,
        ),
        since=parse_when(a.since) if a.since is not None else None,
        until=parse_when(a.until) if a.until is not None else None,
        modified_since=parse_when(a.modified_since) if a.modified_since is not None else None,
        settle_s=a.settle,
        store=settings_of(a.store),
    )


def run_spec(job: Job, run: str) -> RunSpec:
    """What every worker of a run must know. Raises UsageError: a model cannot be resolved."""
    sample = job.sample.rule()
    partition, outputs = job_outputs(job)
    return RunSpec(
        run=run,
        sample=sample,
        sampling=sampling_fingerprint(sample),
        sampling_partition=partition,
        outputs=outputs,
        models=job_models(job),
        archive_uris=job.archive.uri,
        archive_store=settings_of(job.archive.store),
        output_uri=job.output.uri,
        output_store=settings_of(job.output.store),
        limits=DecodeLimits(max_pixels=job.limits.max_pixels),
        attempts=job.limits.attempts,
        isolate=job.limits.isolate,
        versions=software_versions(),
    )


def software_versions() -> dict[str, str]:
    """Versions that a table's metadata name; read from package metadata, nothing is imported."""
    names = ("vidbatch", "ray", "torch", "av", "pyarrow", "numpy")
    return {name: version(name) for name in names}
