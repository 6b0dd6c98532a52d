"""A backfill over a range of days, one run per day, newest first; resumable at any moment.

    python jobs/backfill.py configs/backfill.yaml --from 2024-01-01 --to 2026-01-01
    ray job submit --working-dir . -- python jobs/backfill.py configs/backfill.yaml \\
        --from 2024-01-01 --to 2026-01-01 --set engine.address=auto

The range is half-open: --to is the first day that is not done. A day that is finished costs one
listing. The first day that ends with another code than 0 ends the backfill with that code
(`--keep-going`: only 1, 2 and 5 do).
"""

from __future__ import annotations

import argparse
import sys
from datetime import date, timedelta
from pathlib import Path

from vidbatch.config import load_job
from vidbatch.errors import VidbatchError
from vidbatch.launch import launch
from vidbatch.progress import Progress


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--from", dest="first", type=date.fromisoformat, required=True)
    parser.add_argument("--to", dest="end", type=date.fromisoformat, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--keep-going", action="store_true", help="past days above the limit")
    args = parser.parse_args(argv)
    if args.end <= args.first:
        parser.error(f"--to {args.end} is not after --from {args.first}")
    day = args.end - timedelta(days=1)
    while day >= args.first:
        window = [f"archive.since={day}", f"archive.until={day + timedelta(days=1)}"]
        print(f"backfill: {day}", file=sys.stderr, flush=True)
        try:
            with Progress() as progress:
                job = load_job(args.job, [*args.set, *window])
                code = launch(job, progress=progress).exit_code
        except VidbatchError as error:
            print(f"backfill: {day}: {error.message}", file=sys.stderr)
            return error.exit_code
        if code and not (args.keep_going and code == 4):
            return code
        day -= timedelta(days=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
