"""Sound: windows where the video says they are, the same however it is cut and wherever it runs."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vidbatch.audio import TOUCH_S, Timeline, decode_audio
from vidbatch.data import (
    Audio,
    AudioEnd,
    AudioGrid,
    Clip,
    DecodeLimits,
    Singles,
    Video,
)
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.sandbox import InProcess, Sandbox

SECOND = AudioGrid(rate_hz=16_000, window_s=Fraction(1), hop_s=Fraction(1))
OVERLAPPING = AudioGrid(rate_hz=11_025, window_s=Fraction(3, 2), hop_s=Fraction(1, 2))
CODECS = [
    ("aac", "mp4", 44_100),
    ("mp3", "mp4", 48_000),
    ("libopus", "webm", 48_000),
    ("pcm_s16le", "mov", 8_000),
    ("flac", "matroska", 44_100),
    ("mp2", "mpegts", 48_000),
    ("ac3", "mpegts", 48_000),
]
SPLIT = [codec for codec in CODECS if codec[1] in ("mp4", "mov")]
"""Only in these is a video ever cut into clips."""


def sweep(seconds: float, rate_hz: int) -> Singles:
    """A tone that says when it is: 200 Hz at 0 s, 100 Hz more each second."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * (200 * t + 50 * t**2))).astype(np.float32)


def film(
    codec: str,
    container: str,
    rate_hz: int,
    samples: Singles,
    *,
    first: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of grey frames at 10 fps with mono sound that begins at sample `first`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options or {}) as out:
        name = "vp8" if container == "webm" else "mpeg4" if container != "mpegts" else "mpeg2video"
        video = out.add_stream(name, rate=10 if name != "mpeg2video" else 25)
        video.width, video.height = 64, 48
        video.pix_fmt = "yuv420p"
        sound: Any = out.add_stream(codec, rate=rate_hz)
        sound.layout = "mono"
        rate = video.codec_context.framerate
        for i in range(int(len(samples) / rate_hz * rate)):
            grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), format="rgb24")
            grey.pts = i
            out.mux(video.encode(grey))
        out.mux(video.encode(None))
        kind = sound.codec_context.format.name
        size = sound.codec_context.frame_size or 1024
        turn = av.AudioResampler(format=kind, layout="mono", rate=rate_hz, frame_size=size)
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate_hz, first
        frame.time_base = Fraction(1, rate_hz)
        for part in [*turn.resample(frame), *turn.resample(None)]:
            out.mux(sound.encode(part))
        out.mux(sound.encode(None))
    return file.getvalue()


def a_clip(data: bytes, start_s: float = 0.0, end_s: float | None = None) -> Clip:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    video = Video(
        uri="/made", version="1", size_bytes=len(data), modified_at=now, listed_at=now,
        captured_at=None, captured_from="modified", dt="2026-01-01", source="",
    )  # fmt: skip
    key = int(start_s > 0)
    end = None if end_s is None else key + 1
    return Clip(video=video, first_keyframe=key, end_keyframe=end, start_s=start_s, end_s=end_s)


def windows(
    data: bytes, clip: Clip, *grids: AudioGrid, start_s: float = 0.0, decoder: Any = None
) -> tuple[dict[AudioGrid, dict[int, Singles]], AudioEnd]:
    """Grid → ordinal → samples; each ordinal once, rising."""
    decode = decoder.audio if decoder else decode_audio
    found: dict[AudioGrid, dict[int, Singles]] = {grid: {} for grid in grids}
    limits = DecodeLimits(chunk_bytes=2**18)
    *chunks, end = decode(BytesSource(data), clip, grids=grids, start_s=start_s, limits=limits)
    for chunk in chunks:
        assert isinstance(chunk, Audio) and chunk.nbytes <= 2**18
        for k, samples in zip(chunk.keys.tolist(), chunk.samples, strict=True):
            assert k > max(found[chunk.grid], default=-(10**9))
            found[chunk.grid][k] = np.array(samples)
    assert isinstance(end, AudioEnd) and end.windows == sum(len(w) for w in found.values())
    return found, end


def loudest_hz(samples: Singles, rate_hz: int) -> float:
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(power.argmax() * rate_hz / len(samples))


