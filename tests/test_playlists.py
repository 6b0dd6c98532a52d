"""Playlists, scripts and references by any name: no connection, no other file, no byte of one.

Inputs 70 to 75 of the catalogue. Beside each input lie canaries (a video whose pictures say 4242,
a text), and a socket listens; both are shown to work by the same files opened without guards.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import pytest

from tests.bad_inputs import SDP, outside_reference
from tests.clips import make_clip, read_number
from tests.decoding import ALL, SMALL, make_video
from vidbatch.data import Clip, ClipEnd, DecodeEvent, DecodeLimits, Frames
from vidbatch.errors import MediaError
from vidbatch.sandbox import InProcess, Sandbox
from vidbatch.storage import open_source, open_store

CANARY = 4242
SECRET = "canary-5b1f9"
SUFFIXES = (".mp4", ".ts", ".mkv", ".webm", ".avi", ".mov", ".m3u8", ".sdp", ".mpd", ".gif", "")


@dataclass(frozen=True)
class Traps:
    """A folder of canaries, and sockets that wait for a visitor."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    watch: int
    """Tells of every file that is opened in the folder, by whomever."""

    @property
    def port(self) -> int:
        """Of both sockets."""
        return int(self.tcp.getsockname()[1])

    def visits(self) -> int:
        """Connections and datagrams since the last call."""
        count = 0
        for knock in (self.tcp.accept, lambda: self.udp.recv(2000)):
            while True:
                try:
                    answer = knock()
                except BlockingIOError:
                    break
                count += 1
                if isinstance(answer, tuple):
                    answer[0].close()
        return count

    def opened(self) -> set[str]:
        """Names of files that were opened since the last call."""
        names = set()
        while True:
            try:
                events = os.read(self.watch, 2**16)
            except BlockingIOError:
                return names
            while events:
                length = struct.unpack_from("iIII", events)[3]
                names.add(events[16 : 16 + length].rstrip(b"\0").decode())
                events = events[16 + length :]


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traps]:
    """Canaries and open ears."""
    folder = tmp_path_factory.mktemp("traps")
    (folder / "base.mp4").write_bytes(make_clip(first_number=CANARY, frames=24))
    (folder / "base.ts").write_bytes(
        make_clip(first_number=CANARY, frames=24, container="mpegts", options={"crf": "5"})
    )
    (folder / "secret.txt").write_text(SECRET)
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    opened = 0x20
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(folder), opened) >= 0
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(tcp.getsockname())
        tcp.setblocking(False)
        udp.setblocking(False)
        yield Traps(folder, tcp, udp, watch)
    os.close(watch)


def hls(line: str, tags: str = "") -> bytes:
    """A playlist of one segment."""
    text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n{tags}#EXTINF:10,\n{line}\n#EXT-X-ENDLIST\n"
    return text.encode()


def dash(base: str) -> bytes:
    """A manifest of one segment."""
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT2S" minBufferTime="PT1S"'
        ' profiles="urn:mpeg:dash:profile:full:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1" bandwidth="1000" codecs="avc1.64000a"><BaseURL>{base}</BaseURL>'
        '<SegmentList duration="2"><SegmentURL media="base.mp4"/></SegmentList></Representation>'
        "</AdaptationSet></Period></MPD>"
    ).encode()


Body = Callable[[str, str], bytes]
"""Makes a body from the URL of the listener and the folder of the canaries."""

BODIES: dict[str, Body] = {
    "hls of a url": lambda url, folder: hls(f"{url}/x.ts"),
    "hls of a sibling": lambda url, folder: hls("base.ts"),
    "hls of a file": lambda url, folder: hls(f"file://{folder}/base.ts"),
    "hls of a text": lambda url, folder: hls(f"{folder}/secret.txt"),
    "hls of a concat": lambda url, folder: hls(f"concat:{folder}/base.ts|{url}/y.ts"),
    "hls with a key": lambda url, folder: hls(
        "base.ts", f'#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n'
    ),
    "hls with a map": lambda url, folder: hls("base.mp4", f'#EXT-X-MAP:URI="{url}/init"\n'),
    "hls of playlists": lambda url, folder: (
        f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1000\n{url}/low.m3u8\n".encode()
    ),
    "ffconcat of a sibling": lambda url, folder: b"ffconcat version 1.0\nfile base.mp4\n",
    "ffconcat of a path": lambda url, folder: (
        f"ffconcat version 1.0\nfile '{folder}/base.mp4'\n".encode()
    ),
    "ffconcat of a url": lambda url, folder: f"ffconcat version 1.0\nfile {url}/x.ts\n".encode(),
    "concat list": lambda url, folder: b"file 'base.mp4'\nfile 'base.ts'\n",
    "sdp": lambda url, folder: SDP.replace(b"50004", url.rpartition(":")[2].encode()),
    "dash of a url": lambda url, folder: dash(f"{url}/"),
    "dash of a folder": lambda url, folder: dash(f"{folder}/"),
    "metadata": lambda url, folder: b";FFMETADATA1\ntitle=x\n[CHAPTER]\nSTART=0\nEND=9\n",
    "terminal text": lambda url, folder: b"\x1b[2Jhello\r\n" * 500,
    "redirector": lambda url, folder: f"[Reference]\nRef1={url}/x.asf\nRef2=base.mp4\n".encode(),
    "asx": lambda url, folder: f'<asx version="3"><ref href="{url}/x"/></asx>'.encode(),
    "smil": lambda url, folder: f'<smil><body><video src="{url}/x"/></body></smil>'.encode(),
    "imf": lambda url, folder: (
        b'<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/'
        b'2016"><Id>urn:uuid:0</Id></CompositionPlaylist>'
    ),
    "mov of an alias": lambda url, folder: outside_reference(f"{folder}/base.mp4", alias=True),
}
MOVS: dict[str, Body] = {
    "mov of a file": lambda url, folder: outside_reference(f"file://{folder}/base.mp4"),
    "mov of a url": lambda url, folder: outside_reference(f"{url}/x.mp4"),
}
"""Their own media bytes are there too: these are what comes of them."""


