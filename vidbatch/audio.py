"""decode_audio: the sound of one clip as windows on a grid that is anchored at the video.

    sound   ····▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒·········     mono, at the rate of the stream
    grid        |0    |1    |2    |3    |4             window k covers [k·hop, k·hop + window)
                      clip A ▏ clip B                  k belongs to the clip that holds k·hop

A window's samples depend on the sound around it alone, never on where a clip begins: each is
resampled by itself, with the same neighbours. There is a window where its first hop holds sound for
TOUCH_S or half of it; what the sound does not fill is silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame

from vidbatch.data import Audio, AudioEnd, AudioGrid, ByteSource, Clip, DecodeLimits, Singles
from vidbatch.errors import MediaError
from vidbatch.media import OpenSound, open_sound

TOUCH_S = Fraction(1, 10)
"""Sound that makes a window; what encoders add at both ends is shorter (AAC at 16 kHz: 128 ms in
all)."""
PREROLL_S = 1.5
"""Decoded before the first sample that counts: overlapping transforms and bit reservoirs of lossy
codecs reach back over a few packets (MP3: 9 of 26 ms)."""
MARGIN = 2048
"""Samples of the stream on both sides of a window that go into its resampling; FFmpeg's filter
has 32 taps at the lower of the two rates, so this is enough down to a 60th of the rate."""
JITTER_S = 0.04
"""Timestamps of containers that count in milliseconds are that much off; the sound is not."""
STEP_BACK_S = 1.0
"""A larger step back starts a new count, as it does for frames."""
CHUNK_WINDOWS = 64


def decode_audio(
    source: ByteSource,
    clip: Clip,
    *,
    grids: Sequence[AudioGrid],
    start_s: float,
    limits: DecodeLimits,
) -> Iterator[Audio | AudioEnd]:
    """The sound windows that begin in a clip: chunks per grid in rising order, then one AudioEnd.

    A video without sound gives an AudioEnd alone.

    Args:
        grids: distinct; each chunk is of one of them.
        start_s: the container's clock at frame 0 (`VideoInfo.start_s`), the grids' origin.
        limits: `chunk_bytes` bounds a chunk.

    Raises:
        MediaError: there is sound and nothing of it can be decoded.
        StoreError: the bytes could not be had.
    """
    source.want([])  # nobody knows which bytes: in order from where it begins
    with open_sound(source) as sound:
        if sound is None:
            yield AudioEnd(windows=0, seconds=0.0)
            return
        timeline = Timeline(sound.rate_hz)
        cutters = [_Cutter(grid, timeline, clip, limits) for grid in grids]
        last = max(c.needs for c in cutters)
        decoded = _Decoded(sound, Fraction(start_s), first=clip.start_s if clip.start_s else None)
        for first, samples in decoded.blocks():
            timeline.add(first, samples)
            for cutter in cutters:
                yield from cutter.ready()
            timeline.forget(min(c.lowest for c in cutters))
            if timeline.end >= last:
                break
        for cutter in cutters:
            yield from cutter.ready(end=True)
        if decoded.packets and not decoded.samples:
            raise MediaError(
                f"none of {decoded.packets} packets of sound could be decoded",
                kind="undecodable",
                advice="look at the file; leave the models of sound out if it is of no use",
            )
        reason = decoded.reason()
        yield AudioEnd(
            windows=sum(c.windows for c in cutters),
            seconds=decoded.samples / sound.rate_hz,
            reason=reason,
            kind="corrupt" if reason else None,
        )


class _Decoded:
    """The samples of a stream from a little before a time on, with their place from the origin."""

    def __init__(self, sound: OpenSound, origin: Fraction, first: float | None) -> None:
        self._sound, self._origin, self._first = sound, origin, first
        self._mixers: dict[Any, av.AudioResampler] = {}
        self.packets = self.errors = self.samples = 0

    def blocks(self) -> Iterator[tuple[int | None, Singles]]:
        """(position of the first sample, mono samples); None: right after the block before."""
        if self._first is not None:
            margin_s = PREROLL_S + 2 * MARGIN / self._sound.rate_hz
            self._sound.seek(max(0.0, self._first - margin_s) + float(self._origin))
        for packet in self._sound.packets():
            self.packets += 1
            try:
                frames = self._sound.decode(packet)
            except av.FFmpegError:
                self.errors += 1
                continue
            for frame in frames:
                yield self._block(frame)
        try:
            left = self._sound.decode(None)
        except av.FFmpegError:
            self.errors, left = self.errors + 1, []
        for frame in left:
            yield self._block(frame)

    def _block(self, frame: AudioFrame) -> tuple[int | None, Singles]:
        place = None
        if frame.pts is not None and frame.time_base is not None:
            time = frame.pts * Fraction(frame.time_base) - self._origin
            place = round(time * self._sound.rate_hz)
        samples = self._mono(frame)
        self.samples += len(samples)
        return place, samples

    def _mono(self, frame: AudioFrame) -> Singles:
        """FFmpeg's own mix of the channels, at the stream's rate even where a frame has another."""
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        mixer = self._mixers.get(kind)
        if mixer is None:
            mixer = av.AudioResampler(format="flt", layout="mono", rate=self._sound.rate_hz)
            self._mixers[kind] = mixer
        parts = [part.to_ndarray().reshape(-1) for part in mixer.resample(frame)]
        mixed = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return np.nan_to_num(mixed.astype(np.float32, copy=False), posinf=0.0, neginf=0.0)

    def reason(self) -> str | None:
        """What went wrong, with numbers."""
        if self._sound.demux_error:
            return f"the sound breaks off: {self._sound.demux_error}"
        if self.errors:
            return f"{self.errors} of {self.packets} packets of sound could not be decoded"
        return None


class Timeline:
    """Mono samples by their position; gaps are allowed, what overlaps is taken once."""

    def __init__(self, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self.runs: list[tuple[int, Singles]] = []
        """(first position, samples), rising, apart or adjacent."""
        self.end = 0
        """One past the last position."""
        self._shift = 0

    def add(self, first: int | None, samples: Singles) -> None:
        """Puts samples at a position (None: at the end)."""
        if not self.runs and not self.end:
            self.end = first or 0
        place = self.end if first is None else first + self._shift
        if place < self.end - STEP_BACK_S * self.rate_hz:
            self._shift += self.end - place
            place = self.end
        elif abs(place - self.end) <= JITTER_S * self.rate_hz:
            place = self.end
        samples = samples[max(0, self.end - place) :]
        if len(samples):
            place = max(place, self.end)
            self.runs.append((place, samples))
            self.end = place + len(samples)

    def forget(self, before: int) -> None:
        """Lets go of what lies before a position."""
        while self.runs and self.runs[0][0] + len(self.runs[0][1]) <= before:
            del self.runs[0]

    def held(self, lo: int, hi: int) -> int:
        """Samples there are in [lo, hi)."""
        return sum(max(0, min(hi, at + len(x)) - max(lo, at)) for at, x in self.runs)

    def read(self, lo: int, hi: int) -> Singles:
        """The samples of [lo, hi), silence where there are none."""
        found = np.zeros(hi - lo, np.float32)
        for at, x in self.runs:
            start, stop = max(lo, at), min(hi, at + len(x))
            if start < stop:
                found[start - lo : stop - lo] = x[start - at : stop - at]
        return found


class _Cutter:
    """Cuts the windows of one grid that begin in a clip."""

    def __init__(
        self, grid: AudioGrid, timeline: Timeline, clip: Clip, limits: DecodeLimits
    ) -> None:
        self.grid, self._timeline = grid, timeline
        rate, hop = timeline.rate_hz, grid.hop_s
        self._hop = hop * rate
        self._touch = math.ceil(min(TOUCH_S, hop / 2) * rate)
        self._period = rate // math.gcd(rate, grid.rate_hz)
        self._first = math.ceil(Fraction(clip.start_s) / hop) if clip.start_s else None
        self._stop = None if clip.end_s is None else math.ceil(Fraction(clip.end_s) / hop)
        self._next = self._first
        self._room = max(1, min(CHUNK_WINDOWS, limits.chunk_bytes // (4 * grid.samples)))
        self.windows = 0

    @property
    def needs(self) -> float:
        """The position up to which sound is needed; endless at the end of a video."""
        return math.inf if self._stop is None else self._reach(self._stop)[1]

    @property
    def lowest(self) -> int:
        """The first position that a window still to come may need."""
        return self._timeline.end if self._next is None else self._reach(self._next)[0]

    def ready(self, *, end: bool = False) -> Iterator[Audio]:
        """Chunks of windows whose sound is there; at the end all that are left."""
        keys: list[int] = []
        if self._next is None and self._timeline.runs:
            self._next = math.floor(self._timeline.runs[0][0] / self._hop)
        for k in self._candidates():
            if not end and self._reach(k)[1] > self._timeline.end:
                break
            self._next = k + 1
            lo, hi = (round(i * self._hop) for i in (k, k + 1))
            if self._timeline.held(lo, hi) >= self._touch:
                keys.append(k)
        for i in range(0, len(keys), self._room):
            some = keys[i : i + self._room]
            self.windows += len(some)
            yield Audio(
                grid=self.grid,
                keys=np.array(some, np.int64),
                samples=np.stack([self._window(k) for k in some]),
            )

    def _candidates(self) -> Iterator[int]:
        """Ordinals not yet cut whose first hop touches a run: never more than there is sound."""
        k = self._next
        for at, x in tuple(self._timeline.runs):
            lo, hi = math.floor(at / self._hop), math.floor((at + len(x) - 1) / self._hop) + 1
            for i in range(lo if k is None else max(lo, k), hi):
                if self._stop is None or i < self._stop:
                    k = i + 1
                    yield i

    def _reach(self, k: int) -> tuple[int, int]:
        """[first, end) positions that window k is made of; the first is a multiple of the period
        after which both rates agree, so that the filter is in the same phase for every window."""
        lo = round(k * self._hop)
        first = (lo - MARGIN) // self._period * self._period
        return first, lo + math.ceil(self.grid.window_s * self._timeline.rate_hz) + MARGIN

    def _window(self, k: int) -> Singles:
        lo, samples = round(k * self.grid.hop_s * self.grid.rate_hz), self.grid.samples
        first, end = self._reach(k)
        if self.grid.rate_hz == self._timeline.rate_hz:
            return self._timeline.read(lo, lo + samples)
        made = _resample(self._timeline.read(first, end), self._timeline.rate_hz, self.grid.rate_hz)
        start = lo - first * self.grid.rate_hz // self._timeline.rate_hz
        return np.clip(made[start : start + samples], -1.0, 1.0)


def _resample(samples: Singles, rate_hz: int, wanted_hz: int) -> Singles:
    """Mono samples at another rate, by FFmpeg's resampler from a fresh state."""
    frame = AudioFrame.from_ndarray(samples[None, :], format="flt", layout="mono")
    frame.sample_rate = rate_hz
    resampler = av.AudioResampler(format="flt", layout="mono", rate=wanted_hz)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    made: Singles = np.concatenate([part.to_ndarray().reshape(-1) for part in parts])
    return made
