"""An entry of a job file → ModelDef (facts and fingerprint, no torch) → a Model that can be loaded.

    {builtin: quality}                            one of BUILTINS, nothing else to write
    {file: configs/models/faces.yaml}             a model file: name, version, what, how
    {name: …, version: …, what: {…}, how: {…}}    the same, inline

`what:` changes rows and is fingerprinted: `adapter`, the adapter's own keys, `params`, `geometry`,
`top_k`, `min_score`, `sha256`. `how:` changes only speed: `batch`.
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
from typing import Any, Protocol, cast

from vidbatch.config import read_yaml
from vidbatch.data import FRAMES, Geometry, Model, ModelSpec, digest
from vidbatch.errors import UsageError
from vidbatch.models.base import PlainAdapter, fact, unknown_name
from vidbatch.models.builtin import BUILTINS
from vidbatch.models.located import Located

SCHEMA = 1
"""The table schema the rows are made for (`tables.SCHEMA_VERSION`; a test holds them together)."""

ADAPTERS: dict[str, tuple[str, str]] = {
    "builtin": ("vidbatch.models.builtin", ""),
    "opencv": ("vidbatch.models.opencv", "opencv"),
    "python": ("vidbatch.models.python", ""),
}
"""Adapter → (module with KEYS, locate, load_class; the pip extra that brings what it needs)."""

_COMMON = ("adapter", "params", "geometry", "top_k", "min_score", "sha256")
_GEOMETRY = ("width_px", "height_px", "fit", "interpolation", "pad")
_CHOICES = {
    "fit": ("stretch", "crop", "letterbox"),
    "interpolation": ("bilinear", "bicubic", "area"),
}
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


def resolve_models(entries: Sequence[Mapping[str, Any]], base_dir: Path) -> tuple[ModelDef, ...]:
    """The `models:` block of a job file.

    Raises:
        UsageError: as `resolve_model`, or two models share a name.
    """
    found: dict[str, ModelDef] = {}
    for i, entry in enumerate(entries):
        defn = resolve_model(entry, base_dir, where=f"models[{i}]")
        if defn.spec.name in found:
            raise UsageError(
                f"models[{i}]: a model named {defn.spec.name!r} stands above it; give one of them "
                "another `name:`"
            )
        found[defn.spec.name] = defn
    return tuple(found.values())


def resolve_model(entry: Mapping[str, Any], base_dir: Path, *, where: str = "model") -> ModelDef:
    """One entry of `models:`; paths in it are relative to `base_dir`, in a model file to that file.

    Raises:
        UsageError: an unknown key, adapter or builtin (with the nearest known one), a missing file
            or extra, a file whose sha256 is not the one written, a parameter the model refuses.
    """
    if "builtin" in entry:
        _known(entry, ("builtin", "how"), where)
        name = entry["builtin"]
        if name not in BUILTINS:
            raise unknown_name(where, "builtin", name, tuple(BUILTINS))
        tree: Mapping[str, Any] = {"name": name, "version": "v1", "what": BUILTINS[name]}
        folder = base_dir
    elif "file" in entry:
        _known(entry, ("file", "how"), where)
        path = base_dir / Path(str(entry["file"])).expanduser()
        if not path.is_file():
            raise UsageError(f"{where}.file: {path}: no such model file; paths start at {base_dir}")
        tree, folder, where = read_yaml(path), path.parent, str(path)
    else:
        tree, folder = entry, base_dir
    _known(tree, ("name", "version", "what", "how"), where)
    how = {**_mapping(tree, "how", where), **_mapping(entry, "how", where)}
    _known(how, ("batch",), f"{where}.how")
    return _resolve(tree, how, (folder, base_dir), where)


def create_model(defn: ModelDef) -> Model:
    """Builds the model, not yet loaded.

    Raises:
        UsageError: its module cannot be executed here (something it imports is missing).
    """
    plain = _plain(defn.located, json.loads(defn.params), defn.spec.name)
    plain.geometry = defn.spec.geometry  # the model file may have changed it
    return PlainAdapter(defn.spec, plain, top_k=defn.top_k, min_score=defn.min_score)


def _resolve(
    tree: Mapping[str, Any], how: Mapping[str, Any], folders: Sequence[Path], where: str
) -> ModelDef:
    name = _text(tree, "name", _NAME, where)
    version = _text(tree, "version", _VERSION, where)
    if name == FRAMES:
        raise UsageError(f"{where}.name: {FRAMES!r} is the output of the frames themselves")
    what, at = _mapping(tree, "what", where), f"{where}.what"
    if what.get("adapter") not in ADAPTERS:
        raise unknown_name(f"{at}.adapter", "adapter", what.get("adapter"), tuple(ADAPTERS))
    adapter = str(what["adapter"])
    module_name, extra = ADAPTERS[adapter]
    try:
        module = cast(AdapterModule, importlib.import_module(module_name))
        _known(what, (*_COMMON, *module.KEYS), at)
        located = module.locate(what, folders, at)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{at}: adapter {adapter!r} needs {error.name}, which is not installed here; "
            f"pip install 'vidbatch[{extra}]'"
        ) from error
    _check_hashes(located, _mapping(what, "sha256", at), at)
    params = _mapping(what, "params", at)
    plain = _plain(located, params, at)

    geometry = _geometry(plain, _mapping(what, "geometry", at), at)
    top_k, min_score = what.get("top_k", fact(plain, "top_k")), what.get("min_score")
    min_score = fact(plain, "min_score") if min_score is None else min_score
    _check_number(top_k, int, 0, 100_000, f"{at}.top_k")
    _check_number(min_score, float, 0, 1, f"{at}.min_score")
    batch = how.get("batch", fact(plain, "batch"))
    _check_number(batch, int, 1, 65_536, f"{where}.how.batch")

    gives = _gives(plain)
    if not gives:
        raise UsageError(f"{at}: {located.target} gives nothing: set labels, features or dim")
    config = {
        **{key: what[key] for key in ("adapter", *module.KEYS) if key in what},
        "params": {**_defaults(type(plain)), **params},
        "geometry": asdict(geometry),
        "top_k": top_k,
        "min_score": float(min_score),
    }
    spec = ModelSpec(
        name=name,
        version=version,
        adapter=adapter,
        kind=fact(plain, "kind") or gives[0],
        geometry=geometry,
        gives=cast(Any, gives),
        labels=_names(plain, "labels", at),
        features=_names(plain, "features", at),
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
    )


def _fingerprint(spec: ModelSpec, located: Located, semantics: int) -> str:
    """Changes when and only when rows could, their `model=` (name, version) among them."""
    config = json.loads(spec.config)
    for key in ("class", "files", "cascade"):
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
            "config": {**config, "geometry": spec.geometry.key},
            "gives": spec.gives,
            "labels": spec.labels,
            "features": spec.features,
            "dim": spec.dim,
            "normalised": spec.normalised,
            "context": spec.context,
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


def _names(plain: object, name: str, where: str) -> tuple[str, ...]:
    """Its labels or features: distinct words."""
    found = fact(plain, name)
    if not isinstance(found, list | tuple) or not all(isinstance(x, str) and x for x in found):
        raise UsageError(f"{where}: {name} is {found!r}, expected a tuple of words")
    if len(set(found)) != len(found):
        raise UsageError(f"{where}: {name} holds a word twice; rows could not be told apart")
    return tuple(found)


def _gives(plain: object) -> tuple[str, ...]:
    labelled = bool(fact(plain, "labels"))
    found = {
        "detections": labelled and fact(plain, "detects"),
        "labels": labelled and not fact(plain, "detects"),
        "embeddings": fact(plain, "dim") > 0,
        "features": bool(fact(plain, "features")),
    }
    return tuple(table for table, given in found.items() if given)


def _geometry(plain: object, changes: Mapping[str, Any], where: str) -> Geometry:
    _known(changes, _GEOMETRY, f"{where}.geometry")
    for key, choices in _CHOICES.items():
        if key in changes and changes[key] not in choices:
            raise unknown_name(f"{where}.geometry.{key}", key, changes[key], choices)
    for key in ("width_px", "height_px", "pad"):
        if key in changes:
            _check_number(changes[key], int, 0, 8192, f"{where}.geometry.{key}")
    default = fact(plain, "geometry")
    try:
        if isinstance(default, Geometry):
            return replace(default, **changes)
        return Geometry(**changes)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}.geometry: {error}; write width_px and height_px there or set "
            "`geometry = Geometry(…)` in the class"
        ) from error


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


def _known(tree: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise unknown_name(where, "key", key, known)


def _mapping(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = tree.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}.{key}: expected a mapping, got {type(value).__name__}")
    return dict(value)


def _text(tree: Mapping[str, Any], key: str, form: re.Pattern[str], where: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str) or not form.fullmatch(value):
        raise UsageError(
            f"{where}.{key}: {value!r} does not match {form.pattern} (a partition must not look "
            "like a number)"
        )
    return value


def _check_number(value: object, kind: type, low: float, high: float, where: str) -> None:
    fits = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, fits) or not low <= value <= high:
        raise UsageError(f"{where}: {value!r} is no {kind.__name__} within {low}..{high}")
