"""Where a model's class and files were found, and their content: what travels to the workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from vidbatch.models.weights import WeightFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A class, its source where it travels along, and the bytes of its files."""

    adapter: str
    target: str
    """`package.module:Class`."""
    source: str = field(default="", repr=False)
    """Text of the module; "" for what is part of vidbatch."""
    path: str = ""
    """Where the source was read, for tracebacks."""
    files: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    """(name, content); the plain model finds them as the mapping `files`."""
    weights: tuple[WeightFile, ...] = ()
    """Files that are too large to travel: fetched where the model is loaded; its `weights`."""
    options: str = field(default="", repr=False)
    """JSON of what the adapter read out of the entry and the files for its class, or "": it stands
    in the fingerprint for the adapter's own keys."""

    @property
    def class_name(self) -> str:
        """The class without its module."""
        return self.target.partition(":")[2]

    @property
    def weights_sha256(self) -> tuple[tuple[str, str], ...]:
        """(name, sha256) of the files, by name."""
        read = [(name, hashlib.sha256(data).hexdigest()) for name, data in self.files]
        return tuple(sorted([*read, *((w.name, w.sha256) for w in self.weights)]))
