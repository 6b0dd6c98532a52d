"""`make bench`: the whole job against its decode floor and against Ray Data, side by side.

    python -m tests.bench.job [--videos FOLDER] [--fps 2] [--seconds 60] [--no-ray-data]

The decode floor is what both cores do when they only decode the same samples: no Ray, no model, no
tables. The ratios count, not the times: machines are shared and noisy, so the legs take turns and
the best of each is compared. Without a folder, a made archive is used (720p, drawn pictures).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

GEOMETRY = (224, 224)
RAY_DATA_S = 900
"""After which the leg on Ray Data is ended."""


def decode_share(paths: list[str], fps: str) -> tuple[int, float]:
    """(frames sampled, video seconds) of some files, decoded in this process alone."""
    from datetime import UTC, datetime
    from fractions import Fraction

    from vidbatch.archive import ArchiveRule, list_archive
    from vidbatch.data import Clip, ClipEnd, DecodeLimits, Frames, Geometry, Sample
    from vidbatch.decode import decode_clip
    from vidbatch.storage import open_source, open_store

    sample = Sample(kind="fps", fps=Fraction(fps))
    geometry = Geometry(width_px=GEOMETRY[0], height_px=GEOMETRY[1])
    frames, seconds = 0, 0.0
    listing = list_archive(ArchiveRule(uris=tuple(paths)), now=datetime.now(UTC))
    store = open_store(str(Path(paths[0]).parent))
    for video in listing.videos:
        source = open_source(store, video.uri, size_bytes=video.size_bytes, version=video.version)
        for event in decode_clip(
            source, Clip(video=video), sample=sample, geometries=(geometry,), context=False,
            limits=DecodeLimits(),
        ):  # fmt: skip
            if isinstance(event, Frames):
                frames += event.num_rows
            elif isinstance(event, ClipEnd):
                seconds += event.end_s - event.start_s
        source.close()
    return frames, seconds


def decode_floor(folder: Path, fps: str) -> tuple[float, int]:
    """(seconds, frames) for both cores only decoding; files dealt out longest first."""
    files = sorted(folder.glob("*.mp4"), key=lambda p: -p.stat().st_size)
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(decode_share, [[str(files[0])]] * cores, ["0.001"] * cores))  # imports
        started = time.perf_counter()
        shares = [pool.submit(decode_share, [str(f)], fps) for f in files]
        frames = sum(s.result()[0] for s in shares)
        return time.perf_counter() - started, frames


def vidbatch_job(folder: Path, fps: str) -> tuple[float, int]:
    """(seconds, frames) of `vidbatch run` from a cold start to its exit, model `bench` below."""
    out = Path(tempfile.mkdtemp(prefix="vidbatch-bench-"))
    model = Path(__file__).with_name("mean_colour.yaml")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "vidbatch", "run", str(folder), "-o", str(out / "t"), "-m",
         str(model), "--fps", fps, "--json", "--set", "archive.include=**/*.mp4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    elapsed = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"vidbatch run ended with {done.returncode}: {done.stderr}")
    import json

    summary = json.loads(done.stdout)
    shutil.rmtree(out)
    vidbatch_job.summary = summary  # type: ignore[attr-defined]
    return elapsed, summary["counts"]["frames"]


def ray_data_job(folder: Path, fps: str) -> tuple[float, int]:
    """(seconds, frames) of read_videos(fps, resize) → actor map_batches → write_parquet."""
    out = Path(tempfile.mkdtemp(prefix="raydata-bench-"))
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_data_job.py")), str(folder), fps,
         str(out / "t")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, complaint = process.communicate(timeout=RAY_DATA_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"not done after {RAY_DATA_S} s; ended") from error
    elapsed = time.perf_counter() - started
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode:
        raise RuntimeError(complaint.strip().splitlines()[-1] if complaint else "no message")
    return elapsed, int(said.strip().splitlines()[-1])


def make_archive(folder: Path, source: Path | None, seconds: float, fps: str) -> None:
    """Links enough copies of the source's files into `folder` for so many seconds of work."""
    if source is None:
        from vidbatch.demo import make_archive as draw

        source = folder.parent / "made"
        draw(source, seconds=60)
    files = sorted(p for p in source.rglob("*.mp4") if p.stat().st_size > 20_000)
    if not files:
        sys.exit(f"{source}: no .mp4 file to bench with")
    began = time.perf_counter()
    once, _ = decode_share_all(files, fps)
    copies = max(1, round(seconds * (os.cpu_count() or 1) / max(once, 0.01)))
    for n in range(copies):
        for file in files:
            (folder / f"{n:03d}-{file.stem}.mp4").symlink_to(file.resolve())
    print(f"archive: {len(files)} files × {copies}, sized in {time.perf_counter() - began:.0f} s")


def decode_share_all(files: list[Path], fps: str) -> tuple[float, int]:
    """(seconds, frames) of one core decoding the files once."""
    started = time.perf_counter()
    frames = sum(decode_share([str(f)], fps)[0] for f in files)
    return time.perf_counter() - started, frames


def main() -> None:
    """Prints the table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[3] / "shared" / "videos" / "real"
    parser.add_argument("--videos", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--fps", default="2")
    parser.add_argument("--seconds", type=float, default=60, help="work per leg on all cores")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-ray-data", action="store_true")
    args = parser.parse_args()
    legs: dict[str, Callable[[Path, str], tuple[float, int]]] = {
        "decode floor": decode_floor,
        "vidbatch run": vidbatch_job,
        "Ray Data": ray_data_job,
    }
    if args.no_ray_data:
        del legs["Ray Data"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "archive")
        folder.mkdir()
        make_archive(folder, args.videos, args.seconds, args.fps)
        best: dict[str, tuple[float, int]] = {}
        for turn in range(args.rounds):
            for name, leg in list(legs.items()):
                try:
                    found = leg(folder, args.fps)
                except RuntimeError as error:
                    print(f"  {name}: did not finish: {error}")
                    del legs[name]
                    continue
                print(
                    f"  round {turn + 1}, {name}: {found[0]:.1f} s, {found[1]} frames", flush=True
                )
                best[name] = min(best.get(name, found), found)
    floor = best["decode floor"]
    print(f"\n{'leg':14} {'seconds':>8} {'frames':>8} {'frames/s':>9} {'of the floor':>13}")
    for name, (seconds, frames) in best.items():
        share = (frames / seconds) / (floor[1] / floor[0])
        print(f"{name:14} {seconds:8.1f} {frames:8d} {frames / seconds:9.1f} {share:13.2f}")
    if "Ray Data" in best:
        print(f"\nvidbatch / Ray Data: {best['Ray Data'][0] / best['vidbatch run'][0]:.2f} ×")
    print(f"start to first task {vidbatch_job.summary['first_task_s']} s")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