def write(traps: Traps, name: str, suffix: str) -> Path:
    """Puts an input beside the canaries."""
    path = traps.folder / f"input{suffix}"
    path.write_bytes((BODIES | MOVS)[name](f"http://127.0.0.1:{traps.port}", str(traps.folder)))
    traps.opened()
    return path


def look(path: Path, decoder: Sandbox | InProcess) -> tuple[list[DecodeEvent], MediaError | None]:
    """Decodes a file as a worker of the job reads it."""
    store = open_store(str(path.parent))
    source = open_source(store, str(path), size_bytes=path.stat().st_size, version=None)
    events: list[DecodeEvent] = []
    try:
        events.extend(
            decoder.decode(
                source,
                Clip(video=make_video(path.read_bytes())),
                sample=ALL,
                geometries=(SMALL,),
                context=False,
                limits=DecodeLimits(),
            )
        )
    except MediaError as error:
        return events, error
    finally:
        source.close()
    return events, None


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One sandbox for all."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", BODIES)
def test_nothing_is_visited_and_nothing_told(traps: Traps, sandbox: Sandbox, name: str) -> None:
    traps.visits()
    for suffix in SUFFIXES:
        path = write(traps, name, suffix)
        for decoder in (sandbox, InProcess()):
            events, error = look(path, decoder)
            assert error is not None and not events, f"{name}{suffix}"
            assert error.kind in {"format_refused", "not_media", "zero_frames", "undecodable"}
            assert SECRET not in error.message and str(CANARY) not in error.message
        assert traps.opened() <= {path.name}, f"{name}{suffix} opened other files"
        path.unlink()
    assert traps.visits() == 0
    assert sandbox.restarts == 0


@pytest.mark.parametrize("name", MOVS)
def test_a_reference_to_another_file_is_not_followed(
    traps: Traps, sandbox: Sandbox, name: str
) -> None:
    traps.visits()
    for suffix in (".mp4", ".ts"):
        path = write(traps, name, suffix)
        for decoder in (sandbox, InProcess()):
            events, error = look(path, decoder)
            assert error is None and isinstance(events[-1], ClipEnd)
            frames = [e for e in events if isinstance(e, Frames)]
            numbers = [read_number(p) for e in frames for p in e.pixels[SMALL.key]]
            assert numbers == list(range(60))
        assert traps.opened() <= {path.name}, f"{name}{suffix} opened other files"
        path.unlink()
    assert traps.visits() == 0


class Named:
    """A file object that has a name: FFmpeg takes it for the URL of what it reads."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = path.open("rb")
        self.read, self.seek, self.tell = self._file.read, self._file.seek, self._file.tell

    def __del__(self) -> None:
        self._file.close()


def test_the_traps_work(traps: Traps) -> None:
    """Without the guards the same files are followed."""
    answer = b"HTTP/1.0 404 no\r\n\r\n"

    def serve() -> None:
        traps.tcp.setblocking(True)
        with traps.tcp.accept()[0] as visitor:
            seen.append(visitor.recv(1000))
            visitor.sendall(answer)
        traps.tcp.setblocking(False)

    seen: list[bytes] = []
    thread = threading.Thread(target=serve)
    thread.start()
    path = write(traps, "hls of a url", ".m3u8")
    with pytest.raises(av.FFmpegError):
        av.open(Named(path), timeout=5)
    thread.join()
    assert seen[0].startswith(b"GET /x.ts")
    path = write(traps, "ffconcat of a sibling", ".mp4")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert read_number(frame.to_ndarray(format="rgb24")) == CANARY
    assert "base.mp4" in traps.opened()
    path = write(traps, "hls of a sibling", ".m3u8")
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert read_number(frame.to_ndarray(format="rgb24")) == CANARY
    assert traps.opened() == {"base.ts", path.name}
    path = write(traps, "mov of an alias", ".mov")
    with av.open(str(path), options={"enable_drefs": "1"}):
        assert "base.mp4" in traps.opened()
