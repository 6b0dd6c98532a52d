"""The door to FFmpeg's demuxers: guards, stream choice, reader, packet table. See `opening`."""

from vidbatch.media.bitstream import EntryRefusedError, Facts, Inspector, inspector
from vidbatch.media.boxes import declared_bytes
from vidbatch.media.opening import (
    BytesSource,
    OpenVideo,
    SourceReader,
    open_video,
)
from vidbatch.media.refusal import describe_error, encrypted
from vidbatch.media.sound import OpenSound, open_sound
from vidbatch.media.table import PacketTable, promised_packets, read_packet_table

__all__ = [
    "BytesSource",
    "EntryRefusedError",
    "Facts",
    "Inspector",
    "OpenSound",
    "OpenVideo",
    "PacketTable",
    "SourceReader",
    "declared_bytes",
    "describe_error",
    "encrypted",
    "inspector",
    "open_sound",
    "open_video",
    "promised_packets",
    "read_packet_table",
]
