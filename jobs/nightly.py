"""The nightly run of one job file.

    python jobs/nightly.py configs/nightly.yaml
    ray job submit --working-dir . -- python jobs/nightly.py configs/nightly.yaml \\
        --set engine.address=auto

Exit codes are those of `vidbatch run`: 0 finished, 1 infrastructure, 2 usage, 4 stopped above the
failure limit, 5 stopped before the end. After 1 and 5 the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vidbatch.config import load_job
from vidbatch.errors import VidbatchError
from vidbatch.launch import launch
from vidbatch.progress import Progress


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--strict", action="store_true", help="exit 3 if anything failed")
    args = parser.parse_args(argv)
    try:
        with Progress() as progress:
            job = load_job(args.job, args.set)
            return launch(job, progress=progress, strict=args.strict).exit_code
    except VidbatchError as error:
        print(f"nightly: {error.message}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
