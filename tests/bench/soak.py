"""`make soak`: whether decoders, predictor and driver keep their memory over a long run.

    python -m tests.bench.soak [--minutes 20] [--videos FOLDER] [--fps 2]

Runs `vidbatch run` on links to the same videos until the time is over, and every two seconds takes
the memory of each process (PSS: shared pages are counted once). A role is flat if the median of the
last fifth lies within 5 % of that of the second fifth, or 10 MiB. Ray's own processes are shown,
not judged; nor is the decoding child: it takes what the video at hand needs, and is replaced after
256 jobs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

EVERY_S = 2.0
ROLES = {
    "vidbatch run": "driver",
    "ray::Decoder": "decoder",
    "ray::Predictor": "predictor",
    "vidbatch.sandbox.child": "decoding child",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
}
OURS = {"driver", "decoder", "predictor"}
SLACK, SLACK_MIB = 1.05, 10.0


def processes(root: int) -> list[int]:
    """A process and all that come from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = [root]
    for pid in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_mib(root: int) -> dict[str, float]:
    """Role → the largest of its processes."""
    found: dict[str, float] = {}
    for pid in processes(root):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            role = next((role for part, role in ROLES.items() if part in line), None)
            if role is not None:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                kib = int(rollup.partition("\nPss:")[2].split()[0])
                found[role] = max(found.get(role, 0.0), kib / 1024)
        except (OSError, IndexError):  # it ended meanwhile
            continue
    return found


def verdict(values: list[float]) -> tuple[float, float, bool]:
    """Medians of the second and the last fifth, and whether that is flat.

    >>> verdict([50.0] * 5 + [100.0] * 20)
    (100.0, 100.0, True)
    """
    fifth = max(1, len(values) // 5)
    early, late = median(values[fifth : 2 * fifth] or values), median(values[-fifth:])
    return early, late, late <= max(SLACK * early, early + SLACK_MIB)


def main() -> None:
    """Prints a table; exit code 1 if some role grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[3] / "shared" / "videos" / "real"
    parser.add_argument("--videos", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--fps", default="2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        source, folder = args.videos, Path(scratch, "archive")
        if source is None:
            from vidbatch.demo import make_archive

            source = Path(scratch, "made")
            make_archive(source, seconds=60)
        folder.mkdir()
        files = sorted(source.rglob("*.mp4"))
        for n in range(round(args.minutes * 60)):  # more than can be done: a video takes seconds
            for file in files:
                (folder / f"{n:05d}-{file.stem}.mp4").symlink_to(file.resolve())
        process = subprocess.Popen(
            [sys.executable, "-m", "vidbatch", "run", str(folder), "-o", str(Path(scratch, "t")),
             "-m", str(Path(__file__).with_name("mean_colour.yaml")), "--fps", args.fps,
             "--set", "archive.include=**/*.mp4", "--set", f"limits.stop_after={args.minutes}m"],
        )  # fmt: skip
        series: dict[str, list[float]] = defaultdict(list)
        while process.poll() is None:
            for role, mib in memory_mib(process.pid).items():
                series[role].append(mib)
            time.sleep(EVERY_S)
    print(f"\n{'role':16} {'early MiB':>10} {'late MiB':>10} {'peak MiB':>10}")
    flat = process.returncode == 5 and series.keys() >= OURS
    for role, values in series.items():
        early, late, ok = verdict(values)
        flat = flat and (ok or role not in OURS)
        print(f"{role:16} {early:10.1f} {late:10.1f} {max(values):10.1f} {'' if ok else 'GROWS'}")
    print("flat" if flat else f"not flat, or the run ended with {process.returncode}")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
