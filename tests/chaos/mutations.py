"""Broken videos by the thousand through the isolated decoder: `python -m tests.chaos.mutations`.

Thirty small videos are damaged in seeded ways (bits flipped, runs of bytes overwritten, pieces cut
out, pieces of other videos spliced in, sizes of boxes and counts edited) and decoded as a worker
of the job decodes them. Mutant n is a function of n alone, so that any slice of the whole can be
run anywhere and any mutant made again: `mutant(n)`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.clips import make_clip, trim_start
from tests.decoding import ALL, SMALL, fps, make_video
from vidbatch.data import Clip, ClipEnd, DecodeLimits, Frames, Sample, VideoInfo
from vidbatch.errors import DecoderDied, MediaError
from vidbatch.media import BytesSource
from vidbatch.sandbox import Sandbox

TOTAL = 20_000
SAMPLES = (ALL, fps(5), Sample(kind="keyframes"), Sample(kind="every", every=3))
LIMIT_S = 60.0
"""Of CPU time, of silence and of waiting for one mutant; a sound seed takes some hundredths."""
GRACE_S = 5.0
GROWTH_BYTES = 64 * 2**20
"""By which the parent may grow from its first thousand mutants to its last."""


def _clip(**recipe: object) -> Callable[[], bytes]:
    return lambda: make_clip(**{"frames": 24, "gop": 8, **recipe})


SEEDS: dict[str, Callable[[], bytes]] = {
    "h264": _clip(),
    "h264, header last": _clip(faststart=False),
    "h264, sound": _clip(audio_s=0.5),
    "h264, fragments": _clip(fragmented=True),
    "h264, open gop": _clip(open_gop=True),
    "h264, edit list": lambda: trim_start(_clip()(), 3),
    "h264, turned": _clip(turn_deg=90),
    "h264, 10 bit": _clip(pix_fmt="yuv420p10le"),
    "h264, 4:4:4": _clip(pix_fmt="yuv444p"),
    "h264, interlaced": _clip(options={"flags": "+ildct+ilme"}, b_frames=0),
    "h264 in mkv": _clip(container="matroska"),
    "h264 in ts": _clip(container="mpegts"),
    "h264 in flv": _clip(container="flv", b_frames=0),
    "h264 in avi": _clip(container="avi"),
    "h264, bare": _clip(container="h264"),
    "hevc": _clip(codec="libx265"),
    "hevc, open gop, in mkv": _clip(codec="libx265", open_gop=True, container="matroska"),
    "hevc in ts": _clip(codec="libx265", container="mpegts"),
    "vp8": _clip(codec="libvpx", container="webm"),
    "vp9": _clip(codec="libvpx-vp9", container="webm"),
    "vp9 in ivf": _clip(codec="libvpx-vp9", container="ivf"),
    "av1": _clip(codec="libsvtav1", container="mp4", frames=12),
    "mpeg4 in avi": _clip(codec="mpeg4", container="avi", b_frames=0),
    "mpeg4 in mov": _clip(codec="mpeg4", container="mov", b_frames=1),
    "mpeg2 in ts": _clip(codec="mpeg2video", container="mpegts"),
    "mpeg2 in ps": _clip(codec="mpeg2video", container="mpeg"),
    "mjpeg in avi": _clip(codec="mjpeg", container="avi", pix_fmt="yuvj420p", frames=12),
    "prores": _clip(codec="prores_ks", container="mov", pix_fmt="yuv422p10le", frames=6),
    "ffv1": _clip(codec="ffv1", container="matroska", frames=8),
    "gif": _clip(codec="gif", container="gif", pix_fmt="rgb8", frames=8),
}  # fmt: skip
_NAMES = tuple(SEEDS)
_SIZES = (
    0,
    1,
    7,
    8,
    9,
    15,
    16,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_BOX = re.compile(
    rb"moov|trak|mdia|minf|stbl|stsd|stts|stsc|stsz|stco|ctts|stss|elst|edts|mdhd|mvhd|tkhd|hdlr"
    rb"|avc1|avcC|hvcC|av01|av1C|moof|mfhd|traf|tfhd|trun|tfdt|mdat|free|udta"  # MP4
    rb"|RIFF|LIST|hdrl|strl|strh|strf|movi|idx1|avih"  # AVI
    rb"|\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b"
)
"""Names whose sizes and counts are worth lying about; the last ones are Matroska's elements."""


