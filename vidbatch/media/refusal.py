"""Why FFmpeg would not open an object, in our words."""

from __future__ import annotations

import errno

import av

from vidbatch.data import ByteSource
from vidbatch.errors import MediaError
from vidbatch.media.boxes import MP4_BOXES, scan_boxes

PLAYLIST = b"#EXTM3U"
"""FFmpeg calls an HLS playlist invalid data unless its name says what it is; ours has no name."""


def describe_error(error: Exception) -> str:
    """FFmpeg's words about an error, without the numbers and names PyAV adds."""
    if isinstance(error, MemoryError):  # where there is memory: see `sandbox.child`
        return "a size in it is larger than any memory"
    return str(getattr(error, "strerror", None) or error)


def cut_off(size_bytes: int, declared: int) -> MediaError:
    """The error for a file that ends inside its header."""
    return MediaError(
        f"cut off inside the header: {size_bytes} of {declared} bytes are there",
        kind="truncated",
        advice="upload the whole file again",
    )


def encrypted() -> MediaError:
    """The error for media that are encrypted and come without a key."""
    return MediaError(
        "the media are encrypted; nothing can be decoded",
        kind="encrypted",
        advice="store a decrypted copy",
    )


def refusal(source: ByteSource, error: av.FFmpegError) -> MediaError:
    """Why FFmpeg would not open the object."""
    head = source.read_at(0, 16)
    if error.errno == errno.EINVAL or head.startswith(PLAYLIST):
        return MediaError(
            "the content is no container this build opens (a playlist, an image, a script?)",
            kind="format_refused",
            advice="leave the object out with archive.exclude",
        )
    if head[4:8] in MP4_BOXES:
        boxes = scan_boxes(source)
        if not any(b.name == b"moov" for b in boxes):
            return MediaError(
                "an MP4 without its header (moov): cut off, or a fragment without its first part",
                kind="truncated",
                advice="upload the whole file again",
            )
        if boxes[-1].end > source.size_bytes:
            return cut_off(source.size_bytes, boxes[-1].end)
    return MediaError(
        f"not a video: {describe_error(error)}",
        kind="not_media",
        advice="leave the object out with archive.exclude, or upload it again",
    )
