"""Networks in files, made on the spot: .pt2 and .onnx, of torch modules and by hand."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper


def save_program(network: torch.nn.Module, example: torch.Tensor, path: Path, **fixed: Any) -> Path:
    """A .pt2 of any batch, or with `fixed=True` of the example's."""
    batch = None if fixed.get("fixed") else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=batch)
    torch.export.save(program, path)
    return path


def save_onnx(network: torch.nn.Module, example: torch.Tensor, path: Path, **fixed: Any) -> Path:
    """An .onnx of any batch, or with `fixed=True` of the example's."""
    axes = None if fixed.get("fixed") else {"pixels": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs a library more
        torch.onnx.export(
            network.eval(), (example,), str(path), dynamo=False, input_names=["pixels"],
            dynamic_axes=axes, opset_version=17,
        )  # fmt: skip
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Looks(torch.nn.Module):
    """Two convolutions and a head, from a seed; gives (B, out)."""

    def __init__(self, out: int, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Conv2d(3, width, 5, 3)
        self.second = torch.nn.Conv2d(width, width, 3, 2)
        self.head = torch.nn.Linear(width, out)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.second(torch.relu(self.first(pixels))))
        return self.head(found.mean(dim=(2, 3))) * 8.0


def yunet(width: int, height: int) -> bytes:
    """The outputs of YuNet over a network that finds what is bright: the score of a cell is how far
    its mean is above grey level 200, its box the cell's own size around its first corner."""
    nodes = [
        helper.make_node("Conv", ["input", "third"], ["grey"]),
        helper.make_node("Sub", ["grey", "dark"], ["above"]),
        helper.make_node("Mul", ["above", "slope"], ["steep"]),
        helper.make_node("Clip", ["steep", "zero", "one"], ["bright"]),
    ]
    values: dict[str, Any] = {
        "third": np.full((1, 3, 1, 1), 1 / 3, np.float32),
        "dark": np.float32([200]), "slope": np.float32([1 / 40]),
        "zero": np.float32(0), "one": np.float32(1),
    }  # fmt: skip
    outputs = []
    for kind, n in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        weights, shape = f"{kind}_weights", f"{kind}_shape"
        values[weights] = np.full((n, 1, 1, 1), 1.0 if n == 1 else 0.0, np.float32)
        values[shape] = np.int64([1, -1, n])
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            side = [stride, stride]
            nodes += [
                helper.make_node(
                    "AveragePool", ["bright"], [name + "_p"], kernel_shape=side, strides=side
                ),
                helper.make_node("Conv", [name + "_p", weights], [name + "_c"]),
                helper.make_node("Transpose", [name + "_c"], [name + "_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [name + "_t", shape], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, n]))
    size = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, height, width])
    return to_onnx(nodes, [size], outputs, values)


def to_onnx(nodes: list[Any], inputs: list[Any], outputs: list[Any], values: Any) -> bytes:
    """A checked ONNX file of opset 17."""
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    graph = helper.make_graph(nodes, "made", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
