"""Archive → listing: which objects are videos of this job, when they were taken, what was left out.

Streams the stores' listings: only what is kept becomes a `Video`; all else is counted by reason.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

from vidbatch.data import Video
from vidbatch.errors import UsageError
from vidbatch.storage import Entry, Store, StoreSettings, open_store

_MP4 = ("mp4", "m4v", "mov", "3gp", "3g2")
_MPEG = ("ts", "m2ts", "mts", "mpg", "mpeg", "h264", "h265", "hevc", "ivf")
_OTHER = ("mkv", "webm", "avi", "flv", "ogv", "wmv", "asf", "mxf", "gif")
DEFAULT_INCLUDE = tuple(f"**/*.{suffix}" for suffix in _MP4 + _MPEG + _OTHER)

When = date | datetime | timedelta
"""A local day (its first instant), an instant (local unless it names an offset), or an age."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NO_VIDEO = ("not_included", "excluded")
"""Reasons that say that an object is no video of this archive at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DateRule:
    """Where the capture date comes from.

    `pattern` is searched for in the whole URI, so that a video's date does not depend on which
    folder the archive was named by. Its groups: `date` (2026/03/01, 2026-03-01, 20260301), `time`
    (103000, 10-30-00, 1030; midnight if missing), `source`; all others become `key_fields`.
    """

    source: Literal["key", "modified"] = "modified"
    pattern: str | None = None
    tz: str = "UTC"
    otherwise: Literal["modified"] = "modified"
    """What a key without a (valid) date falls back to; counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveRule:
    """Which objects to take: the `archive:` block of a job file."""

    uris: tuple[str, ...]
    """Folders, prefixes, or single objects."""
    include: tuple[str, ...] = ()
    """Globs on the key under its URI; () means DEFAULT_INCLUDE."""
    exclude: tuple[str, ...] = ()
    date: DateRule = DateRule()
    since: When | None = None
    """[since, until) on the capture date."""
    until: When | None = None
    modified_since: When | None = None
    settle_s: float = 0.0
    """Objects modified less long ago wait for the next run."""
    store: StoreSettings = field(default_factory=StoreSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one look at the archive found."""

    videos: list[Video]
    """By uri, each once."""
    left_out: dict[str, int]
    """Reason → objects."""
    bytes: int
    """Of the videos."""
    no_date: int
    """Videos whose key has no date, so that `modified_at` stands for it."""


def parse_when(text: str) -> When:
    """`3d`, `15m` → an age; `2026-03-01` → a day; `2026-03-01T10:00` → an instant.

    Raises:
        UsageError: anything else.
    """
    text = text.strip()
    if age := _AGE.fullmatch(text):
        return timedelta(**{_UNITS[age[2]]: float(age[1])})
    try:
        return date.fromisoformat(text) if len(text) <= 10 else datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"{text!r} is no date and no age — write 2026-03-01, 2026-03-01T10:00, 3d or 15m"
        ) from error


def instant(when: When, now: datetime, tz: ZoneInfo) -> datetime:
    """The UTC instant that a `When` stands for."""
    if isinstance(when, timedelta):
        return now - when
    if not isinstance(when, datetime):
        when = datetime.combine(when, time())
    return (when if when.tzinfo else when.replace(tzinfo=tz)).astimezone(UTC)


def compile_globs(patterns: Sequence[str]) -> re.Pattern[str]:
    """One expression for `fullmatch`, true for a key that any of the patterns matches.

    `*` and `?` stay within a folder, `**/` is any number of folders (also none), `**` anything,
    `[a-z]` and `[!a-z]` one character. A suffix matches in either case: `*.mp4` takes `A.MP4`.
    """
    split = [re.fullmatch(r"(.*?)(\.\w+)?", p, re.DOTALL) for p in sorted(patterns)]
    parts = [
        _translate(stem) + "(?i:" + "|".join(re.escape(m[2] or "") for m in group if m) + ")"
        for stem, group in groupby((m for m in split if m), key=lambda m: m[1])
    ]
    return re.compile("|".join(f"(?:{part})" for part in parts), re.DOTALL)


def _translate(glob: str) -> str:
    tokens = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def token(match: re.Match[str]) -> str:
        text = match[0]
        if text.startswith("[") and len(text) > 2:
            inner = text[1:-1].replace("\\", r"\\").replace("[", r"\[")
            return f"[{'^/' + inner[1:] if inner[0] == '!' else inner}]"
        return tokens.get(text) or re.escape(text)

    return re.sub(r"(?:(?<=/)|^)\*\*/|\*\*|\*|\?|\[!?[^/]?[^]/]*\]|.", token, glob, flags=re.DOTALL)


def list_archive(
    rule: ArchiveRule,
    *,
    now: datetime,
    open_store: Callable[[str, StoreSettings], Store] = open_store,
) -> Listing:
    """Lists every URI of the rule and keeps what is to be looked at.

    Args:
        now: with a time zone; ages count back from it, and it becomes `listed_at`.

    Raises:
        UsageError: a URI is missing or empty, or nothing under all of them is a video. (Videos that
            are only too young or outside the window make an empty listing, no error.)
        StoreError: a store cannot be listed.
    """
    taking = _Taking(rule, now.astimezone(UTC))
    for uri in rule.uris:
        store = open_store(uri, rule.store)
        empty = True
        for entry in store.list():
            empty = False
            taking.look_at(store, entry)
        if empty:
            taking.keep(*_single(store, open_store))
    if not taking.videos and not taking.left_out.keys() - set(_NO_VIDEO) - {"folder_marker"}:
        raise _nothing(rule, taking)
    taking.videos.sort(key=lambda video: video.uri)
    videos = [next(same) for _, same in groupby(taking.videos, key=lambda video: video.uri)]
    if len(videos) < len(taking.videos):  # the URIs of the rule overlap
        taking.left_out["listed_twice"] = len(taking.videos) - len(videos)
    return Listing(
        videos=videos,
        left_out=dict(taking.left_out),
        bytes=sum(video.size_bytes for video in videos),
        no_date=taking.no_date,
    )


def _single(store: Store, open_store: Callable[[str, StoreSettings], Store]) -> tuple[Store, Entry]:
    """The object that a URI names itself, where nothing lies under it."""
    folder, _, name = store.uri.rpartition("/")
    if name and not folder.endswith(":/"):
        parent = open_store(folder or "/", store.settings)
        if entry := parent.head(name):
            return parent, entry
    if "://" in store.uri:
        raise UsageError(
            f"nothing lies under {store.uri}, so there is nothing to do"
            " — check the bucket, the prefix and store.endpoint_url"
        )
    state = "is empty" if Path(store.uri).exists() else "does not exist"
    raise UsageError(f"{store.uri} {state}, so there is nothing to do — check archive.uri")


def _nothing(rule: ArchiveRule, taking: _Taking) -> UsageError:
    counts = ", ".join(f"{reason} {n}" for reason, n in sorted(taking.left_out.items()))
    return UsageError(
        f"no video under {', '.join(rule.uris)}: {sum(taking.left_out.values())} objects are all"
        f" left out ({counts}; the first is {taking.first_left_out!r}) — check archive.include and"
        " archive.exclude; `*` does not cross folders, `**/*.mp4` does"
    )


@dataclass(slots=True)
class _Taking:
    """The filters of a rule, compiled, and what has passed them."""

    rule: ArchiveRule
    now: datetime
    videos: list[Video] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    first_left_out: str = ""
    no_date: int = 0
    tz: ZoneInfo = field(init=False)
    include: re.Pattern[str] = field(init=False)
    exclude: re.Pattern[str] | None = field(init=False)
    pattern: re.Pattern[str] | None = field(init=False)
    limits: dict[str, datetime | None] = field(init=False)
    known: dict[str, str] = field(default_factory=dict)
    """Equal texts (dates, sources, key fields) are kept once: an archive has millions of keys."""

    def __post_init__(self) -> None:
        rule = self.rule
        self.tz = ZoneInfo(rule.date.tz)
        self.include = compile_globs(rule.include or DEFAULT_INCLUDE)
        self.exclude = compile_globs(rule.exclude) if rule.exclude else None
        self.pattern = re.compile(rule.date.pattern) if rule.date.pattern else None
        self.limits = {
            name: None if when is None else instant(when, self.now, self.tz)
            for name, when in (
                ("since", rule.since),
                ("until", rule.until),
                ("modified_since", rule.modified_since),
                ("settled", timedelta(seconds=rule.settle_s) if rule.settle_s else None),
            )
        }

    def look_at(self, store: Store, entry: Entry) -> None:
        """Keeps an entry if it is a video of the archive, else counts why not."""
        reason = self._no_video(entry)
        if reason:
            self._leave_out(reason, entry)
        else:
            self.keep(store, entry)

    def keep(self, store: Store, entry: Entry) -> None:
        """Keeps an entry if it lies within the window, else counts why not."""
        since, until = self.limits["since"], self.limits["until"]
        modified_since, settled = self.limits["modified_since"], self.limits["settled"]
        if settled and entry.modified_at > settled:
            return self._leave_out("too_young", entry)
        if modified_since and entry.modified_at < modified_since:
            return self._leave_out("modified_before", entry)
        uri = store.uri_of(entry.key)
        if not uri.isascii() and uri != uri.encode("utf-8", "replace").decode():
            return self._leave_out("bad_name", entry)
        found = self.pattern.search(uri) if self.pattern else None
        groups = {k: v for k, v in found.groupdict().items() if v is not None} if found else {}
        day, clock = groups.pop("date", ""), groups.pop("time", "")
        of_key = _captured(day, clock, self.tz) if self.rule.date.source == "key" else None
        captured_at = of_key or entry.modified_at
        if since and captured_at < since:
            return self._leave_out("before_since", entry)
        if until and captured_at >= until:
            return self._leave_out("after_until", entry)
        self.no_date += of_key is None and self.rule.date.source == "key"
        source = groups.pop("source", "")
        fields = json.dumps(groups, sort_keys=True, ensure_ascii=False) if groups else "{}"
        self.videos.append(
            Video(
                uri=uri,
                version=entry.version,
                size_bytes=entry.size_bytes,
                modified_at=entry.modified_at,
                listed_at=self.now,
                captured_at=captured_at,
                captured_from="key" if of_key else "modified",
                dt=self._once(captured_at.astimezone(self.tz).date().isoformat()),
                source=self._once(source),
                key_fields=self._once(fields),
            )
        )
        return None

    def _no_video(self, entry: Entry) -> str:
        if entry.oddity:
            return entry.oddity
        if not entry.key or entry.key.endswith("/"):
            return "folder_marker"
        if not self.include.fullmatch(entry.key):
            return "not_included"
        if self.exclude and self.exclude.fullmatch(entry.key):
            return "excluded"
        return ""

    def _leave_out(self, reason: str, entry: Entry) -> None:
        self.left_out[reason] += 1
        if reason in _NO_VIDEO:
            self.first_left_out = self.first_left_out or entry.key

    def _once(self, text: str) -> str:
        return self.known.setdefault(text, text)


def _captured(day: str, clock: str, tz: ZoneInfo) -> datetime | None:
    """The UTC instant of a local day and time as a key writes them, or None.

    A local time that a clock change skips counts as if the clock had not been changed yet; one
    that comes twice is its first.
    """
    parts = re.findall(r"\d+", day)
    if len(parts) == 1 and len(parts[0]) == 8:
        parts = [parts[0][:4], parts[0][4:6], parts[0][6:]]
    hours = re.findall(r"\d+", clock)
    if len(hours) == 1 and len(hours[0]) in (4, 6):
        hours = [hours[0][i : i + 2] for i in range(0, len(hours[0]), 2)]
    if len(parts) != 3 or len(parts[0]) != 4 or len(hours) > 3:
        return None
    year, month, of_month = map(int, parts)
    hour, minute, second = map(int, [*hours, "0", "0", "0"][:3])
    try:
        return datetime(year, month, of_month, hour, minute, second, tzinfo=tz).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
