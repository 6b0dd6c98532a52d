"""The tracker file: `name`, `version`, and `what:`, all of which changes rows and is fingerprinted.

    name: faces-tracks
    version: v1
    what: {on: faces, lost_s: 2, appearance: face-looks}

Without a file everything but `on` has the values below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidbatch.config import read_yaml
from vidbatch.errors import UsageError
from vidbatch.quantities import Seconds

_Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrackWhat(_Strict):
    """What decides which boxes are one track."""

    on: str
    """Name of the model whose boxes are followed."""
    appearance: str | None = None
    """Name of the model that gives embeddings of those boxes; null: by motion alone."""
    min_fps: Annotated[float, Field(gt=0)] = 8.0
    """Samples a second from which motion alone is trusted. Below, boxes of one thing seldom overlap
    from sample to sample: IDF1 on the made scenes falls from 0.95 at 8 fps to 0.26 at 2 fps."""
    lost_s: Annotated[Seconds, Field(gt=0)] | None = None
    """Seconds after which what is not seen again is another track; null: 2 by motion, for then the
    place is a guess, 10 by appearance."""
    high_score: _Share = 0.5
    """Boxes of lower score continue a track, but begin none."""
    min_iou: _Share = 0.1
    """Of a box and the place where the track is expected."""
    low_iou: _Share = 0.35
    """The same, for boxes of low score."""
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.6
    """Of a crop's embedding and those the track had; depends on the model of the embeddings."""
    position_weight: _Share = 0.6
    """How much the place counts beside the cosine, for things that look alike."""

    def is_dense(self, rate_fps: float) -> bool:
        """Whether motion alone is trusted at a measured rate: lost frames may take 5 % of it."""
        return rate_fps >= 0.95 * self.min_fps

    def settled(self, appearance: str | None) -> TrackWhat:
        """With the model of the embeddings and every default decided: what is fingerprinted."""
        lost_s = self.lost_s or (10.0 if appearance else 2.0)
        return self.model_copy(update={"appearance": appearance, "lost_s": lost_s})


class TrackRule(_Strict):
    """A tracker file."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
    version: Annotated[str, Field(pattern=r"^[a-z][a-z0-9._-]{0,62}$")] = "v1"
    what: TrackWhat


def load_rule(path: Path) -> TrackRule:
    """Reads a tracker file. Raises UsageError, in one line."""
    return parse_rule(read_yaml(path), str(path))


def parse_rule(tree: dict[str, Any], where: str) -> TrackRule:
    """A mapping as read from YAML → TrackRule. Raises UsageError, in one line."""
    try:
        return TrackRule.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        known = (TrackWhat if "what" in first["loc"][:-1] else TrackRule).model_fields
        hint = f"; known keys: {', '.join(known)}" if first["type"] == "extra_forbidden" else ""
        raise UsageError(
            f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}{hint}"
        ) from error
