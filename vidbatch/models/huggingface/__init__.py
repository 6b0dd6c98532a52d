"""`huggingface`: models of the transformers library, from a folder, the object store or the hub.

what: {adapter: huggingface, source: s3://acme-models/vit, sha256: {model.safetensors: …}}

source       a folder, s3://bucket/prefix, or a hub id with `revision:`, its 40-digit commit
store        how to reach it, as in a job file: {endpoint_url: …}
task         told by the architecture: see `facts.TASKS`
prompts      zero-shot: a list, or label: prompt
outputs      zero-shot: [labels, embeddings] gives both in one pass
pooling      image-embedding: cls, mean or pooler
labels       only these of its labels
scores       softmax or sigmoid, where config.json does not say what was trained

facts.py     config.json → task, labels, widths         pixels.py    preprocessor → geometry
networks.py  loading and answering, a class per task    mirror.py    hub → object store
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidbatch.data import Geometry
from vidbatch.errors import UsageError
from vidbatch.models.base import unknown_name
from vidbatch.models.huggingface import facts, networks
from vidbatch.models.huggingface.pixels import read_pixels
from vidbatch.models.located import Located
from vidbatch.models.weights import WeightStore
from vidbatch.storage import StoreSettings

KEYS = ("source", "revision", "store", "task", "prompts", "outputs", "pooling", "labels", "scores")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
FILES = (
    "config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip
"""All that this adapter may read of a model, besides its *.safetensors."""
_TOKENIZER = FILES[FILES.index("tokenizer.json") :]
_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_STORE = ("endpoint_url", "region", "profile", "requester_pays")


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """Reads the model's JSON files and finds its weights.

    Raises:
        UsageError: no such model, a pickle, a missing label list, a geometry that is not stated or
            cannot be had, an unknown key: each with what to write.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    store = _open(what, folders, where)
    at = f"{where}.source: {store.uri}"
    used = {"config.json", *weight_names(store, at)}
    if "config.json" not in store.entries:
        raise UsageError(f"{at} holds no config.json; it is no model of the transformers library")
    config = facts.read_json(store.read("config.json"), f"{at}/config.json")
    task = facts.read_task(config, what, where)
    for key, tasks in (
        ("prompts", ("zero-shot",)),
        ("outputs", ("zero-shot",)),
        ("pooling", ("image-embedding",)),
        ("scores", ("image-classification", "video-classification", "audio-classification")),
        ("labels", tuple(t for t in facts.TASKS if t not in ("zero-shot", "image-embedding"))),
    ):
        if what.get(key) is not None and task not in tasks:
            raise UsageError(f"{where}.{key}: goes with {', '.join(tasks)}; this model is {task}")
    processor = _processor(store, task, used, at)
    options = _options(task, config, what, where)
    if task == "audio-classification":
        grid = facts.read_sound(processor, what, where)
        options["audio"] = [grid.rate_hz, str(grid.window_s), str(grid.hop_s)]
    else:
        # of a model on boxes, `geometry` is that of the frames they are cut from
        own = what.get("crop" if "on" in what else "geometry")
        own = own if isinstance(own, Mapping) else {}
        patch = config.get("patch_size")
        if options["model_type"] == "yolos" and isinstance(patch, int):
            for key in ("width_px", "height_px"):
                if isinstance(own.get(key), int) and own[key] % patch:
                    raise UsageError(
                        f"{where}.geometry.{key}: {own[key]} is no multiple of {patch}, the "
                        f"patches of this model: write {own[key] - own[key] % patch}"
                    )
        rule = read_pixels(processor, options["model_type"], own, f"{at}/preprocessor_config.json")
        options.update(rule.numbers(), geometry=_plain_geometry(rule.geometry))
    if task == "zero-shot":
        used |= store.entries.keys() & set(_TOKENIZER)
        if not used & {"tokenizer.json", "spiece.model", "vocab.json"}:
            raise UsageError(f"{at} holds no tokenizer.json; prompts cannot be read; add it there")
    pinned = what.get("sha256") if isinstance(what.get("sha256"), Mapping) else {}
    assert isinstance(pinned, Mapping)
    used |= pinned.keys() & store.entries.keys() & set(FILES)
    small, large = store.find(used, pinned)
    for name, content in small:
        if name.endswith(".json"):
            facts.read_json(content, f"{at}/{name}")  # none of them may bring code
    return Located(
        adapter="huggingface",
        target=f"vidbatch.models.huggingface.networks:{networks.CLASSES[task].__name__}",
        files=small,
        weights=large,
        options=json.dumps(options, sort_keys=True),
    )


def load_class(located: Located) -> type[Any]:
    """The class of its task, its facts those of this model."""
    options = json.loads(located.options)
    cls = networks.CLASSES[options["task"]]
    return type(cls.__name__, (cls,), networks.class_facts(options))


