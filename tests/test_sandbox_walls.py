"""What a hostile decoder process cannot reach, and nothing it says is believed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import hostile
from tests.cages import Cage, assert_works, play, wait_gone
from vidbatch.data import ClipEnd, VideoInfo
from vidbatch.errors import DecoderDied
from vidbatch.sandbox import wire


@pytest.fixture(scope="module")
def cage() -> Iterator[Cage]:
    """One cage for many tests: what one test did to it must not show in the next."""
    with Cage(stall_s=20) as cage:
        yield cage


@pytest.mark.parametrize("lie", hostile.LIES)
def test_nothing_a_hostile_child_says_is_believed(cage: Cage, lie: str) -> None:
    with pytest.raises(DecoderDied, match="broke the protocol") as caught:
        list(play(cage, f"raw-{lie}"))
    assert caught.value.kind == "decoder_crash"


def test_no_chunk_reaches_beyond_its_room() -> None:
    with Cage() as cage, pytest.raises(DecoderDied, match="chunk of 136200 bytes in 1681"):
        list(play(cage, "fat", chunk_bytes=1000))


def test_the_child_has_nothing_and_reaches_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a")
    canary = Path("/tmp/vidbatch-canary")
    canary.touch()
    with Cage() as cage, canary.open():
        *_, end = play(cage, "attack")
        proc = Path(f"/proc/{cage.pid}")
        status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
        limits = {line[:26].strip(): line[26:].split()[:2] for line in open_limits(proc)}
        assert b"canary" not in (proc / "environ").read_bytes() + (proc / "cmdline").read_bytes()
        assert (proc / "environ").read_bytes() == b""
        assert (proc / "cwd").readlink() == Path("/")
        descriptors = sorted(str(fd.readlink()).split(":")[0] for fd in (proc / "fd").iterdir())
    assert descriptors == ["/dev/null", "/dev/null", "pipe", "socket"]
    assert [status[name].strip() for name in ("NoNewPrivs", "Seccomp", "Threads")] == [
        "1",
        "2",
        "1",
    ]
    assert [limits[f"Max {what}"] for what in ("file size", "core file size", "open files")] == [
        ["0", "0"]
    ] * 3
    assert int(limits["Max address space"][1]) < 10 * 2**30
    assert int(limits["Max cpu time"][0]) <= 4 * 3600 + 60
    assert isinstance(end, ClipEnd) and end.reason is not None
    attacks = dict(part.split(": ", 1) for part in end.reason.split("; "))
    assert attacks.keys() == hostile.ATTACKS.keys()
    assert not [f"{name}: {end}" for name, end in attacks.items() if end.startswith("DONE")]
    assert canary.exists() and not Path("/tmp/vidbatch-escaped").exists()
    canary.unlink()


def open_limits(proc: Path) -> list[str]:
    """The lines of /proc/<pid>/limits without the heading."""
    return (proc / "limits").read_text().splitlines()[1:]


def test_children_die_with_their_parent() -> None:
    program = (
        "import sys, os, time; from tests.cages import *\n"
        "cage = Cage(); events = play(cage, 'spin'); next(events)\n"
        "spare = cage._spare.result().pid\n"
        "print(cage.pid, spare, flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
        parent.kill()
    for pid in pids:
        wait_gone(pid)


@pytest.mark.parametrize("deed", ["segv", "spin", "bomb"])
def test_the_spare_takes_over_from_one_that_died(deed: str) -> None:
    """It was up and locked in before it was needed, and the next one starts meanwhile."""
    with Cage(stall_s=0.3 if deed == "spin" else 20, memory_bytes=100 * 2**20) as cage:
        list(play(cage, "frames-1"))
        for _ in range(2):
            assert cage._spare is not None
            spare = cage._spare.result()
            assert spare.alive() and spare.jobs == 0 and spare.pid != cage.pid
            with pytest.raises(DecoderDied):
                list(play(cage, deed))
            assert_works(cage)
            assert cage.pid == spare.pid
        assert cage.restarts == 2


@given(
    number=st.integers(-(2**63) + 1, 2**63 - 1),
    rate=st.fractions(min_value=0, max_value=2**20, max_denominator=2**40),
    seconds=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(max_size=50),
)
def test_values_survive_the_wire(number: int, rate: Fraction, seconds: float, text: str) -> None:
    info = VideoInfo(
        container=text,
        codec="",
        width_px=number,
        height_px=2,
        rotation_deg=0,
        time_base=Fraction(1, 90_000),
        rate=rate,
        start_s=seconds,
        duration_s=None,
        frame_count=None,
        audio_codec=None,
        audio_rate_hz=number,
    )
    back = wire.load(wire.dump(info))
    assert isinstance(back, VideoInfo)
    assert wire.printable(text) == back.container
    assert {f: getattr(back, f) for f in VideoInfo.__slots__ if f != "container"} == {
        f: getattr(info, f) for f in VideoInfo.__slots__ if f != "container"
    }
    assert wire.load(wire.dump(hostile.END)) == hostile.END


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width_px", 2**63),
        ("width_px", 1.0),
        ("width_px", True),
        ("width_px", None),
        ("codec", 5),
        ("codec", "x" * 3000),
        ("time_base", "1/0"),
        ("time_base", "1/2/3"),
        ("time_base", "9" * 2000),
        ("time_base", "1e999999999"),
        ("time_base", 0.5),
        ("start_s", True),
        ("start_s", 10**400),
        ("duration_s", "None"),
        ("start_s", float("inf")),
        ("start_s", "1"),
        ("start_s", []),
        ("no_such_field", 1),
    ],
)
def test_values_of_another_kind_are_refused(field: str, value: Any) -> None:
    name, values = json.loads(wire.dump(hostile.INFO))
    assert wire.load(json.dumps([name, values]).encode()) == hostile.INFO
    with pytest.raises(wire.BreachError):
        wire.load(json.dumps([name, values | {field: value}]).encode())


def test_missing_fields_and_other_words_are_refused() -> None:
    _, values = json.loads(wire.dump(hostile.INFO))
    del values["codec"]
    _, end = json.loads(wire.dump(hostile.END))
    for said in (["VideoInfo", values], ["ClipEnd", end | {"status": "fine"}], ["Video", {}]):
        with pytest.raises(wire.BreachError):
            wire.load(json.dumps(said).encode())


def test_columns_must_grow_where_a_difference_would_overflow() -> None:
    frames = hostile.make_frames(0, 2, (), context=False)
    good = wire.pack_columns(frames)
    assert wire.unpack_columns(good, 2)["frame_index"].tolist() == [0, 1]
    frames.frame_index[:] = 2**63 - 1, -(2**63) + 1
    with pytest.raises(wire.BreachError, match="do not grow"):
        wire.unpack_columns(wire.pack_columns(frames), 2)
