"""Opening the sound of a video: the guards of `opening`, one audio stream, all else discarded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
from av.audio.frame import AudioFrame
from av.packet import Packet
from av.stream import Discard

from vidbatch.data import ByteSource
from vidbatch.errors import MediaError
from vidbatch.media.opening import SourceReader, open_container
from vidbatch.media.refusal import describe_error, encrypted

SOUND_CODECS = frozenset([
    "aac", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "alac", "amr_nb",
    "amr_wb", "dts", "eac3", "flac", "mp1", "mp2", "mp3", "opus", "pcm_alaw", "pcm_f32be",
    "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_mulaw", "pcm_s16be", "pcm_s16le", "pcm_s24be",
    "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_u8", "speex", "truehd", "vorbis", "wmav1",
    "wmav2",
])  # fmt: skip
"""Decoders that may see a byte; names are FFmpeg's of the codec, not of the library behind it."""

MAX_CODED_PIXELS = 2**24
"""Of pictures that FFmpeg decodes while it probes for streams: none of them is wanted."""


class OpenSound:
    """The first audio stream of an opened file, ready to demux and decode with one thread."""

    def __init__(self, container: Any, stream: Any, reader: SourceReader) -> None:
        self._container, self._stream, self._reader = container, stream, reader
        self.time_base = Fraction(stream.time_base or 1)
        self.rate_hz: int = stream.codec_context.sample_rate
        self.demux_error: str | None = None

    def seek(self, time_s: float) -> None:
        """Goes to a packet at or before a time of the container's clock, if the file can."""
        try:
            self._container.seek(int(time_s / self.time_base), stream=self._stream)
        except av.FFmpegError as error:
            if self._reader.error is not None:
                raise self._reader.error from error
            self._container.seek(0)

    def packets(self) -> Iterator[Packet[Any]]:
        """The stream's packets; damage that stops the demuxer ends them and sets `demux_error`.

        Raises:
            MediaError: the packets are encrypted.
            StoreError: the bytes could not be had.
        """
        demuxer = self._container.demux(self._stream)
        while True:
            try:
                packet = next(demuxer, None)
            except av.FFmpegError as error:
                self.demux_error = describe_error(error)
                packet = None
            except IndexError:  # PyAV, where a stream turned up after opening
                packet = None
            if self._reader.error is not None:
                raise self._reader.error
            if packet is None:
                return
            if packet.has_sidedata("encryption_info"):
                raise encrypted()
            if packet.size:
                yield packet

    def decode(self, packet: Packet[Any] | None) -> list[AudioFrame]:
        """Frames that come out when this packet goes in. Raises av.FFmpegError."""
        frames: list[AudioFrame] = self._stream.codec_context.decode(packet)
        return frames


@contextmanager
def open_sound(source: ByteSource) -> Iterator[OpenSound | None]:
    """Opens the first audio stream of a file; None where there is none.

    Raises:
        MediaError: the file cannot be opened, or its sound is encrypted or of another codec.
        StoreError: the source failed.
    """
    with open_container(source, max_pixels=MAX_CODED_PIXELS) as (container, reader):
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            yield None
            return
        context = stream.codec_context
        name = context.codec.canonical_name if context is not None else "unknown"
        if name not in SOUND_CODECS:
            raise MediaError(
                f"sound codec {name} is not one this build decodes; the video has no sound rows",
                kind="codec_refused",
                advice="transcode the sound, or leave the models of sound out",
            )
        if "enc_key_id" in stream.metadata:
            raise encrypted()
        if not context.sample_rate or not 1000 <= context.sample_rate <= 768_000:
            raise MediaError(
                f"the sound claims {context.sample_rate} samples a second; it is not decoded",
                kind="not_media",
                advice="look at the file: its header is wrong",
            )
        context.thread_count = 1
        for other in container.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        yield OpenSound(container, stream, reader)
