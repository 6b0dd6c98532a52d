"""`vidbatch plan`: what a run would do, what it would take, and why, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from vidbatch.config import Job
from vidbatch.data import Clip, Sample, Task, Video, VideoInfo
from vidbatch.errors import VidbatchError
from vidbatch.pipeline.engine import make_decoder
from vidbatch.pipeline.failures import to_failure
from vidbatch.pipeline.survey import ASSUMED_BITS_PER_S, Survey, new_run_id, take_survey
from vidbatch.plan import estimate_cost_s, pack, task_cost_s, whole
from vidbatch.progress import human_bytes, human_s
from vidbatch.storage import open_source, open_store

PROBERS = 4
"""Headers read at once: they wait for the store, not for the core."""

ROW_BYTES = 60
"""Of a part file per frame and model, measured over the built-in models; embeddings add 4 D."""


def show_plan(job: Job, *, max_probes: int = 200) -> dict[str, Any]:
    """Everything that `vidbatch plan` says, as JSON types.

    Args:
        max_probes: headers that are read at most, spread evenly over what is to do; hours and
            frames of the rest follow from their bytes.
    Raises:
        UsageError, StoreError: archive or output cannot be used as they are.
    """
    now = datetime.now(UTC)
    survey = take_survey(job, run=new_run_id(now), now=now)
    todo = survey.videos_to_do()
    chosen = todo[:: max(1, -(-len(todo) // max_probes))] if max_probes > 0 else []
    infos, unreadable = _probe(survey, chosen)
    probed_bytes = sum(v.size_bytes for v, _ in infos)
    probed_s = sum(i.duration_s or 0.0 for _, i in infos)
    per_byte = probed_s / probed_bytes if probed_s and probed_bytes else 8 / ASSUMED_BITS_PER_S
    todo_bytes = sum(v.size_bytes for v in todo)
    hours = todo_bytes * per_byte / 3600
    rate = _mean_rate([i for _, i in infos])
    frames = _frames(job.sample.rule(), hours * 3600, rate)
    num_tasks = len(survey.lacking) + len(survey.retries) + len(_new_tasks(survey))
    core_s = sum(estimate_cost_s(v.size_bytes) for v in todo)
    cores = job.engine.decoders if job.engine.decoders != "auto" else _cores()
    models = len(survey.spec.outputs) - 1
    gets = sum(-(-v.size_bytes // (8 * 2**20)) + 1 for v in todo)
    puts = num_tasks * (4 + 4 * models)
    dim = sum(o.spec.dim for o in survey.spec.outputs if o.spec)
    return {
        "archive": list(job.archive.uri),
        "output": job.output.uri,
        "sample": survey.spec.sampling_partition,
        "listing": survey.listing_facts(),
        "to_do": {
            "videos": len(todo),
            "bytes": todo_bytes,
            "video_hours": round(hours, 4),
            "hours_from": f"the headers of {len(infos)} of {len(todo)} videos"
            if infos
            else f"an assumed {ASSUMED_BITS_PER_S / 1e6:g} Mbit/s",
            "frames": frames,
            "tasks": num_tasks,
        },
        "outputs": [_output_state(survey, o.fingerprint) for o in survey.spec.outputs],
        "days": dict(sorted(Counter(v.dt for v in todo).items())),
        "unreadable": unreadable,
        "estimate": {
            "core_s": round(core_s, 1),
            "decoders": cores,
            "elapsed_s": round(core_s / cores, 1),
            "table_bytes": frames * (ROW_BYTES * (models + 1) + 4 * dim),
            "bytes_per_task": frames * (ROW_BYTES * (models + 1) + 4 * dim) // max(num_tasks, 1),
            "cost": round(
                core_s / 3600 * job.cost.cpu_hour
                + gets / 1000 * job.cost.get_1000
                + puts / 1000 * job.cost.put_1000,
                4,
            ),
        },
    }


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _new_tasks(survey: Survey) -> list[Task]:
    """As if every large video were one clip: their number is known only once they are probed."""
    pieces = [whole(Clip(video=v)) for v in survey.new]
    decoders = survey.job.engine.decoders
    task_s = task_cost_s(
        sum(p.cost_s for p in pieces),
        limit_s=survey.job.limits.task_minutes * 60,
        decoders=_cores() if decoders == "auto" else decoders,
    )
    return pack(pieces, sampling=survey.spec.sampling, task_s=task_s)


def _probe(
    survey: Survey, videos: Sequence[Video]
) -> tuple[list[tuple[Video, VideoInfo]], list[dict[str, str]]]:
    """Headers of some videos, and those that cannot be read with the reason."""
    spec = survey.spec
    infos: list[tuple[Video, VideoInfo]] = []
    unreadable: list[dict[str, str]] = []

    def probe_share(share: Iterable[Video]) -> None:
        store = open_store(spec.archive_uris[0], spec.archive_store)
        with make_decoder(spec) as decoder:
            for video in share:
                try:
                    source = open_source(
                        store, video.uri, size_bytes=video.size_bytes, version=video.version
                    )
                    try:
                        info, _ = decoder.probe(
                            source, limits=spec.limits, length_s=60.0, uri=video.uri
                        )
                    finally:
                        source.close()
                    infos.append((video, info))
                except VidbatchError as error:
                    failure = to_failure(error, "probe")
                    unreadable.append(
                        {"uri": video.uri, "kind": failure.kind, "message": failure.message}
                    )

    shares = [videos[i::PROBERS] for i in range(PROBERS) if videos[i::PROBERS]]
    with ThreadPoolExecutor(PROBERS, "probe") as pool:
        for future in [pool.submit(probe_share, share) for share in shares]:
            future.result()
    return infos, sorted(unreadable, key=lambda f: f["uri"])


def _mean_rate(infos: Sequence[VideoInfo]) -> float:
    rates = [float(i.rate) for i in infos if i.rate]
    return sum(rates) / len(rates) if rates else 25.0


def _frames(sample: Sample, seconds: float, rate: float) -> int:
    if sample.kind == "fps":
        return round(seconds * min(float(sample.fps or 0), rate))
    if sample.kind == "every":
        return round(seconds * rate / (sample.every or 1))
    return round(seconds * rate if sample.kind == "all" else seconds / 2)


def _output_state(survey: Survey, fingerprint: str) -> dict[str, Any]:
    """How much of an output is done, and why the rest is not."""
    output = survey.spec.output(fingerprint)
    lacking = sum(fingerprint in fps for fps in survey.lacking.values())
    done = len(survey.done[fingerprint])
    reasons: dict[str, int] = {}
    if survey.new:
        changed = int(survey.log.knows_uri([v.uri for v in survey.new]).sum())
        reasons = {"new videos": len(survey.new) - changed, "changed videos": changed}
    if lacking:
        if done:
            why = "tasks not finished"
        elif output.name in survey.ledger.model_names():
            why = "tasks: model changed"
        elif output.name != "frames" and survey.done[survey.spec.outputs[0].fingerprint]:
            why = "tasks: model added"
        else:
            why = "tasks not begun"
        reasons[why] = lacking
    return {
        "output": output.partition,
        "tasks_done": done,
        "missing": {k: v for k, v in reasons.items() if v},
    }


def plan_table(shown: dict[str, Any]) -> Any:
    """`show_plan`'s result for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    todo, guess = shown["to_do"], shown["estimate"]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    listing = shown["listing"]
    left_out = ", ".join(f"{n} {k}" for k, n in listing["left_out"].items()) or "nothing"
    for name, value in (
        ("archive", f"{listing['videos']} videos, {human_bytes(listing['bytes'])}"),
        ("left out", left_out),
        ("to do", f"{todo['videos']} videos, {human_bytes(todo['bytes'])}, {todo['tasks']} tasks"),
        ("hours", f"{todo['video_hours']:.2f} of video, from {todo['hours_from']}"),
        ("frames", f"{todo['frames']} to sample ({shown['sample']})"),
        (
            "estimate",
            f"{human_s(guess['elapsed_s'])} on {guess['decoders']} decoders, "
            f"cost {guess['cost']:g}, tables {human_bytes(guess['table_bytes'])} "
            f"({human_bytes(guess['bytes_per_task'])} a task)",
        ),
    ):
        facts.add_row(name, value)
    outputs = Table("output", "tasks done", "missing", box=None, padding=(0, 2, 0, 0))
    for row in shown["outputs"]:
        why = ", ".join(f"{n} {k}" for k, n in row["missing"].items()) or "nothing"
        outputs.add_row(row["output"], str(row["tasks_done"]), why)
    parts: list[Any] = [facts, Text(), outputs]
    if shown["days"]:
        parts += [Text(), _histogram(shown["days"])]
    if shown["unreadable"]:
        bad = Table("cannot be read", "kind", "why", box=None, padding=(0, 2, 0, 0))
        for row in shown["unreadable"]:
            bad.add_row(Text(row["uri"]), row["kind"], Text(row["message"]))
        parts += [Text(), bad]
    return Group(*parts)


def _histogram(days: dict[str, int], *, most: int = 31) -> Any:
    """A bar per day; the newest `most` days, the older ones in one line."""
    from rich.table import Table

    table = Table("day", "videos", "", box=None, padding=(0, 2, 0, 0))
    newest = sorted(days)[-most:]
    top = max(days[d] for d in newest)
    if len(days) > most:
        table.add_row(f"{len(days) - most} days before", str(sum(days.values()) - sum(
            days[d] for d in newest)), "")  # fmt: skip
    for day in newest:
        table.add_row(day, str(days[day]), "█" * max(1, round(40 * days[day] / top)))
    return table
