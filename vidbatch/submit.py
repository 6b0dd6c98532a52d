"""A job file with everything beside it that it names, on its way to a cluster.

    job.yaml ─ resolved, overrides applied ─┐
    models/*.yaml, their classes and files ─┴▶ files ─┬▶ working_dir of a Ray job
                                                      └▶ ConfigMap of a RayJob

Only what the job names travels: never its folder. What is too large belongs into a store or the
image; what looks like a credential is refused.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vidbatch.config import Job, has_credential, read_yaml
from vidbatch.errors import UsageError
from vidbatch.progress import human_bytes

JOB = "job.yaml"

WORKING_DIR_BYTES = 64 * 2**20
"""Ray keeps it in the memory of the head and takes 100 MiB at most."""

CONFIG_MAP_BYTES = 900_000
"""Kubernetes takes 1 MiB for the whole object, base64 included."""

_TEXT = {".yaml", ".yml", ".json", ".py", ".txt", ".md", ".toml", ".cfg", ".ini", ".env", ""}

Files = Mapping[str, bytes]
"""Path relative to the job file → content."""


def collect_files(job: Job, script: Path | None = None) -> dict[str, bytes]:
    """The job file, to be run on a cluster, and the local files it names; `script` beside it.

    Raises:
        UsageError: a file lies outside the job's folder, is too large or holds a credential; the
            job says not how it is to run on a cluster.
    """
    if job.engine.device == "auto":
        raise UsageError(
            "engine.device: auto looks for a GPU on this machine only; nothing was submitted; "
            "write cuda or cpu (--set engine.device=cuda)"
        )
    tree = job.dump()
    tree.pop("base_dir")
    tree["engine"]["address"] = "auto"
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    found: dict[str, bytes] = {JOB: text.encode()}
    base = Path(job.base_dir)
    for path in sorted({p for entry in job.models for p in _local_files(entry, base)}):
        name = _relative(path, base)
        if name in found:
            raise UsageError(f"{path}: the name {JOB} is the job file's own; rename it")
        found[name] = _read(path)
    if script is not None:
        found[script.name] = _read(script)
    size = sum(map(len, found.values()))
    if size > WORKING_DIR_BYTES:
        raise UsageError(
            f"{human_bytes(size)} of model files, more than {human_bytes(WORKING_DIR_BYTES)}; "
            "nothing was submitted; put weights into a store (s3://…) or into the image"
        )
    return found


def entrypoint(script: Path | None, args: Sequence[str]) -> str:
    """The command of a Ray job whose working directory holds the files."""
    what = ["-m", "vidbatch", "run"] if script is None else [script.name]
    return "exec " + shlex.join(["python", *what, JOB, *args])


def rayjob(manifests: str, files: Files, args: Sequence[str]) -> str:
    """A ConfigMap with the files and a RayJob that runs them, for `kubectl create -f -`.

    Args:
        manifests: YAML with a RayJob, or with a RayCronJob whose template is taken: nodes, image
            and security are as they stand there. Its volume `job` is what is exchanged.
        args: added to the entrypoint.
    Raises:
        UsageError: there is no such manifest, or the files are too large for a ConfigMap.
    """
    if (size := sum(map(len, files.values()))) > CONFIG_MAP_BYTES:
        raise UsageError(
            f"{human_bytes(size)} of model files, more than a ConfigMap takes; nothing was "
            "printed; put weights into a store (s3://…) or into the image"
        )
    head, spec = _template(manifests)
    digest = hashlib.sha256(b"\0".join(k.encode() + b"\0" + v for k, v in sorted(files.items())))
    volume = f"vidbatch-job-{digest.hexdigest()[:10]}"
    keys = {name: name.replace("/", "__") for name in files}
    items = [{"key": keys[name], "path": name} for name in files]
    volumes = list(_volumes(spec.get("rayClusterSpec", {})))
    if not volumes:
        raise UsageError("the RayJob has no volume named `job`: the job file would go nowhere")
    for found in volumes:
        found["configMap"] = {"name": volume, "items": items}
    if args:
        spec["entrypoint"] = f"{str(spec['entrypoint']).rstrip()} {shlex.join(args)}"
    meta = {k: head[k] for k in ("namespace", "labels") if k in head}
    text: dict[str, str] = {}
    binary: dict[str, str] = {}
    for name, data in files.items():
        try:
            text[keys[name]] = data.decode()
        except UnicodeDecodeError:
            binary[keys[name]] = base64.b64encode(data).decode()
    config: dict[str, Any] = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": volume, **meta},
        "immutable": True, "data": text, **({"binaryData": binary} if binary else {}),
    }  # fmt: skip
    job: dict[str, Any] = {
        "apiVersion": "ray.io/v1", "kind": "RayJob",
        "metadata": {"generateName": f"{head['name'][:40]}-", **meta}, "spec": spec,
    }  # fmt: skip
    return yaml.dump_all([config, job], Dumper=_Plain, sort_keys=False, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """Files as blocks of their lines; no anchors, which a template may have shared."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Plain, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)


def _template(manifests: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and spec of the first RayJob, else of the first RayCronJob's template."""
    try:
        documents = [d for d in yaml.safe_load_all(manifests) if isinstance(d, dict)]
    except yaml.YAMLError as error:
        raise UsageError(f"--k8s: not YAML: {' '.join(str(error).split())}") from error
    for kind, path in (("RayJob", ("spec",)), ("RayCronJob", ("spec", "jobTemplate"))):
        for document in documents:
            if document.get("kind") == kind:
                spec: Any = document
                for key in path:
                    spec = spec[key]
                return document["metadata"], copy.deepcopy(spec)
    raise UsageError(
        "--k8s: no RayJob nor RayCronJob in it; give what `kubectl kustomize k8s/overlays/gpu` "
        "prints"
    )


def _volumes(cluster: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", ())):
        pod = group.get("template", {}).get("spec", {})
        yield from (v for v in pod.get("volumes", ()) if v.get("name") == "job")


# files ----------------------------------------------------------------------------------------


def _local_files(entry: Mapping[str, Any], base: Path) -> Iterator[Path]:
    """Files that an entry of `models:` names, its model file first."""
    folders = [base]
    if isinstance(entry.get("file"), str):
        path = base / entry["file"]
        yield path
        entry, folders = read_yaml(path), [path.parent, base]
    for text in _texts(entry):
        module = text.partition(":")[0].replace(".", "/") + ".py" if ":" in text else ""
        for folder, name in ((f, n) for f in folders for n in (text, module) if n):
            if "://" in text or len(name) > 255 or Path(name).is_absolute():
                continue
            path = folder / name
            if path.is_dir():
                yield from (p for p in path.rglob("*") if p.is_file())
            elif path.is_file():
                yield path


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str) and value.strip("./"):
        yield value


def _relative(path: Path, base: Path) -> str:
    try:
        return str(PurePosixPath(path.resolve().relative_to(base.resolve())))
    except ValueError as error:
        raise UsageError(
            f"{path}: lies outside {base}; nothing was submitted; files that travel with the job "
            "lie in or below its folder, and are named relative to it"
        ) from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > WORKING_DIR_BYTES:
            raise UsageError(
                f"{path}: {human_bytes(path.stat().st_size)}; nothing was submitted; put weights "
                "into a store (s3://…) or into the image"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error}; nothing was submitted") from error
    if path.suffix in _TEXT and has_credential(data.decode("utf-8", "replace")):
        raise UsageError(
            f"{path}: holds what looks like a credential; nothing was submitted: whoever sees the "
            "cluster could read it; credentials come from the pods' own identity"
        )
    return data
