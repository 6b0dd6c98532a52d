"""An entry of a job file → ModelDef (facts and fingerprint, no torch) → a Model that can be loaded.

    {builtin: quality}                            one of BUILTINS, nothing else to write
    {file: configs/models/faces.yaml}             a model file: name, version, what, how
    {name: …, version: …, what: {…}, how: {…}}    the same, inline

`what:` changes rows and is fingerprinted: `adapter`, the adapter's own keys, `params`, `geometry`,
`top_k`, `min_score`, `sha256`, `precision`, `rle`; and what its items are if not frames:

    window: {frames: 16, stride: 4, hop: 32}             windows of sampled frames
    audio: {rate_hz: 16000, window_s: 1, hop_s: 0.5}     windows of sound
    on: faces                                            boxes of another model of the job,
    crop: {width_px: 112, height_px: 112, margin: 0.2}   cut out and scaled

`how:` changes only speed: `batch`, `compile`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

from vidbatch.config import read_yaml
from vidbatch.data import FRAMES, Model, ModelSpec, digest
from vidbatch.errors import UsageError
from vidbatch.models.base import PlainAdapter, fact, unknown_name
from vidbatch.models.builtin import BUILTINS
from vidbatch.models.entries import (
    check_keys,
    check_number,
    read_audio,
    read_choice,
    read_crop,
    read_flag,
    read_geometry,
    read_gives,
    read_mapping,
    read_names,
    read_text,
    read_window,
)
from vidbatch.models.located import Located

SCHEMA = 1
"""The table schema the rows are made for (`tables.SCHEMA_VERSION`; a test holds them together)."""

ADAPTERS: dict[str, tuple[str, str]] = {
    "builtin": ("vidbatch.models.builtin", ""),
    "huggingface": ("vidbatch.models.huggingface", "huggingface"),
    "onnx": ("vidbatch.models.onnx", "onnx"),
    "opencv": ("vidbatch.models.opencv", "opencv"),
    "python": ("vidbatch.models.python", ""),
    "torch_export": ("vidbatch.models.torch_export", ""),
}
"""Adapter → (module with KEYS, locate, load_class; the pip extra that brings what it needs)."""

_COMMON = (
    "adapter", "params", "geometry", "top_k", "min_score", "sha256", "precision", "rle", "window",
    "audio", "on", "crop",
)  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VERSION = re.compile(r"[a-z][a-z0-9._-]{0,62}")


class AdapterModule(Protocol):
    """What the module of an adapter offers."""

    KEYS: tuple[str, ...]
    """Its own keys of `what:`."""

    def locate(self, what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
        """Finds the class, its source and its files. Raises UsageError."""
        ...

    def load_class(self, located: Located) -> type[Any]:
        """The class of the plain model. Raises UsageError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDef:
    """All that is needed to build a model anywhere: picklable, torch-free, carries its files."""

    spec: ModelSpec
    located: Located
    params: str
    """JSON of the keyword arguments that the model file gives the plain model."""
    top_k: int
    min_score: float
    rle: bool = False
    """Whether masks come with their run lengths."""


def resolve_models(
    entries: Sequence[Mapping[str, Any]], base_dir: Path, *, hub: bool = True
) -> tuple[ModelDef, ...]:
    """The `models:` block of a job file; models on crops come last, after those they follow.

    Args:
        hub: whether models may come from a hub of models instead of a folder or store.

    Raises:
        UsageError: as `resolve_model`, or two models share a name.
    """
    read = [_read(entry, base_dir, f"models[{i}]") for i, entry in enumerate(entries)]
    found: dict[str, ModelDef] = {}
    parents: dict[str, ModelSpec] = {}
    for chained in (False, True):
        for i, entry in enumerate(read):
            if entry.chained != chained:
                continue
            if entry.of_hub and not hub:
                raise UsageError(
                    f"{entry.where}.what.revision: a run reaches the hub only with engine.address: "
                    "local; `vidbatch models fetch OWNER/NAME@REVISION s3://…` brings the model to "
                    "the store"
                )
            defn = _resolve(entry, parents)
            if defn.spec.name in found:
                raise UsageError(
                    f"models[{i}]: a model named {defn.spec.name!r} stands above it; give one of "
                    "them another `name:`"
                )
            found[defn.spec.name] = defn
        parents = {name: defn.spec for name, defn in found.items()}
    return tuple(found.values())


