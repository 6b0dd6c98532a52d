"""`python`: the user's own class; its module's source and files travel to the workers with the job.

    what: {adapter: python, class: my_models:Redness, params: {…}, files: [weights.npz]}

The module is found in the model file's folder, the job file's folder, then on sys.path. It is one
file: what it imports must be installed on the workers. `__init__` takes `params` and only stores
them (it also runs where the job is planned); `load(device)` is the place for weights, which it
finds as bytes in `self.files["weights.npz"]`. See `base.PlainModel` for what `predict` returns.
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vidbatch.errors import UsageError
from vidbatch.models.located import Located

KEYS = ("class", "files")

FILES_BYTES = 64 * 2**20
"""All `files:` together: they are copied to every worker with the job, larger weights belong into
an adapter that stages them once per node."""

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """Reads the module's source and the files. Raises UsageError."""
    target = what.get("class")
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise UsageError(f"{where}.class: {target!r} is not of the form package.module:Class")
    path = _find_module(target.partition(":")[0], folders, where)
    names = what.get("files") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UsageError(f"{where}.files: expected a list of paths, got {names!r}")
    files, total = [], 0
    for name in names:
        file = folders[0] / name
        if not file.is_file():
            raise UsageError(f"{where}.files: {file}: no such file")
        total += file.stat().st_size
        if total > FILES_BYTES:
            raise UsageError(
                f"{where}.files: more than {FILES_BYTES} bytes with {name}; they travel with the "
                "job, so keep them smaller or put them into the image"
            )
        files.append((name, file.read_bytes()))
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}.class: {path} cannot be read: {error}") from error
    return Located(
        adapter="python", target=target, source=source, path=str(path), files=tuple(files)
    )


def load_class(located: Located) -> type[Any]:
    """Executes the module's source once per process and takes the class from it.

    Raises:
        UsageError: the source raises, or has no such class.
    """
    module = _execute(located)
    cls = getattr(module, located.class_name, None)
    if not isinstance(cls, type) or not callable(getattr(cls, "predict", None)):
        raise UsageError(f"{located.path}: has no class {located.class_name!r} with a `predict`")
    return cls


def _find_module(name: str, folders: Sequence[Path], where: str) -> Path:
    relative = Path(*name.split("."))
    for folder in folders:
        for path in (folder / f"{relative}.py", folder / relative / "__init__.py"):
            if path.is_file():
                return path.absolute()
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        places = " nor in ".join(str(f) for f in dict.fromkeys(folders))
        raise UsageError(f"{where}.class: no module {name!r} in {places} nor on sys.path")
    return Path(found.origin)


def _execute(located: Located) -> ModuleType:
    """The module, under a private name made of its content: no clash with an installed one."""
    key = hashlib.sha256(located.source.encode()).hexdigest()[:16]
    name = f"_vidbatch_model_{key}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = located.path
    module.__package__ = located.target.partition(":")[0].rpartition(".")[0]  # relative imports
    filename = f"<{located.target.partition(':')[0]} {key}>"
    lines = located.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(located.source), None, lines, filename)  # readable tracebacks
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        exec(compile(located.source, filename, "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"{located.path}: importing it raised {type(error).__name__}: {error}; the model "
            "cannot run; what it imports must be installed here and on the workers"
        ) from error
    return module