@pytest.mark.parametrize(("codec", "container", "rate_hz"), CODECS)
def test_a_window_holds_the_sound_of_its_second(codec: str, container: str, rate_hz: int) -> None:
    """The tone of second k lies between 200 + 100 k and 300 + 100 k Hz, at every rate."""
    data = film(codec, container, rate_hz, sweep(6, rate_hz))
    with av.open(io.BytesIO(data)) as opened:
        stream = opened.streams.video[0]
        start_s = float((stream.start_time or 0) * (stream.time_base or 0))
    found, end = windows(data, a_clip(data), SECOND, start_s=start_s)
    assert end.reason is None and end.seconds == pytest.approx(6, abs=0.2)
    assert set(range(6)) <= found[SECOND].keys() <= set(range(-1, 7))
    for k in range(6):
        assert 190 + 100 * k < loudest_hz(found[SECOND][k], 16_000) < 310 + 100 * k


@pytest.mark.parametrize("grid", [SECOND, OVERLAPPING], ids=lambda g: g.key)
def test_resampling_is_that_of_the_whole(grid: AudioGrid) -> None:
    """Each window equals the same stretch of a tone made at the wanted rate, but for 1 %."""
    data = film("pcm_s16le", "mov", 48_000, sweep(5, 48_000))
    found, _ = windows(data, a_clip(data), grid)
    truth = sweep(8, grid.rate_hz)
    truth[5 * grid.rate_hz :] = 0
    assert len(found[grid]) == 5 / grid.hop_s
    for k, samples in found[grid].items():
        at = round(k * grid.hop_s * grid.rate_hz)
        error = samples - truth[at : at + grid.samples]
        assert np.sqrt(np.mean(error**2)) < 0.005, k


def assert_same(ours: Singles, theirs: Singles, codec: str, what: str) -> None:
    """Bit by bit where nothing was lost; AAC fills bands with noise of its decoder's own."""
    if codec.startswith("pcm"):
        np.testing.assert_array_equal(ours, theirs, err_msg=what)
    error, level = (
        np.sqrt(np.mean(np.square(x, dtype=np.float64))) for x in (ours - theirs, theirs)
    )
    assert error <= 1e-3 + 0.01 * level, what


@pytest.mark.parametrize(("codec", "container", "rate_hz"), SPLIT)
def test_cut_into_clips_as_in_one(codec: str, container: str, rate_hz: int) -> None:
    """Every window is there once, with the sound it has in the whole."""
    data = film(codec, container, rate_hz, sweep(9, rate_hz))
    whole, _ = windows(data, a_clip(data), SECOND, OVERLAPPING)
    cuts = [0.0, 0.3, 2.0, 4.7, 7.1]
    parts: dict[AudioGrid, dict[int, Singles]] = {SECOND: {}, OVERLAPPING: {}}
    for start_s, end_s in zip(cuts, [*cuts[1:], None], strict=True):
        some, _ = windows(data, a_clip(data, start_s, end_s), SECOND, OVERLAPPING)
        for grid in parts:
            assert not parts[grid].keys() & some[grid].keys()
            parts[grid] |= some[grid]
    for grid, expected in whole.items():
        assert sorted(parts[grid]) == list(expected)
        for k, samples in expected.items():
            assert_same(parts[grid][k], samples, codec, f"{grid.key} {k}")


def test_sound_may_begin_before_or_after_the_picture() -> None:
    """Ordinals are those of the video's clock; a window that sound hardly touches is none."""
    data = film("pcm_s16le", "mov", 8_000, sweep(3, 8_000))
    assert list(windows(data, a_clip(data), SECOND, start_s=1.5)[0][SECOND]) == [-2, -1, 0, 1]
    assert list(windows(data, a_clip(data), SECOND, start_s=-2.0)[0][SECOND]) == [2, 3, 4]
    touched = float(1 - TOUCH_S + Fraction(1, 100))
    assert list(windows(data, a_clip(data), SECOND, start_s=-touched)[0][SECOND]) == [1, 2, 3]
    (early, _) = windows(data, a_clip(data), SECOND, start_s=1.5)
    assert not early[SECOND][-2][:7_000].any() and early[SECOND][-2][9_000:].any()


def test_a_video_without_sound_has_no_windows() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        out.mux(stream.encode(None))
    found, end = windows(file.getvalue(), a_clip(file.getvalue()), SECOND)
    assert found[SECOND] == {} and end == AudioEnd(windows=0, seconds=0.0)


