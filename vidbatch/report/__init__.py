"""What operators ask of an output: how the runs went, what failed and what to do, what it holds.

runs       `status`, from the run folder alone
holdings   `failures`, `known_models`, `verify_output`, `sweep_output`
shown      each of them as a table for the terminal

Everything comes back as JSON types.
"""

from vidbatch.report.holdings import failures, known_models, sweep_output, verify_output
from vidbatch.report.runs import OutputStatus, RunStatus, Status, status
from vidbatch.report.shown import (
    bench_table,
    failures_table,
    models_table,
    status_table,
    summary_table,
    sweep_table,
    verify_table,
)

__all__ = [
    "OutputStatus",
    "RunStatus",
    "Status",
    "bench_table",
    "failures",
    "failures_table",
    "known_models",
    "models_table",
    "status",
    "status_table",
    "summary_table",
    "sweep_output",
    "sweep_table",
    "verify_output",
    "verify_table",
]
