"""The SQL of the views: what of the tables is current, and two questions as macros.

Works in DuckDB's own shell as `<output>/views/duckdb.sql`, and statement by statement in
`connect`. Every view reads by its table's glob, level by level, below the variable
`vidbatch_root`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from vidbatch.tables import PARTITIONS, ROOT

_TYPES = {"sample": "VARCHAR", "model": "VARCHAR", "dt": "DATE"}

_HEADER = """\
-- Views over the tables of vidbatch, for DuckDB 1.1 and later. In the folder above this file:
--     duckdb -init views/duckdb.sql
-- From elsewhere, or for a bucket, name the output first (a bucket also needs httpfs and a secret):
--     SET VARIABLE vidbatch_root = 's3://bucket/prefix';
--     .read duckdb.sql
-- labels, frames, ... hold what is current: the newest version of each video, of each model's name
-- the newest model that covers the video, failures that nothing cured. labels_all, ... hold the
-- history too. Sampling rules are kept apart: an output with several has each row once per rule;
-- filter by the column `sample`, or join current_models and take newest_sample.
-- Models that came after the first run have their features_... and embeddings_... views in
-- `vidbatch sql` alone.
SET VARIABLE vidbatch_root = coalesce(getvariable('vidbatch_root'), '.')"""

_CURRENT = {
    "videos": """
-- newest version of each object, per sampling rule
SELECT * FROM videos_all
QUALIFY row_number() OVER (
    PARTITION BY sample, uri ORDER BY listed_at DESC, modified_at DESC, video_id) = 1""",
    "current_models": """
-- which model speaks for a video: of each name the newest (by first run) that covers any of it.
-- newest_sample: of the rules under which a model of that name covers the video, the newest.
-- uri goes with every key so that a filter on it reaches the files
WITH covering AS (
    SELECT DISTINCT c.sample, c.uri, c.video_id, c.model,
           coalesce(m.name, c.model) AS name, m.version, coalesce(m.first_run, '') AS first_run
    FROM coverage_all c LEFT JOIN models m ON m.model = c.model
    WHERE c.status IN ('ok', 'partial')
), newest AS (
    SELECT v.dt, v.listed_at, covering.*
    FROM covering JOIN videos v USING (sample, uri, video_id)
    QUALIFY row_number() OVER (
        PARTITION BY sample, uri, video_id, name ORDER BY first_run DESC, model DESC) = 1
)
SELECT sample, dt, video_id, uri, name, version, model, first_run,
       row_number() OVER (PARTITION BY uri, name ORDER BY listed_at DESC, sample) = 1
           AS newest_sample
FROM newest""",
    "coverage": """
-- how each clip of a current video ended last, per output, unless a newer model speaks for it
SELECT c.*
FROM coverage_all c
LEFT JOIN videos v ON v.sample = c.sample AND v.uri = c.uri
LEFT JOIN models m ON m.model = c.model
LEFT JOIN current_models n ON n.sample = c.sample AND n.video_id = c.video_id
    AND n.name = coalesce(m.name, c.model)
WHERE (v.video_id IS NULL OR v.video_id = c.video_id)
  AND (n.model IS NULL OR (n.first_run, n.model) <= (coalesce(m.first_run, ''), c.model))
QUALIFY row_number() OVER (
    PARTITION BY c.sample, c.model, c.video_id, c.start_s ORDER BY c.generation DESC) = 1""",
    "failures": """
-- what nothing cured: no later generation of the clip, no newer model, no newer version
SELECT * FROM failures_all
SEMI JOIN coverage USING (sample, model, video_id, start_s, generation)""",
    "shots": """
-- a shot that goes on after its clip ends where the next one begins, the last one with the video
WITH seen AS (
    SELECT sample, model, video_id, max(end_frame) AS last_frame, max(end_s) AS last_s
    FROM coverage WHERE status IN ('ok', 'partial') GROUP BY ALL
)
SELECT s.* REPLACE (
    coalesce(end_frame, lead(start_frame) OVER later, last_frame) AS end_frame,
    coalesce(end_s, lead(start_s) OVER later, last_s) AS end_s)
FROM shots_all s JOIN seen USING (sample, model, video_id)
SEMI JOIN current_models USING (sample, model, video_id)
WINDOW later AS (PARTITION BY sample, model, video_id ORDER BY start_frame)""",
    "frames": """
SELECT * FROM frames_all SEMI JOIN videos USING (sample, video_id)""",
}

MACROS = {
    "minutes": """(wanted_label, min_score := 0) AS TABLE
-- minutes in which a model saw the label, of the minutes it looked at: per camera, day and model
WITH speaking AS MATERIALIZED (
    SELECT sample, model, video_id, name FROM current_models
    WHERE newest_sample
      AND model IN (SELECT model FROM models WHERE list_contains(labels, wanted_label))
), looked AS (
    SELECT c.source, c.dt, n.name, sum(c.end_s - c.start_s) / 60 AS minutes
    FROM coverage_all c JOIN speaking n USING (sample, model, video_id)
    WHERE c.status IN ('ok', 'partial')
    GROUP BY ALL
), seen AS (
    SELECT l.sample, n.name, l.video_id, l.frame_index, l.dt
    FROM labels_all l JOIN speaking n USING (sample, model, video_id)
    WHERE l.label = wanted_label AND l.score >= min_score
    UNION
    SELECT d.sample, n.name, d.video_id, d.frame_index, d.dt
    FROM detections_all d JOIN speaking n USING (sample, model, video_id)
    WHERE d.label = wanted_label AND d.score >= min_score
), found AS (
    SELECT f.source, f.dt, seen.name, sum(f.covers_s) / 60 AS minutes
    FROM seen JOIN frames_all f USING (sample, dt, video_id, frame_index)
    GROUP BY ALL
)
SELECT dt, source, name AS model, round(coalesce(found.minutes, 0), 3) AS minutes,
       round(looked.minutes, 3) AS looked_at_minutes