@cache
def seed_bytes(name: str) -> bytes:
    """The sound video of a name."""
    return SEEDS[name]()


def _flip(data: bytearray, dice: random.Random) -> None:
    """Bits: few or many, anywhere or only at the start, where the header lies."""
    end = len(data) if dice.random() < 0.6 else min(len(data), 1200)
    for _ in range(dice.choice((1, 1, 2, 5, 20, 100))):
        data[dice.randrange(end)] ^= 1 << dice.randrange(8)


def _overwrite(data: bytearray, dice: random.Random) -> None:
    """A run of bytes: zeros, ones, or noise."""
    start = dice.randrange(len(data))
    count = min(dice.choice((1, 4, 16, 200, 2000)), len(data) - start)
    fill = dice.choice((b"\0", b"\xff", b""))
    data[start : start + count] = fill * count if fill else dice.randbytes(count)


def _cut(data: bytearray, dice: random.Random) -> None:
    """The end, the start, or a piece from the middle is gone."""
    a, b = sorted(dice.randrange(1, len(data) + 1) for _ in range(2))
    match dice.randrange(3):
        case 0:
            del data[a:]
        case 1:
            del data[a:b]
        case _:
            del data[: min(a, 400)]


def _splice(data: bytearray, dice: random.Random) -> None:
    """A piece of this or another video in the middle, or another video behind."""
    other = seed_bytes(dice.choice(_NAMES)) if dice.random() < 0.5 else bytes(data)
    a, b = sorted(dice.randrange(len(other) + 1) for _ in range(2))
    at = dice.randrange(len(data) + 1)
    match dice.randrange(3):
        case 0:
            data[at:at] = other[a:b]
        case 1:
            data[at : at + b - a] = other[a:b]
        case _:
            data += other


def _lie(data: bytearray, dice: random.Random) -> None:
    """A size, a count or another number near the name of a box; anywhere if there is none."""
    places = [m.start() for m in _BOX.finditer(data)] or [dice.randrange(len(data))]
    for _ in range(dice.choice((1, 1, 1, 3))):
        at = dice.choice(places) + dice.choice((-4, -4, 4, 8, 12, 16, 20, 24))
        value = dice.choice((*_SIZES, len(data), dice.getrandbits(32)))
        if 0 <= at <= len(data) - 4:
            data[at : at + 4] = value.to_bytes(4, dice.choice(("big", "big", "little")))


