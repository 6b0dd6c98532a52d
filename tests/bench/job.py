"""`make bench`: the whole job against its decode floor, Ray Data and Daft, side by side.

    python -m tests.bench.job [--videos FOLDER] [--fps 2] [--seconds 60] [--gop-s 1] [--tolerance]
                              [--daft]

The decode floor is what both cores do when they only decode the same samples: no Ray, no model, no
tables; `on bare Ray` does the same in actors, so it holds what Ray and the imports cost. The ratios
count, not the times: machines are shared and noisy, so the legs take turns and the best of each is
compared. Without a folder, a made archive is used (720p, drawn pictures).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

GEOMETRY = (224, 224)
Leg = Callable[[Path, str], tuple[float, int]]
OTHER_S = 900
"""After which a leg on another engine is ended."""

STARTS_S: list[float] = []
"""Start to first task, of each run of vidbatch."""

DAFT = Path(__file__).resolve().parents[2] / "build" / "daft" / "bin" / "python"
"""Of an environment with Daft, which `make bench-daft` makes: its pins are not ours."""


def decode_share(paths: list[str], fps: str) -> tuple[int, float]:
    """(frames sampled, video seconds) of some files, decoded in this process alone."""
    from datetime import UTC, datetime

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


def vidbatch_job(folder: Path, fps: str, *options: str) -> tuple[float, int]:
    """(seconds, frames) of `vidbatch run` from a cold start to its exit, model `mean_colour`."""
    out = Path(tempfile.mkdtemp(prefix="vidbatch-bench-"))
    model = Path(__file__).with_name("mean_colour.yaml")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "vidbatch", "run", str(folder), "-o", str(out / "t"), "-m",
         str(model), "--fps", fps, "--json", "--set", "archive.include=**/*.mp4", *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    elapsed = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"vidbatch run ended with {done.returncode}: {done.stderr}")
    summary = json.loads(done.stdout)
    shutil.rmtree(out)
    STARTS_S.append(summary["first_task_s"])
    return elapsed, summary["counts"]["frames"]


def tolerant_job(folder: Path, fps: str) -> tuple[float, int]:
    """The same where a frame may be half an interval off: the nearest keyframe will often do."""
    return vidbatch_job(folder, fps, "--set", f"sample.tolerance_s=1/{2 * int(fps)}")


def other_job(python: Path, script: str, folder: Path, fps: str) -> tuple[float, int]:
    """(seconds, frames) of a script of this folder: SCRIPT FOLDER FPS OUT, which prints the frames.

    Raises:
        RuntimeError: it failed, or was not done after OTHER_S; its last words.
    """
    out = Path(tempfile.mkdtemp(prefix="other-bench-"))
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(python), str(Path(__file__).with_name(script)), str(folder), fps, str(out / "t")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    try:
        said, complaint = process.communicate(timeout=OTHER_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        said, complaint = process.communicate()
        last = [*complaint.strip().splitlines(), "it had said nothing"][:1]
        raise RuntimeError(f"not done after {OTHER_S} s; ended; {last[0]}") from error
    finally:
        shutil.rmtree(out, ignore_errors=True)
    elapsed = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(complaint.strip().splitlines()[-1] if complaint else "no message")
    return elapsed, int(said.strip().splitlines()[-1])


def encode_anew(source: Path, gop_s: float, folder: Path) -> Path:
    """The pictures of a file as H.264 with a keyframe at least every `gop_s` seconds."""
    import av

    made = folder / f"{source.stem}.mp4"
    with av.open(str(source)) as read, av.open(str(made), "w") as written:
        shown = read.streams.video[0]
        rate = shown.average_rate or 25
        options = {"g": str(max(1, int(rate * Fraction(gop_s)))), "crf": "23", "bf": "2"}
        stream = written.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = shown.width // 2 * 2, shown.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for n, frame in enumerate(read.decode(shown)):
            picture = frame.reformat(stream.width, stream.height, "yuv420p")
            picture.pts, picture.time_base, picture.pict_type = n, 1 / Fraction(rate), 0
            written.mux(stream.encode(picture))
        written.mux(stream.encode(None))
    return made


def make_archive(
    folder: Path, source: Path | None, seconds: float, fps: str, gop_s: float | None = None
) -> None:
    """Links enough copies of the source's files into `folder` for so many seconds of work."""
    if source is None:
        from vidbatch.demo import make_archive as draw

        source = folder.parent / "made"
        draw(source, seconds=60)
    files = sorted(p for p in source.rglob("*.mp4") if p.stat().st_size > 20_000)
    if not files:
        sys.exit(f"{source}: no .mp4 file to bench with")
    if gop_s:
        encoded = folder.parent / "encoded"
        encoded.mkdir()
        files = [encode_anew(file, gop_s, encoded) for file in files]
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
    parser.add_argument("--gop-s", type=float, help="encode the files with keyframes so far apart")
    parser.add_argument("--tolerance", action="store_true", help="also half an interval off")
    parser.add_argument("--no-ray-data", action="store_true")
    parser.add_argument("--daft", action="store_true", help="also Daft, of build/daft")
    args = parser.parse_args()
    bare = partial(other_job, Path(sys.executable), "bare_ray_job.py")
    legs: dict[str, Leg] = {
        "decode floor": decode_floor,
        "on bare Ray": bare,
        "vidbatch run": vidbatch_job,
    }
    if args.tolerance:
        legs["with tolerance"] = tolerant_job
    if not args.no_ray_data:
        legs["Ray Data"] = partial(other_job, Path(sys.executable), "ray_data_job.py")
    if args.daft:
        legs["Daft"] = partial(other_job, DAFT, "daft_job.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "archive")
        folder.mkdir()
        make_archive(folder, args.videos, args.seconds, args.fps, args.gop_s)
        best = race(legs, folder, args.fps, args.rounds)
    floor = best["decode floor"]
    print(f"\n{'leg':14} {'seconds':>8} {'frames':>8} {'frames/s':>9} {'of the floor':>13}")
    for name, (seconds, frames) in best.items():
        share = (frames / seconds) / (floor[1] / floor[0])
        print(f"{name:14} {seconds:8.1f} {frames:8d} {frames / seconds:9.1f} {share:13.2f}")
    print()
    for ours in ("vidbatch run", "with tolerance"):
        for theirs in ("Ray Data", "Daft"):
            if ours in best and theirs in best:
                times = best[theirs][0] / best[ours][0]
                print(f"{ours} against {theirs}, {args.fps} fps: {times:.2f} × faster")
    print(f"start to first task {min(STARTS_S)} s")


def race(legs: dict[str, Leg], folder: Path, fps: str, rounds: int) -> dict[str, tuple[float, int]]:
    """The best (seconds, frames) of each leg; they take turns, and one that fails is left out."""
    best: dict[str, tuple[float, int]] = {}
    for turn in range(rounds):
        for name, leg in list(legs.items()):
            try:
                found = leg(folder, fps)
            except RuntimeError as error:
                print(f"  {name}: did not finish: {error}", flush=True)
                del legs[name]
                continue
            print(f"  round {turn + 1}, {name}: {found[0]:.1f} s, {found[1]} frames", flush=True)
            best[name] = min(best.get(name, found), found)
    return best


if __name__ == "__main__":
    main()
