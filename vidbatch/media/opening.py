"""The only `av.open`: guards against hostile and broken files, stream choice, the packet table.

A file is opened through a reader of ours that has no name and clamps every read, with FFmpeg held
to a list of containers, no protocol at all and bounded probing; codecs are allowed by name.
Whatever the bytes are, what comes out is an `OpenVideo` or a MediaError of a stable kind:

    empty not_media format_refused truncated no_video codec_refused too_large encrypted
    undecodable zero_frames          (the last two are for decoders to raise)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vidbatch.data import ByteSource, VideoInfo
from vidbatch.errors import MediaError, StoreError
from vidbatch.media.boxes import declared_bytes
from vidbatch.media.refusal import cut_off, describe_error, encrypted, refusal

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,ivf,mxf,h264,hevc,gif"
"""Demuxers that may see a byte: none opens another file or a socket (HLS, concat and SDP do)."""

CODECS = frozenset(
    [
        "av1",
        "cfhd",
        "cinepak",
        "dnxhd",
        "dvvideo",
        "ffv1",
        "flv1",
        "gif",
        "h261",
        "h263",
        "h264",
        "hevc",
        "huffyuv",
        "mjpeg",
        "mpeg1video",
        "mpeg2video",
        "mpeg4",
        "msmpeg4v1",
        "msmpeg4v2",
        "msmpeg4v3",
        "prores",
        "qtrle",
        "rawvideo",
        "rv40",
        "svq3",
        "theora",
        "utvideo",
        "vc1",
        "vp6",
        "vp6f",
        "vp8",
        "vp9",
        "vvc",
        "wmv1",
        "wmv2",
        "wmv3",
    ]
)
"""Decoders that may see a byte; names are FFmpeg's of the codec, not of the library behind it."""

PROBE_BYTES = 10_000_000
PROBE_US = 10_000_000
"""What FFmpeg may read to find out about streams: enough for a late moov or sparse TS, bounded."""
MAX_STREAMS = 64
READ_BYTES = 65_536


class BytesSource:
    """A ByteSource over bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.size_bytes = len(data)
        self._data = data

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes [offset, min(offset+length, size))."""
        return self._data[offset : offset + length]

    def want(self, extents: Sequence[tuple[int, int]]) -> None:
        """Nothing to do."""


class SourceReader:
    """What FFmpeg reads through. Has no `.name`: FFmpeg would take it for a URL."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._size = source.size_bytes
        self._pos = 0
        self.reached = 0
        """One past the last byte that was read."""
        self.error: StoreError | None = None

    def read(self, n: int = -1) -> bytes:
        """At most n bytes; empty only at the end of the object.

        Raises:
            StoreError: the source failed or gave less than there is. Later reads give nothing:
                PyAV keeps one exception at a time and prints the others.
        """
        if self.error is not None:
            return b""
        left = max(0, self._size - self._pos)
        wanted = left if n < 0 else min(n, left)
        if not wanted:
            return b""
        try:
            # More than asked for would overrun FFmpeg's buffer.
            data = self._source.read_at(self._pos, wanted)[:wanted]
            if len(data) < wanted:
                raise StoreError(
                    f"short read: {len(data)} of {wanted} bytes at {self._pos} of {self._size};"
                    " the clip is not done; run again",
                    kind="short_read",
                )
        except StoreError as error:
            self.error = error
            raise
        self._pos += wanted
        self.reached = max(self.reached, self._pos)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves; a negative answer tells FFmpeg that the target does not exist."""
        target = offset + (0, self._pos, self._size)[whence]
        if target < 0:
            return -errno.EINVAL
        self._pos = target
        return target

    def tell(self) -> int:
        """Where the next read begins."""
        return self._pos


