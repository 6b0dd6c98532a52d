"""`make bench-gpu`: a model on a GPU the way jobs run it, beside its bare loop.

    python -m tests.bench.gpu [--device cuda] [--batch 128] [--seconds 10] [--size base]

The model is ViT-B/16 at 224 with random weights, made by transformers itself. The bare loop is
what the same GPU gives when nothing but the model runs: one batch that lies on the device already,
in the same precision, compiled or not. vidbatch starts from frames in memory, as a predictor gets
them: collated, pinned, uploaded, normalised, answered, copied back, checked. `--device cpu
--size tiny` shows that it works where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vidbatch.models.bench import bench_model
from vidbatch.models.registry import ModelDef, resolve_model

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64},
}  # fmt: skip
LEGS = (("fp32", False), ("fp16", False), ("bf16", False), ("bf16", True))
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_vit(folder: Path, size: str) -> Any:
    """Saves a seeded ViT with what its processor states; gives the network."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    names = {i: f"class {i}" for i in range(1000)}
    config = ViTConfig(image_size=224, id2label=names, **SIZES[size])
    network = ViTForImageClassification(config)
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224},
        "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return network


def bare(network: Any, device: str, precision: str, compiled: bool, batch: int, s: float) -> float:
    """Frames per second of the network alone, its input on the device already."""
    network = network.to(device).eval()
    if compiled:
        network = torch.compile(network)
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    kind, half = device.partition(":")[0], precision != "fp32"
    times: list[float] = []
    with torch.inference_mode(), torch.autocast(kind, TYPES[precision], enabled=half):
        while len(times) < 7 or sum(times) < s:
            began = time.perf_counter()
            network(pixels)
            if kind == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return batch / sorted(times[2:])[len(times[2:]) // 2]


def main() -> None:
    """Prints a table: what the GPU gives alone, what it gives in vidbatch, and the error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    args = parser.parse_args()
    print(
        f"{'leg':14} {'bare/s':>9} {'vidbatch/s':>11} {'share':>6} {'MiB':>7}  error against fp32"
    )
    with tempfile.TemporaryDirectory() as scratch:
        network = make_vit(Path(scratch), args.size)
        for precision, compiled in LEGS:
            alone = bare(network, args.device, precision, compiled, args.batch, args.seconds)
            tree = {
                "name": "vit", "version": "v1",
                "what": {"adapter": "huggingface", "source": scratch, "top_k": 5,
                         "precision": precision},
                "how": {"batch": args.batch, "compile": compiled},
            }  # fmt: skip
            model: ModelDef = resolve_model(tree, Path(scratch))
            found = bench_model(model, device=args.device, seconds=args.seconds)
            error = ", ".join(f"{k} {v:.3g}" for k, v in found.error.items())
            leg = precision + (" compiled" if compiled else "")
            print(
                f"{leg:14} {alone:9.0f} {found.items_per_s:11.0f} {found.items_per_s / alone:6.2f} "
                f"{found.memory_bytes / 2**20:7.0f}  {error}",
                flush=True,
            )


if __name__ == "__main__":
    main()
