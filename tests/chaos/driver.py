"""A driver in a process of its own, to be killed; and what may happen to its workers.

The process is forked from one that has imported the product: it starts at once, and dies as a
driver that was started by hand.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401  imported once, before any driver is forked

from tests.ray_faults import marked
from vidbatch.config import parse_job
from vidbatch.data import ByteSource, Clip, DecodeEvent
from vidbatch.errors import VidbatchError
from vidbatch.ledger import COMMITS, Ledger
from vidbatch.pipeline.engine import Engine, LocalEngine
from vidbatch.pipeline.run import run_job
from vidbatch.storage import s3_connection

END_S = 900.0
"""For one run, on a machine that does much else."""


@dataclass(frozen=True)
class Accidents:
    """What happens to the workers of one run, each at most once: a folder of marks counts them."""

    marks: str = ""
    decode: int = 0
    """Decoder actors that are killed at the first event of a video."""
    put: int = 0
    """Decoder actors that are killed right before or after a PUT of theirs."""
    child: int = 0
    """Decoding children that are killed while they wait for bytes."""
    predictor: int = 0
    """Predictors that are killed by a chunk."""
    slow_s: float = 0.0
    """Every clip takes this much longer."""
    here: bool = False
    """Without Ray: decoders and models in the driver's process."""

    def befalls(self, kind: str, name: str) -> bool:
        """Whether it happens now: the first time that this name is met, as often as is meant."""
        name = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
        if not getattr(self, kind) or not marked(Path(self.marks), f"met-{kind}-{name}", 1):
            return False
        return marked(Path(self.marks), f"done-{kind}", getattr(self, kind))

    def done(self, kind: str) -> int:
        """How often it has happened."""
        return len(list(Path(self.marks).glob(f"done-{kind}-*")))


NONE = Accidents()


@dataclass
class Unlucky:
    """A `ClipDecoder` to which accidents happen."""

    inner: Any
    accidents: Accidents

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, source: ByteSource, clip: Clip, **rest: Any) -> Iterator[DecodeEvent]:
        """As the inner one."""
        time.sleep(self.accidents.slow_s)
        name = f"{clip.video.uri} {clip.first_keyframe}"

        def reads() -> None:
            if self.accidents.befalls("child", name):
                os.kill(self.inner.pid, signal.SIGKILL)

        for event in self.inner.decode(Watched(source, reads), clip, **rest):
            if self.accidents.befalls("decode", name):
                os.kill(os.getpid(), signal.SIGKILL)
            yield event


@dataclass
class Watched:
    """A `ByteSource` that says when it is read."""

    inner: ByteSource
    reads: Callable[[], None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read_at(self, offset: int, length: int) -> bytes:
        """As the inner one."""
        self.reads()
        return self.inner.read_at(offset, length)


@dataclass
class MortalStore:
    """A store whose process is killed at some of its PUTs."""

    inner: Any
    accidents: Accidents

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put_new(self, key: str, data: bytes, metadata: Mapping[str, str] = {}) -> None:
        """As the inner one."""
        # at most twice per task: one whose decoders die too often is left out, as it should be
        task = key.rpartition("/")[2].removeprefix("part-").partition(".")[0]
        chance = hashlib.md5(key.encode(), usedforsecurity=False).digest()[0]
        is_record = key.startswith(COMMITS)
        dies = (is_record or chance % 4 == 0) and self.accidents.befalls(
            "put", f"{task} {is_record}"
        )
        if not dies or chance % 8 < 4:
            self.inner.put_new(key, data, metadata)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)


class UnluckyEngine(LocalEngine):
    """The engine of one process, with accidents."""

    accidents: Accidents

    def start(self) -> str:
        """As ever."""
        line = super().start()
        self._decoder = Unlucky(self._decoder, self.accidents)  # type: ignore[assignment]
        return line


def _ray_engine(spec: Any, job: Any, note: Callable[[str], None], accidents: Accidents) -> Engine:
    from vidbatch.cluster.decoder import Decoder
    from vidbatch.cluster.driver import RayEngine
    from vidbatch.cluster.predictor import Predictor

    class UnluckyDecoder(Decoder):
        def fit(self, decoder: Any) -> Any:
            self._ledger = Ledger(MortalStore(self._ledger.store, accidents))
            return Unlucky(decoder, accidents)

    class UnluckyPredictor(Predictor):
        def _run_staged(self, staged: Any) -> Any:
            for piece in staged.pieces:
                pixels = next(iter(piece.chunk.pixels.values()))
                if accidents.befalls("predictor", hashlib.md5(pixels.tobytes()).hexdigest()):
                    os.kill(os.getpid(), signal.SIGKILL)
            return super()._run_staged(staged)

    class UnluckyRay(RayEngine):
        decoder_class, predictor_class = UnluckyDecoder, UnluckyPredictor

    return UnluckyRay(spec, job, note=note)


@dataclass
class Driver:
    """One run of a job, under way."""

    tree: Mapping[str, Any]
    env: Mapping[str, str]
    log: Path
    accidents: Accidents = NONE
    read_timeout_s: float | None = None

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        args = (self.tree, self.env, self.log, self.accidents, self.read_timeout_s)
        self.process = context.Process(target=_drive, args=args)
        self.process.start()

    def kill(self) -> None:
        """By SIGKILL."""
        self.process.kill()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.is_alive()

    def end(self) -> int:
        """Waits for its exit code; -9 of one that was killed.

        Raises:
            TimeoutError: it does not end.
        """
        self.process.join(END_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"a driver did not end in {END_S:g} s: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


def _drive(
    tree: Mapping[str, Any],
    env: Mapping[str, str],
    log: Path,
    accidents: Accidents,
    read_timeout_s: float | None,
) -> None:
    os.setsid()  # Ray ends the process group of a driver that has died
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    for name in [n for n in os.environ if n.startswith(("AWS_", "RAY_"))]:
        del os.environ[name]
    os.environ.update(env)
    if read_timeout_s:
        s3_connection.READ_TIMEOUT_S = read_timeout_s  # type: ignore[assignment]

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def make(spec: Any, job: Any, _: Any) -> Engine:
        if not accidents.here:
            return _ray_engine(spec, job, note, accidents)
        engine = UnluckyEngine(spec, length_s=job.clips.length_s)
        engine.accidents = accidents
        return engine

    try:
        result = run_job(parse_job(dict(tree), base_dir=Path("/")), make_engine=make)
    except VidbatchError as error:
        note(f"exit {error.exit_code}: {error.message}")
        sys.exit(error.exit_code)
    note(f"exit {result.exit_code}, {time.process_time():.1f} s of CPU: {result.summary}")
    sys.exit(result.exit_code)