MUTATORS = {"flip": _flip, "overwrite": _overwrite, "cut": _cut, "splice": _splice, "lie": _lie}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A broken video, and what was done to which seed."""

    number: int
    seed: str
    how: str
    data: bytes
    sample: Sample


def mutant(number: int) -> Mutant:
    """Mutant `number`: the same bytes in every run."""
    dice = random.Random(number)
    seed = _NAMES[number % len(_NAMES)]
    data = bytearray(seed_bytes(seed))
    deeds = [dice.choice(tuple(MUTATORS)) for _ in range(dice.choice((1, 1, 2)))]
    for deed in deeds:
        if data:
            MUTATORS[deed](data, dice)
    return Mutant(number, seed, "+".join(deeds), bytes(data), dice.choice(SAMPLES))


@dataclass
class Findings:
    """What became of the mutants."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """`ok`, `partial <kind>`, `failed <kind>`, `died <kind>`."""
    died: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    """(seconds, number)"""
    over_limit: list[int] = field(default_factory=list)
    late_rejections: int = 0
    """Failed after rows had been given out: whoever takes rows must drop them."""
    restarts: int = 0
    rss_start_bytes: int = 0
    rss_end_bytes: int = 0
    child_bytes: int = 0

    @property
    def files(self) -> int:
        """Mutants that were decoded."""
        return self.outcomes.total()


def decode_mutant(sandbox: Sandbox, broken: Mutant) -> tuple[str, int]:
    """(outcome, rows that were given out). Everything but MediaError and DecoderDied is raised."""
    video = make_video(broken.data)
    events = sandbox.decode(
        BytesSource(broken.data),
        Clip(video=video),
        sample=broken.sample,
        geometries=(SMALL,),
        context=False,
        limits=DecodeLimits(),
    )
    rows, last, kinds = 0, -1, []
    end: ClipEnd | None = None
    try:
        for event in events:
            kinds.append(type(event))
            if isinstance(event, Frames):
                index = event.frame_index
                assert index[0] > last, f"mutant {broken.number}: a row came twice"
                last, rows = int(index[-1]), rows + event.num_rows
            elif isinstance(event, ClipEnd):
                end = event
    except MediaError as error:
        assert error.kind and error.advice, f"mutant {broken.number}: {error!r}"
        return f"failed {error.kind}", rows
    except DecoderDied as error:
        return f"died {error.kind}", rows
    assert end is not None and kinds[0] is VideoInfo and kinds[-1] is ClipEnd
    assert (end.status == "ok") == (end.kind is None), f"mutant {broken.number}: {end}"
    return end.status if end.kind is None else f"{end.status} {end.kind}", rows


def run(numbers: Iterable[int], said: Callable[[Findings], None] = lambda found: None) -> Findings:
    """Decodes mutants one after the other in one sandbox, as a decoder actor would.

    Raises:
        AssertionError: a promise is broken, with the number of the mutant.
    """
    found = Findings()
    with Sandbox(cpu_s=LIMIT_S, wall_s=LIMIT_S, stall_s=LIMIT_S) as sandbox:
        for number in numbers:
            broken = mutant(number)
            restarts, began_s = sandbox.restarts, time.monotonic()
            outcome, rows = decode_mutant(sandbox, broken)
            took_s = time.monotonic() - began_s
            died = outcome.startswith("died")
            assert sandbox.restarts - restarts == died, f"mutant {number}: deaths do not add up"
            found.outcomes[outcome] += 1
            found.late_rejections += bool(rows) and outcome.startswith(("failed", "died"))
            found.slowest = max(found.slowest, (took_s, number))
            if took_s > LIMIT_S + GRACE_S:
                found.over_limit.append(number)
            if died:
                found.died.append((number, f"{broken.seed}: {broken.how}: {sandbox.last_exit}"))
            if found.files <= 1000:
                gc.collect(0)
                found.rss_start_bytes = max(found.rss_start_bytes, _rss_bytes())
            if found.files % 500 == 0:
                said(found)
        found.restarts = sandbox.restarts
    gc.collect()
    found.rss_end_bytes = _rss_bytes()
    found.child_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return found


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    """Runs a slice and prints what was found; 1 if a promise about time or memory is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=TOTAL)
    parser.add_argument("--step", type=int, default=1, help="take every n-th, to share the work")
    args = parser.parse_args()
    os.environ["SVT_LOG"] = "0"  # the encoder of AV1 would introduce itself
    began_s = time.monotonic()

    def say(found: Findings) -> None:
        took_s = time.monotonic() - began_s
        print(f"{found.files} mutants, {len(found.died)} died, {took_s:.0f} s", file=sys.stderr)

    found = run(range(args.first, args.first + args.count, args.step), say)
    growth_bytes = found.rss_end_bytes - found.rss_start_bytes
    facts = {
        "files": found.files,
        "seconds": round(time.monotonic() - began_s, 1),
        "outcomes": dict(found.outcomes.most_common()),
        "died": found.died,
        "slowest": {"seconds": round(found.slowest[0], 3), "mutant": found.slowest[1]},
        "over_limit": found.over_limit,
        "rejected_after_rows": found.late_rejections,
        "parent_rss_mib": [
            round(b / 2**20, 1) for b in (found.rss_start_bytes, found.rss_end_bytes)
        ],
        "largest_child_mib": round(found.child_bytes / 2**20, 1),
    }
    print(json.dumps(facts, indent=1))
    return int(bool(found.over_limit) or growth_bytes > GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
