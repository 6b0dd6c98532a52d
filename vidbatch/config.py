"""The job file: YAML → one strict, frozen tree. *What* changes rows, *how* only speed.

Knows nothing of stores, models or Ray: a model entry stays the mapping that the user wrote.
Every error names the path of the key and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vidbatch.data import Sample, digest
from vidbatch.errors import UsageError
from vidbatch.quantities import Bytes, Rate, Seconds

_SECRET = re.compile(
    r"(AKIA|ASIA)[A-Z0-9]{12,}|://[^/\s:@]+:[^/\s@]+@|X-Amz-(Signature|Credential)="
    r"|aws_secret_access_key|-----BEGIN [A-Z ]*PRIVATE KEY",
)


def has_credential(text: str) -> bool:
    """Whether a text holds what looks like a key, a password or a signed URL."""
    return bool(_SECRET.search(text))


When = Annotated[str, BeforeValidator(str)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreConfig(_Strict):
    """Names of where and how to reach a store; never secrets."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    requester_pays: bool = False


class DateConfig(_Strict):
    """Where the capture date comes from; pinned per output by the first run."""

    source: Literal["key", "modified"] = Field("modified", alias="from")
    pattern: str | None = None
    tz: str = "UTC"
    otherwise: Literal["modified"] = "modified"

    @model_validator(mode="after")
    def _pattern_goes_with_key(self) -> DateConfig:
        if (self.source == "key") != (self.pattern is not None):
            raise ValueError("'pattern' goes with 'from: key', and 'from: key' needs a 'pattern'")
        try:
            groups = re.compile(self.pattern or "(?P<date>)").groupindex
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from error
        if "date" not in groups:
            raise ValueError("pattern has no group (?P<date>…)")
        try:
            ZoneInfo(self.tz)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"tz {self.tz!r} is not a time zone such as Europe/Berlin") from error
        return self


class ArchiveConfig(_Strict):
    """Which objects are videos of this job."""

    uri: Texts
    include: Texts = ()
    exclude: Texts = ()
    date: DateConfig = DateConfig.model_validate({})
    since: When | None = None
    until: When | None = None
    modified_since: When | None = None
    settle: Seconds = 0.0
    store: StoreConfig = StoreConfig()


class SampleConfig(_Strict):
    """Exactly one sampling rule."""

    fps: Rate | None = None
    every: Annotated[int, Field(ge=1)] | None = None
    keyframes: Literal[True] | None = None
    all: Literal[True] | None = None
    tolerance_s: Rate = Fraction(0)

    @model_validator(mode="after")
    def _one_rule(self) -> SampleConfig:
        rules = [k for k in ("fps", "every", "keyframes", "all") if getattr(self, k) is not None]
        if len(rules) != 1:
            raise ValueError(f"exactly one of fps, every, keyframes, all; got {rules or 'none'}")
        self.rule()
        return self

    def rule(self) -> Sample:
        """The rule as the pipeline uses it."""
        if self.fps is not None:
            return Sample(kind="fps", fps=self.fps, tolerance_s=self.tolerance_s)
        if self.every is not None:
            return Sample(kind="every", every=self.every, tolerance_s=self.tolerance_s)
        return Sample(kind="keyframes" if self.keyframes else "all", tolerance_s=self.tolerance_s)


class OutputConfig(_Strict):
    """Where the tables go."""

    uri: str
    store: StoreConfig = StoreConfig()


class ClipsConfig(_Strict):
    """How new videos are cut; never touches what is planned already."""

    length_s: Annotated[Seconds, Field(gt=0)] = 60.0
    split_above: Bytes = 64 * 2**20


Pool = Literal["auto"] | Annotated[int, Field(ge=1)]


class EngineConfig(_Strict):
    """Where and how wide the work runs."""

    address: str = "local"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    decoders: Pool = "auto"
    predictors: Pool = "auto"
    wait_s: Annotated[float, Field(gt=0)] = 900.0
    object_store_cap: Bytes = 2 * 2**30
    order: Literal["newest", "oldest", "longest"] = "newest"


class LimitsConfig(_Strict):
    """Where a run stops or a clip is given up."""

    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    max_video_hours: Annotated[float, Field(gt=0)] | None = None
    stop_after: Seconds | None = None
    max_pixels: Annotated[int, Field(ge=1)] = 134_217_728
    max_cost: Annotated[float, Field(gt=0)] | None = None
    task_minutes: Annotated[float, Field(gt=0)] = 10.0
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    isolate: bool = True


class CostConfig(_Strict):
    """Prices in one currency, for estimates only."""

    cpu_hour: float = 0.04
    gpu_hour: float = 1.2
    get_1000: float = 0.0004
    put_1000: float = 0.005


