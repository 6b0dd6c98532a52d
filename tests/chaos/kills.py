"""Scenarios in which processes are killed: drivers, decoders, predictors, decoding children."""

from __future__ import annotations

import time
from collections.abc import Mapping
from random import Random

from tests.chaos.driver import Accidents, Driver
from tests.chaos.stage import VIDEOS, Stage, Tally
from tests.s3_faults import Action, Fault

PLACES = ("/plans/", "/runs/", "/frames/", "/coverage/", "/failures/", "/commits/", "/", "/", "/")
"""Where the PUT lies that a driver does not survive; "/" is anywhere."""
MOMENTS: dict[Action, str] = {
    "reset": "killed before a PUT", "lost": "killed after a PUT", "late": "killed, PUT under way",
}  # fmt: skip
ON_RAY = 8
"""One in so many drivers that are killed runs on a Ray of its own."""


def drivers(stage: Stage, n: int, tally: Tally) -> None:
    """A driver dies before a PUT is done, after it, or with the PUT still under way; again and
    again over one output, until a run comes to its end. So also between data and commit."""
    archive = stage.archive(VIDEOS)
    want = stage.reference(archive)
    rng = Random(stage.rng.random())
    with stage.proxy() as proxy:
        while proxy.happened.total() < n:
            output = stage.output()
            with stage.watched(output, tally):
                code = -9
                while code == -9:
                    killed = proxy.happened.total()
                    current: list[Driver] = []

                    def kill(current: list[Driver] = current) -> None:
                        while not current:  # the n-th PUT was one that a dead driver left behind
                            time.sleep(0.01)
                        current[0].kill()

                    proxy.faults = []
                    if killed < n:
                        where, nth = f"/{output}/.*{rng.choice(PLACES)}", rng.randint(1, 8)
                        action = rng.choice(list(MOMENTS))
                        proxy.faults = [Fault(action, "PUT", where, nth=nth, then=kill)]
                    tree = stage.tree(archive, output)
                    if killed % ON_RAY == ON_RAY - 1:
                        tree["engine"] = {"address": "local", "object_store_cap": "100MiB"}
                    env = {"AWS_ENDPOINT_URL": proxy.endpoint_url}
                    current.append(stage.start(tree, env))
                    code = current[0].end()
                    tally.runs += 1
                if code:
                    tally.wrong.append(f"exit {code}: {current[0].said()}")
                proxy.release()  # what dead drivers had under way arrives when all is done
            stage.judge(output, want, tally)
        tally.faults.update({m: proxy.happened[action] for action, m in MOMENTS.items()})
        tally.wrong += [f"a dead driver's PUT: {s}" for s in proxy.released if s not in (200, 412)]


def workers(stage: Stage, n: int, tally: Tally) -> None:
    """On Ray: decoders die at a video and around their PUTs, predictors at a chunk."""
    share = -(-n // 3)
    kills = {"decode": share, "put": share, "predictor": share}
    archive = stage.archive(3 * share // 2 + 3)
    engine = {"address": "local", "decoders": 2, "predictors": 2, "object_store_cap": "100MiB"}
    _suffer(stage, archive, tally, kills, engine=engine)


def children(stage: Stage, n: int, tally: Tally) -> None:
    """Without Ray: decoding children die while they wait for bytes."""
    archive = stage.archive(max(VIDEOS, n + 2))
    engine = {"address": "local"}
    _suffer(stage, archive, tally, {"child": n}, engine=engine, here=True)


def _suffer(
    stage: Stage,
    archive: str,
    tally: Tally,
    kills: dict[str, int],
    *,
    engine: Mapping[str, object],
    here: bool = False,
) -> None:
    want = stage.reference(archive)
    output = stage.output()
    accidents = Accidents(marks=stage.marks(), here=here, **kills)
    tree = stage.tree(archive, output, engine=engine)
    tree["limits"] |= {"isolate": here}
    with stage.watched(output, tally):
        for _ in range(3):
            driver = stage.start(tree, accidents=accidents)
            tally.runs += 1
            if (code := driver.end()) != 1:
                break
        if code:
            tally.wrong.append(f"exit {code}: {driver.said()}")
    stage.judge(output, want, tally)
    for kind, wanted in kills.items():
        done = accidents.done(kind)
        tally.faults[f"{kind} killed"] += done
        if done < wanted:
            tally.wrong.append(f"only {done} of {wanted} {kind} kills happened")
