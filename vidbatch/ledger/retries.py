"""Clips that failed and may succeed later: found by one LIST, planned again under a new generation.

A commit puts `_vidbatch/retries/<output fingerprint>/<task_id>.json` before its record when a clip
failed retryably: so the next run reads the few small markers of failed tasks and not the record
of every task ever committed. Its content follows from the coverage file that is already in the
store, so it is the same whoever writes it. Markers are never removed: the plan log says which of
them have been answered by a later generation. `partial` is final: its rows stand.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from vidbatch.data import Clip, Outcome, Output, Task
from vidbatch.errors import ExistsInStore
from vidbatch.ledger.fetch import fetch
from vidbatch.ledger.plan_log import PlanLog

if TYPE_CHECKING:
    from vidbatch.storage import Store

RETRIES = "_vidbatch/retries"

MAX_GENERATION = 2
"""Of retries that come by themselves: three nights, then a person decides."""


def put_marker(store: Store, output: str, task: Task, outcomes: Sequence[Outcome]) -> None:
    """Leaves word of the clips that failed retryably; nothing where there are none."""
    clips = [[*o.clip.identity(), o.kind] for o in outcomes if o.status == "failed" and o.retryable]
    if not clips:
        return
    body = {"task": task.task_id, "generation": task.generation, "clips": clips}
    data = json.dumps(body, separators=(",", ":")).encode()
    try:
        store.put_new(f"{RETRIES}/{output}/{task.task_id}.json", data, {"task": task.task_id})
    except ExistsInStore:
        return  # an earlier attempt got this far; the same coverage gives the same marker


def retry_tasks(
    store: Store,
    log: PlanLog,
    output: Output,
    *,
    done: Collection[str],
    kinds: Collection[str] | None,
    max_generation: int | None,
    listed: Collection[str] | None,
) -> list[Task]:
    """See `Ledger.retry_tasks`."""
    prefix = f"{RETRIES}/{output.fingerprint}/"
    keys = {PurePosixPath(key).stem: key for key in store.list_keys(prefix)}
    committed = sorted(keys.keys() & set(done))
    found = fetch(store, [keys[task_id] for task_id in committed])
    bodies = dict(zip(committed, found, strict=True))
    planned = log.retried(output.fingerprint)
    tasks = []
    for task in log.tasks(log.positions_of(committed)):
        marker: dict[str, Any] = json.loads(bodies[task.task_id])
        generation = task.generation + 1
        if max_generation is not None and generation > max_generation:
            continue
        kind_of = {tuple(clip[:3]): clip[3] for clip in marker["clips"]}

        def again(clip: Clip, generation: int = generation, kind_of: Any = kind_of) -> bool:
            identity = tuple(clip.identity())
            return (
                identity in kind_of
                and (kinds is None or kind_of[identity] in kinds)
                and (listed is None or identity[0] in listed)
                and (identity[0], identity[1], generation) not in planned
            )

        clips = tuple(clip for clip in task.clips if again(clip))
        if clips:
            tasks.append(
                replace(
                    task,
                    clips=clips,
                    generation=generation,
                    output=output.fingerprint,
                    cost_s=task.cost_s * len(clips) / len(task.clips),
                )
            )
    return tasks