def _options(
    task: str, config: Mapping[str, Any], what: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """All that the class must know, as plain values with every default filled in."""
    model_type = str(config.get("model_type"))
    found: dict[str, Any] = {
        "task": task,
        "model_type": model_type,
        "architecture": config["architectures"][0],
    }
    if task == "zero-shot":
        prompts = facts.read_prompts(what, where)
        outputs = what.get("outputs") or ["labels"]
        if outputs not in (["labels"], ["labels", "embeddings"]):
            raise UsageError(
                f"{where}.outputs: {outputs!r} is not [labels] or [labels, embeddings]"
            )
        return {
            **found,
            "labels": list(prompts),
            "prompts": list(prompts.values()),
            "dim": facts.read_width(config, where) if "embeddings" in outputs else 0,
        }
    if task == "image-embedding":
        projected = model_type in facts.TEXT_MODELS or found["architecture"].endswith("Projection")
        pools = projected or "hidden_sizes" in config or model_type == "siglip_vision_model"
        default = "pooler" if pools else "cls"
        pooling = what.get("pooling") or default
        if pooling not in ("cls", "mean", "pooler"):
            raise unknown_name(f"{where}.pooling", "pooling", pooling, ("cls", "mean", "pooler"))
        if projected and pooling != "pooler":
            raise UsageError(f"{where}.pooling: a {model_type} model has its own; leave it out")
        return {**found, "dim": facts.read_width(config, where), "pooling": pooling}
    names = facts.read_labels(config, where)
    labels, kept = facts.pick_labels(names, what, where)
    found |= {"labels": labels, "kept": kept, "classes": len(names)}
    if task.endswith("classification"):
        trained = config.get("problem_type")
        several = trained == "multi_label_classification" or len(names) == 1
        scores = what.get("scores") or ("sigmoid" if several else "softmax")
        if scores not in ("softmax", "sigmoid"):
            raise unknown_name(f"{where}.scores", "kind of score", scores, ("softmax", "sigmoid"))
        found["scores"] = scores
    if task == "video-classification":
        found["frames"] = facts.read_frames(config, where).frames
    return found


def _open(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> WeightStore:
    source, revision = what.get("source"), what.get("revision")
    if not isinstance(source, str) or not source:
        raise UsageError(
            f"{where}.source: {source!r}; write the model's folder, s3://bucket/prefix, or a hub "
            "id with `revision:`"
        )
    settings = what.get("store") or {}
    if not isinstance(settings, Mapping) or (odd := [k for k in settings if k not in _STORE]):
        raise unknown_name(f"{where}.store", "key", odd[0] if odd else settings, _STORE)
    if revision is not None:
        return WeightStore(find_on_hub(source, revision, where), StoreSettings(), f"{where}.source")
    if "://" not in source:
        path = folders[0] / Path(source).expanduser()
        if not path.is_dir():
            hint = (
                "; a model of the hub needs `revision:`, its commit" if HUB_ID.fullmatch(source)
                else ""
            )  # fmt: skip
            raise UsageError(f"{where}.source: {path}: no such folder{hint}")
        source = str(path.absolute())
    return WeightStore(source, StoreSettings(**settings), f"{where}.source")


def find_on_hub(source: str, revision: object, where: str) -> str:
    """The folder where this machine keeps that commit of a hub model; downloads it if it must.

    Raises:
        UsageError: no owner/name or commit, or the hub does not give it.
    """
    if not HUB_ID.fullmatch(source) or not _COMMIT.fullmatch(str(revision)):
        raise UsageError(
            f"{where}.revision: {revision!r} of {source!r}; a hub model is owner/name at a commit "
            "of 40 digits, since a branch may change overnight; `vidbatch models fetch "
            "owner/name@main DEST` tells it"
        )
    from huggingface_hub import snapshot_download

    wanted = [*FILES, "*.safetensors"]
    with hub_errors(f"{where}.source: {source}@{revision}"):
        return str(snapshot_download(source, revision=str(revision), allow_patterns=wanted))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub's client raises as one UsageError."""
    try:
        yield
    except Exception as error:  # its own, its HTTP client's, the system's: they share no root
        text = " ".join(str(error).split())[:300]
        raise UsageError(f"{what} cannot be had from the hub: {text}") from error


def weight_names(store: WeightStore, at: str) -> set[str]:
    """The files that hold the weights. Raises UsageError: there are only pickles, or none."""
    names = store.entries
    if "model.safetensors" in names:
        return {"model.safetensors"}
    if "model.safetensors.index.json" in names:
        index = facts.read_json(store.read("model.safetensors.index.json"), f"{at}: its index")
        parts = set((index.get("weight_map") or {}).values())
        if missing := sorted(parts - names.keys()):
            raise UsageError(f"{at} lacks {', '.join(missing)}, which its index names")
        return {"model.safetensors.index.json", *parts}
    pickles = sorted(n for n in names if n.endswith(PICKLES))
    if pickles:
        raise UsageError(
            f"{at} holds {', '.join(pickles)} and no model.safetensors; reading such files can run "
            "code, so they are not read; save the model again with save_pretrained"
        )
    raise UsageError(f"{at} holds no model.safetensors; save the model with save_pretrained")


def _processor(store: WeightStore, task: str, used: set[str], at: str) -> dict[str, Any]:
    """The preprocessor's file, however this version of the library named and nested it."""
    names = _PROCESSORS[::-1] if task == "video-classification" else _PROCESSORS[:1]
    for name in names:
        if name in store.entries:
            used.add(name)
            return facts.read_json(store.read(name), f"{at}/{name}")
    if "processor_config.json" in store.entries:
        used.add("processor_config.json")
        tree = facts.read_json(store.read("processor_config.json"), f"{at}/processor_config.json")
        for key in ("video_processor", "image_processor", "feature_extractor"):
            if isinstance(tree.get(key), dict):
                return dict(tree[key])
    raise UsageError(
        f"{at} holds no preprocessor_config.json; what its frames look like is unknown; take it "
        "from where the model was trained"
    )


def _plain_geometry(geometry: Geometry | None) -> list[Any] | None:
    if geometry is None:
        return None
    return [geometry.width_px, geometry.height_px, geometry.fit, geometry.interpolation]
