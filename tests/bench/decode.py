"""`make bench-decode`: what sampling costs, as a share of decoding every frame of the same file.

    python -m tests.bench.decode [--codecs h264,hevc,vp9,av1] [--videos FOLDER] [--rounds 3]
                                 [--no-rivals] [--no-isolation] [--json FILE]

Every figure is CPU seconds of the whole process (user and system, all threads), the best of some
rounds in which the things compared take turns: on a shared machine nothing else can be compared.
The full decode is PyAV's, one thread, every frame, no scaling, straight from the file. We read
through a source, decode, scale to 224 x 224 and give out rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.bench.decode_files import bench_videos
from tests.bench.decode_rivals import RIVALS, SIZE, Rival, prepare, wrong_frames
from vidbatch.archive import ArchiveRule, list_archive
from vidbatch.data import (
    Clip,
    ClipEnd,
    DecodeEvent,
    DecodeLimits,
    Frames,
    Geometry,
    Pixels,
    Sample,
    Video,
)
from vidbatch.sandbox import InProcess, Sandbox
from vidbatch.storage import open_source, open_store

GEOMETRY = Geometry(width_px=SIZE, height_px=SIZE)


def _fps(rate: str, tolerance_s: int = 0) -> Sample:
    return Sample(kind="fps", fps=Fraction(rate), tolerance_s=Fraction(tolerance_s))


SAMPLES: dict[str, tuple[Sample, float]] = {
    "2 fps": (_fps("2"), 0.72),
    "1 fps": (_fps("1"), 0.55),
    "0.5 fps": (_fps("1/2"), 0.30),
    "0.5 fps, tolerance_s 1": (_fps("1/2", 1), 0.07),
    "keyframes": (Sample(kind="keyframes"), 0.07),
}
"""Rule → what it may cost of a full decode of the H.264 file."""
MAX_ISOLATION = 0.03
MAX_RESTART_S = 0.2


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of this process, what the work gave)."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def rival_s(work: Rival, path: Path, frames: list[int]) -> tuple[float, Pixels]:
    """(CPU seconds, pictures) of another library, which has been loaded before."""
    work(path, frames[:1])
    return cpu_s(lambda: work(path, frames))


def decode_fully(path: Path) -> int:
    """Frames of the file, each decoded and dropped."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.thread_type = "NONE"
        return sum(1 for _ in container.decode(stream))


def to_video(path: Path) -> Video:
    """The file as an archive lists it."""
    listing = list_archive(ArchiveRule(uris=(str(path),)), now=datetime.now(UTC))
    return listing.videos[0]


def decode(
    decoder: InProcess | Sandbox, video: Video, sample: Sample, limits: DecodeLimits | None = None
) -> Iterator[DecodeEvent]:
    """The events of the whole video, read from its file."""
    store = open_store(str(Path(video.uri).parent))
    source = open_source(store, video.uri, size_bytes=video.size_bytes, version=video.version)
    try:
        yield from decoder.decode(
            source, Clip(video=video), sample=sample, geometries=(GEOMETRY,), context=False,
            limits=limits or DecodeLimits(),
        )  # fmt: skip
    finally:
        source.close()


def rows(events: Iterator[DecodeEvent]) -> tuple[list[int], Pixels, ClipEnd]:
    """(frame numbers, their pictures, how it went)."""
    *chunks, end = (e for e in events if isinstance(e, Frames | ClipEnd))
    frames = [n for c in chunks if isinstance(c, Frames) for n in c.frame_index.tolist()]
    pixels = [c.pixels[GEOMETRY.key] for c in chunks if isinstance(c, Frames)]
    assert isinstance(end, ClipEnd), end
    return frames, np.concatenate(pixels), end


def bench_file(name: str, path: Path, rounds: int, rivals: bool) -> dict[str, Any]:
    """All rules on one file, ours and others', as shares of its full decode."""
    video, inside = to_video(path), InProcess()
    full, best = float("inf"), dict.fromkeys(SAMPLES, float("inf"))
    found: dict[str, Any] = {}
    for _ in range(rounds):
        took, count = cpu_s(lambda: decode_fully(path))
        full = min(full, took)
        for rule, (sample, _) in SAMPLES.items():
            took, found[rule] = cpu_s(lambda s=sample: rows(decode(inside, video, s)))
            best[rule] = min(best[rule], took)
    report: dict[str, Any] = {"file": name, "frames": count, "full_decode_s": full, "rules": {}}
    truth = rows(decode(inside, video, Sample(kind="all")))[1] if rivals else None
    for rule in SAMPLES:
        frames, _, end = found[rule]
        shares = {"vidbatch": best[rule] / full}
        notes = {"vidbatch": f"fallback: {end.fallback}"} if end.fallback else {}
        for rival, work in RIVALS.items() if truth is not None else ():
            try:
                with ProcessPoolExecutor(1) as apart:  # a library that crashes ends alone
                    took, pixels = apart.submit(rival_s, work, path, frames).result()
            except Exception as error:  # whatever a library cannot do is a line of the table
                notes[rival] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                continue
            shares[rival] = took / full
            if wrong := wrong_frames(pixels, frames, truth):
                notes[rival] = f"{wrong} of {len(frames)} frames are not those asked for"
        report["rules"][rule] = {
            "rows": len(frames), "frames_decoded": end.frames_decoded, "shares": shares,
            "notes": notes,
        }  # fmt: skip
    return report


