"""Where the seconds of decoders and predictors went, and the sentence that says what to change.

predictors starved?  ─ no ─▶ copied a lot?  larger batches : predictors are the limit
      │ yes (a fifth of the time)
      ▼
decoders: idle ─▶ too little to do   read ─▶ the store   predict ─▶ credits   else ─▶ CPUs
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vidbatch.cluster.metric_names import DECODER_STATES, PREDICTOR_STATES

MUCH = 0.2
"""A state is worth a sentence from this share of the time on."""

SOME_FRAMES, SOME_S = 200, 10.0
"""Of work that say how fast decoders and predictors are."""

_COPYING = ("collating", "uploading")


def attribute(
    predictors: Sequence[Mapping[str, Any]],
    device: str,
    decoders: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Seconds by state of each actor and of all, and the sentence that follows from them.

    Args:
        predictors: of each process, what `Predictor.stats` gave; loading does not count as idle.
        decoders: of each decoder, its seconds by state (`DECODER_STATES`).
    """
    predicting = _total((p["seconds"] for p in predictors), PREDICTOR_STATES)
    decoding = _total(decoders, DECODER_STATES)
    facts: dict[str, Any] = {"decoder_seconds": decoding, "predictor_seconds": predicting}
    for name, key in (("frames", "frames"), ("batches", "batches"), ("batches_halved", "halved")):
        facts[name] = sum(p[key] for p in predictors)
    facts["sentence"] = _sentence(predicting, decoding, device)
    facts["per_decoder"] = [_rounded(d) for d in decoders]
    facts["per_predictor"] = [_rounded(p["seconds"]) for p in predictors]
    return facts


def calibration(
    predictors: Sequence[Mapping[str, Any]], decoders: Sequence[Mapping[str, float]], device: str
) -> str | None:
    """How the pools suit each other, from the first work itself; None while that says little.

    Args:
        predictors: as of `attribute`, of those that run.
        decoders: as of `attribute`.
    """
    frames = sum(p["frames"] for p in predictors)
    working = _total((p["seconds"] for p in predictors), ("compute", *_COPYING))
    decoding = _total(decoders, [s for s in DECODER_STATES if s not in ("idle", "predict")])
    busy_s, given_s = sum(working.values()), sum(decoding.values())
    if frames < SOME_FRAMES or given_s < SOME_S or busy_s <= 0:
        return None
    given, taken = frames / given_s, frames / busy_s
    who = "GPU" if device == "cuda" else "predictor"
    load = len(decoders) * given / (len(predictors) * taken)
    limit = f"{who}s are" if load > 1 else "decoders are"
    return (
        f"measured: a decoder gives {given:.0f} frames/s, a {who} takes {taken:.0f}: one keeps up "
        f"with {taken / given:.1f} decoders; with {len(decoders)} and {len(predictors)} the "
        f"{limit} the limit ({load:.0%} of what the {who}s take)"
    )


def busy_line(
    predictors: Sequence[Mapping[str, Any]], decoders: Sequence[Mapping[str, float]]
) -> str:
    """Both pools in a few words, for the progress line; empty while there is nothing to say."""
    parts = []
    for who, seconds in (
        ("decoders", _total(decoders, DECODER_STATES)),
        ("predictors", _total((p["seconds"] for p in predictors), PREDICTOR_STATES)),
    ):
        shares = _shares(seconds)
        top = sorted(shares, key=lambda s: -shares[s])[:2]
        said = ", ".join(f"{s} {shares[s]:.0%}" for s in top if shares[s] >= 0.01)
        if said:
            parts.append(f"{who} {said}")
    return "; ".join(parts)


def _sentence(predicting: Mapping[str, float], decoding: Mapping[str, float], device: str) -> str:
    who = "GPUs" if device == "cuda" else "predictors"
    share, of_decoders = _shares(predicting), _shares(decoding)
    if not share:
        return f"no model was run; {_limit_of_decoders(of_decoders)}"
    if share["starved"] >= MUCH:
        return f"{who} starved {share['starved']:.0%}: {_limit_of_decoders(of_decoders)}"
    if (moved := sum(share[s] for s in _COPYING)) >= MUCH:
        return f"{who} waited {moved:.0%} for frames to be copied: larger batches would help"
    return f"{who} busy {share['compute']:.0%}: they are the limit; more of them would help"


def _limit_of_decoders(share: Mapping[str, float]) -> str:
    """What keeps decoders from giving more."""
    if share.get("idle", 0.0) >= 2 * MUCH:
        return (
            f"decoders had no task {share['idle']:.0%} of the time: there was too little to do for "
            "so many; fewer of each would do"
        )
    waits = {s: share.get(s, 0.0) for s in ("read", "predict", "commit")}
    worst = max(waits, key=lambda s: waits[s])
    if waits[worst] >= 2 * MUCH:
        return {
            "read": f"decoders waited {waits[worst]:.0%} for the archive's bytes: the store or the "
            "network is the limit; more decoders per CPU or a nearer store would help",
            "predict": f"decoders waited {waits[worst]:.0%} for answers all the same: a larger "
            "engine.object_store_cap would let more frames be under way",
            "commit": f"decoders wrote {waits[worst]:.0%} of the time: the output's store is the "
            "limit; longer tasks (limits.task_minutes) would write fewer, larger files",
        }[worst]
    return "decoders are the limit; more CPUs or sample.tolerance_s would fill them"


def _total(seconds: Iterable[Mapping[str, float]], states: Sequence[str]) -> dict[str, float]:
    every = list(seconds)
    return {s: round(sum(one.get(s, 0.0) for one in every), 3) for s in states}


def _shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of all but loading; empty where there is nothing."""
    working = sum(v for s, v in seconds.items() if s != "loading")
    if working <= 0:
        return {}
    return {s: v / working for s, v in seconds.items() if s != "loading"}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {state: round(value, 3) for state, value in seconds.items()}
