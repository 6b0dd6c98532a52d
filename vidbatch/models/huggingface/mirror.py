"""A model of the hub, or a folder → the object store, once, on a person's machine; prints its YAML.

Runs read models from where this put them; the hashes in the YAML hold them to these very bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vidbatch.errors import ExistsInStore, UsageError
from vidbatch.models.huggingface import (
    FILES,
    HUB_ID,
    find_on_hub,
    hub_errors,
    locate,
    weight_names,
)
from vidbatch.models.weights import WeightStore
from vidbatch.storage import StoreSettings, open_store


def fetch_model(source: str, dest: str | None = None, settings: StoreSettings | None = None) -> str:
    """Copies the files of a model to `dest` and gives the text of its model file.

    Args:
        source: `owner/name@revision` of the hub (a branch is brought to its commit), a folder or
            s3://bucket/prefix.
        dest: a folder or s3://bucket/prefix; None copies nothing and hashes what is there.

    Raises:
        UsageError: no such model, or another file lies in its place.
        StoreError: the store does not take it.
    """
    settings = settings or StoreSettings()
    name, _, revision = source.rpartition("@")
    of_hub = bool(HUB_ID.fullmatch(name)) and not Path(source).expanduser().exists()
    if of_hub:
        revision = _commit(name, revision)
        store = WeightStore(find_on_hub(name, revision, "source"), settings, source)
    else:
        uri = source if "://" in source else str(Path(source).expanduser().absolute())
        store = WeightStore(uri, settings, source)
    names = sorted({n for n in FILES if n in store.entries} | weight_names(store, source))
    sha256 = {n: store.hash(n) for n in names}
    if dest is not None:
        _copy(store, names, sha256, dest, settings)
    what: dict[str, Any] = {"adapter": "huggingface"}
    if dest is not None:
        what["source"] = dest
    else:
        what |= {"source": name, "revision": revision} if of_hub else {"source": store.uri}
    if settings != StoreSettings() and "://" in what["source"]:
        what["store"] = {"endpoint_url": settings.endpoint_url}
    what["sha256"] = sha256
    slug = re.sub(r"[^a-z0-9_-]+", "-", (name if of_hub else store.uri).rpartition("/")[2].lower())
    tree = {"name": slug.lstrip("-0123456789_") or "model", "version": "v1", "what": what}
    return _remark(what, settings) + yaml.safe_dump(tree, sort_keys=False, width=1000)


def _commit(name: str, revision: str) -> str:
    """The 40 digits of a branch, a tag or a commit."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    with hub_errors(f"{name}@{revision}"):
        return str(HfApi().model_info(name, revision=revision).sha)


def _copy(
    store: WeightStore, names: list[str], sha256: Mapping[str, str], dest: str, settings: Any
) -> None:
    to = open_store(dest, settings)
    for name in names:
        try:
            to.put_new(name, store.read(name))
        except ExistsInStore as error:
            if WeightStore(dest, settings, dest).hash(name) != sha256[name]:
                raise UsageError(
                    f"{to.uri_of(name)} is there and is another file; nothing of it was touched; "
                    "copy the model to a new place"
                ) from error


def _remark(what: Mapping[str, Any], settings: StoreSettings) -> str:
    """What the model file still lacks, as comments above it."""
    try:
        located = locate(what, (Path(), Path()), "what")
    except UsageError as error:
        return f"# still to be written: {error.message}\n"
    options = json.loads(located.options)
    lines = [f"# task: {options['task']}; labels: {len(options.get('labels', ()))}"]
    if options["task"] == "image-embedding" and any(n.startswith("token") for n in what["sha256"]):
        lines.append("# with prompts: [a cat, a dog] under what: zero-shot labels instead")
    return "\n".join(lines) + "\n"
