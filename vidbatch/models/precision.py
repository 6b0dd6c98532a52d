"""Precision and compilation of torch networks, for every adapter that has one.

fp32     as it was saved
bf16     half the memory; the fast one on processors with AMX and on GPUs
fp16     half the memory; finer than bf16, overflows at 65504
int8     weights and inputs of linear layers, where both widths are multiples of 8; the rest fp32

The error of each against fp32 is measured by `vidbatch models bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from vidbatch.data import ModelSpec
from vidbatch.errors import ModelError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16", "int8")

_WIDTH = 8
"""Widths of the integer product are multiples of it, on a GPU and so everywhere."""
_ROWS = 32
"""Fewest rows of it: a GPU refuses 16 and less."""


def settle(network: Any, precision: str, device: Any) -> tuple[Any, torch.dtype]:
    """Brings a torch module to its device and precision, in place where it can.

    Returns:
        The module and the type of floating point numbers it takes.

    Raises:
        ModelError: int8 of a network without a linear layer it could be of.
    """
    import torch

    network = network.requires_grad_(False)
    if precision == "int8":
        if not _quantise(network):
            raise ModelError(
                "precision: int8 is for linear layers with widths that are multiples of 8, and "
                "this network has none; write bf16 or fp32",
                kind="model_load",
            )
        return network.to(device), torch.float32
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return (network.to(device) if precision == "fp32" else network.to(device, dtype)), dtype


def ready(network: Any, spec: ModelSpec, device: Any) -> Callable[[torch.Tensor], Any]:
    """What calls a network of one tensor in the precision of its spec, compiled if it says so.

    It takes (B, …) of any B ≤ `spec.batch` and any floating point type; what it gives is float32.
    """
    import torch

    module, dtype = settle(network, spec.precision, device)
    call = padded(torch.compile(module, dynamic=False), spec.batch) if spec.compile else module
    pytree = torch.utils._pytree

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if floating else value

    def run(values: torch.Tensor) -> Any:
        answer = call(values.to(dtype) if values.is_floating_point() else values)
        return pytree.tree_map(cast, answer)

    return run


def padded(call: Callable[[torch.Tensor], Any], size: int) -> Callable[[torch.Tensor], Any]:
    """Calls with exactly `size` items, the rest repeating the last; gives the first ones back.

    For networks of a fixed batch, and compiled ones: every other size would be compiled anew, for
    minutes. More than `size` are called for in parts.
    """
    import torch

    pytree = torch.utils._pytree

    def run(values: torch.Tensor) -> Any:
        parts = []
        for some in torch.split(values, size):
            n = len(some)
            rest = some[-1:].expand(size - n, *some.shape[1:])
            answer = call(torch.cat([some, rest]) if n < size else some)
            parts.append(pytree.tree_map(lambda t, n=n: t[:n], answer))
        if len(parts) == 1:
            return parts[0]
        return pytree.tree_map(lambda *of: torch.cat(of), *parts)

    return run


def _quantise(network: Any) -> int:
    """Puts integer layers in the place of linear ones; how many."""
    import torch

    found = 0
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and _fits(child.weight):
                setattr(module, name, _int8_linear()(child.weight, child.bias))
                found += 1
    if not isinstance(network, torch.fx.GraphModule):
        return found
    for node in list(network.graph.nodes):  # an exported one has calls, no modules
        if node.target is not torch.ops.aten.linear.default or node.args[1].op != "get_attr":
            continue
        weight, *bias = (network.get_parameter(a.target) for a in node.args[1:] if a is not None)
        if _fits(weight):
            layer = f"int8_{found}"
            network.add_submodule(layer, _int8_linear()(weight, *bias))
            with network.graph.inserting_before(node):
                node.replace_all_uses_with(network.graph.call_module(layer, (node.args[0],)))
            network.graph.erase_node(node)
            found += 1
    network.graph.lint()
    network.recompile()
    return found


def _fits(weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and not any(n % _WIDTH for n in weight.shape)


@cache
def _int8_linear() -> type[Any]:
    """The class, made when torch is at hand."""
    import torch

    class Int8Linear(torch.nn.Module):
        """A linear layer whose weights are int8 with a scale per output, its inputs quantised as
        they come with a scale per row.

        One core of a Xeon with AMX, 788 rows through 768 → 3072 → 768: fp32 61 ms, this 41,
        torchao's layer for the same (not compiled) 59, at the same error of 1.6 %.
        """

        scale: torch.Tensor
        quantised: torch.Tensor
        bias: torch.Tensor | None

        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
            super().__init__()
            weight = weight.detach().float()
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("quantised", (weight / scale[:, None]).round().to(torch.int8).t())
            self.register_buffer("bias", None if bias is None else bias.detach().float())

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            rows = values.reshape(-1, values.shape[-1])
            n = rows.shape[0]
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            whole = (rows / scale).round().to(torch.int8)
            if n < _ROWS:
                whole = torch.nn.functional.pad(whole, (0, 0, 0, _ROWS - n))
            found = torch._int_mm(whole, self.quantised)[:n] * (scale * self.scale)
            if self.bias is not None:
                found = found + self.bias
            return found.reshape(*values.shape[:-1], -1)

    return Int8Linear
