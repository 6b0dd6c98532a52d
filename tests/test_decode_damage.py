"""decode_clip on damaged and malformed videos: what must come out, called by its name."""

from __future__ import annotations

import random
from typing import Any

import av
import pytest

from tests.bad_inputs import MADE, made
from tests.clips import flip_bits, make_clip, media_start, remux
from tests.decoding import ALL, SMALL, decode, fps
from vidbatch.data import DecodeLimits, Sample
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.probe import clip_ranges, probe

MP4 = make_clip()
LATE = make_clip(faststart=False)
MKV = make_clip(container="matroska")
AVI = make_clip(container="avi", codec="mpeg4", b_frames=0)
FRAGMENTS = make_clip(fragmented=True)


@pytest.mark.parametrize("name", MADE)
def test_a_sparser_rule_takes_rows_of_all_and_says_the_same(name: str) -> None:
    """What each of them comes to is in `test_inputs`."""
    data = made(name)
    try:
        whole = decode(data, ALL)
    except MediaError as error:
        with pytest.raises(MediaError) as again:
            decode(data, fps(5))
        assert again.value.kind == error.kind
        return
    sparse = decode(data, fps(5))
    assert (sparse.end.status, sparse.end.kind) == (whole.end.status, whole.end.kind)
    assert set(sparse.marks) <= set(whole.marks)
    if whole.end.status == "partial":
        assert any(c.isdigit() for c in whole.end.reason or "")


def test_damage_leaves_a_hole_never_a_shift() -> None:
    for container in ("mp4", "matroska"):
        whole = make_clip(container=container, codec="mpeg4", b_frames=0, gop=1)
        broken = remux(whole, blank(7), container=container)
        got = decode(broken, ALL)
        expected = [i for i in range(60) if i != 7]
        assert got.index == got.numbers() == expected, container
        assert (got.end.kind, got.end.end_frame) == ("corrupt", 60)


def blank(number: int) -> Any:
    """Replaces the content of one packet by zeros."""

    def change(n: int, packet: Any) -> Any:
        if n != number:
            return packet
        empty = av.Packet(bytes(packet.size))
        empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
        empty.duration, empty.is_keyframe = packet.duration, packet.is_keyframe
        return empty

    return change


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_damaged_first_picture_keeps_its_place(codec: str, container: str) -> None:
    broken = remux(make_clip(codec=codec), blank(0), container=container)
    got = decode(broken, ALL)
    assert got.index and got.index == got.numbers()
    assert got.end.end_frame == 60 and got.end.kind == "corrupt"


@pytest.mark.parametrize("seed", range(6))
def test_damaged_rows_are_the_same_however_the_video_is_cut(seed: int) -> None:
    data = make_clip(frames=96)
    data = flip_bits(data, media_start(data) + 8, len(data), 12, seed)
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    assert table is not None
    for sample in (ALL, fps(5), Sample(kind="keyframes")):
        whole = decode(data, sample)
        assert whole.rows == decode(data, sample).rows
        for length_s in (0.01, 1.0):
            rows = []
            for part in clip_ranges(info, table, length_s):
                try:
                    rows += decode(data, sample, part=part).rows
                except MediaError as error:
                    assert error.kind == "undecodable"
            assert rows == whole.rows


@pytest.mark.parametrize("data", [MP4, LATE, MKV, AVI, FRAGMENTS], ids=["mp4", "late", *"kaf"])
def test_no_cut_goes_unnoticed(data: bytes) -> None:
    dice = random.Random(0)
    for _ in range(25):
        cut = data[: dice.randrange(1, len(data))]
        try:
            end = decode(cut, fps(5)).end
        except MediaError as error:
            assert error.kind in {"truncated", "not_media", "zero_frames", "format_refused"}
        else:
            assert (end.status, end.kind) == ("partial", "truncated")


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
def test_random_damage_ends_in_an_outcome(container: str) -> None:
    data = make_clip(container=container, frames=24, b_frames=0)
    for seed in range(25):
        broken = flip_bits(data, 0, len(data), 30, seed)
        try:
            got = decode(broken, fps(5))
        except MediaError as error:
            assert error.kind and error.advice
        else:
            assert got.end.frames_decoded and (got.end.status == "ok") == (got.end.kind is None)


def test_context_is_the_last_sampled_frame_that_can_be_decoded() -> None:
    """Not the one before, if that is damaged: a model sees what it sees in the whole video."""
    spoiled = set(range(12, 48))
    data = remux(
        make_clip(frames=96),
        lambda n, p: blank(n)(n, p) if n in spoiled else p,
        container="mp4",
    )
    info, table = probe(BytesSource(data), limits=DecodeLimits())
    parts = clip_ranges(info, table, 1.9)
    assert [p.start_frame for p in parts] == [0, 48]
    for sample in (ALL, fps(5), Sample(kind="every", every=5)):
        whole = decode(data, sample, context=True, chunk_frames=4)
        last = [decode(data, sample, part=p, context=True, chunk_frames=4) for p in parts][1]
        before = [row for row in whole.rows if row.index < 48][-1]
        assert before.index < 12
        chunk = last.chunks[0]
        assert chunk.context and int(chunk.frame_index[0]) == before.index
        assert chunk.pixels[SMALL.key][0].tobytes() == before.pixels
        assert [c.ordinal.tolist() for c in last.chunks] == [
            c.ordinal.tolist() for c in whole.chunks[-len(last.chunks) :]
        ]


def test_what_damage_took_counts_among_the_samples() -> None:
    for container in ("mp4", "matroska"):
        data = remux(make_clip(codec="libx265"), blank(24), container=container)
        ordinals = {
            int(i): int(o)
            for c in decode(data, fps(5)).chunks
            for i, o in zip(*rows_of(c), strict=True)
        }
        assert ordinals == {i: i // 5 for i in ordinals} and len(ordinals) < 12


def rows_of(chunk: Any) -> tuple[Any, Any]:
    """frame_index and ordinal of a chunk's items."""
    return chunk.frame_index, chunk.ordinal
