"""The listing of an archive: what is taken, what is left out and why, when it was taken."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from vidbatch.archive import (
    DEFAULT_INCLUDE,
    ArchiveRule,
    DateRule,
    Listing,
    compile_globs,
    instant,
    list_archive,
    parse_when,
)
from vidbatch.errors import NotFoundInStore, UsageError
from vidbatch.storage import Entry, open_store
from vidbatch.storage.anyfs import AnyStore
from vidbatch.storage.base import utc

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
CAMERAS = DateRule(
    source="key",
    pattern=r"(?P<source>cam-\d+)/(?P<date>\d{4}/\d{2}/\d{2})/(?P<time>\d{6})(?:-(?P<take>\w+))?",
    tz="Europe/Berlin",
)


def write(root: Path, key: str, *, modified: datetime = NOW - timedelta(days=1)) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 7)
    os.utime(path, (modified.timestamp(), modified.timestamp()))


def look(root: Path | str, **rule: object) -> Listing:
    return list_archive(ArchiveRule(uris=(str(root),), **rule), now=NOW)  # type: ignore[arg-type]


def keys(root: Path, listing: Listing) -> list[str]:
    return [v.uri.removeprefix(f"{root}/") for v in listing.videos]


# what is taken --------------------------------------------------------------------------------


def test_media_files_are_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    for key in ("b/x.mkv", "a.mp4", "A.MP4", "b/c/d.Mov", "b/notes.txt", "b/.mp4", "noend"):
        write(tmp_path, key)
    os.mkfifo(tmp_path / "live.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    listing = look(tmp_path)
    assert keys(tmp_path, listing) == ["A.MP4", "a.mp4", "b/.mp4", "b/c/d.Mov", "b/x.mkv"]
    assert listing.left_out == {"not_included": 2, "not_regular": 1, "broken_link": 1}
    assert listing.bytes == 35
    assert listing.no_date == 0
    video = listing.videos[1]
    assert video.version == f"7-{(tmp_path / 'a.mp4').stat().st_mtime_ns}"
    assert (video.captured_from, video.captured_at) == ("modified", video.modified_at)
    assert video.modified_at == NOW - timedelta(days=1) and video.listed_at == NOW
    assert (video.dt, video.source, video.key_fields) == ("2026-03-09", "", "{}")


def test_include_and_exclude(tmp_path: Path) -> None:
    for key in ("cam/1.mp4", "cam/tmp/2.mp4", "cam/3.mkv", "4.mp4"):
        write(tmp_path, key)
    listing = look(tmp_path, include=("**/*.mp4",), exclude=("**/tmp/**",))
    assert keys(tmp_path, listing) == ["4.mp4", "cam/1.mp4"]
    assert listing.left_out == {"not_included": 1, "excluded": 1}


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("**/*.mp4", ["a.mp4", "x/a.mp4", "x/y/a.MP4", "new\nline.mp4"], ["a.mp4x", "mp4"]),
        ("*.mp4", ["a.mp4", "A.Mp4"], ["x/a.mp4"]),
        ("cam-?/*.mp4", ["cam-1/a.mp4"], ["cam-12/a.mp4", "cam-1/x/a.mp4", "CAM-1/a.mp4"]),
        ("cam-[0-4]*/**", ["cam-1/a", "cam-22/x/y"], ["cam-5/a", "cam-1"]),
        ("cam-[!0-4]/*", ["cam-5/a"], ["cam-1/a", "cam-//a"]),
        ("a/**/b.mkv", ["a/b.mkv", "a/x/b.mkv", "a/x/y/b.mkv"], ["ab.mkv", "a/xb.mkv"]),
        ("**", ["a", "a/b"], []),
        ("a+(b).{c}", ["a+(b).{c}"], ["aab.c"]),
        ("[", ["["], ["a"]),
        ("v1.2/*", ["v1.2/x"], ["v1x2/x"]),
        ("x[]].ts", ["x].ts"], ["x.ts"]),
    ],
)  # fmt: skip
def test_globs(glob: str, yes: list[str], no: list[str]) -> None:
    found = compile_globs([glob, "never/matches"])
    assert [k for k in yes if not found.fullmatch(k)] == []
    assert [k for k in no if found.fullmatch(k)] == []


def test_all_containers_that_we_read_are_included() -> None:
    assert len(set(DEFAULT_INCLUDE)) == 23
    found = compile_globs(DEFAULT_INCLUDE)
    assert all(found.fullmatch(f"a/b.{s}") for s in ("mp4", "TS", "hevc", "MXF", "gif"))
    assert not found.fullmatch("a/b.jpg")


def test_one_file_may_be_the_archive(tmp_path: Path) -> None:
    write(tmp_path, "one.dat")
    write(tmp_path, "two.mp4")
    assert keys(tmp_path, look(tmp_path / "one.dat")) == ["one.dat"]


def test_several_uris_and_their_overlap(tmp_path: Path) -> None:
    for key in ("a/1.mp4", "a/b/2.mp4", "c/3.mp4"):
        write(tmp_path, key)
    rule = ArchiveRule(uris=(f"{tmp_path}/c", f"{tmp_path}/a/b/", f"{tmp_path}/a"))
    listing = list_archive(rule, now=NOW)
    assert keys(tmp_path, listing) == ["a/1.mp4", "a/b/2.mp4", "c/3.mp4"]
    assert listing.left_out == {"listed_twice": 1}
    assert listing.bytes == 21


def test_names_that_are_no_text_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "fine-é.mp4")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad-\xff.mp4"))).write_bytes(b"x")
    os.utime(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad-\xff.mp4")), (0, 0))
    listing = look(tmp_path)
    assert keys(tmp_path, listing) == ["fine-é.mp4"]
    assert listing.left_out == {"bad_name": 1}


def test_folder_markers(s3_bucket: str) -> None:
    store = open_store(f"s3://{s3_bucket}")
    for key in ("cams/", "cams/a/", "cams/a/1.mp4"):
        store.put_new(key, b"")
    listing = look(f"s3://{s3_bucket}/cams/")
    assert [v.uri for v in listing.videos] == [f"s3://{s3_bucket}/cams/a/1.mp4"]
    assert listing.left_out == {"folder_marker": 2}
    assert listing.videos[0].version == "d41d8cd98f00b204e9800998ecf8427e"
    one = look(f"s3://{s3_bucket}/cams/a/1.mp4")
    assert one.videos == listing.videos


# nothing to do --------------------------------------------------------------------------------


def test_a_missing_or_empty_archive_is_an_error(tmp_path: Path, s3_bucket: str) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}/nowhere does not exist"):
        look(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"{tmp_path} is empty"):
        look(tmp_path)
    with pytest.raises(UsageError, match=f"nothing lies under s3://{s3_bucket}/cams,"):
        look(f"s3://{s3_bucket}/cams/")
    with pytest.raises(UsageError, match=f"nothing lies under s3://{s3_bucket},"):
        look(f"s3://{s3_bucket}")
    with pytest.raises(NotFoundInStore, match="no such bucket"):
        look(f"s3://{s3_bucket}-not/cams/")
    write(tmp_path, "a.mp4")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        list_archive(ArchiveRule(uris=(str(tmp_path), f"{tmp_path}/nowhere")), now=NOW)


def test_an_archive_without_videos_says_what_there_is(tmp_path: Path) -> None:
    for key in ("a/readme.txt", "a/x.mp4", "b.txt"):
        write(tmp_path, key)
    with pytest.raises(UsageError) as caught:
        look(tmp_path, include=("*.mp4",))
    said = str(caught.value)
    assert "3 objects" in said and "not_included 3" in said and "a/readme.txt" in said
    assert "**/*.mp4" in said and "\n" not in said


def test_a_quiet_night_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, "a.mp4")
    write(tmp_path, "b.mp4", modified=NOW - timedelta(minutes=1))
    listing = look(tmp_path, since=timedelta(hours=2), settle_s=900.0)
    assert listing.videos == []
    assert listing.left_out == {"before_since": 1, "too_young": 1}


# when it was taken ----------------------------------------------------------------------------


def test_the_date_of_a_key(tmp_path: Path) -> None:
    write(tmp_path, "cam-07/2026/03/01/003000-b2.mp4")
    write(tmp_path, "other/x.mp4", modified=datetime(2026, 3, 4, 23, 30, tzinfo=UTC))
    listing = look(tmp_path, date=CAMERAS)
    video, other = listing.videos
    assert video.captured_at == datetime(2026, 2, 28, 23, 30, tzinfo=UTC)
    assert (video.captured_from, video.dt, video.source) == ("key", "2026-03-01", "cam-07")
    assert video.key_fields == '{"take": "b2"}'
    assert other.captured_at == datetime(2026, 3, 4, 23, 30, tzinfo=UTC)
    assert (other.captured_from, other.dt, other.source) == ("modified", "2026-03-05", "")
    assert listing.no_date == 1


def test_a_date_does_not_depend_on_the_folder_named(tmp_path: Path) -> None:
    write(tmp_path, "cam-07/2026/03/01/003000.mp4")
    wide, narrow = look(tmp_path, date=CAMERAS), look(tmp_path / "cam-07/2026/03", date=CAMERAS)
    assert wide == narrow


@pytest.mark.parametrize(
    ("day", "clock", "expected"),
    [
        ("2026-03-01", "103000", "2026-03-01T10:30:00"),
        ("20260301", "10-30-05", "2026-03-01T10:30:05"),
        ("2026_03_01", "1030", "2026-03-01T10:30:00"),
        ("2026/3/1", "9.05", "2026-03-01T09:05:00"),
        ("year=2026/month=03/day=01", "", "2026-03-01T00:00:00"),
        ("2026-02-29", "", None),
        ("20261301", "", None),
        ("01-03-2026", "", None),
        ("2026-03", "", None),
        ("2026-03-01", "256000", None),
        ("2026-03-01", "1-2-3-4", None),
        ("0000-01-01", "", None),
    ],
)
def test_ways_to_write_a_date(tmp_path: Path, day: str, clock: str, expected: str | None) -> None:
    write(tmp_path, f"d={day} t={clock}~.mp4")
    rule = DateRule(source="key", pattern=r"d=(?P<date>.*?) t=(?P<time>[^~]*)~")
    listing = look(tmp_path, date=rule)
    (video,) = listing.videos
    if expected is None:
        assert (video.captured_from, listing.no_date) == ("modified", 1)
    else:
        assert video.captured_at == datetime.fromisoformat(expected + "+00:00")
        assert (video.captured_from, video.dt, listing.no_date) == ("key", expected[:10], 0)


@pytest.mark.parametrize(
    ("tz", "local", "utc_text", "dt"),
    [
        ("Europe/Berlin", "20260329 0230", "2026-03-29T01:30", "2026-03-29"),  # skipped
        ("Europe/Berlin", "20261025 0230", "2026-10-25T00:30", "2026-10-25"),  # comes twice
        ("America/Sao_Paulo", "20181104 0030", "2018-11-04T03:30", "2018-11-04"),  # no midnight
        ("Pacific/Apia", "20111230 1200", "2011-12-30T22:00", "2011-12-31"),  # no such day
        ("Asia/Kathmandu", "20260301 0000", "2026-02-28T18:15", "2026-03-01"),
    ],
)
def test_clock_changes(tmp_path: Path, tz: str, local: str, utc_text: str, dt: str) -> None:
    write(tmp_path, f"{local}.mp4")
    rule = DateRule(source="key", pattern=r"(?P<date>\d{8}) (?P<time>\d{4})\.", tz=tz)
    (video,) = look(tmp_path, date=rule).videos
    assert video.captured_at == datetime.fromisoformat(utc_text + "+00:00")
    assert video.captured_at.astimezone(ZoneInfo(tz)).date().isoformat() == video.dt == dt


def test_a_pattern_may_give_the_source_without_a_date(tmp_path: Path) -> None:
    write(tmp_path, "front-door/x.mp4")
    rule = DateRule(pattern=r"(?P<source>[^/]+)/(?P<name>[^/]+)\.mp4$(?P<date>)")
    (video,) = (listing := look(tmp_path, date=rule)).videos
    assert (video.source, video.key_fields) == ("front-door", '{"name": "x"}')
    assert (video.captured_from, listing.no_date) == ("modified", 0)


# windows --------------------------------------------------------------------------------------


@pytest.fixture
def march(tmp_path: Path) -> Path:
    """One video a day at 23:30 in Berlin, 1 to 9 March, uploaded the day after at noon."""
    for day in range(1, 10):
        uploaded = datetime(2026, 3, day + 1, 12, tzinfo=UTC)
        write(tmp_path, f"cam-1/2026/03/{day:02}/233000.mp4", modified=uploaded)
    return tmp_path


def days(listing: Listing) -> list[int]:
    return [int(v.dt[-2:]) for v in listing.videos]


def test_since_and_until_are_half_open_local_days(march: Path) -> None:
    listing = look(march, date=CAMERAS, since=date(2026, 3, 3), until=date(2026, 3, 6))
    assert days(listing) == [3, 4, 5]
    assert listing.left_out == {"before_since": 2, "after_until": 4}
    exact = look(march, date=CAMERAS, since=datetime(2026, 3, 3, 23, 30))
    assert days(exact)[0] == 3
    later = look(march, date=CAMERAS, since=datetime(2026, 3, 3, 22, 31, tzinfo=UTC))
    assert days(later)[0] == 4


def test_ages_count_back_from_now(march: Path) -> None:
    assert days(look(march, date=CAMERAS, since=timedelta(days=3))) == [7, 8, 9]
    assert days(look(march, date=CAMERAS, until=timedelta(days=3))) == [1, 2, 3, 4, 5, 6]


def test_modified_since_is_the_upload(march: Path) -> None:
    listing = look(march, date=CAMERAS, modified_since=date(2026, 3, 8))
    assert days(listing) == [7, 8, 9]
    assert listing.left_out == {"modified_before": 6}


def test_the_young_wait(march: Path) -> None:
    write(march, "cam-1/2026/03/10/120000.mp4", modified=NOW + timedelta(hours=1))
    listing = look(march, date=CAMERAS, settle_s=1.0)
    assert days(listing) == list(range(1, 9))
    assert listing.left_out == {"too_young": 2}


@pytest.mark.parametrize(
    ("text", "when"),
    [("3d", timedelta(days=3)), ("15m", timedelta(minutes=15)), ("1.5 h", timedelta(minutes=90)),
     ("2w", timedelta(days=14)), ("90s", timedelta(seconds=90)), ("2026-03-01", date(2026, 3, 1)),
     ("2026-03-01T10:00", datetime(2026, 3, 1, 10)),
     (" 2026-03-01 10:00 ", datetime(2026, 3, 1, 10)),
     ("2026-03-01T10:00+02:00", datetime(2026, 3, 1, 8, tzinfo=UTC))],
)  # fmt: skip
def test_parse_when(text: str, when: object) -> None:
    assert parse_when(text) == when
    assert type(parse_when(text)) is type(when)


@pytest.mark.parametrize("text", ["", "3", "d", "3y", "-3d", "yesterday", "2026-13-01", "2026-03"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="write 2026-03-01"):
        parse_when(text)


def test_instants() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    assert instant(date(2026, 3, 1), NOW, berlin) == datetime(2026, 2, 28, 23, tzinfo=UTC)
    assert instant(datetime(2026, 7, 1, 12), NOW, berlin) == datetime(2026, 7, 1, 10, tzinfo=UTC)
    assert instant(timedelta(hours=1), NOW, berlin) == NOW - timedelta(hours=1)


# size -----------------------------------------------------------------------------------------


def test_what_is_left_out_takes_no_memory() -> None:
    """The listing streams: 100,000 keys that are not wanted leave nothing behind."""

    class Endless(AnyStore):
        def list(self, prefix: str = "") -> Iterator[Entry]:
            mtime_ns = int(time.mktime((2026, 3, 1, 0, 0, 0, 0, 0, 0))) * 10**9
            for i in range(100_000):
                suffix = "mp4" if i % 1000 == 0 else "txt"
                yield Entry(
                    key=f"cam-{i % 9}/2026/03/01/{i:06}.{suffix}",
                    size_bytes=1,
                    etag=f"{i:032x}",
                    modified_at=utc(mtime_ns),
                    mtime_ns=mtime_ns,
                )

    rule = ArchiveRule(uris=("s3://bucket",), date=CAMERAS)
    tracemalloc.start()
    listing = list_archive(rule, now=NOW, open_store=Endless)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(listing.videos), listing.left_out) == (100, {"not_included": 99_900})
    assert peak < 2_000_000
