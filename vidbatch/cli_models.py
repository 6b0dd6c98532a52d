"""`vidbatch models …`: what there is, and bringing models to where runs find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _ShowByDefault(TyperGroup):
    """`vidbatch models`, `vidbatch models OUTPUT`: what is no command of the group is `show`'s."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


models_app = typer.Typer(cls=_ShowByDefault, help="Shows models, fetches and measures them.")
EndpointOption = Annotated[str | None, typer.Option(help="of an S3 store other than AWS")]


@models_app.command()
def show(
    output: Annotated[str | None, typer.Argument(help="also what this output holds")] = None,
    endpoint_url: EndpointOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Shows the built-in models and adapters, and the models an output holds."""
    from rich.console import Console

    from vidbatch import report
    from vidbatch.storage import StoreSettings

    found = report.known_models(output, StoreSettings(endpoint_url=endpoint_url))
    if as_json:
        print(json.dumps(found, indent=2, default=str, ensure_ascii=False))
    else:
        Console().print(report.models_table(found))


@models_app.command()
def fetch(
    source: Annotated[str, typer.Argument(help="owner/name@revision, a folder or s3:// prefix")],
    dest: Annotated[str | None, typer.Argument(help="a folder or s3:// prefix")] = None,
    endpoint_url: EndpointOption = None,
) -> None:
    """Copies a model to where runs read it, and prints its model file with all hashes."""
    from vidbatch.models.huggingface.mirror import fetch_model
    from vidbatch.storage import StoreSettings

    print(fetch_model(source, dest, StoreSettings(endpoint_url=endpoint_url)), end="")


@models_app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a model file, or the name of a builtin")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1")] = "cpu",
    batch: Annotated[int | None, typer.Option(min=1, help="instead of the file's")] = None,
    video: Annotated[Path | None, typer.Option(help="its frames; made ones without")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Measures a model: items per second, memory, and the error of its precision against fp32."""
    from rich.console import Console

    from vidbatch import report
    from vidbatch.models.bench import bench_model, read_alone
    from vidbatch.pipeline.excerpt import first_items

    defn = read_alone(model)
    items = max(2 * (batch or defn.spec.batch), 32)
    chunk = None if video is None else first_items(defn.spec, video, items)
    found = bench_model(defn, device=device, batch=batch, chunk=chunk).as_dict()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(report.bench_table(found))
