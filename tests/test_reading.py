"""What decoding fetches: few large requests, little more than it needs, the next clip's in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest

from tests.clips import make_clip
from tests.long_videos import make_long
from tests.outputs import check_same, read_tables
from tests.s3_faults import Action, Fault, FaultProxy
from tests.test_run import make_job, run
from vidbatch.cluster.decoder import Decoder
from vidbatch.cluster.driver import RayEngine
from vidbatch.cluster.slots import Slot
from vidbatch.config import Job
from vidbatch.data import Clip, ClipEnd, ClipRange, DecodeLimits, Sample, Task, Video
from vidbatch.decode.planned import NEXT_BYTES, Plan
from vidbatch.errors import NotFoundInStore
from vidbatch.media import BytesSource, PacketTable, read_packet_table
from vidbatch.media.boxes import scan_boxes
from vidbatch.pipeline.order import RunSpec, WorkOrder
from vidbatch.pipeline.reading import AHEAD, Sources
from vidbatch.probe import clip_ranges, probe
from vidbatch.sandbox import InProcess, Sandbox
from vidbatch.sandbox.wire import pack_extents, unpack_extents
from vidbatch.storage import Store, open_store
from vidbatch.storage.s3 import S3Store

pytestmark = pytest.mark.s3

KiB, MB = 2**10, 10**6
LIMITS = DecodeLimits()
NOW = datetime(2026, 3, 1, tzinfo=UTC)
Reads = list[tuple[str, int, int]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """(key, first byte, one past the last) of what is asked of the store, as it is asked."""
    found: Reads = []
    real = S3Store.read_at

    def read_at(
        store: S3Store, key: str, offset: int, length: int, *, version: str | None = None
    ) -> bytes:
        assert version, "not pinned"
        found.append((key, offset, offset + length))
        return real(store, key, offset, length, version=version)

    monkeypatch.setattr(S3Store, "read_at", read_at)
    return found


@pytest.fixture
def store(s3_bucket: str) -> Store:
    return open_store(f"s3://{s3_bucket}/archive")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def put(store: Store, key: str, data: bytes) -> Video:
    store.put_new(key, data)
    entry = store.head(key)
    assert entry is not None
    return named(store.uri_of(key), entry.version, len(data))


def named(uri: str, version: str = "1", size_bytes: int = 1) -> Video:
    return Video(
        uri=uri, version=version, size_bytes=size_bytes, modified_at=NOW, listed_at=NOW,
        captured_at=None, captured_from="modified", dt="2026-03-01", source="",
    )  # fmt: skip


def table_of(data: bytes) -> PacketTable:
    table, why = read_packet_table(BytesSource(data), max_pixels=LIMITS.max_pixels)
    assert table is not None, why
    return table


def clips_of(video: Video, data: bytes, length_s: float) -> list[Clip]:
    info, table = probe(BytesSource(data), limits=LIMITS)

    def clip(r: ClipRange) -> Clip:
        names = ("first_keyframe", "end_keyframe", "start_s", "end_s", "start_frame", "end_frame")
        return Clip(video=video, **{name: getattr(r, name) for name in names})

    return [clip(r) for r in clip_ranges(info, table, length_s)]


def header_bytes(data: bytes) -> int:
    """All of an MP4 that is no media."""
    return len(data) - sum(b.end - b.payload for b in scan_boxes(BytesSource(data))
                           if b.name == b"mdat")  # fmt: skip


def decode(
    decoder: InProcess | Sandbox,
    sources: Sources,
    clip: Clip,
    fps: Fraction,
    following: Clip | None = None,
) -> tuple[int, int]:
    """Bytes and requests of one clip."""
    events = list(
        decoder.decode(
            sources.take(clip),
            clip,
            sample=Sample(kind="fps", fps=fps),
            geometries=(),
            context=False,
            limits=LIMITS,
            following=following,
        )
    )
    assert isinstance(events[-1], ClipEnd)
    assert events[-1].status == "ok"
    return sources.spent()


def check_sound(reads: Reads, sizes: dict[str, int]) -> None:
    """No request is small, and no byte is fetched twice."""
    for key, size in sizes.items():
        mine = sorted((first, stop) for k, first, stop in reads if k == key)
        assert all(stop - first >= 256 * KiB or stop == size for first, stop in mine), mine
        assert all(a[1] <= b[0] for a, b in pairwise(mine)), mine


@pytest.mark.parametrize(("isolated", "faststart"), [(True, False), (False, True)])
def test_the_clips_of_a_long_video(
    store: Store, reads: Reads, sandbox: Sandbox, faststart: bool, isolated: bool
) -> None:
    """Three clips of a minute, at the bit rate of 1080p, in one task: the header comes once."""
    data = make_long(180, faststart=faststart)
    video = put(store, "long.mp4", data)
    clips = clips_of(video, data, 60.0)
    assert len(clips) == 3
    sources = Sources(store)
    decoder = sandbox if isolated else InProcess()
    spent = [
        decode(decoder, sources, clip, Fraction(1), following)
        for clip, following in zip(clips, [*clips[1:], None], strict=True)
    ]
    sources.close()
    assert max(gets for _, gets in spent[1:]) <= 4
    assert spent[0][1] <= 4 + 2, "the header is two more, and the next clip's first bytes one"
    assert sum(gets for _, gets in spent) <= 3 * 4
    assert sum(n for n, _ in spent) <= len(data)
    check_sound(reads, {"long.mp4": len(data)})


@pytest.mark.parametrize(
    ("container", "faststart"),
    [("mp4", True), ("mp4", False), ("matroska", True), ("mpegts", True)],
)
def test_a_minute_takes_four_requests(
    store: Store, reads: Reads, sandbox: Sandbox, container: str, faststart: bool
) -> None:
    data = make_long(60, container=container, faststart=faststart)
    video = put(store, f"v.{container}", data)
    assert 33 * MB < len(data) < 36 * MB
    n_bytes, gets = decode(sandbox, Sources(store), Clip(video=video), Fraction(1))
    assert (n_bytes, gets) == (len(data), len(reads))
    assert gets <= 4
    check_sound(reads, {f"v.{container}": len(data)})


@pytest.mark.parametrize("faststart", [True, False])
def test_what_is_not_wanted_is_not_fetched(
    store: Store, reads: Reads, sandbox: Sandbox, faststart: bool
) -> None:
    """A frame every 20 s needs a GOP of a second each: of all else nothing is read."""
    data = make_long(60, faststart=faststart)
    video = put(store, "v.mp4", data)
    table = table_of(data)
    wanted = sum(
        int(table.size[n * 25 : n * 25 + 25].sum()) for n in (0, 20, 40)
    )  # one keyframe a second, 25 packets
    n_bytes, gets = decode(sandbox, Sources(store), Clip(video=video), Fraction(1, 20))
    assert n_bytes <= 1.15 * wanted + header_bytes(data)
    assert gets <= 5
    check_sound(reads, {"v.mp4": len(data)})


@pytest.mark.parametrize("faststart", [True, False])
def test_ten_seconds_of_a_large_file(
    store: Store, reads: Reads, sandbox: Sandbox, faststart: bool
) -> None:
    data = make_long(500, 10_000, faststart=faststart)
    video = put(store, "large.mp4", data)
    assert len(data) > 125 * MB
    clip = clips_of(video, data, 10.0)[30]
    n_bytes, gets = decode(sandbox, Sources(store), clip, Fraction(2))
    table = table_of(data)
    first, stop = table.keyframes[[clip.first_keyframe, clip.end_keyframe or 0]]
    planned = int(table.size[first:stop].sum())
    assert n_bytes <= 1.15 * planned + header_bytes(data)
    assert n_bytes < 0.03 * len(data)
    assert gets <= 4
    check_sound(reads, {"large.mp4": len(data)})


def test_a_small_video_is_one_request(store: Store, reads: Reads, sandbox: Sandbox) -> None:
    data = make_long(10, faststart=False)
    sources = Sources(store)
    first, second = (Clip(video=put(store, key, data)) for key in ("a.mp4", "b.mp4"))
    assert decode(sandbox, sources, first, Fraction(1)) == (len(data), 1)
    sources.prepare(second)
    assert decode(sandbox, sources, second, Fraction(1)) == (len(data), 1)
    assert [r[0] for r in reads] == ["a.mp4", "b.mp4"]
    sources.close()


def wait_until(true: Callable[[], bool]) -> None:
    """The test's time limit is the bound."""
    while not true():
        time.sleep(0.005)


