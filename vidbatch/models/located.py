"""Where a model's class and files were found, and their content: what travels to the workers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


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

    @property
    def class_name(self) -> str:
        """The class without its module."""
        return self.target.partition(":")[2]

    @property
    def weights_sha256(self) -> tuple[tuple[str, str], ...]:
        """(name, sha256) of the files, by name."""
        return tuple(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.files))
