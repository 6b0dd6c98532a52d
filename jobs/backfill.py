"""A backfill over a range of days, one run per day, newest first; resumable at any moment.

    python jobs/backfill.py configs/backfill.yaml --from 2024-01-01 --to 2026-01-01
    vidbatch submit configs/backfill.yaml --address http://127.0.0.1:8265 \\
        --script jobs/backfill.py -- --from 2024-01-01 --to 2026-01-01 --max-cost 100

The range is half-open: --to is the first day that is not done. A day that is finished costs one
listing. `limits.stop_after` and `limits.max_cost` hold for the whole backfill (exit code 5; the
same command goes on). The first day that ends with another code than 0 ends the backfill with that
code (`--keep-going`: only 1, 2 and 5 do).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from vidbatch.config import load_job
from vidbatch.errors import VidbatchError
from vidbatch.launch import kuberay_code, launch, tell_end
from vidbatch.logs import make_progress, say_error
from vidbatch.progress import Progress


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--from", dest="first", type=date.fromisoformat, required=True)
    parser.add_argument("--to", dest="end", type=date.fromisoformat, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--stop-after", metavar="6h", help="limits.stop_after")
    parser.add_argument("--max-cost", metavar="100", help="limits.max_cost")
    parser.add_argument("--keep-going", action="store_true", help="past days above the limit")
    parser.add_argument("--log", choices=("text", "json"), default=os.environ.get("VIDBATCH_LOG"))
    parser.add_argument("--exit-codes", choices=("all", "kuberay"), default="all")
    args = parser.parse_args(argv)
    if args.end <= args.first:
        parser.error(f"--to {args.end} is not after --from {args.first}")
    try:
        with make_progress(args.log) as progress:
            code, stopped = backfill(args, progress)
    except VidbatchError as error:
        say_error(error, args.log)
        return error.exit_code
    return kuberay_code(code, stopped) if args.exit_codes == "kuberay" else code


def backfill(args: Any, progress: Progress) -> tuple[int, str | None]:
    """Runs day after day; gives the last run's exit code, and why it stopped early.

    Raises:
        VidbatchError: as `launch`.
    """
    given = {"limits.stop_after": args.stop_after, "limits.max_cost": args.max_cost}
    settings = [*args.set, *(f"{k}={v}" for k, v in given.items() if v is not None)]
    whole = load_job(args.job, settings)
    started, spent = time.monotonic(), 0.0
    code, stopped = 0, None
    day = args.end - timedelta(days=1)
    while day >= args.first and (code == 0 or (args.keep_going and code == 4)):
        left: dict[str, float] = {}
        if whole.limits.stop_after is not None:
            left["stop_after"] = whole.limits.stop_after - (time.monotonic() - started)
        if whole.limits.max_cost is not None:
            left["max_cost"] = whole.limits.max_cost - spent
        if used_up := [name for name, value in left.items() if value <= 0]:
            code, stopped = 5, f"limits.{used_up[0]} is used up; {day} and older are not done"
            progress.note(f"backfill: {stopped}; the same command goes on")
            break
        progress.note(f"backfill: {day}")
        window = [f"archive.since={day}", f"archive.until={day + timedelta(days=1)}"]
        window += [f"limits.{name}={max(value, 1e-6):.6f}" for name, value in left.items()]
        job = load_job(args.job, [*settings, *window])
        try:
            result = launch(job, progress=progress, tell=False)
        except VidbatchError as error:
            tell_end(job, error.exit_code, progress)
            raise
        code, stopped = result.exit_code, result.summary.get("stopped")
        spent += sum(result.summary.get("cost", {}).values())
        day -= timedelta(days=1)
    tell_end(whole, code, progress)
    return code, stopped


if __name__ == "__main__":
    sys.exit(main())