def test_what_is_prepared_is_fetched_before_it_is_taken(store: Store, reads: Reads) -> None:
    data = make_clip()
    clips = [Clip(video=put(store, f"{n}.mp4", data)) for n in range(AHEAD + 3)]
    sources = Sources(store)
    now = sources.take(clips[0])
    for clip in clips[:3]:
        sources.prepare(clip)
        sources.prepare(clip)
    wait_until(lambda: len(reads) >= 3)
    assert sorted(r[0] for r in reads) == ["0.mp4", "1.mp4", "2.mp4"]
    second = sources.take(clips[1])
    assert second is not now
    assert second.read_at(0, len(data)) == data
    sources.spent()
    for clip in clips[3:]:
        sources.prepare(clip)
    wait_until(lambda: len(reads) == len(clips))
    assert sources.take(clips[1]) is second
    assert sources.take(clips[2]).read_at(0, len(data)) == data
    assert [r[0] for r in reads].count("2.mp4") == 2, "it was closed, unused: too many came since"
    sources.close()
    assert sources.spent()[1] >= 2


def test_a_clip_that_cannot_be_prepared_fails_at_its_turn(tmp_path: Any) -> None:
    gone = named(str(tmp_path / "gone.mp4"), "1-1")
    sources = Sources(open_store(str(tmp_path)))
    sources.prepare(Clip(video=gone))
    with pytest.raises(NotFoundInStore):
        sources.take(Clip(video=gone))
    sources.close()