def print_file(report: dict[str, Any]) -> None:
    """The table of one file."""
    columns = ["vidbatch", *RIVALS]
    print(f"\n{report['file']}: {report['frames']} frames 1080p, full decode"
          f" {report['full_decode_s']:.2f} s of CPU = 1")  # fmt: skip
    print(f"  {'':24}{'rows':>6}{'decoded':>9}" + "".join(f"{c:>12}" for c in columns) + "   ≤")
    for rule, line in report["rules"].items():
        cells = [f"{line['shares'][c]:12.3f}" if c in line["shares"] else f"{'—':>12}"
                 for c in columns]  # fmt: skip
        limit = f"   {SAMPLES[rule][1]}" if report["file"] == "h264" else ""
        print(f"  {rule:24}{line['rows']:6}{line['frames_decoded']:9}{''.join(cells)}{limit}")
    for rule, line in report["rules"].items():
        for who, note in line["notes"].items():
            print(f"  {rule}, {who}: {note}")


def bench_isolation(path: Path, rounds: int) -> dict[str, float]:
    """What the child process costs on top of decoding at 2 fps, and how soon it is replaced."""
    video, (sample, _) = to_video(path), SAMPLES["2 fps"]
    inside = isolated = restart = float("inf")
    with Sandbox() as sandbox:
        rows(decode(sandbox, video, SAMPLES["keyframes"][0]))
        for _ in range(rounds):
            inside = min(inside, cpu_s(lambda: rows(decode(InProcess(), video, sample)))[0])
            child = _child_cpu_s(sandbox)
            own, _ = cpu_s(lambda: rows(decode(sandbox, video, sample)))
            isolated = min(isolated, own + _child_cpu_s(sandbox) - child)
        for _ in range(rounds):
            time.sleep(5)  # the spare is warm: in a job clips take longer than it takes to start
            restart = min(restart, _restart_s(sandbox, video))
    return {"in_process_s": inside, "isolated_s": isolated, "restart_s": restart}


def _child_cpu_s(sandbox: Sandbox) -> float:
    """CPU seconds of the child so far."""
    spent_ns = Path(f"/proc/{sandbox.pid}/schedstat").read_text().split()[0]
    return int(spent_ns) / 1e9


def _restart_s(sandbox: Sandbox, video: Video) -> float:
    """From the death of the child in a clip to the first row of the next clip."""
    one_by_one = DecodeLimits(chunk_frames=1)
    try:
        for event in decode(sandbox, video, SAMPLES["2 fps"][0], one_by_one):
            if isinstance(event, Frames) and sandbox.pid:
                began = time.perf_counter()
                os.kill(sandbox.pid, signal.SIGSEGV)
    except Exception as died:
        assert "decoder" in str(getattr(died, "kind", "")), died
    following = decode(sandbox, video, SAMPLES["2 fps"][0], one_by_one)
    next(e for e in following if isinstance(e, Frames))
    took = time.perf_counter() - began
    following.close()  # type: ignore[attr-defined]
    return took


def main() -> None:
    """Prints the tables."""
    cache = Path("build/bench-decode").resolve()
    prepare(cache / "rivals")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[3] / "shared" / "videos" / "real"
    parser.add_argument("--videos", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--codecs", default="h264,hevc,vp9,av1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--no-isolation", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    files = bench_videos(cache, args.videos, args.codecs.split(","))
    report: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} x {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "pyav": av.__version__,
        "files": [],
    }
    for name, path in files.items():
        report["files"].append(bench_file(name, path, args.rounds, not args.no_rivals))
        print_file(report["files"][-1])
    if not args.no_isolation:
        report["isolation"] = cost = bench_isolation(next(iter(files.values())), args.rounds)
        share = cost["isolated_s"] / cost["in_process_s"] - 1
        print(f"\nisolation: {share:+.1%} CPU (≤ {MAX_ISOLATION:.0%}); the next clip's first row"
              f" {cost['restart_s']:.3f} s after a crash (≤ {MAX_RESTART_S} s)")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
