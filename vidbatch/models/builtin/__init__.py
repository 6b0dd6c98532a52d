"""Models that need no weights: batched torch, the same on CPU and GPU.

Those of frames, all but `faces`, share one geometry, so that they cost one scaling pass per
sampled frame together.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidbatch.models.base import unknown_name
from vidbatch.models.located import Located

CLASSES: dict[str, str] = {
    "quality": "vidbatch.models.builtin.quality:Quality",
    "colour": "vidbatch.models.builtin.colour:Colour",
    "shape": "vidbatch.models.builtin.shape:Shape",
    "motion": "vidbatch.models.builtin.motion:Motion",
    "phash": "vidbatch.models.builtin.phash:PerceptualHash",
    "shots": "vidbatch.models.builtin.shots:Shots",
    "loudness": "vidbatch.models.builtin.sound:Loudness",
    "silence": "vidbatch.models.builtin.sound:Silence",
    "spectrum": "vidbatch.models.builtin.sound:Spectrum",
    "null": "vidbatch.models.builtin.null:Null",
}
"""`what.model` of the adapter `builtin` → its class."""

BUILTINS: dict[str, dict[str, Any]] = {
    **{name: {"adapter": "builtin", "model": name} for name in CLASSES},
    "faces": {"adapter": "opencv", "cascade": "haarcascade_frontalface_default"},
}
"""The short form `builtin: name` → the `what:` block it stands for (version v1)."""

KEYS = ("model",)


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """The class of `what.model`. Raises UsageError."""
    name = what.get("model")
    if name not in CLASSES:
        raise unknown_name(f"{where}.model", "builtin", name, tuple(CLASSES))
    return Located(adapter="builtin", target=CLASSES[str(name)])


def load_class(located: Located) -> type[Any]:
    """Imports the class; its module does not import torch."""
    module, _, name = located.target.partition(":")
    cls: type[Any] = getattr(importlib.import_module(module), name)
    return cls
