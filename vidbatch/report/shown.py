"""Reports as tables for the terminal; cells are plain text, so that `[…]` in a message stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vidbatch.progress import human_bytes, human_s
from vidbatch.report.runs import ENDS, Status, counts_of

MAX_SLOWEST = 5
"""Clips shown; the summary holds more."""

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def status_table(found: Status) -> Table:
    """`status` in a few lines."""
    table = _table(found["output"], "", "")
    last = found["last"]
    if last is None:
        _add(table, "runs", "none: nothing has been written here yet")
        return table
    counts, elapsed_s = last["counts"], last["elapsed_s"]
    _add(table, "runs", f"{len(found['runs'])}, last {last['run']}")
    ended = f" after {human_s(elapsed_s)}" + (f": {last['stopped']}" if last["stopped"] else "")
    silent = "; killed? the same command goes on from here" if last["state"] == "silent" else ""
    _add(table, "state", last["state"] + ended + silent)
    _add(table, "speed", f"{last['frames_per_s']:g} frames/s, {_realtime(counts, elapsed_s)}")
    _add_counts(table, counts, last["failures_by_kind"])
    for output in found["outputs"]:
        left = output["planned"] - output["committed"]
        text = f"{output['committed']} of {output['planned']} tasks committed"
        if not output["in_last_run"]:
            text += ", not touched by the last run"
        _add(
            table,
            f"{output['model']} ({output['sample']})",
            text + (f", {left} open" if left else ""),
        )
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The summary of a run."""
    counts, elapsed_s = summary["counts"], summary["elapsed_s"]
    table = _table(f"run {summary['run']}", "", "")
    state = ENDS.get(summary["exit_code"], f"exit code {summary['exit_code']}")
    why = f": {summary['stopped']}" if summary.get("stopped") else ""
    _add(table, "state", f"{state} after {human_s(elapsed_s)}{why}")
    _add(table, "speed", f"{summary['frames_per_s']:g} frames/s, {_realtime(counts, elapsed_s)}")
    _add_counts(table, counts, summary["failures_by_kind"])
    for model, how in summary["outputs"].items():
        _add(table, model, ", ".join(f"{n} tasks {what}" for what, n in how.items()))
    left = summary.get("not_planned", {}).items()
    _add_lines(table, "not planned", (f"{uri}: {why}" for uri, why in left))
    _add_lines(table, "slowest", map(_slow_line, summary.get("slowest", ())[:MAX_SLOWEST]))
    reasons = summary.get("fallbacks", {}).items()
    _add_lines(table, "decoded in order", (f"{n} × {why}" for why, n in reasons))
    _add_engine(table, summary.get("engine", {}))
    return table


def _slow_line(clip: Mapping[str, Any]) -> str:
    read = f"{human_bytes(clip['bytes_read'])} in {clip['gets']} GETs"
    return f"{human_s(clip['seconds'])}: {clip['uri']} from {clip['start_s']:.0f} s, {read}"


def _add_engine(table: Table, facts: Mapping[str, Any]) -> None:
    """Where the seconds of the actors went, what died, and what to change; nothing of no news."""
    for who in ("decoder", "predictor"):
        if spent := _spent(facts.get(f"{who}_seconds", {})):
            batches = f"; {facts['frames']} frames in {facts['batches']} batches"
            _add(table, f"{who}s", spent + batches * (who == "predictor"))
    died = {
        "decoders": facts.get("decoder_deaths", 0),
        "predictors": facts.get("predictor_restarts", 0),
        "decoding processes": facts.get("child_restarts", facts.get("decoder_restarts", 0)),
    }
    if any(died.values()):
        _add(table, "died and replaced", ", ".join(f"{who} {n}" for who, n in died.items() if n))
    if halved := facts.get("batches_halved"):
        _add(table, "out of memory", f"{halved} batches were halved; a smaller batch would do")
    if "sentence" in facts:
        _add(table, "what limits it", facts["sentence"])


def _spent(seconds: Mapping[str, float]) -> str:
    """Seconds by state with their shares, the most first; what is under 1 % is left out."""
    total_s = sum(seconds.values())
    shares = {state: value / total_s for state, value in seconds.items() if total_s}
    said = (f"{k} {human_s(seconds[k])} ({v:.0%})" for k, v in _falling(shares) if v >= 0.01)
    return ", ".join(said)


def _add_counts(table: Table, counts: Mapping[str, Any], kinds: Mapping[str, int]) -> None:
    c = counts_of(counts)
    _add(table, "work", f"{c.tasks} tasks, {c.clips} clips, {c.videos} videos, {c.frames} frames")
    outcomes = f"{c.ok} ok, {c.partial} partial, {c.failed} failed (clips × outputs)"
    _add(
        table,
        "outcomes",
        outcomes + (f"; {c.fallbacks} clips decoded in order" if c.fallbacks else ""),
    )
    if kinds:
        _add(table, "failures", ", ".join(f"{n} {kind}" for kind, n in _falling(kinds)))
    _add(table, "read", f"{human_bytes(c.bytes_read)} in {c.gets} GETs")
    _add(table, "written", f"{human_bytes(c.bytes_written)} in {c.puts} PUTs")
    if spent := _spent({k: v for k, v in c.stage_s.items() if k != "task"}):
        _add(table, "stages", spent)


