"""What `torch_export`, `onnx` and `opencv` say of a network in one file: keys, input, outputs.

file       path beside the model file, or s3://bucket/prefix/name; `store:` as for huggingface
input      {mean: [r, g, b], std: [r, g, b], scale: 1/255, order: rgb, layout: nchw}: the network
           gets (pixel · scale - mean) / std, channels in that order; not for models of sound
gives      a word per output of the network, in its order:
             logits      (B, K) → scores of `labels`, by `scores: softmax` or sigmoid
             scores      (B, K), 0..1 in the order of `labels`
             embeddings  (B, D), `dim: D`
             features    (B, F) in the order of `features`
             masks       (B, K, h, w) score of each class at each pixel, or (B, h, w) their numbers
             boxes       (B, N, 4), with logits or scores (B, N, K); form and unit in `boxes`
             detections  (B, N, 6): x_min, y_min, x_max, y_max, score, class; all that was found
             yolo        (B, 4 + K, N): centre, size, a score per class; also (B, N, 4 + K) and
                         5 + K, with a score for the box itself
             skip        not used
labels     a list in the network's order, null for classes that are left out; or a text file
boxes      {form: xyxy | cxcywh | xywh, unit: px | share, iou: 0.5}: px of the network's picture,
           or 0..1 of it; with `iou` (yolo: always) the weaker of two boxes of one label that
           share more than that is dropped

A network of a fixed batch gets its last batch filled up. Arithmetic on answers: `outputs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vidbatch.data import Batch, Geometry, ModelSpec
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.base import unknown_name
from vidbatch.models.entries import check_keys, check_number, read_choice, read_mapping
from vidbatch.models.located import Located
from vidbatch.models.outputs import read_outputs
from vidbatch.models.precision import padded
from vidbatch.models.weights import SMALL_BYTES, WeightFile, WeightStore, staged
from vidbatch.storage import StoreSettings

if TYPE_CHECKING:
    import torch

KEYS = ("file", "store", "input", "gives", "scores", "labels", "features", "dim", "boxes")

WORDS = (
    "logits", "scores", "embeddings", "features", "masks", "boxes", "detections", "yolo", "skip",
)  # fmt: skip
_LABELLED = ("logits", "scores", "masks", "detections", "yolo")
_STORE = ("endpoint_url", "region", "profile", "requester_pays")
_LAYOUTS = ("nchw", "nhwc", "ntchw", "ncthw", "nthwc")
MAX_LABELS = 100_000


def locate_network(
    target: str,
    what: Mapping[str, Any],
    folders: Sequence[Path],
    where: str,
    suffixes: Sequence[str],
) -> Located:
    """Reads the keys and finds the file.

    Args:
        target: the class, `package.module:Class`.
        suffixes: endings that its runtime reads.

    Raises:
        UsageError: a key, value or file that cannot be: each with what to write.
    """
    gives = read_gives_words(what, where)
    options: dict[str, Any] = {"gives": gives}
    labelled = any(word in _LABELLED for word in gives)
    for key, wanted in (
        ("labels", labelled),
        ("scores", "logits" in gives),
        ("boxes", "boxes" in gives or "yolo" in gives),
        ("features", "features" in gives),
        ("dim", "embeddings" in gives),
    ):
        if key in what and not wanted:
            raise UsageError(f"{where}.{key}: goes with none of gives: [{', '.join(gives)}]")
    if labelled:
        options["labels"] = _labels(what, folders[0], where)
    if "logits" in gives:
        kinds = ("softmax", "sigmoid")
        options["scores"] = read_choice(
            what.get("scores", "softmax"), kinds, f"{where}.scores", "kind of score"
        )
    if "features" in gives:
        options["features"] = _words(what.get("features"), f"{where}.features")
    if "embeddings" in gives:
        check_number(what.get("dim"), int, 1, 1_000_000, f"{where}.dim")
        options["dim"] = what["dim"]
    if "boxes" in gives or "yolo" in gives:
        options["boxes"] = _boxes(what, "yolo" in gives, where)
    if "audio" not in what:
        options["input"] = _input(what, where)
        if "geometry" not in what and "on" not in what:
            raise UsageError(
                f"{where}.geometry: not written; the file does not say how frames were scaled for "
                "it: write geometry: {width_px: …, height_px: …, fit: stretch | crop | letterbox}"
            )
    elif "input" in what:
        raise UsageError(f"{where}.input: a model of sound gets its samples as they are")
    store, name = find_file(what, "file", folders, where, suffixes)
    pinned = read_mapping(what, "sha256", where)
    beside = [n for n in pinned if n != name and "/" not in str(n)]
    if beside:  # weights of an ONNX network may lie in a second file
        store = WeightStore(store.uri, settings_of(what, where), where, [name, *beside])
    small, large = store.find(store.entries, pinned)
    return Located(
        adapter=str(what["adapter"]),
        target=target,
        files=small,
        weights=large,
        options=json.dumps({"file": name, **options}, sort_keys=True),
    )


def find_file(
    what: Mapping[str, Any], key: str, folders: Sequence[Path], where: str, suffixes: Sequence[str]
) -> tuple[WeightStore, str]:
    """The folder and the name of the file that stands under a key. Raises UsageError."""
    value = what.get(key)
    if not isinstance(value, str) or not value.endswith(tuple(suffixes)):
        raise UsageError(
            f"{where}.{key}: {value!r} is no {' or '.join(suffixes)} file; write its path or "
            "s3://bucket/prefix/name"
        )
    if "://" not in value:
        value = str((folders[0] / Path(value).expanduser()).absolute())
    folder, _, name = value.rpartition("/")
    if "://" not in value and not Path(folder).is_dir():
        raise UsageError(f"{where}.{key}: {value}: no such file")
    store = WeightStore(folder or "/", settings_of(what, where), f"{where}.{key}", [name])
    entry = store.entries.get(name)
    if entry is None:
        raise UsageError(f"{where}.{key}: {value}: no such file")
    pinned = read_mapping(what, "sha256", where)
    if "://" in value and entry.size_bytes > SMALL_BYTES and name not in pinned:
        raise UsageError(
            f"{where}.sha256: lacks {name}, so a changed file would not be noticed; write sha256: "
            f"{{{name}: …}}, which `sha256sum {name}` prints where it was made"
        )
    return store, name


def settings_of(what: Mapping[str, Any], where: str) -> StoreSettings:
    """The block `store:`."""
    settings = read_mapping(what, "store", where)
    check_keys(settings, _STORE, f"{where}.store")
    return StoreSettings(**settings)


def read_gives_words(what: Mapping[str, Any], where: str) -> list[str]:
    """`gives:`, one of WORDS per output. Raises UsageError."""
    found = what.get("gives")
    at = f"{where}.gives"
    if not isinstance(found, list) or not found:
        raise UsageError(
            f"{at}: {found!r}; write a list with a word per output of the network: "
            f"{', '.join(WORDS)}"
        )
    words = [read_choice(word, WORDS, at, "output") for word in found]
    used = [word for word in words if word != "skip"]
    if not used or len(set(used)) != len(used):
        raise UsageError(f"{at}: {words} must name something, and nothing but skip twice")
    if "logits" in used and "scores" in used:
        raise UsageError(f"{at}: logits and scores exclude each other; skip one of them")
    several = [w for w in used if w in ("masks", "detections", "yolo", "boxes")]
    if len(several) > 1 or (several not in ([], ["boxes"]) and {"logits", "scores"} & set(used)):
        raise UsageError(f"{at}: {used} give boxes, masks or labels; a model gives one of them")
    if "boxes" in used and not {"logits", "scores"} & set(used):
        raise UsageError(f"{at}: boxes go with logits or scores, which say what is in them")
    return words


def _labels(what: Mapping[str, Any], folder: Path, where: str) -> list[str | None]:
    found = what.get("labels")
    at = f"{where}.labels"
    if isinstance(found, str):
        path = folder / Path(found).expanduser()
        if not path.is_file():
            raise UsageError(f"{at}: {path}: no such file; it has a label per line")
        found = [line.strip() or None for line in path.read_text("utf-8").splitlines()]
    if not isinstance(found, list) or not found or not any(found) or len(found) > MAX_LABELS:
        raise UsageError(
            f"{at}: {found!r}; write the network's classes in its order (null: left out), or a "
            "text file with one per line"
        )
    named = [x for x in found if x is not None]
    _words(named, at)
    return found


def _words(found: Any, at: str) -> list[str]:
    if not isinstance(found, list) or not found or not all(isinstance(x, str) and x for x in found):
        raise UsageError(
            f"{at}: expected a list of words, got {found!r}; quote numbers, yes and no"
        )
    most, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{at}: {most!r} stands there twice; rows could not be told apart")
    return found


def _input(what: Mapping[str, Any], where: str) -> dict[str, Any]:
    given, at = read_mapping(what, "input", where), f"{where}.input"
    check_keys(given, ("mean", "std", "scale", "order", "layout"), at)
    for key in ("mean", "std"):
        value = given.get(key)
        fits = isinstance(value, list) and len(value) == 3
        if not fits or not all(isinstance(x, int | float) for x in value or ()):
            raise UsageError(
                f"{at}.{key}: {value!r}; write three numbers, those it was trained with; of a "
                "network that wants plain 0..1 mean: [0, 0, 0] and std: [1, 1, 1]"
            )
    if min(given["std"]) <= 0:
        raise UsageError(f"{at}.std: {given['std']} are divided by; write numbers above 0")
    try:
        scale = float(Fraction(str(given.get("scale", "1/255"))))
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{at}.scale: {error}; write a number, such as 1/255 or 1") from error
    layouts = [x for x in _LAYOUTS if ("t" in x) == (what.get("window") is not None)]
    layout = given.get("layout", layouts[0])
    return {
        "mean": [float(x) for x in given["mean"]],
        "std": [float(x) for x in given["std"]],
        "scale": scale,
        "order": read_choice(given.get("order", "rgb"), ("rgb", "bgr"), f"{at}.order", "order"),
        "layout": read_choice(layout, layouts, f"{at}.layout", "layout"),
    }


def _boxes(what: Mapping[str, Any], yolo: bool, where: str) -> dict[str, Any]:
    given, at = read_mapping(what, "boxes", where), f"{where}.boxes"
    check_keys(given, ("iou",) if yolo else ("form", "unit", "iou"), at)
    iou: Any = given.get("iou", 0.5 if yolo else None)
    if iou is not None:
        check_number(iou, float, 0, 1, f"{at}.iou")
    if yolo:
        return {"form": "cxcywh", "unit": "px", "iou": float(iou)}
    for key, known in (("form", ("xyxy", "cxcywh", "xywh")), ("unit", ("px", "share"))):
        if given.get(key) not in known:
            raise unknown_name(f"{at}.{key}", key, given.get(key), known)
    return {"form": given["form"], "unit": given["unit"], "iou": iou}


class NetworkFile:
    """Frames → the network of a runtime → answers; `_open` and `_run` are the runtime's."""

    options: ClassVar[dict[str, Any]] = {}
    batch = 32
    files: Mapping[str, bytes]
    weights: tuple[WeightFile, ...] = ()
    spec: ModelSpec
    geometry: Geometry | None = None

    def __init__(self) -> None:
        self._network: Any = None  # what the runtime made of the file
        self._call: Callable[[torch.Tensor], list[torch.Tensor]] | None = None
        self._scale: Any = None
        self._shift: Any = None

    def load(self, device: str) -> None:
        """Stages the file, opens it, holds its shapes against the model file. Raises ModelError."""
        import torch

        name = self.options["file"]
        with staged(self.weights, getattr(self, "files", {})) as folder:
            fixed = self._open(folder / name, device)
        self._call = padded(self._run, fixed) if fixed else self._run
        if "input" in self.options:
            rule = self.options["input"]
            place = "cpu" if getattr(self, "on_host", False) else device
            mean, std = (torch.tensor(rule[key], device=place) for key in ("mean", "std"))
            self._scale, self._shift = rule["scale"] / std, -mean / std

    def predict(self, batch: Batch) -> dict[str, Any]:
        """What the outputs mean, in the words of `gives`."""
        assert self._call is not None, "load first"
        outputs = self._call(self._input(batch))
        self.check_count(len(outputs))
        return read_outputs(self.options, self.spec, self.geometry, outputs, batch.source_px)

    def close(self) -> None:
        """Forgets the network."""
        self._network = self._call = None

    def _open(self, path: Path, device: str) -> int:
        """Reads the network; the only batch it takes, or 0."""
        raise NotImplementedError

    def _run(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Its outputs for (B, …) values."""
        raise NotImplementedError

    def _input(self, batch: Batch) -> torch.Tensor:
        if "input" not in self.options:
            samples: torch.Tensor = batch.samples
            return samples
        rule, pixels = self.options["input"], batch.pixels
        if rule["order"] == "bgr":
            pixels = pixels.flip(-1)
        axes = "nthwc" if pixels.ndim == 5 else "nhwc"
        values: torch.Tensor = pixels.float() * self._scale + self._shift
        return values.permute([axes.index(axis) for axis in rule["layout"]]).contiguous()

    def _shape(self) -> dict[str, int]:
        """Axis → its length, of what the network gets."""
        if self.spec.audio is not None:
            return {"n": 0, "samples": self.spec.audio.samples}
        assert self.geometry is not None
        frames = self.spec.window.frames if self.spec.window else 0
        found = {"n": 0, "t": frames, "c": 3, "h": self.geometry.height_px,
                 "w": self.geometry.width_px}  # fmt: skip
        return {axis: found[axis] for axis in self.options["input"]["layout"]}

    def check_input(self, shapes: Sequence[Sequence[Any]]) -> int:
        """Holds the shapes of its inputs against the model file; the only batch it takes, or 0.

        Args:
            shapes: per input its lengths; what is no int is free.
        Raises:
            ModelError: several inputs, or another shape.
        """
        name, mine = self.options["file"], self._shape()
        if len(shapes) != 1:
            raise ModelError(
                f"file: {name} has {len(shapes)} inputs; a network of frames has one; export it "
                "with the others as constants",
                kind="model_load",
            )
        (theirs,) = shapes
        wrong = len(theirs) != len(mine) or any(
            isinstance(b, int) and axis != "n" and a != b
            for (axis, a), b in zip(mine.items(), theirs, strict=False)
        )
        if wrong:
            wanted = tuple(x if isinstance(x, int) else "any" for x in theirs)
            got = ("B", *list(mine.values())[1:])
            raise ModelError(
                f"geometry: {name} takes {wanted} and would get {got} ({', '.join(mine)}); set "
                "geometry (window, audio, crop) or input.layout to what it takes",
                kind="model_load",
            )
        return theirs[0] if isinstance(theirs[0], int) else 0

    def check_count(self, outputs: int) -> None:
        """Raises ModelError: `gives` has another number of words than the network outputs."""
        gives = self.options["gives"]
        if outputs != len(gives):
            raise ModelError(
                f"gives: [{', '.join(gives)}] names {len(gives)} outputs, {self.options['file']} "
                f"has {outputs}; write a word for each, skip for those without use",
                kind="model_load",
            )


def network_class(cls: type[NetworkFile], located: Located) -> type[NetworkFile]:
    """The class with the facts (`base.Facts`) that the options mean."""
    options = json.loads(located.options)
    gives = options["gives"]
    boxes = any(word in ("boxes", "detections", "yolo") for word in gives)
    facts: dict[str, Any] = {
        "options": options,
        "labels": tuple(x for x in options.get("labels", ()) if x is not None),
        "features": tuple(options.get("features", ())),
        "dim": options.get("dim", 0),
        "detects": boxes,
        "segments": "masks" in gives,
    }
    if boxes:
        facts |= {"kind": "detector", "min_score": 0.25, "batch": 8}
    return type(cls.__name__, (cls,), facts)
