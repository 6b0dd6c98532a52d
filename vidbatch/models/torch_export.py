"""`torch_export`: a network saved with torch.export.save, run by torch.

what: {adapter: torch_export, file: brands.pt2, sha256: {brands.pt2: …}, gives: [logits], …}

Keys: see `networkfile`. Such a file holds a pickle (the inputs it was exported with), which can run
code when it is read: it is read only if its sha256 is written down.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidbatch.errors import ModelError, UsageError
from vidbatch.models.entries import read_mapping
from vidbatch.models.located import Located
from vidbatch.models.networkfile import KEYS, NetworkFile, find_file, locate_network, network_class
from vidbatch.models.precision import PRECISIONS, ready

if TYPE_CHECKING:
    import torch

__all__ = ["KEYS", "ExportedProgram", "load_class", "locate"]

_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".bin")


class ExportedProgram(NetworkFile):
    """The network of a .pt2 file."""

    precisions = PRECISIONS
    compiles = True

    def _open(self, path: Path, device: str) -> int:
        import torch
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(torch.export.load(path), device)
        wanted = set(program.graph_signature.user_inputs)
        values = [n.meta["val"] for n in program.graph.nodes if n.name in wanted]
        fixed = self.check_input([tuple(getattr(value, "shape", ())) for value in values])
        self.check_count(len(program.graph_signature.user_outputs))
        if fixed and self.spec.compile and fixed != self.spec.batch:
            raise ModelError(
                f"how.batch: {self.options['file']} takes batches of {fixed} alone and is to be "
                f"compiled; write batch: {fixed}",
                kind="model_load",
            )
        self._network = ready(program.module(), self.spec, device)
        return fixed

    def _run(self, values: torch.Tensor) -> list[torch.Tensor]:
        from torch.utils import _pytree

        return list(_pytree.tree_leaves(self._network(values)))


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """Reads the keys and finds the file.

    Raises:
        UsageError: as `locate_network`; another kind of file, or one that is not pinned.
    """
    value = what.get("file")
    if isinstance(value, str) and value.endswith(_PICKLES):
        raise UsageError(
            f"{where}.file: {value} is a pickle or a script of torch; save the network with "
            "torch.export.save(torch.export.export(network, (example,)), 'network.pt2')"
        )
    store, name = find_file(what, "file", folders, where, (".pt2",))
    if name not in read_mapping(what, "sha256", where):
        data = store.read(name)  # what is large and in a store was refused for want of a pin
        if not _holds_program(data):
            raise UsageError(
                f"{where}.file: {value} holds no exported program; it may be cut short; write it "
                "with torch.export.save"
            )
        raise UsageError(
            f"{where}.sha256: lacks {name}; it holds a pickle, which can run code when it is read; "
            f"if you trust it, write sha256: {{{name}: {hashlib.sha256(data).hexdigest()}}}"
        )
    target = "vidbatch.models.torch_export:ExportedProgram"
    return locate_network(target, what, folders, where, (".pt2",))


def load_class(located: Located) -> type[NetworkFile]:
    """The class with the facts of this network."""
    return network_class(ExportedProgram, located)


def _holds_program(data: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(n.endswith("/models/model.json") for n in archive.namelist())
    except zipfile.BadZipFile:
        return False