def test_damaged_sound_says_so_and_keeps_its_place() -> None:
    """Packets of noise: the others stay where they were, what is lost is silence."""
    data = bytearray(film("mp3", "matroska", 48_000, sweep(8, 48_000)))
    with av.open(io.BytesIO(bytes(data))) as opened:
        packets = [(p.pos, p.size) for p in opened.demux(audio=0) if p.size]
    rng = np.random.default_rng(3)
    for pos, size in packets[125:180]:  # seconds 3 to 4.3
        data[pos + 6 : pos + size] = rng.bytes(size - 6)
    found, end = windows(bytes(data), a_clip(bytes(data)), SECOND)
    assert end.kind == "corrupt" and end.reason is not None and "packets of sound" in end.reason
    for k in (0, 1, 6):
        assert 190 + 100 * k < loudest_hz(found[SECOND][k], 16_000) < 310 + 100 * k


def test_sound_that_cannot_be_decoded_is_an_error() -> None:
    data = bytearray(film("aac", "mp4", 44_100, sweep(2, 44_100)))
    with av.open(io.BytesIO(bytes(data))) as opened:
        packets = [(p.pos, p.size) for p in opened.demux(audio=0) if p.size]
    for pos, size in packets:
        data[pos : pos + size] = b"\xff" * size
    with pytest.raises(MediaError) as caught:
        windows(bytes(data), a_clip(bytes(data)), SECOND)
    assert caught.value.kind == "undecodable"


def test_the_child_gives_what_the_process_gives() -> None:
    """The same windows through shared memory, chunk after chunk, and the next job after it."""
    data = film("aac", "mp4", 44_100, sweep(20, 44_100))
    with Sandbox() as sandbox:
        for clip in (a_clip(data), a_clip(data, 3.0, 9.0)):
            ours, end = windows(data, clip, SECOND, OVERLAPPING, decoder=sandbox)
            theirs, truth = windows(data, clip, SECOND, OVERLAPPING, decoder=InProcess())
            assert end == truth
            for grid, expected in theirs.items():
                assert list(ours[grid]) == list(expected)
                for k, samples in expected.items():
                    np.testing.assert_array_equal(ours[grid][k], samples)
        assert sandbox.restarts == 0


def test_lying_timestamps_cost_nothing() -> None:
    """A gap of a year is neither filled nor walked through."""
    timeline = Timeline(48_000)
    timeline.add(0, np.ones(1000, np.float32))
    timeline.add(48_000 * 31_536_000, np.ones(1000, np.float32))
    assert [at for at, _ in timeline.runs] == [0, 48_000 * 31_536_000]
    timeline.add(500, np.ones(10, np.float32))  # a step back of a year: the count goes on
    assert timeline.end == 48_000 * 31_536_000 + 1010
    timeline.forget(1000)
    assert len(timeline.runs) == 2


def test_real_sound(shared_videos: Path) -> None:
    """Every real video: as many seconds as a plain decode gives; cut into clips as in one."""
    heard = 0
    for path in sorted((shared_videos / "real").iterdir()):
        data = path.read_bytes()
        seconds = plain_seconds(data)
        if seconds is None or seconds > 35:
            continue
        found, end = windows(data, a_clip(data), SECOND)
        assert end.seconds == pytest.approx(seconds, rel=1e-6), path.name
        heard += 1
        edges = np.linspace(0, seconds, 5)[:-1].tolist()
        if path.suffix not in (".mp4", ".mov", ".3gp"):
            continue
        parts: dict[int, Singles] = {}
        for start_s, end_s in pairs(edges):
            parts |= windows(data, a_clip(data, start_s, end_s), SECOND)[0][SECOND]
        assert sorted(parts) == list(found[SECOND]), path.name
        for k, samples in found[SECOND].items():
            assert_same(parts[k], samples, "lossy", f"{path.name} {k}")
    assert heard >= 10


def plain_seconds(data: bytes) -> float | None:
    with av.open(io.BytesIO(data), metadata_errors="ignore") as opened:
        if not opened.streams.audio:
            return None
        stream = opened.streams.audio[0]
        return sum(f.samples for f in opened.decode(stream)) / (stream.rate or 1)


def pairs(edges: Sequence[float]) -> Iterator[tuple[float, float | None]]:
    yield from zip(edges, [*edges[1:], None], strict=True)