def resolve_model(
    entry: Mapping[str, Any],
    base_dir: Path,
    *,
    where: str = "model",
    parents: Mapping[str, ModelSpec] = MappingProxyType({}),
) -> ModelDef:
    """One entry of `models:`; paths in it are relative to `base_dir`, in a model file to that file.

    Args:
        parents: name → model whose boxes it may be `on:`.
    Raises:
        UsageError: an unknown key, adapter or builtin (with the nearest known one), a missing file
            or extra, a file whose sha256 is not the one written, a parameter the model refuses,
            kinds of items and answers that do not go together.
    """
    return _resolve(_read(entry, base_dir, where), parents)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An entry with the model file it names."""

    tree: Mapping[str, Any]
    how: Mapping[str, Any]
    folders: tuple[Path, ...]
    """Where its paths start."""
    where: str

    @property
    def chained(self) -> bool:
        """Whether it is on the boxes of another model."""
        return self._says("on")

    @property
    def of_hub(self) -> bool:
        """Whether its files come from a hub, at a revision."""
        return self._says("revision")

    def _says(self, key: str) -> bool:
        what = self.tree.get("what")
        return isinstance(what, Mapping) and key in what


def _read(entry: Mapping[str, Any], base_dir: Path, where: str) -> _Entry:
    if "builtin" in entry:
        check_keys(entry, ("builtin", "how"), where)
        name = entry["builtin"]
        if name not in BUILTINS:
            raise unknown_name(where, "builtin", name, tuple(BUILTINS))
        tree: Mapping[str, Any] = {"name": name, "version": "v1", "what": BUILTINS[name]}
        folder = base_dir
    elif "file" in entry:
        check_keys(entry, ("file", "how"), where)
        path = base_dir / Path(str(entry["file"])).expanduser()
        if not path.is_file():
            raise UsageError(f"{where}.file: {path}: no such model file; paths start at {base_dir}")
        tree, folder, where = read_yaml(path), path.parent, str(path)
    else:
        tree, folder = entry, base_dir
    check_keys(tree, ("name", "version", "what", "how"), where)
    how = {**read_mapping(tree, "how", where), **read_mapping(entry, "how", where)}
    check_keys(how, ("batch", "compile"), f"{where}.how")
    return _Entry(tree=tree, how=how, folders=(folder, base_dir), where=where)


def create_model(defn: ModelDef) -> Model:
    """Builds the model, not yet loaded.

    Raises:
        UsageError: its module cannot be executed here (something it imports is missing).
    """
    spec = defn.spec
    plain = _plain(defn.located, json.loads(defn.params), spec.name)
    if spec.geometry is not None:  # the model file may have changed it
        plain.geometry = spec.crop.size if spec.crop else spec.geometry
    plain.spec = spec
    return PlainAdapter(spec, plain, top_k=defn.top_k, min_score=defn.min_score, rle=defn.rle)


def _resolve(entry: _Entry, parents: Mapping[str, ModelSpec]) -> ModelDef:
    tree, how, where = entry.tree, entry.how, entry.where
    name = read_text(tree, "name", _NAME, where)
    version = read_text(tree, "version", _VERSION, where)
    if name == FRAMES:
        raise UsageError(f"{where}.name: {FRAMES!r} is the output of the frames themselves")
    what, at = read_mapping(tree, "what", where), f"{where}.what"
    if what.get("adapter") not in ADAPTERS:
        raise unknown_name(f"{at}.adapter", "adapter", what.get("adapter"), tuple(ADAPTERS))
    adapter = str(what["adapter"])
    module_name, extra = ADAPTERS[adapter]
    try:
        module = cast(AdapterModule, importlib.import_module(module_name))
        check_keys(what, (*_COMMON, *module.KEYS), at)
        located = module.locate(what, entry.folders, at)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{at}: adapter {adapter!r} needs {error.name}, which is not installed here; "
            f"pip install 'vidbatch[{extra}]'"
        ) from error
    _check_hashes(located, read_mapping(what, "sha256", at), at)
    params = read_mapping(what, "params", at)
    plain = _plain(located, params, at)

    window, audio = read_window(plain, what, at), read_audio(plain, what, at)
    crop = read_crop(plain, what, parents, at)
    gives = read_gives(plain, at, window=window, audio=audio, crop=crop)
    geometry = None
    if audio is None:
        default = parents[crop.on].geometry if crop else fact(plain, "geometry")
        geometry = read_geometry(default, read_mapping(what, "geometry", at), f"{at}.geometry")
    elif "geometry" in what:
        raise UsageError(f"{at}.geometry: a model of sound gets no frames; leave it out")
    precision = what.get("precision", "fp32")
    read_choice(precision, fact(plain, "precisions"), f"{at}.precision", "precision of this model")
    rle = read_flag(what, "rle", "masks" in gives, at, "goes with models that give masks")
    compiles = bool(fact(plain, "compiles"))
    compile_it = read_flag(how, "compile", compiles, f"{where}.how", "this model is not compiled")
    top_k, min_score = what.get("top_k", fact(plain, "top_k")), what.get("min_score")
    min_score = fact(plain, "min_score") if min_score is None else min_score
    check_number(top_k, int, 0, 100_000, f"{at}.top_k")
    check_number(min_score, float, 0, 1, f"{at}.min_score")
    batch = how.get("batch", fact(plain, "batch"))
    check_number(batch, int, 1, 65_536, f"{where}.how.batch")

    config = {
        **{key: what[key] for key in ("adapter", *module.KEYS) if key in what},
        "params": {**_defaults(type(plain)), **params},
        "geometry": asdict(geometry) if geometry else None,
        "top_k": top_k,
        "min_score": float(min_score),
        # what most models do not have is left out: their fingerprints stay what they were
        **({"window": asdict(window)} if window else {}),
        **({"audio": audio.key} if audio else {}),
        **({"crop": asdict(crop)} if crop else {}),
        **({"precision": precision} if precision != "fp32" else {}),
        **({"rle": True} if rle else {}),
    }
    spec = ModelSpec(
        name=name,
        version=version,
        adapter=adapter,
        kind=fact(plain, "kind") or gives[0],
        geometry=geometry,
        gives=gives,
        window=window,
        audio=audio,
        crop=crop,
        precision=cast(Any, precision),
        compile=compile_it,
        labels=read_names(plain, "labels", at),
        features=read_names(plain, "features", at),
        dim=int(fact(plain, "dim")),
        normalised=bool(fact(plain, "normalised")),
        context=1 if fact(plain, "context") else 0,
        batch=batch,
        thresholds=json.dumps({"min_score": float(min_score), "top_k": top_k}),
        weights_sha256=located.weights_sha256,
        config=_json(config, at),
    )
    return ModelDef(
        spec=replace(spec, fingerprint=_fingerprint(spec, located, fact(plain, "semantics"))),
        located=located,
        params=_json(params, f"{at}.params"),
        top_k=top_k,
        min_score=float(min_score),
        rle=rle,
    )


def _fingerprint(spec: ModelSpec, located: Located, semantics: int) -> str:
    """Changes when and only when rows could, their `model=` (name, version) among them."""
    config = json.loads(spec.config)
    options = json.loads(located.options) if located.options else {}
    options.pop("geometry", None)  # the one that holds is in the spec
    own = [key for key in config if key not in _COMMON]  # said in full by the options
    for key in own if options else ("class", "files", "cascade", "yunet", "store"):
        config.pop(key, None)  # where things lie; what they are is in the source and the hashes
    return digest(
        {
            "schema": SCHEMA,
            "name": spec.name,
            "version": spec.version,
            "class": located.class_name,
            "source": hashlib.sha256(located.source.encode()).hexdigest(),
            "weights": located.weights_sha256,
            "semantics": semantics,
            "config": {**config, "geometry": spec.geometry.key if spec.geometry else None},
            "gives": spec.gives,
            "labels": spec.labels,
            "features": spec.features,
            "dim": spec.dim,
            "normalised": spec.normalised,
            "context": spec.context,
            **({"options": options} if options else {}),
        }
    )


def _plain(located: Located, params: Mapping[str, Any], where: str) -> Any:
    """An instance of the located class, its `files` set. Raises UsageError."""
    module = cast(AdapterModule, importlib.import_module(ADAPTERS[located.adapter][0]))
    cls = module.load_class(located)
    known = inspect.signature(cls).parameters
    for key, value in params.items():
        if key not in known:
            raise unknown_name(f"{where}.params", "parameter", key, tuple(known) or ("none",))
        default = known[key].default
        if default not in (None, inspect.Parameter.empty) and not _alike(value, default):
            raise UsageError(
                f"{where}.params.{key}: {value!r} is no {type(default).__name__} "
                f"(default {default!r})"
            )
    try:
        plain = cls(**params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}.params: {located.target} refuses them: {error}") from error
    if located.files:
        plain.files = dict(located.files)
    if located.weights:
        plain.weights = located.weights
    return plain


def _alike(value: object, default: object) -> bool:
    if isinstance(default, list | tuple):
        return isinstance(value, list)
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def _defaults(cls: type[Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: only plain YAML values can be written down: {error}") from error


def _check_hashes(located: Located, expected: Mapping[str, Any], where: str) -> None:
    have = dict(located.weights_sha256)
    for name, sha256 in expected.items():
        if name not in have:
            raise unknown_name(f"{where}.sha256", "file", name, tuple(have) or ("none",))
        if have[name] != str(sha256).lower():
            raise UsageError(
                f"{where}.sha256: {name} is not the file that was pinned: its sha256 is "
                f"{have[name]}, written is {sha256}; nothing was started"
            )