class OpenVideo:
    """An opened video: its one chosen stream, ready to demux and decode with one thread."""

    def __init__(
        self, container: Any, stream: VideoStream, reader: SourceReader, max_pixels: int
    ) -> None:
        self.container = container
        self.stream = stream
        self.reader = reader
        self.time_base = Fraction(stream.time_base or 1)
        self.codec: str = stream.codec_context.codec.canonical_name
        self.is_mp4 = "mp4" in container.format.name.split(",")
        self.other_end_s: float | None = None
        """Where the packets of other streams end so far, on the container's clock (not in MP4)."""
        self.demux_error: str | None = None
        self.too_large = False
        """Whether the decoder refused a picture for its size."""
        self.max_pixels = max_pixels

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """The stream's packets in decode order, without the empty one that flushes.

        Reading past damage that stops the demuxer ends the iteration and sets `demux_error`.

        Raises:
            MediaError: the packets are encrypted.
            StoreError: the bytes could not be had.
        """
        demuxer = self.container.demux(*([self.stream] if self.is_mp4 else []))
        while True:
            try:
                packet = next(demuxer, None)
            except av.FFmpegError as error:
                self.demux_error = describe_error(error)
                packet = None
            except IndexError:
                # PyAV, after the last packet, where a stream turned up after opening.
                packet = None
            if self.reader.error is not None:
                raise self.reader.error
            if packet is None:
                return
            if packet.stream_index == self.stream.index:
                if packet.has_sidedata("encryption_info"):
                    raise encrypted()
                if packet.size or packet.pts is not None:
                    yield packet
            elif packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self.other_end_s = max(end, self.other_end_s or end)

    def decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        """Frames that come out when this packet goes in; None brings out what is left.

        Raises:
            av.FFmpegError: the decoder failed on this packet; the next may be fine.
            MemoryError: there was no memory for a picture of allowed size.
        """
        context = self.stream.codec_context
        try:
            frames: list[VideoFrame] = self._push(packet)
        except av.FFmpegError as error:
            pixels = context.width * context.height
            if error.errno == errno.ENOMEM and 0 < pixels <= self.max_pixels:
                raise MemoryError(f"no memory to decode {pixels} pixels") from error
            # No damage makes a decoder call its arguments invalid: a refused size does.
            self.too_large |= error.errno == errno.EINVAL or pixels > self.max_pixels
            raise
        return frames

    def _push(self, packet: Packet[VideoStream] | None) -> Any:
        context = self.stream.codec_context
        try:
            return context.decode(packet)
        except av.BlockingIOError:
            # A filter inside the decoder (VP9 has one) choked on the packet before and will take no
            # other until it is emptied.
            context.flush_buffers()
            return context.decode(packet)

    def info(self, *, upright: tuple[int, int, int] | None, start_pts: int | None) -> VideoInfo:
        """What the headers say.

        Args:
            upright: Width and height after rotation and the rotation, from a decoded frame; None
                takes the header's size as upright.
            start_pts: pts of frame 0.
        """
        stream, context = self.stream, self.stream.codec_context
        audio = next((a for a in self.container.streams.audio if a.codec_context), None)
        width, height, rotation = upright or (context.width, context.height, 0)
        start = start_pts if start_pts is not None else stream.start_time
        return VideoInfo(
            container=self.container.format.name,
            codec=self.codec,
            width_px=width,
            height_px=height,
            rotation_deg=rotation,
            time_base=self.time_base,
            rate=self.rate,
            start_s=None if start is None else float(start * self.time_base),
            duration_s=self.duration_s,
            frame_count=stream.frames or None,
            audio_codec=audio.codec_context.codec.canonical_name if audio else None,
            audio_rate_hz=(audio.codec_context.sample_rate or None) if audio else None,
        )

    @property
    def rate(self) -> Fraction | None:
        """Average frame rate as the header says, None where it says nothing."""
        rate = self.stream.average_rate
        return Fraction(rate) if rate and rate > 0 else None

    @property
    def duration_s(self) -> float | None:
        """Of the video stream, else of the container; None where no header says."""
        if self.stream.duration:
            return float(self.stream.duration * self.time_base)
        tag = _tagged_duration(self.stream.metadata.get("DURATION", ""))
        if tag:
            return tag
        duration = self.container.duration
        return duration / av.time_base if duration and duration > 0 else None


