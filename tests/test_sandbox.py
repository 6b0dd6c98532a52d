"""Decoding in a locked child: equal to in-process, and what a video does there stays there."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests import hostile
from tests.cages import (
    ALL,
    SMALL,
    Bytes,
    Cage,
    assert_equal,
    assert_works,
    make_clip,
    play,
    wait_gone,
)
from vidbatch.data import ClipEnd, DecodeLimits, Frames, Geometry, Sample
from vidbatch.errors import (
    DecoderDied,
    InfraError,
    MediaError,
    SourceChanged,
    StoreError,
    UsageError,
    VidbatchError,
)
from vidbatch.sandbox import InProcess, Sandbox


@pytest.fixture(scope="module")
def cage() -> Iterator[Cage]:
    """One cage for many tests: what one test did to it must not show in the next."""
    with Cage(stall_s=20) as cage:
        yield cage


def test_events_come_as_the_child_made_them(cage: Cage) -> None:
    events = list(play(cage, "frames-9"))
    assert events[0] == hostile.INFO
    assert events[-1] == hostile.END
    for k, frames in enumerate(events[1:-1]):
        assert isinstance(frames, Frames)
        assert_equal(frames, hostile.make_frames(10 * k, 10, SMALL, context=k > 0))


def test_frames_stay_as_they_are_while_they_are_held() -> None:
    with Cage() as cage:
        events = (e for e in play(cage, "frames-12") if isinstance(e, Frames))
        held = [e for e in events if e.frame_index[0] in (0, 50, 60)]
        list(play(cage, "frames-12"))
    for frames in held:
        assert_equal(
            frames, hostile.make_frames(int(frames.frame_index[0]), 10, SMALL, frames.context)
        )


def test_the_pixels_are_the_callers_to_change(cage: Cage) -> None:
    _, first, second, _ = play(cage, "frames-2", geometries=SMALL[:1])
    assert isinstance(first, Frames) and isinstance(second, Frames)
    first.pixels[SMALL[0].key][:] = 99
    first.pts[:] = 7
    assert_equal(second, hostile.make_frames(10, 10, SMALL[:1], context=True))


def test_no_geometry_gives_rows_without_pixels(cage: Cage) -> None:
    events = list(play(cage, "frames-2", geometries=()))
    assert [len(e) for e in events if isinstance(e, Frames)] == [10, 10]


def test_bytes_come_from_the_parent_as_they_are_asked_for(cage: Cage) -> None:
    data = np.random.default_rng(7).integers(0, 256, 3 * 2**18 + 77, np.uint8).tobytes()
    source = Bytes(data)
    _, frames, _ = play(cage, "sum-65536", source)
    assert isinstance(frames, Frames)
    assert frames.frame_index[0] == sum(data)
    assert source.reads == [(k * 2**16, 2**16) for k in range(12)] + [(3 * 2**18, 77)]
    assert len(list(play(cage, "sieve", source))) == 2


def test_what_is_wanted_is_told(cage: Cage) -> None:
    source = Bytes(bytes(2500 * 20))
    assert len(list(play(cage, "want-20", source))) == 2
    assert source.wanted == [[(n * 20, n * 20 + 9) for n in range(2500)]]


def test_a_long_read_is_asked_for_as_it_is(cage: Cage) -> None:
    source = Bytes(bytes(range(256)) * 80_000)
    _, frames, _ = play(cage, f"sum-{len(source.data)}", source)
    assert isinstance(frames, Frames)
    assert frames.frame_index[0] == sum(source.data)
    assert source.reads == [(0, 2**24), (2**24, len(source.data) - 2**24)]


@pytest.mark.parametrize("error", [SourceChanged("other bytes"), StoreError("gone"), OSError(5)])
def test_errors_of_the_source_surface_as_they_are(cage: Cage, error: Exception) -> None:
    restarts = cage.restarts
    with pytest.raises(type(error)) as caught:
        list(play(cage, "sum-4096", Bytes(b"\0" * 2**21, fail_at=1, error=error)))
    assert caught.value is error
    assert_works(cage)
    assert cage.restarts == restarts, "it was no decoder's fault"


def test_a_short_read_is_no_end_of_file(cage: Cage) -> None:
    source = Bytes(b"\0" * 5000)
    source.size_bytes = 6000
    with pytest.raises(StoreError, match="6000 bytes at 0 gave 5000"):
        list(play(cage, "sum-8192", source))


def test_a_media_error_keeps_its_kind(cage: Cage) -> None:
    restarts = cage.restarts
    with pytest.raises(MediaError) as caught:
        list(play(cage, "media"))
    assert (caught.value.kind, caught.value.advice) == ("no_video", "none")
    assert caught.value.message == "no video stream� — s3://bucket/media"
    assert cage.restarts == restarts


@pytest.mark.parametrize(
    ("deed", "kind", "words"),
    [
        ("segv", "decoder_crash", "died of SIGSEGV"),
        ("abort", "decoder_crash", "died of SIGABRT"),
        ("exit-3", "decoder_crash", "exited with code 3"),
        ("bug", "decoder_crash", "KeyError at hostile.py:"),
    ],
)
def test_a_crash_is_charged_to_its_clip(cage: Cage, deed: str, kind: str, words: str) -> None:
    restarts = cage.restarts
    with pytest.raises(DecoderDied, match=rf"{words}.* s3://bucket/{deed} ") as caught:
        list(play(cage, deed))
    assert caught.value.kind == kind
    assert cage.restarts == restarts + 1
    assert cage.last_exit is not None and words in cage.last_exit
    assert_works(cage)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGSEGV, "decoder_crash"),
        (signal.SIGBUS, "decoder_crash"),
        (signal.SIGKILL, "decoder_oom"),
    ],
)
def test_a_child_killed_at_work(cage: Cage, number: int, kind: str) -> None:
    events = play(cage, "sleep-60")
    next(events)
    assert cage.pid is not None
    os.kill(cage.pid, number)
    with pytest.raises(DecoderDied) as caught:
        list(events)
    assert caught.value.kind == kind
    assert_works(cage)


def test_a_child_that_dies_between_clips_is_nobodys_fault(cage: Cage) -> None:
    assert_works(cage)
    assert cage.pid is not None
    os.kill(cage.pid, signal.SIGKILL)
    wait_gone(cage.pid)
    assert_works(cage)


def test_hangs_and_endless_loops_are_ended() -> None:
    with Cage(stall_s=0.3) as cage:
        list(play(cage, "frames-1"))
        events = play(cage, "sum-4096", Bytes(b"\0" * 2**24))
        next(events)
        assert cage.pid is not None
        os.kill(cage.pid, signal.SIGSTOP)
        with pytest.raises(DecoderDied, match=r"gave no sign for 0\.3 s") as caught:
            list(events)
        assert caught.value.kind == "decoder_timeout"
        with pytest.raises(DecoderDied, match="gave no sign"):
            list(play(cage, "spin"))
        assert_works(cage)
        assert cage.restarts == 2


def test_a_slow_source_or_consumer_is_no_hang() -> None:
    class Slow(Bytes):
        def read_at(self, offset: int, length: int) -> bytes:
            time.sleep(0.4)
            return super().read_at(offset, length)

    with Cage(stall_s=0.3) as cage:
        for _ in play(cage, "sum-4096", Slow(b"\0" * 4096)):
            time.sleep(0.4)
        assert cage.restarts == 0


def test_cpu_time_and_waiting_time_have_limits() -> None:
    with Cage(cpu_s=0.1) as cage, pytest.raises(DecoderDied, match="CPU time") as caught:
        list(play(cage, "spin"))
    assert caught.value.kind == "decoder_timeout"
    with Cage(wall_s=0.2) as cage, pytest.raises(DecoderDied, match=r"longer than 0\.2 s"):
        list(play(cage, "sleep-0.3"))


def test_the_cpu_limit_is_renewed_for_every_clip() -> None:
    with Cage(cpu_s=0.7) as cage:
        for _ in range(3):
            list(play(cage, "burn-0.5"))
        assert cage.restarts == 0


def test_memory_has_a_limit() -> None:
    with Cage(memory_bytes=100 * 2**20) as cage:
        with pytest.raises(DecoderDied, match="limit of memory") as caught:
            list(play(cage, "bomb"))
        assert caught.value.kind == "decoder_oom"
        assert_works(cage)


def test_an_abandoned_iterator_leaves_the_sandbox_usable(cage: Cage) -> None:
    assert_works(cage)
    pid, restarts = cage.pid, cage.restarts
    events = play(cage, "frames-1")
    assert [type(next(events)) for _ in range(3)][-1] is ClipEnd
    assert_works(cage)  # who has seen the end need not close
    assert cage.pid == pid
    events = play(cage, "sum-4096", Bytes(b"\0" * 2**26))
    next(events)
    with pytest.raises(RuntimeError, match="is at work"):
        next(play(cage, "frames-1"))
    events.close()  # type: ignore[attr-defined]
    assert pid is not None and not Path(f"/proc/{pid}").exists()
    assert_works(cage)
    events = play(cage, "frames-50")
    next(events)
    next(events)
    del events  # the child waits for its chunk to be taken, or is about to
    assert_works(cage)
    events = play(cage, "sleep-60")
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert_works(cage)
    assert cage.restarts == restarts


def test_a_sandbox_outlives_the_thread_that_made_it() -> None:
    made: list[Cage] = []

    def make() -> None:
        made.append(Cage())
        assert_works(made[0])

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    with made[0] as cage:
        assert_works(cage)
        assert cage.restarts == 0


def test_closing_ends_the_children_and_keeps_the_arrays() -> None:
    with Cage() as cage:
        _, frames, _ = play(cage, "frames-1")
        events = play(cage, "sleep-60")
        next(events)
        pid = cage.pid
    assert pid is not None and not Path(f"/proc/{pid}").exists()
    events.close()  # type: ignore[attr-defined]
    cage.close()
    assert isinstance(frames, Frames)
    assert_equal(frames, hostile.make_frames(0, 10, SMALL, context=False))


def test_chunks_may_be_larger_than_those_before(cage: Cage) -> None:
    assert_works(cage)
    large = (Geometry(width_px=800, height_px=600),)
    _, frames, _ = play(cage, "frames-1", geometries=large, chunk_bytes=2**25)
    assert isinstance(frames, Frames)
    assert_equal(frames, hostile.make_frames(0, 10, large, context=False))
    assert_works(cage)
    with pytest.raises(UsageError, match="smaller geometries"):
        next(play(cage, "frames-1", chunk_bytes=2**31))


def test_a_child_that_cannot_start_is_told_with_its_cause() -> None:
    class Broken(Sandbox):
        MODULES = ("tests.there_is_no_such_module", "tests.hostile")

    with Broken() as sandbox:
        for _ in range(2):
            with pytest.raises(InfraError, match="there_is_no_such_module"):
                next(play(sandbox, "frames-1"))


@pytest.mark.parametrize("name", ["mdn__flower.mp4", "mb__0.ts", "bgs__video.avi"])
def test_decodes_and_probes_as_in_process(shared_videos: Path, name: str) -> None:
    data = (shared_videos / "real" / name).read_bytes()
    limits = DecodeLimits(chunk_bytes=2**20)
    with Sandbox() as sandbox, InProcess() as plain:
        probes, runs = [], []
        for decoder in (sandbox, plain):
            probes.append(decoder.probe(Bytes(data), limits=limits, length_s=10))
            runs.append(
                list(
                    decoder.decode(
                        Bytes(data),
                        make_clip(name),
                        sample=Sample(kind="fps", fps=Fraction(1, 2)),
                        geometries=SMALL,
                        context=True,
                        limits=limits,
                    )
                )
            )
    assert probes[0] == probes[1]
    assert len(runs[0]) == len(runs[1]) > 2
    for ours, theirs in zip(*runs, strict=True):
        if isinstance(ours, Frames):
            assert isinstance(theirs, Frames)
            assert_equal(ours, theirs)
        else:
            assert ours == theirs


def test_a_picture_larger_than_the_memory_is_an_oom(shared_videos: Path) -> None:
    data = (shared_videos / "real" / "v2d__test_video.mp4").read_bytes()
    with Sandbox(memory_bytes=8 * 2**20) as sandbox, pytest.raises(VidbatchError) as caught:
        list(
            sandbox.decode(
                Bytes(data),
                make_clip("s3://bucket/large.mp4"),
                sample=ALL,
                geometries=SMALL,
                context=False,
                limits=DecodeLimits(),
            )
        )
    assert isinstance(caught.value, DecoderDied)
    assert caught.value.kind == "decoder_oom"
