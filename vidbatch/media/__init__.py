"""The door to FFmpeg's demuxers: guards, stream choice, reader, packet table. See `opening`."""

from vidbatch.media.bitstream import Facts, Inspector, inspector
from vidbatch.media.boxes import declared_bytes
from vidbatch.media.opening import (
    BytesSource,
    OpenVideo,
    SourceReader,
    describe_error,
    encrypted,
    open_video,
)
from vidbatch.media.table import PacketTable, read_packet_table

__all__ = [
    "BytesSource",
    "Facts",
    "Inspector",
    "OpenVideo",
    "PacketTable",
    "SourceReader",
    "declared_bytes",
    "describe_error",
    "encrypted",
    "inspector",
    "open_video",
    "read_packet_table",
]