FROM looked LEFT JOIN found USING (source, dt, name)
ORDER BY dt, source, model""",
    "frames_of": """(video_uri, from_s, to_s) AS TABLE
-- the frames of one video in [from_s, to_s) with their boxes, under its newest sampling rule
WITH speaking AS MATERIALIZED (
    SELECT sample, dt, model, video_id, name, newest_sample FROM current_models
    WHERE uri = video_uri
), boxes AS (
    SELECT d.* FROM detections_all d SEMI JOIN speaking USING (sample, dt, model, video_id)
    WHERE d.uri = video_uri AND d.time_s >= from_s AND d.time_s < to_s
)
SELECT f.frame_index, f.time_s, f.is_keyframe, f.is_corrupt, d.model, d.detection_id, d.label,
       d.score, d.x_min, d.y_min, d.x_max, d.y_max, f.pts, f.sample, f.dt, f.video_id
FROM frames_all f
JOIN speaking n ON n.name = 'frames' AND n.newest_sample
    AND n.sample = f.sample AND n.dt = f.dt AND n.video_id = f.video_id
LEFT JOIN boxes d ON d.sample = f.sample AND d.video_id = f.video_id
    AND d.frame_index = f.frame_index
WHERE f.uri = video_uri AND f.time_s >= from_s AND f.time_s < to_s
ORDER BY f.frame_index, d.model, d.detection_id""",
}
"""Table macros: signature and body."""

_KEY = ("sample", "model", "dt", "video_id", "uri", "source", "frame_index", "pts", "time_s")


class Described(Protocol):
    """What the views of one model need to know of it; a ModelSpec is one."""

    @property
    def name(self) -> str:
        """Of the model, without its version."""
        ...

    @property
    def dim(self) -> int:
        """Width of its embeddings, 0 without."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """Names of its scalars."""
        ...


def table_view(name: str) -> str:
    """The view that reads a table whole: `<name>_all`, or `<name>` where there is no history."""
    return f"{name}_all" if PARTITIONS[name] else name


def table_glob(name: str) -> str:
    """The files of a table below the output's root, level by level."""
    return "/".join([ROOT, name, *(f"{level}=*" for level in PARTITIONS[name]), "*.parquet"])


def view_bodies() -> dict[str, str]:
    """The views that every output has: name → SELECT, each after those it reads."""
    bodies = {}
    for name, levels in PARTITIONS.items():
        hive = ""
        if levels:
            types = ", ".join(f"{level}: {_TYPES[level]}" for level in levels)
            hive = f", hive_partitioning = true, hive_types = {{{types}}}"
        files = f"getvariable('vidbatch_root') || '/{table_glob(name)}'"
        bodies[table_view(name)] = f"\nSELECT * FROM read_parquet({files}{hive})"
    of_models = {
        name: f"\nSELECT * FROM {name}_all SEMI JOIN current_models USING (sample, model, video_id)"
        for name, levels in PARTITIONS.items()
        if "model" in levels and name not in _CURRENT
    }
    return bodies | _CURRENT | of_models


def model_bodies(models: Iterable[Described]) -> dict[str, str]:
    """The views of single models: `features_<name>` (a column each) and `embeddings_<name>`.

    Of models with one name the features are united and the last one's width of embeddings holds:
    vectors of another width are left out. A `-` of the name is a `_` in the view's.
    """
    features: dict[str, dict[str, None]] = {}
    dims: dict[str, int] = {}
    for model in models:
        features.setdefault(model.name, {}).update(dict.fromkeys(model.features))
        if model.dim:
            dims[model.name] = model.dim
    bodies = {}
    for name, columns in features.items():
        # starts_with prunes files by their path, the list of models takes exactly the name's
        mine = (
            f"starts_with(model, '{name}-')\n"
            f"  AND model IN (SELECT model FROM models WHERE name = '{name}'"
        )
        plain = name.replace("-", "_")
        if columns:
            picked = "".join(f",\n    {_pick(column)}" for column in sorted(columns))
            bodies[f"features_{plain}"] = (
                f"\nSELECT {', '.join(_KEY)}{picked}\nFROM features\nWHERE {mine})\nGROUP BY ALL"
            )
        if name in dims:
            dim = dims[name]
            bodies[f"embeddings_{plain}"] = (
                f"\nSELECT * REPLACE (embedding::FLOAT[{dim}] AS embedding)\nFROM embeddings\n"
                f"WHERE {mine} AND dim = {dim})"
            )
    return bodies


def _pick(feature: str) -> str:
    text, column = feature.replace("'", "''"), feature.replace('"', '""')
    if feature in _KEY:
        column += "_value"
    return f"max(value) FILTER (WHERE feature = '{text}') AS \"{column}\""


def statements(models: Iterable[Described] = ()) -> Iterator[tuple[str, str]]:
    """(name, statement) of all views and macros, each after those it reads."""
    for name, body in (view_bodies() | model_bodies(models)).items():
        yield name, f"CREATE OR REPLACE VIEW {name} AS{body}"
    for name, body in MACROS.items():
        yield name, f"CREATE OR REPLACE MACRO {name}{body}"


def views_sql(models: Iterable[Described] = ()) -> str:
    """The content of `<output>/views/duckdb.sql`.

    Args:
        models: of the job of the first run.
    """
    return ";\n\n".join([_HEADER, *(text for _, text in statements(models))]) + ";\n"
