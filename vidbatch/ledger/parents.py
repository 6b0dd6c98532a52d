"""Boxes that an output has committed for a task: what rows of a model on them may refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidbatch.data import Outcome

PARENT_FAILED = "parent_failed"
"""Kind of a clip without rows of a model on boxes, because it has no boxes."""

KEY = ("video_id", "frame_index", "detection_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """The detections of one task in one output."""

    model: str
    """The value of `model=`."""
    keys: pa.Table
    """Columns KEY."""
    outcomes: tuple[Outcome, ...]
    """How the task's clips ended there, in its order."""

    def bound(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """How the clips end in an output on these boxes: where these have failed, it fails too."""
        return [
            mine
            if theirs.status != "failed" or mine.status == "failed"
            else replace(
                mine,
                status="failed",
                frames=0,
                reason=f"{self.model}, whose boxes it is on, has failed: {theirs.reason}",
                stage=theirs.stage,
                kind=PARENT_FAILED,
                advice=theirs.advice,
                retryable=theirs.retryable,
            )
            for mine, theirs in zip(outcomes, self.outcomes, strict=True)
        ]

    def kept(self, tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
        """The tables without rows of boxes that are not among these."""
        return {
            name: with_parent(table, self.keys) if "of_model" in table.column_names else table
            for name, table in tables.items()
        }


def with_parent(table: pa.Table, parents: pa.Table) -> pa.Table:
    """The rows that refer to no detection, or to one of `parents` (columns KEY)."""
    key = parents.column_names
    positions = pa.array(np.arange(len(table)))
    found = (
        table.select(key)
        .append_column("position", positions)
        .join(parents, keys=key, join_type="left semi")["position"]
    )
    keep = pc.or_(pc.is_null(table["detection_id"]), pc.is_in(positions, value_set=found))
    return table.filter(keep)