def _tagged_duration(text: str) -> float | None:
    """Seconds of Matroska's per-stream tag `hh:mm:ss.fraction`."""
    parts = text.split(":")
    try:
        return float(sum(float(p) * 60**i for i, p in enumerate(reversed(parts)))) if text else None
    except ValueError:
        return None


@contextmanager
def open_container(
    source: ByteSource, *, max_pixels: int, edited: bool = True, decoders: bool = True
) -> Iterator[tuple[Any, SourceReader]]:
    """The container and what it reads through; without `edited`, what its edit lists leave out is
    there too; without `decoders`, streams are as the container describes them.

    Raises MediaError, StoreError.
    """
    if source.size_bytes == 0:
        raise MediaError(
            "the object is empty (0 bytes); nothing to decode",
            kind="empty",
            advice="upload the file again or delete the object",
        )
    reader = SourceReader(source)
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": FORMATS,
        "max_streams": str(MAX_STREAMS),
        "probesize": str(PROBE_BYTES),
        "analyzeduration": str(PROBE_US),
        # These two are for the decoders that FFmpeg opens itself while it probes.
        "max_pixels": str(max_pixels),
        "threads": "1",
        "advanced_editlist": str(int(edited)),
    }
    if not decoders:
        options["codec_whitelist"] = "none"
    try:
        container = av.open(
            reader, "r", options=options, metadata_errors="ignore", buffer_size=READ_BYTES
        )
    except av.FFmpegError as error:
        raise reader.error or refusal(source, error) from error
    with container:
        if reader.error is not None:
            raise reader.error
        yield container, reader


@contextmanager
def open_video(source: ByteSource, *, max_pixels: int) -> Iterator[OpenVideo]:
    """Opens a video with every guard up; closes it with the block.

    Raises:
        MediaError: kinds as in this module's docstring.
        StoreError: the source failed.
    """
    with open_container(source, max_pixels=max_pixels) as (container, reader):
        stream = _choose_stream(container, source)
        context = stream.codec_context
        if not context.width:
            _check_size(source, stream.index, max_pixels)
        context.options = {"max_pixels": str(max_pixels)}
        context.thread_count = 1
        context.thread_type = "NONE"
        # Frames then carry the number their packet was given: reordering cannot mix them up.
        context.copy_opaque = True
        video = OpenVideo(container, stream, reader, max_pixels)
        for other in container.streams:
            if other.index != stream.index and (video.is_mp4 or other.type == "attachment"):
                other.discard = Discard.all
        yield video


def _choose_stream(container: Any, source: ByteSource) -> VideoStream:
    """The first video stream that is not a cover picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    context = streams[0].codec_context if streams else None
    if context is None:
        declared = declared_bytes(source)
        if declared is not None and declared > source.size_bytes:
            raise cut_off(source.size_bytes, declared)
    if not streams:
        raise MediaError(
            f"no video stream ({container.format.name}); nothing to decode",
            kind="no_video",
            advice="leave the object out with archive.exclude",
        )
    stream: VideoStream = streams[0]
    name = context.codec.canonical_name if context is not None else "unknown"
    if name not in CODECS:
        raise MediaError(
            f"codec {name} is not one this build decodes; the video is left out",
            kind="codec_refused",
            advice="transcode the file, or leave it out with archive.exclude",
        )
    if "enc_key_id" in stream.metadata:
        raise encrypted()
    return stream


def _check_size(source: ByteSource, index: int, max_pixels: int) -> None:
    """Raises MediaError if the container says a size over the limit: FFmpeg then forgets it."""
    with open_container(source, max_pixels=max_pixels, decoders=False) as (container, _):
        context = container.streams[index].codec_context if index < len(container.streams) else None
        if context is not None and context.width * context.height > max_pixels:
            raise MediaError(
                f"pictures of {context.width}x{context.height} are more than the limit of"
                f" {max_pixels} pixels; nothing is decoded",
                kind="too_large",
                advice="raise limits.max_pixels if the file is meant to be that large",
            )
