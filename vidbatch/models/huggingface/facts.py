"""`config.json` and the entry of a model → what the network is for, its labels and widths.

Plain JSON: neither the library nor torch is needed to look at a job file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from vidbatch.data import AudioGrid, WindowGrid
from vidbatch.errors import UsageError
from vidbatch.models.base import unknown_name

TASKS = (
    "image-classification", "zero-shot", "image-embedding", "object-detection",
    "semantic-segmentation", "video-classification", "audio-classification",
)  # fmt: skip

_BY_ARCHITECTURE = (
    (re.compile(r"For(Image)Classification$"), "image-classification"),
    (re.compile(r"ForObjectDetection$"), "object-detection"),
    (re.compile(r"ForSemanticSegmentation$"), "semantic-segmentation"),
    (re.compile(r"ForVideoClassification$"), "video-classification"),
    (re.compile(r"For(Audio|Sequence)Classification$"), "audio-classification"),
    (re.compile(r"(Model|ModelWithProjection)$"), "image-embedding"),
)
TEXT_MODELS = ("clip", "siglip")
"""`model_type` of those that have a text tower: prompts are possible."""
DETECTORS = {"detr": "softmax", "yolos": "softmax", "rt_detr": "sigmoid"}
"""`model_type` → how its scores are made. All answer with sets: they need no NMS."""
ANY_SIZE = ("detr",)
"""Detectors whose picture may have any width and height."""
SPEECH_MODELS = ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "audio-spectrogram-transformer")
_VISION_WIDTHS = {"siglip": 768, "siglip_vision_model": 768, "clip": 512, "clip_vision_model": 512}
"""What the library takes where config.json, which leaves defaults out, says no width."""


def read_json(content: bytes, where: str) -> dict[str, Any]:
    """One of a model's JSON files.

    Raises:
        UsageError: it is none, or it wants code of its own to be run.
    """
    try:
        tree = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}; the download may be cut short") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{where} holds a {type(tree).__name__}, expected a mapping")
    for key, why in (
        ("auto_map", "wants code from its repository to be run, which vidbatch never does"),
        ("quantization_config", "holds quantised weights, which this adapter does not load"),
    ):
        if tree.get(key):
            raise UsageError(
                f"{where} has {key!r}: it {why}; take a model of the library's own architectures, "
                "or export it with torch_export or onnx"
            )
    return tree


def read_task(config: Mapping[str, Any], what: Mapping[str, Any], where: str) -> str:
    """One of TASKS, from `task:` or the architecture. Raises UsageError."""
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and len(names) == 1 else ""
    found = next((task for form, task in _BY_ARCHITECTURE if form.search(str(name))), "")
    model_type = str(config.get("model_type"))
    if not found:
        raise UsageError(
            f"{where}.source: config.json names the architecture {names!r}, of which no task can "
            f"be told; known: {', '.join(f'…{f.pattern}' for f, _ in _BY_ARCHITECTURE)}"
        )
    if found == "image-embedding" and what.get("prompts") is not None:
        found = "zero-shot"
    asked = what.get("task") or found
    if asked not in TASKS:
        raise unknown_name(f"{where}.task", "task", asked, TASKS)
    if asked == "zero-shot" and model_type not in TEXT_MODELS:
        raise UsageError(
            f"{where}: a {model_type} model has no text tower for prompts; zero-shot goes with "
            f"{' and '.join(TEXT_MODELS)}"
        )
    if asked != found:
        hint = "; write `prompts:`, a list of them" if asked == "zero-shot" else ""
        raise UsageError(f"{where}.task: {name} is for {found}, not for {asked}{hint}")
    if found == "object-detection" and model_type not in DETECTORS:
        raise unknown_name(where, "kind of detector", model_type, tuple(DETECTORS))
    if found == "audio-classification" and model_type not in SPEECH_MODELS:
        raise unknown_name(where, "kind of audio model", model_type, SPEECH_MODELS)
    return found


def read_labels(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The labels by class number; a name that several classes have gets their numbers.

    Raises:
        UsageError: config.json has none, or those that the library makes up.
    """
    tree = config.get("id2label")
    names = tree if isinstance(tree, Mapping) else {}
    found = [names.get(str(i)) for i in range(len(names))]
    if not found or any(not isinstance(n, str) or not n for n in found):
        raise UsageError(
            f"{where}.source: config.json has no list of labels (id2label, a name for each class "
            "from 0 on); rows without names would mean nothing; write it there"
        )
    if all(re.fullmatch(r"LABEL_\d+", str(n)) for n in found):
        raise UsageError(
            f"{where}.source: config.json names its classes LABEL_0 …, which the library makes up "
            "where a model has no labels; write the real names into its id2label"
        )
    often = Counter(found)
    return tuple(f"{n} ({i})" if often[n] > 1 else str(n) for i, n in enumerate(found))