def _falling(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return sorted(values.items(), key=lambda item: (-item[1], item[0]))


def _realtime(counts: Mapping[str, Any], elapsed_s: float) -> str:
    video_s = counts.get("video_s", 0.0)
    times = f", {video_s / elapsed_s:.0f} x real time" if elapsed_s else ""
    return f"{human_s(video_s)} of video{times}"


def failures_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """`failures` by kind, the most frequent first: what to do once, then each clip and cause.

    No columns: uris and messages are as long as they are, and are copied from here.
    """
    from rich.console import Group
    from rich.text import Text

    causes: dict[tuple[Any, ...], list[str]] = {}
    for r in rows:
        key = (r["kind"], r["status"], r["advice"], r["uri"], r["start_s"], r["end_s"],
               r["message"])  # fmt: skip
        causes.setdefault(key, []).append(r["model"])
    kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for key in causes:
        kinds.setdefault(key[:3], []).append(key)
    lines: list[Text] = []
    for (kind, how, advice), keys in sorted(kinds.items(), key=lambda k: -len(k[1])):
        plural = "clip" if len(keys) == 1 else "clips"
        lines.append(Text(f"{kind}: {len(keys)} {plural} {how}", style="bold"))
        lines.append(Text(f"  what to do: {advice or 'nothing'}"))
        for key in keys:
            _, _, _, uri, start_s, end_s, message = key
            clip = f"  [{start_s:.0f}, {end_s:.0f}) s" if end_s > start_s else ""
            lines.append(Text(f"  {uri}{clip}", style="cyan"))
            lines.append(Text(f"    {message}"))
            lines.append(Text(f"    in {', '.join(sorted(causes[key]))}", style="dim"))
    lines.append(Text(f"{len(causes)} clips" if causes else "nothing failed"))
    return Group(*lines)


def models_table(found: Mapping[str, Any]) -> Table:
    """`known_models` for the terminal."""
    table = _table("", "model", "what it is")
    for name in found["builtin"]:
        _add(table, name, f"built in: `builtin: {name}`")
    for name, extra in found["adapters"].items():
        _add(table, name, "adapter" + (f", needs vidbatch[{extra}]" if extra else ""))
    for row in found["output"]:
        _add(
            table,
            row["model"],
            f"{row['videos']} videos, {row['frames']} frames, current for "
            f"{row['videos_current']}, first in run {row['first_run']}",
        )
    return table


def bench_table(found: Mapping[str, Any]) -> Table:
    """What `models.bench` measured, for the terminal."""
    table = _table("", "", "")
    compiled = ", compiled" if found["compiled"] else ""
    _add(table, "model", f"{found['model']}, {found['precision']}{compiled}")
    _add(table, "where", f"{found['device']}, batches of {found['batch']}")
    _add(table, "speed", f"{found['items_per_s']:.4g} items/s, over {found['items']} of them")
    _add(table, "loading", f"{found['load_s']:.3g} s")
    _add(table, "memory", f"{human_bytes(found['memory_bytes'])} at its peak")
    for name, value in found["error"].items():
        _add(table, f"against fp32: {name}", f"{value:.3g}")
    return table


def verify_table(found: Mapping[str, Any]) -> Table:
    """`verify_output` for the terminal."""
    table = _table("", "", "")
    _add(table, "files", f"{found['files']} part files")
    for o in found["outputs"]:
        _add(
            table,
            f"{o['model']} ({o['sample']})",
            f"{o['planned']} clips planned = {o['ok']} ok + {o['partial']} partial + "
            f"{o['failed']} failed + {o['pending']} pending",
        )
    for name in found["uncommitted"]:
        _add(table, "not committed yet", name)
    for problem in found["problems"]:
        _add(table, "PROBLEM", problem)
    table.caption = f"{len(found['problems'])} problems" if found["problems"] else "all proved"
    return table


def sweep_table(found: Mapping[str, Any]) -> Table:
    """`sweep_output` for the terminal."""
    table = _table("", "", "")
    for name in found["removed"]:
        _add(table, "removed", name)
    for name in found["uncommitted"]:
        _add(table, "not committed yet", name)
    table.caption = f"{len(found['removed'])} temporary files removed"
    return table


def _add_lines(table: Table, what: str, lines: Iterable[str]) -> None:
    if text := "\n".join(lines):
        _add(table, what, text)


def _add(table: Table, *cells: str) -> None:
    """A row of plain text: rich would take `[…]` in a message for markup."""
    from rich.text import Text

    table.add_row(*map(Text, cells))


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title or None, show_header=any(columns), title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table
