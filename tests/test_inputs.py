"""The catalogue of broken, odd and hostile inputs: what each must come to, called by its name.

One job over all of them, decoded in isolation: a bad file is a row in `failures`, and every good
row beside it is there. Numbers are those of the catalogue, 1 to 86. Inputs that are no files of
their own lie elsewhere: stores that fail or lie (13, 14, 77 to 84) in `test_input_sources.py`,
playlists and scripts (70 to 75) in `test_playlists.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.bad_inputs import MADE, flat, made, repeated
from tests.cages import assert_equal
from tests.decoding import ALL, SMALL, decode_plainly, fps, make_video
from tests.outputs import check_no_key_twice, check_same, read_tables
from tests.test_run import make_job
from vidbatch.data import Clip, ClipEnd, DecodeEvent, DecodeLimits, Frames, Sample
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.pipeline.run import run_job
from vidbatch.sandbox import InProcess, Sandbox
from vidbatch.storage import open_store


@dataclass(frozen=True)
class Outcome:
    """What a file comes to: its row in `coverage`, and in `failures` if it is not ok."""

    status: str
    kind: str | None = None
    rows: range = range(1)
    fallback: str = ""


def ok(rows: int, fallback: str = "") -> Outcome:
    """All frames are rows; `fallback` are words about why it was decoded in order, if it was."""
    return Outcome("ok", None, range(rows, rows + 1), fallback)


def partial(kind: str, least: int, most: int) -> Outcome:
    """Good rows stand; damaged input gives the same number of them every time."""
    return Outcome("partial", kind, range(least, most + 1))


def failed(kind: str) -> Outcome:
    """No row."""
    return Outcome("failed", kind)


EXPECTED: dict[str, Outcome] = {
    "01 empty.mp4": failed("empty"),
    "02 zeros.mp4": failed("not_media"),
    "03 random.mp4": failed("not_media"),
    "04 text.mp4": failed("not_media"),
    "05 header last, cut.mp4": failed("truncated"),
    "06 cut in half.mp4": partial("truncated", 5, 30),
    "07 cut in the first frame.mp4": failed("truncated"),
    # not "zero frames": the object ends before its last box does, which says more
    "08 header only.mp4": failed("truncated"),
    "09 last byte missing.mp4": partial("truncated", 59, 59),
    # the segment's and the RIFF chunk's sizes, and whole packets, tell of a cut in these too
    "10 matroska cut.mkv": partial("truncated", 5, 35),
    "11 ts cut in a packet.ts": partial("truncated", 20, 40),
    "12 fragments cut.mp4": partial("truncated", 20, 45),
    "12b avi cut.avi": partial("truncated", 1, 35),
    "15 bits flipped.mp4": partial("corrupt", 40, 60),
    "16 media zeroed.mp4": failed("undecodable"),
    "17 header flipped.mp4": partial("corrupt", 1, 10),
    "18 ts flipped.ts": partial("corrupt", 20, 60),
    "19 matroska header flipped.mkv": failed("codec_refused"),
    "20 matroska with a hole.mkv": partial("corrupt", 5, 59),
    # not ok with a flag: the demuxer's continuity check calls packets damaged, and frames lack
    "21 ts packets lost.ts": partial("corrupt", 30, 59),
    "22 ts from mid-gop.ts": ok(48, "the first packet is no keyframe"),
    "23 ts unaligned.ts": ok(60),
    "24 wild sample count.mp4": failed("not_media"),
    "25 wild time-to-sample count.mp4": partial("count_mismatch", 60, 60),
    # not partial: every picture that the container shows is a row, and the clock is called broken
    "26 time-to-sample zero.mp4": ok(25, "timestamps step back"),
    "27 wild chunk offset.mp4": failed("zero_frames"),
    "28a moov size 2^32.mp4": ok(60),
    # a size beyond the object's end and a cut object look the same; its good rows stand
    "28b moov size 2^32-1.mp4": partial("truncated", 60, 60),
    "29 empty track.mp4": failed("not_media"),
    # not partial: the sample table is the finer measure, and all 60 that it names are there
    "30 a day in the header.mp4": ok(60),
    "31 wild picture size.mp4": ok(60),
    "32 parameter sets zeroed.mp4": failed("undecodable"),
    "33 unknown codec.mp4": failed("codec_refused"),
    # FFmpeg takes the garbage for a container, but for none that is allowed
    "34 garbage before.mp4": failed("format_refused"),
    "35 garbage after.mp4": ok(60),
    "36 two files in one.mp4": ok(60),
    "37 no frames.mp4": failed("no_video"),
    "38 one frame.mp4": ok(1),
    "39a sound only.mp4": failed("no_video"),
    # an MP3 is refused before anybody looks for a picture in it
    "39b mp3.mp4": failed("format_refused"),
    "40a cover.mp4": failed("no_video"),
    "40b mp3 with cover.mp4": failed("format_refused"),
    "41 no suffix": ok(60),
    "42a is an mp4.avi": ok(60),
    "42b is an mp4.png": ok(60),
    "43 weird name ☃ %03d ..mp4": ok(1),
    "-43 dash.mp4": ok(1),
    "43 a:b.mp4": ok(1),
    "43 concat:x.mp4": ok(1),
    "43 new\nline.mp4": ok(1),
    "43 http:/127.0.0.1:9/x.mp4": ok(1),
    f"43 long/{'x' * 250}/{'y' * 250}/{'z' * 250}/{'w' * 200}.mp4": ok(1),
    "44 variable rate.mp4": ok(60),
    "45 starts at 8.32 s.mp4": ok(60),
    "46 edit list trims 5.mp4": ok(55),
    "47 first keyframe missing.mp4": partial("missing_reference", 48, 48),
    "47b a later keyframe missing.mp4": partial("corrupt", 36, 59),
    # no damage: an edit list leaves out what lies before zero
    "48 negative times.mp4": ok(35),
    "49 negative times.ts": ok(60),
    "50 clock wraps.ts": ok(60),
    "51 clock starts again.ts": ok(120, "timestamps step back 1 times"),
    # a pause is no fault: one row stands for ten hours, and its covers_s says so
    "52 ten hours in between.mp4": ok(60),
    "53 no timestamps.h264": ok(60, "60 timestamps are missing"),
    "54 b-frames in avi.avi": ok(60, "another order than pts say"),
    "55 coarse clock.mkv": ok(10),
    "56a open gop.mp4": ok(60),
    "56b open gop hevc.mp4": ok(60),
    "57 one keyframe in 300.mp4": ok(300),
    "58a interlaced h264.mp4": ok(60),
    "58b interlaced mpeg-2.ts": ok(60),
    "59 turned 90.mp4": ok(60),
    "59 turned 180.mp4": ok(60),
    "59 turned 270.mp4": ok(60),
    "59 mirrored.mp4": ok(60),
    "60a ten bits.mp4": ok(60),
    "60b 4:4:4.mp4": ok(60),
    "60c hdr.mp4": ok(60),
    "61a odd size vp9.webm": ok(24),
    "61b odd size ffv1.mkv": ok(24),
    "62a 1x1.mkv": ok(1),
    "62b 2x2.mp4": ok(1),
    "62c 16384x16.mp4": ok(1),
    "63a gray.mkv": ok(60),
    "63b alpha.mov": ok(60),
    # not refused: GIF demuxer and decoder are on the lists, and limited like all others
    "63c palette.gif": ok(24),
    "64 size changes.ts": ok(120, "timestamps step back 1 times"),
    # not refused: the demuxer stops at 64 streams, and a broadcast multiplex may have more
    "65 300 video streams.mkv": ok(1),
    "66a png 15000.mp4": failed("format_refused"),
    "66b png 30000.mp4": failed("format_refused"),
    "67a gif 65535.gif": failed("too_large"),
    "67b y4m 30000.mp4": failed("format_refused"),
    "67c ivf 65535.ivf": failed("too_large"),
    "69 encrypted.mp4": failed("encrypted"),
    "85a tags of 10 MiB.mp4": ok(60),
    "85b tags of 10 MiB.mkv": ok(60),
    "86a times near the limit.mkv": ok(48, "the first packet is no keyframe"),
    "86b ticks of 1 in 2^31.mp4": ok(60),
}
ONE = "38 one frame.mp4"
RENAMED = {"41 no suffix": "42a is an mp4.avi", "42b is an mp4.png": "42a is an mp4.avi"}
"""Files with the content of another, for the sake of their names; those of 43 have one frame."""


def bytes_of(name: str) -> bytes:
    """The content of a file of the catalogue."""
    return made(name if name in MADE else RENAMED.get(name, ONE))


@dataclass(frozen=True)
class Ran:
    """A job over all files: its tables and what it left out."""

    folder: Path
    output: Path
    tables: dict[str, Any]
    summary: dict[str, Any]
    outcomes: dict[str, dict[str, Any]]
    """Name → row of `coverage` joined with that of `failures`."""


def rows_of(tables: dict[str, Any], table: str) -> Iterator[dict[str, Any]]:
    """The rows of a table that tell of the frames themselves."""
    for partition, rows in tables.get(table, {}).items():
        if table in ("videos", "frames") or partition[1] == "frames":
            yield from rows.to_pylist()


def run(folder: Path, output: Path, *, isolate: bool) -> Ran:
    """Runs a job over a folder; every frame is a row."""
    job = make_job(
        folder,
        str(output),
        archive={"uri": str(folder), "include": ["**"]},
        sample={"all": True},
        models=[],
        limits={"isolate": isolate, "task_minutes": 1},
    )
    done = run_job(job)
    assert done.exit_code == 0
    tables = read_tables(open_store(str(output)))
    outcomes = {r["uri"].removeprefix(f"{folder}/"): r for r in rows_of(tables, "coverage")}
    for row in rows_of(tables, "failures"):
        outcomes[row["uri"].removeprefix(f"{folder}/")].update(row)
    return Ran(folder, output, tables, done.summary, outcomes)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All files of the catalogue in one archive, decoded in isolation."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in EXPECTED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes_of(name))
    return run(folder, tmp_path_factory.mktemp("tables") / "all", isolate=True)


def test_every_made_file_has_its_outcome() -> None:
    assert MADE.keys() <= EXPECTED.keys()
    elsewhere = {13, 14, 68, *range(70, 85)}
    numbered = {int(name.lstrip("-")[:2]) for name in EXPECTED}
    assert sorted(numbered | elsewhere) == list(range(1, 87)) and not numbered & elsewhere


@pytest.mark.parametrize("name", EXPECTED)
def test_it_comes_to_what_it_should(ran: Ran, name: str) -> None:
    expected, got = EXPECTED[name], ran.outcomes[name]
    assert (got["status"], got.get("kind")) == (expected.status, expected.kind), got["reason"]
    assert got["frames"] in expected.rows
    assert expected.fallback in (got["fallback"] or "")
    assert bool(got["fallback"]) <= bool(expected.fallback) or expected.status == "partial"
    rows = [r for r in rows_of(ran.tables, "frames") if r["video_id"] == got["video_id"]]
    assert len(rows) == got["frames"]
    if expected.status != "ok":
        assert got["stage"] == "decode" and got["advice"] and not got["retryable"]
        assert "\n" not in got["message"] and len(got["message"]) <= 500
    if expected.status == "ok" or expected.kind == "count_mismatch":
        assert [r["frame_index"] for r in rows] == list(range(len(rows)))


def test_nothing_else_is_in_the_tables(ran: Ran) -> None:
    assert ran.outcomes.keys() == EXPECTED.keys()
    check_no_key_twice(ran.tables)
    lost = {r["video_id"] for r in ran.outcomes.values() if r["status"] == "failed"}
    assert len(lost) == sum(e.status == "failed" for e in EXPECTED.values())
    assert lost.isdisjoint(r["video_id"] for r in rows_of(ran.tables, "frames"))
    for row in rows_of(ran.tables, "videos"):
        assert row["start_s"] is None or abs(row["start_s"]) < 2**50
    for row in rows_of(ran.tables, "frames"):
        assert 0 <= row["time_s"] < 37_000 and 0 <= row["covers_s"] < 37_000


def test_no_tag_is_copied_into_the_output(ran: Ran) -> None:
    files = [p for p in ran.output.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert not [p for p in files if b"canary-" in p.read_bytes()]


def test_the_tables_are_the_same_without_isolation(ran: Ran, tmp_path: Path) -> None:
    check_same(run(ran.folder, tmp_path / "plain", isolate=False).tables, ran.tables)


def events_of(
    decoder: Sandbox | InProcess, data: bytes, sample: Sample, **limits: int
) -> tuple[list[DecodeEvent], str | None]:
    """What decoding gives, and the kind of the MediaError it ends with."""
    events: list[DecodeEvent] = []
    clip = Clip(video=make_video(data))
    try:
        events.extend(
            decoder.decode(
                BytesSource(data),
                clip,
                sample=sample,
                geometries=(SMALL,),
                context=True,
                limits=DecodeLimits(**limits),
            )
        )
    except MediaError as error:
        return events, error.kind
    return events, None


def test_pixels_are_the_same_without_isolation() -> None:
    with Sandbox() as sandbox, InProcess() as plain:
        for name in MADE:
            data = made(name)
            mine, theirs = (events_of(decoder, data, fps(5)) for decoder in (sandbox, plain))
            assert mine[1] == theirs[1], name
            for a, b in zip(mine[0], theirs[0], strict=True):
                if isinstance(a, Frames) and isinstance(b, Frames):
                    assert_equal(a, b)
                else:
                    assert a == b, name
        assert sandbox.restarts == 0, sandbox.last_exit


def table_of(ran: Ran, name: str) -> list[dict[str, Any]]:
    """The rows of a file in `frames`, in order."""
    video_id = ran.outcomes[name]["video_id"]
    return [r for r in rows_of(ran.tables, "frames") if r["video_id"] == video_id]


@pytest.mark.parametrize(
    "name",
    ["44 variable rate.mp4", "45 starts at 8.32 s.mp4", "49 negative times.ts",
     "50 clock wraps.ts", "52 ten hours in between.mp4", "86a times near the limit.mkv"],
)  # fmt: skip
def test_odd_clocks_are_kept_as_they_are(ran: Ran, name: str) -> None:
    rows, plain = table_of(ran, name), decode_plainly(made(name), lambda i: False)
    assert [r["pts"] for r in rows] == plain.pts
    first = plain.pts[0] or 0
    assert [r["time_s"] for r in rows] == [
        float((p - first) * plain.time_base) for p in plain.pts if p is not None
    ]


def test_a_clock_that_starts_again_goes_on(ran: Ran) -> None:
    rows = table_of(ran, "51 clock starts again.ts")
    assert rows[0]["pts"] == rows[60]["pts"]
    times = [r["time_s"] for r in rows]
    assert all(a < b for a, b in itertools.pairwise(times)) and times[-1] == pytest.approx(4.76)


def test_missing_and_equal_timestamps(ran: Ran) -> None:
    bare = table_of(ran, "53 no timestamps.h264")
    assert {r["pts"] for r in bare} == {None}
    assert [r["time_s"] for r in bare] == [float(Fraction(i, 25)) for i in range(60)]
    coarse = table_of(ran, "55 coarse clock.mkv")
    assert [(r["frame_index"], r["pts"]) for r in coarse] == [(i, 0) for i in range(10)]


def test_names_that_are_no_video_are_not_listed(tmp_path: Path) -> None:
    for name in ("41 no suffix", "42 a video.png", "42 a video.mp4.txt", "38 one frame.mp4"):
        (tmp_path / name).write_bytes(made(ONE))
    done = run_job(make_job(tmp_path, str(tmp_path / "tables"), archive={"uri": str(tmp_path)}))
    assert done.exit_code == 0
    assert done.summary["listing"]["left_out"] == {"not_included": 3}
    assert done.summary["counts"]["videos"] == 1


def test_a_change_to_a_size_over_the_limit_ends_the_rows() -> None:
    data = made("64 size changes.ts")
    with Sandbox() as sandbox:
        events, kind = events_of(sandbox, data, ALL, max_pixels=5000)
        sizes = {tuple(px) for e in events if isinstance(e, Frames) for px in e.source_px.tolist()}
        assert sizes == {(64, 64)} and kind is None
        end = events[-1]
        assert isinstance(end, ClipEnd) and (end.status, end.kind) == ("partial", "too_large")
        both = [e for e in events_of(sandbox, data, ALL)[0] if isinstance(e, Frames)]
    found = [tuple(px) for e in both for px in e.source_px[int(e.context) :].tolist()]
    assert found == [(64, 64)] * 60 + [(128, 96)] * 60


def test_a_real_huge_picture_is_refused_within_memory() -> None:
    """Input 68: 144 million pixels that compress to next to nothing."""
    data = flat(12_000, 12_000, "qtrle", "mov", "gray")
    assert len(data) < 10 * 2**20
    with Sandbox() as sandbox:
        assert events_of(sandbox, data, ALL) == ([], "too_large")
        assert _peak_bytes(sandbox) < 400 * 2**20
        assert sandbox.restarts == 0


def test_a_long_video_takes_no_more_memory_than_a_short_one() -> None:
    """Input 84: 50,000 tiny pictures."""
    peaks = []
    for times in (10, 1000):
        with Sandbox() as sandbox:
            events, _ = events_of(sandbox, repeated(times), fps("1/10"))
            end = events[-1]
            assert isinstance(end, ClipEnd) and (end.status, end.end_frame) == ("ok", 50 * times)
            peaks.append(_peak_bytes(sandbox))
    assert peaks[1] - peaks[0] < 32 * 2**20, peaks


def _peak_bytes(sandbox: Sandbox) -> int:
    lines = Path(f"/proc/{sandbox.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def test_nothing_is_cut_where_decoding_could_not_begin() -> None:
    """Input 57, and open GOPs."""
    with Sandbox() as sandbox:
        for name, cut in (("57 one keyframe in 300.mp4", False), ("56a open gop.mp4", False),
                          ("42a is an mp4.avi", True)):  # fmt: skip
            source = BytesSource(made(name))
            _, ranges = sandbox.probe(source, limits=DecodeLimits(), length_s=0.5)
            assert (len(ranges) > 1) == cut, name