def test_a_run_tells_what_it_read(store: Store, reads: Reads, s3_bucket: str) -> None:
    """Four videos in two tasks, the largest in clips: bytes and requests of each in the summary."""
    sizes = {}
    for key, seconds in (("a.mp4", 4), ("b.mp4", 60), ("c.mp4", 4)):
        data = make_long(seconds, faststart=key != "b.mp4")
        put(store, key, data)
        sizes[key] = len(data)
    data = make_clip(codec="mpeg4")
    put(store, "d.mp4", data)
    sizes["d.mp4"] = len(data)
    job = make_job(
        store.uri,
        f"s3://{s3_bucket}/tables",
        archive={"uri": store.uri},
        models=[],
        clips={"length_s": 20, "split_above": 20 * MB},
        limits={"isolate": True, "task_minutes": 10},
    )
    reads.clear()
    done = run(job)
    assert done.exit_code == 0
    counts, slowest = done.summary["counts"], done.summary["slowest"]
    assert (counts["tasks"], counts["clips"], len(slowest)) == (2, 6, 6)
    assert counts["bytes_read"] == sum(c["bytes_read"] for c in slowest) == sum(sizes.values())
    probed = 2  # the header of b.mp4, on its own account
    assert counts["gets"] == sum(c["gets"] for c in slowest) == len(reads) - probed
    assert {c["uri"] for c in slowest} == {store.uri_of(key) for key in sizes}
    assert [c["seconds"] for c in slowest] == sorted((c["seconds"] for c in slowest), reverse=True)
    assert max(c["gets"] for c in slowest) <= 4
    assert done.summary["fallbacks"] == {"mpeg4 is decoded in order": 1}