def pick_labels(
    names: Sequence[str], what: Mapping[str, Any], where: str
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """`labels:`, the classes that are kept: (their names, their numbers; None = all)."""
    wanted = what.get("labels")
    if wanted is None:
        return tuple(names), None
    if not isinstance(wanted, list) or not wanted:
        raise UsageError(f"{where}.labels: expected a list of the labels to keep, got {wanted!r}")
    for name in wanted:
        if name not in names:
            raise unknown_name(f"{where}.labels", "label", name, tuple(names))
    kept = [i for i, name in enumerate(names) if name in wanted]
    return tuple(names[i] for i in kept), tuple(kept)


def read_prompts(what: Mapping[str, Any], where: str) -> dict[str, str]:
    """Label → prompt, of a list of prompts (which are their own labels) or a mapping."""
    given = what.get("prompts")
    found = {str(p): str(p) for p in given} if isinstance(given, list) else given
    if (
        not isinstance(found, Mapping)
        or not found
        or (isinstance(given, list) and len(found) != len(given))
        or not all(isinstance(x, str) and x.strip() for x in (*found, *found.values()))
    ):
        raise UsageError(
            f"{where}.prompts: expected a list of different prompts, or label: prompt, got "
            f"{given!r}"
        )
    return dict(found)


def read_width(config: Mapping[str, Any], where: str) -> int:
    """Numbers in an image embedding. Raises UsageError."""
    model_type, vision = str(config.get("model_type")), config.get("vision_config") or {}
    name = str((config.get("architectures") or [""])[0])
    if model_type in ("clip", "clip_vision_model"):
        projects = model_type == "clip" or name.endswith("WithProjection")
        found = config.get("projection_dim" if projects else "hidden_size")
    elif model_type == "siglip":
        found = vision.get("hidden_size")
    else:
        found = config.get("hidden_size") or (config.get("hidden_sizes") or [None])[-1]
    found = found or _VISION_WIDTHS.get(model_type)
    if not isinstance(found, int):
        raise UsageError(f"{where}.source: config.json says no hidden_size; is it an image model?")
    return found


def read_frames(config: Mapping[str, Any], where: str) -> WindowGrid:
    """The window of a video model: as many frames as it was made for, one after the other."""
    frames = config.get("num_frames")
    if not isinstance(frames, int):
        raise UsageError(f"{where}.source: config.json says no num_frames; is it a video model?")
    return WindowGrid(frames=frames)


def read_sound(file: Mapping[str, Any], what: Mapping[str, Any], where: str) -> AudioGrid:
    """The windows of sound: of `audio:`, else as long as the feature extractor says.

    Raises:
        UsageError: neither says how long, or `audio:` says another rate than the model's.
    """
    own = what.get("audio") if isinstance(what.get("audio"), Mapping) else {}
    assert isinstance(own, Mapping)
    rate = file.get("sampling_rate")
    if not isinstance(rate, int):
        raise UsageError(f"{where}.source: preprocessor_config.json states no sampling_rate")
    if own.get("rate_hz", rate) != rate:
        raise UsageError(
            f"{where}.audio.rate_hz: {own['rate_hz']!r}, but the model hears {rate} Hz; leave it "
            "out"
        )
    if "window_s" in own:
        try:
            window_s = Fraction(str(own["window_s"]))
            return AudioGrid(
                rate_hz=rate, window_s=window_s, hop_s=Fraction(str(own.get("hop_s", window_s)))
            )
        except (ValueError, ZeroDivisionError) as error:
            raise UsageError(f"{where}.audio: {error}; write seconds, such as 0.96") from error
    frames = file.get("max_length")
    if not isinstance(frames, int) or "num_mel_bins" not in file:
        raise UsageError(
            f"{where}.audio: the model does not say how long its windows are; write audio: "
            "{window_s: 5, hop_s: 5}"
        )
    window_s = frames * Fraction(1, 100)  # a spectrum every 10 ms
    return AudioGrid(rate_hz=rate, window_s=window_s, hop_s=window_s)
