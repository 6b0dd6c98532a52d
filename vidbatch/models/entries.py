"""What stands in an entry of a job file or a model file, checked value by value.

Every fault is one UsageError line: where it stands, what it is, what may stand there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

from vidbatch.data import AudioGrid, CropRule, Geometry, Gives, ModelSpec, WindowGrid
from vidbatch.errors import UsageError
from vidbatch.models.base import fact, unknown_name

_GEOMETRY = ("width_px", "height_px", "fit", "interpolation", "pad")
_CHOICES = {
    "fit": ("stretch", "crop", "letterbox"),
    "interpolation": ("bilinear", "bicubic", "area"),
}


def read_names(plain: object, name: str, where: str) -> tuple[str, ...]:
    """Its labels or features: distinct words."""
    found = fact(plain, name)
    if not isinstance(found, list | tuple) or not all(isinstance(x, str) and x for x in found):
        raise UsageError(f"{where}: {name} is {found!r}, expected a tuple of words")
    if len(set(found)) != len(found):
        raise UsageError(f"{where}: {name} holds a word twice; rows could not be told apart")
    return tuple(found)


def read_gives(
    plain: object,
    where: str,
    *,
    window: WindowGrid | None = None,
    audio: AudioGrid | None = None,
    crop: CropRule | None = None,
) -> tuple[Gives, ...]:
    """The tables a model fills, parents first, as its facts and its kind of items say.

    Raises:
        UsageError: none, or one that answers of this kind have no place in.
    """
    labelled, features = bool(fact(plain, "labels")), bool(fact(plain, "features"))
    detects, segments = bool(fact(plain, "detects")), bool(fact(plain, "segments"))
    items = [("window", window), ("audio", audio), ("on", crop)]
    kinds = [key for key, value in items if value is not None]
    if len(kinds) > 1:
        raise UsageError(f"{where}: {' and '.join(kinds)} exclude each other; write one of them")
    if detects and segments:
        raise UsageError(f"{where}: its labels name boxes or masks (detects, segments), not both")
    if kinds:
        barred = {
            "detects": detects,
            "segments": segments,
            "cuts": bool(fact(plain, "cuts")),
            "context": bool(fact(plain, "context")),
            "features": features and audio is None,
            "dim": fact(plain, "dim") > 0 and audio is not None,
        }
        if wrong := [name for name, there in barred.items() if there]:
            may = "labels and features" if audio else "labels and embeddings"
            raise UsageError(
                f"{where}: a model with {kinds[0]!r} gives {may} alone; {', '.join(wrong)} of its "
                "class have no place there"
            )
    of_frames = window is None and audio is None
    found: dict[Gives, bool] = {
        "detections": labelled and detects,
        "labels": labelled and of_frames and not (detects or segments),
        "embeddings": fact(plain, "dim") > 0,
        "features": features and audio is None,
        "masks": labelled and segments,
        "windows": labelled and window is not None,
        "audio": audio is not None and (labelled or features),
        "shots": bool(fact(plain, "cuts")),
    }
    gives = tuple(table for table, given in found.items() if given)
    if not gives:
        raise UsageError(f"{where}: it gives nothing: set labels, features, dim or cuts")
    return gives


def read_geometry(default: Geometry | None, changes: Mapping[str, Any], where: str) -> Geometry:
    """A geometry, some of whose values the file changes. `where` names the block."""
    check_keys(changes, _GEOMETRY, where)
    for key, choices in _CHOICES.items():
        if key in changes and changes[key] not in choices:
            raise unknown_name(f"{where}.{key}", key, changes[key], choices)
    for key in ("width_px", "height_px", "pad"):
        if key in changes:
            check_number(changes[key], int, 0, 8192, f"{where}.{key}")
    try:
        if isinstance(default, Geometry):
            return replace(default, **changes)
        return Geometry(**changes)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: {error}; write width_px and height_px there or set "
            "`geometry = Geometry(…)` in the class"
        ) from error


def read_window(plain: object, what: Mapping[str, Any], where: str) -> WindowGrid | None:
    """`window: {frames, stride, hop}` over what the class says; null for a model of frames."""
    default, changes = fact(plain, "window"), read_mapping(what, "window", where)
    if "window" not in what:
        return cast("WindowGrid | None", default)
    check_keys(changes, ("frames", "stride", "hop"), f"{where}.window")
    for key, high in (("frames", 256), ("stride", 1000), ("hop", 1_000_000)):
        if key in changes:
            check_number(changes[key], int, 0 if key == "hop" else 1, high, f"{where}.window.{key}")
    if default is None and "frames" not in changes:
        raise UsageError(f"{where}.window: write `frames`, how many a window has")
    return replace(default, **changes) if default else WindowGrid(**changes)


def read_audio(plain: object, what: Mapping[str, Any], where: str) -> AudioGrid | None:
    """`audio: {rate_hz, window_s, hop_s}` over what the class says; null for a model of frames."""
    default, changes = fact(plain, "audio"), read_mapping(what, "audio", where)
    if "audio" not in what:
        return cast("AudioGrid | None", default)
    at = f"{where}.audio"
    check_keys(changes, ("rate_hz", "window_s", "hop_s"), at)
    if "rate_hz" in changes:
        check_number(changes["rate_hz"], int, 1000, 192_000, f"{at}.rate_hz")
    try:
        for key in ("window_s", "hop_s"):
            if key in changes:
                changes[key] = Fraction(str(changes[key]))
        return replace(default, **changes) if default else AudioGrid(**changes)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{at}: {error}; write rate_hz, and window_s and hop_s in seconds (0.96 or 24/25)"
        ) from error


def read_crop(
    plain: object, what: Mapping[str, Any], parents: Mapping[str, ModelSpec], where: str
) -> CropRule | None:
    """`on: faces` and `crop: {width_px, height_px, margin}`; null for a model of whole frames.

    A crop has the size that the class wants as its geometry unless the file says another.
    """
    changes = read_mapping(what, "crop", where)
    if "on" not in what:
        if changes:
            raise UsageError(f"{where}.crop: goes with `on:`, the model whose boxes are cut out")
        return None
    name = what["on"]
    if name not in parents:
        raise unknown_name(f"{where}.on", "model of this job", name, tuple(parents) or ("none",))
    parent = parents[name]
    if "detections" not in parent.gives:
        raise UsageError(
            f"{where}.on: {name!r} gives {', '.join(parent.gives)}, no detections: there are no "
            "boxes to cut out"
        )
    check_keys(changes, ("width_px", "height_px", "margin"), f"{where}.crop")
    margin = changes.pop("margin", 0.0)
    check_number(margin, float, 0, 10, f"{where}.crop.margin")
    size = read_geometry(fact(plain, "geometry"), changes, f"{where}.crop")
    return CropRule(
        on=str(name),
        size=Geometry(width_px=size.width_px, height_px=size.height_px),
        margin=float(margin),
        version=parent.version,
        parent=parent.fingerprint,
    )


def read_choice(value: object, known: Sequence[str], where: str, what: str) -> str:
    """One of some words."""
    if value not in known:
        raise unknown_name(where, what, value, known)
    return str(value)


def read_flag(tree: Mapping[str, Any], key: str, allowed: bool, where: str, why: str) -> bool:
    """true or false (the default); true only where it is allowed."""
    value = tree.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{where}.{key}: {value!r} is neither true nor false")
    if value and not allowed:
        raise UsageError(f"{where}.{key}: {why}")
    return value


def check_keys(tree: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuses a key that nobody knows, with the nearest known one."""
    for key in tree:
        if key not in known:
            raise unknown_name(where, "key", key, known)


def read_mapping(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A block; {} where there is none."""
    value = tree.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}.{key}: expected a mapping, got {type(value).__name__}")
    return dict(value)


def read_text(tree: Mapping[str, Any], key: str, form: re.Pattern[str], where: str) -> str:
    """A word that may stand in a partition."""
    value = tree.get(key)
    if not isinstance(value, str) or not form.fullmatch(value):
        raise UsageError(
            f"{where}.{key}: {value!r} does not match {form.pattern} (a partition must not look "
            "like a number)"
        )
    return value


def check_number(value: object, kind: type, low: float, high: float, where: str) -> None:
    """Refuses what is no number of that kind within [low, high]."""
    fits = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, fits) or not low <= value <= high:
        raise UsageError(f"{where}: {value!r} is no {kind.__name__} within {low}..{high}")
