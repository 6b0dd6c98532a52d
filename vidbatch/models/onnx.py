"""`onnx`: a network in an .onnx file, run by onnxruntime; on CUDA where it has that.

what: {adapter: onnx, file: brands.onnx, gives: [logits], labels: [cat, dog], geometry: …, input: …}

Keys: see `networkfile`. The precision is the file's: export or quantise it as it shall run. Weights
in a second file are found if that one is named under `sha256:` as well.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidbatch.errors import ModelError
from vidbatch.models.located import Located
from vidbatch.models.networkfile import KEYS, NetworkFile, locate_network, network_class

if TYPE_CHECKING:
    import torch

__all__ = ["KEYS", "OnnxNetwork", "load_class", "locate"]

_NUMBERS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class OnnxNetwork(NetworkFile):
    """A session of onnxruntime; frames come from the host and answers go there."""

    on_host = True

    def _open(self, path: Path, device: str) -> int:
        import onnxruntime
        import torch

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.inter_op_num_threads = 1
        settings.intra_op_num_threads = torch.get_num_threads()  # this process' share
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            index = int(device.partition(":")[2] or 0)
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
            else:
                logging.getLogger(__name__).warning(
                    "model %s: this onnxruntime has no CUDA, so it runs on the CPU beside %s; "
                    "install onnxruntime-gpu instead of onnxruntime there", self.spec.name, device,
                )  # fmt: skip
        try:
            self._network = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        except Exception as error:  # its exceptions share no root but this
            text = " ".join(str(error).split())[:300]
            raise ModelError(
                f"file: onnxruntime {onnxruntime.__version__} cannot read "
                f"{self.options['file']}: {text}; export it again, with its weights inside or the "
                "second file named under sha256",
                kind="model_load",
            ) from error
        inputs = self._network.get_inputs()
        fixed = self.check_input([i.shape for i in inputs])
        self.check_count(len(self._network.get_outputs()))
        if inputs[0].type not in _NUMBERS:
            raise ModelError(
                f"file: {self.options['file']} takes {inputs[0].type}; frames are one of "
                f"{', '.join(_NUMBERS)}; export it with such an input",
                kind="model_load",
            )
        self._name, self._type = inputs[0].name, _NUMBERS[inputs[0].type]
        return fixed

    def _run(self, values: torch.Tensor) -> list[torch.Tensor]:
        import torch

        array = values.numpy()
        if self._type == "uint8":
            array = array.round().clip(0, 255)
        found = self._network.run(None, {self._name: array.astype(self._type, copy=False)})
        return [torch.from_numpy(x) for x in found]


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """Reads the keys and finds the file. Raises UsageError: as `locate_network`."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
    target = "vidbatch.models.onnx:OnnxNetwork"
    return locate_network(target, what, folders, where, (".onnx",))


def load_class(located: Located) -> type[NetworkFile]:
    """The class with the facts of this network."""
    return network_class(OnnxNetwork, located)