def test_faults_while_a_video_is_read(
    store: Store, s3_bucket: str, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short, broken and missing answers are asked for again: the rows are those of a quiet run."""
    monkeypatch.setattr("vidbatch.storage.base.BACKOFF_S", 0.01)
    put(store, "v.mp4", make_long(30, 14_000))
    tables = []
    for name in ("quiet", "faulty"):
        if name == "faulty":
            actions: tuple[Action, ...] = ("short", "cut", "reset", "slow_down")
            s3_proxy.faults = [Fault(action, "GET", within="v.mp4") for action in actions]
        output = f"s3://{s3_bucket}/{name}"
        archive = {"uri": store.uri}
        assert run(make_job(store.uri, output, archive=archive, models=[])).exit_code == 0
        tables.append(read_tables(open_store(output)))
    assert not any(fault.times for fault in s3_proxy.faults)
    check_same(*tables)


def test_what_is_wanted_of_two_clips_rises() -> None:
    """The next clip's beginning comes behind this clip's bytes, and little of it."""
    data = make_long(60)
    table, clips = table_of(data), clips_of(named("s3://a/v"), data, 20.0)
    for fps, skip in ((Fraction(1), True), (Fraction(1, 4), True), (Fraction(1), False)):
        plan = Plan(table, clips[1], Sample(kind="fps", fps=fps), context=True)
        own = plan.extents(len(data), None, skip=skip)
        both = plan.extents(len(data), clips[2], skip=skip)
        assert both[: len(own)] == own
        assert unpack_extents(pack_extents(both), len(data)) == both
        assert 0 < sum(b - a for a, b in both[len(own) :]) <= NEXT_BYTES
        behind = plan.extents(len(data), clips[0], skip=skip)
        assert behind == own, "what lies before is not wanted again"
        ends = [int(table.pos[s.stop - 1] + table.size[s.stop - 1]) for s in plan.segments()]
        assert all(any(a < end <= b for a, b in own) for end in ends)


def test_an_order_that_waits_is_prepared_for() -> None:
    calls: list[Any] = []

    class Handle:
        @property
        def prepare(self) -> Handle:
            return self

        def options(self, **options: Any) -> Handle:
            calls.append(options)
            return self

        def remote(self, clip: Clip) -> None:
            calls.append(clip)

    tasks = [Task(clips=(Clip(video=named(f"s3://a/{n}")),), sampling="s") for n in range(2)]
    orders = [WorkOrder(task=task, outputs=()) for task in tasks]
    slot = Slot(index=0, handle=Handle())
    first = slot.take_on(orders[0])
    assert calls == []
    second = slot.take_on(orders[1])
    assert list(slot.flights) == [first, second]
    options = {"concurrency_group": "control", "num_returns": 0}
    assert calls == [options, orders[1].task.clips[0]]


def test_on_ray_each_small_video_is_fetched_once(
    store: Store, s3_bucket: str, ray_cluster: None
) -> None:
    """One decoder, a task for each video, two of them at the decoder at any time."""
    data = make_clip()
    for n in range(8):
        put(store, f"{n}.mp4", data)
    job = make_job(
        store.uri,
        f"s3://{s3_bucket}/tables",
        archive={"uri": store.uri},
        models=[],
        engine={"address": "local", "decoders": 1},
        limits={"isolate": True, "task_minutes": 0.0001},
    )
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    class Keyed(Decoder):
        """The cluster was started before this test's bucket was known."""

        def __init__(self, *args: Any) -> None:
            os.environ.update(environment)
            super().__init__(*args)

    def make(spec: RunSpec, job: Job, note: Callable[[str], None]) -> RayEngine:
        engine = RayEngine(spec, job, note=note)
        engine.decoder_class = Keyed
        return engine

    done = run(job, make_engine=make)
    counts = done.summary["counts"]
    assert (counts["tasks"], counts["gets"], counts["bytes_read"]) == (8, 8, 8 * len(data))