class Job(_Strict):
    """One resolved job file: paths absolute, defaults filled in."""

    archive: ArchiveConfig
    sample: SampleConfig
    models: tuple[dict[str, Any], ...] = ()
    output: OutputConfig
    clips: ClipsConfig = ClipsConfig()
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    cost: CostConfig = CostConfig()
    base_dir: str = "."
    """Folder of the job file: model files and their weights are relative to it."""

    def date_rule(self) -> dict[str, Any]:
        """What the first run pins in output.json."""
        return self.archive.date.model_dump(mode="json", by_alias=True)

    def dump(self) -> dict[str, Any]:
        """The resolved tree as JSON types, for the run folder; `load_job` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        """Hash of the resolved tree: tells two runs of one output apart in `config check`."""
        return digest({k: v for k, v in self.dump().items() if k != "base_dir"})


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: plain YAML takes the last one in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise UsageError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1})")
        seen.add(key)
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 reads on, off, yes and no as booleans: `on: faces` would be a key True.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, word) for tag, word in rules if first in "tTfF" or not tag.endswith(":bool")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping.

    Raises:
        UsageError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise UsageError(
            f"{path}: no such file; `vidbatch init FOLDER` writes a job file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}; remove one of them") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(
            f"{path}: expected a mapping of keys at the top, got {type(tree).__name__}"
        )
    return tree


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file, applies `section.key=value` overrides, resolves its paths.

    Raises:
        UsageError: anything the user has to change, in one line.
    """
    return parse_job(read_yaml(path), base_dir=path.parent, overrides=overrides, name=str(path))


def parse_job(
    tree: Mapping[str, Any], *, base_dir: Path, overrides: Sequence[str] = (), name: str = "job"
) -> Job:
    """A mapping as read from YAML → Job. Raises UsageError."""
    merged = dict(tree)
    for text in overrides:
        merged = _override(merged, text)
    for path, value in _leaves(merged):
        if (isinstance(value, str) and has_credential(value)) or has_credential(path):
            raise UsageError(
                f"{name}: {path}: looks like a credential; nothing was started; credentials come "
                "from the environment (profile, role, pod identity), never from this file"
            )
    base_dir = Path(merged.pop("base_dir", base_dir))  # stands only in a dumped job
    if isinstance(merged.get("models"), list) and not all(
        isinstance(m, dict) for m in merged["models"]
    ):
        raise UsageError(f"{name}: models: each entry is a mapping such as 'builtin: quality'")
    try:
        job = Job.model_validate({**merged, "base_dir": str(base_dir.absolute())})
    except ValidationError as error:
        raise UsageError(f"{name}: {_explain(error)}") from error
    archive = job.archive.model_copy(
        update={"uri": tuple(_absolute(u, base_dir) for u in job.archive.uri)}
    )
    output = job.output.model_copy(update={"uri": _absolute(job.output.uri, base_dir)})
    return job.model_copy(update={"archive": archive, "output": output})


def _absolute(uri: str, base_dir: Path) -> str:
    if "://" in uri:
        return uri
    path = Path(uri).expanduser()
    return str(path if path.is_absolute() else (base_dir / path).absolute())


def _override(tree: Mapping[str, Any], text: str) -> dict[str, Any]:
    path, sign, raw = text.partition("=")
    if not sign or not path:
        raise UsageError(f"--set {text}: expected section.key=value")
    try:
        value = yaml.safe_load(raw) if raw else None
    except yaml.YAMLError:
        value = raw  # a glob such as **/*.mp4 is no YAML, and means itself
    head, _, rest = path.partition(".")
    merged = dict(tree)
    if not rest:
        merged[head] = value
        return merged
    below = merged.get(head) or {}
    if not isinstance(below, dict):
        raise UsageError(f"--set {text}: {head} is not a section")
    if head == "sample":  # one rule only: setting one replaces the one in the file
        below = {k: v for k, v in below.items() if k == "tolerance_s" or rest == "tolerance_s"}
    merged[head] = _override(below, f"{rest}={raw}")
    return merged


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        yield path, tree


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    """The keys that may stand where `loc` points: walks the model classes along the path."""
    model: Any = Job
    for part in loc:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return [f.alias or n for n, f in model.model_fields.items() if n != "base_dir"]


def _explain(error: ValidationError) -> str:
    """The first error of pydantic as one line: path, what is wrong, what to write."""
    first = error.errors(include_url=False, include_context=False)[0]
    loc = tuple(p for p in first["loc"] if "[" not in str(p) and p != "constrained-int")
    path = ".".join(str(p) for p in loc) or "job"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {path}; {hint}{more}"
    if first["type"] == "missing":
        return f"{path} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f"; got {first['input']!r}"
    return f"{path}: {message}{got}{more}" if loc else f"{message}{more}"


class QuickJob(BaseModel):
    """The job of `vidbatch run FOLDER -o OUT -m quality …`, without a file."""

    archive: str
    output: str
    models: tuple[str, ...] = ("quality",)
    fps: str = "1"

    def job(self, overrides: Sequence[str] = ()) -> Job:
        """The same Job a file would give. Raises UsageError."""
        entries = [
            {"file": m} if m.endswith((".yaml", ".yml")) else {"builtin": m} for m in self.models
        ]
        tree = {
            "archive": {"uri": self.archive},
            "sample": {"fps": self.fps},
            "models": entries,
            "output": {"uri": self.output},
        }
        return parse_job(tree, base_dir=Path.cwd(), overrides=overrides, name="command line")
