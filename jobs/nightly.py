"""The nightly run of one job file: `vidbatch run`, as a script that can be submitted.

    python jobs/nightly.py configs/nightly.yaml
    vidbatch submit configs/nightly.yaml --address http://127.0.0.1:8265 --script jobs/nightly.py
    python /app/jobs/nightly.py /job/job.yaml --exit-codes kuberay --set engine.address=auto

The last one is the entrypoint of a RayJob. It takes every option of `vidbatch run`. Exit codes: 0
finished, 1 infrastructure, 2 usage, 3 (--strict) finished with failures, 4 stopped above the
failure limit, 5 stopped before the end. After 1 and 5 the same command goes on.
"""

from __future__ import annotations

import sys

from vidbatch.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
