"""The output's own README: its tables, columns, units and keys, and five questions as SQL."""

from __future__ import annotations

from collections.abc import Sequence

from vidbatch.data import ModelSpec, Sample
from vidbatch.query.views import MACROS, model_bodies, table_glob, view_bodies, views_sql
from vidbatch.tables import SCHEMAS, UNIQUE_KEYS, sampling_partition

ROWS_ARE = {
    "videos": "video version: facts of the object and its header",
    "coverage": "clip and output (a model, or `frames`), per generation: how it ended",
    "frames": "sampled frame, also where no model found anything",
    "labels": "frame and label kept",
    "embeddings": "frame (or crop, or window)",
    "detections": "box",
    "features": "frame and scalar",
    "masks": "frame and class that is in it",
    "windows": "temporal window and label kept",
    "audio": "window of sound and label or scalar kept",
    "shots": "shot, by the clip it begins in",
    "tracks": "box that is part of a track (`vidbatch track`)",
    "failures": "clip and output that ended `failed` or `partial`",
    "models": "model under a sampling rule",
    "runs": "run that came to its end",
}
"""What one row of each table stands for."""

COLUMNS = {
    "sample": "partition: the sampling rule",
    "model": "partition: `<name>-<version>.<hash>`, or `frames`",
    "dt": "partition: local date of `captured_at`",
    "video_id": "hash of `uri` and version: a changed object is a new video",
    "uri": "where the object lies, unquoted",
    "source": "the camera or channel; empty if the job's date rule names none",
    "frame_index": "ordinal of the frame in the video, from 0, independent of sampling",
    "pts": "presentation time in units of the video's time base; null where the stream has none",
    "time_s": "seconds from the first frame of the video",
    "modified_at": "of the object, UTC",
    "listed_at": "when the version was first listed, UTC",
    "captured_at": "UTC; null if unknown",
    "captured_from": "where that is from: `key`, `container` or `modified`",
    "key_fields": "JSON of the other fields found in the key",
    "version": "etag, or size and time of change; of a model: as its file says",
    "size_bytes": "of the object",
    "container": "format name",
    "codec": "of the video stream",
    "width_px": "upright, after rotation",
    "height_px": "upright, after rotation",
    "rotation_deg": "clockwise turn that makes the coded picture upright",
    "time_base_numerator": "pts × numerator / denominator = seconds",
    "time_base_denominator": "see above",
    "fps_numerator": "average frame rate as the header says",
    "fps_denominator": "see above",
    "start_s": "of the clip, window or shot, seconds from frame 0; of sound it may be negative (in "
    "`videos`: the container's clock at frame 0)",
    "end_s": "its end, not included; null for a shot that goes on after its clip: see the view",
    "duration_s": "as the header says",
    "frame_count": "null if the header does not say",
    "audio_codec": "null without sound",
    "audio_rate_hz": "null without sound",
    "run": "the run that wrote the row",
    "start_frame": "first `frame_index` of the clip, window or shot",
    "end_frame": "end of the frames, not included; in `embeddings` of windows only; null for a "
    "shot that goes on after its clip: see the view",
    "generation": "0, then 1, 2, … for each retry of the clip",
    "frames": "sampled frames",
    "status": "`ok`, `partial` (damaged: the good rows stand) or `failed` (no row)",
    "reason": "null when ok",
    "frames_decoded": "frames decoded to get at the sampled ones",
    "decode_errors": "errors the decoder reported",
    "corrupt_frames": "frames marked as damaged",
    "fallback": "null, or why decoding had to be sequential",
    "device": "what the model ran on",
    "committed_at": "UTC",
    "covers_s": "seconds of the video the frame stands for: sum it to get durations",
    "is_keyframe": "whether the frame is coded by itself",
    "is_corrupt": "whether the decoder marked it as damaged",
    "rank": "1 is the best label of the frame",
    "label": "name",
    "label_id": "position in the model's list of labels",
    "score": "0..1",
    "detection_id": "ordinal of the box in its frame, by falling score; null if not of a box",
    "of_model": "the `model` whose box it is: join `detections` on it, the frame and "
    "`detection_id`; null if not of a box",
    "area": "share of the upright frame, 0..1",
    "mask_rle": "run lengths as COCO compresses them; null unless the model file asks for them",
    "mask_width_px": "size of that mask: the frame, or what the model saw of it, scaled",
    "mask_height_px": "see above",
    "embedding": "list of float32; L2-normalised where `models.normalised`",
    "x_min": "0..1 of the upright frame's width",
    "y_min": "0..1 of the upright frame's height",
    "x_max": "0..1 of the upright frame's width",
    "y_max": "0..1 of the upright frame's height",
    "feature": "name of the scalar",
    "track_id": "of the thing the box shows: 1, 2, … within the video and `model`; what was seen "
    "in a single frame may be an error of the detector: count rows per track",
    "value": "its value",
    "stage": "`read`, `probe`, `decode`, `predict` or `write`",
    "kind": "a stable word for the cause; of a model: what it is; of sound: `label`, `feature`",
    "message": "what happened, at most 500 characters, without secrets",
    "advice": "what to do",
    "attempts": "made in that run",
    "retryable": "whether the same input may succeed later",
    "failed_at": "UTC",
    "fingerprint": "hash of all that can change its rows",
    "name": "of the model, without version",
    "adapter": "what runs it",
    "dim": "length of its embeddings, 0 without",
    "normalised": "whether they are L2-normalised",
    "labels": "label_id (from 0) → label; in DuckDB `labels[label_id + 1]`",
    "thresholds": "JSON of floors and top-k",
    "weights_sha256": "JSON of file → hash",
    "config": "JSON of the part of the model file that changes rows",
    "first_run": "the run that first had it",
    "job": "first digits of the resolved job file's hash",
    "started_at": "UTC",
    "ended_at": "UTC",
    "exit_code": "0 is a finished run",
    "videos": "videos begun",
    "spans_ok": "clips × outputs that ended ok",
    "spans_partial": "… partial",
    "spans_failed": "… failed",
    "video_hours": "hours of video looked at",
    "bytes_read": "of the archive",
    "vidbatch_version": "software",
    "ray_version": "software",
    "torch_version": "software",
    "av_version": "software",
    "ffmpeg_version": "software",
}
"""Meaning and unit of every column; one name means one thing in all tables."""


def readme_and_views(specs: Sequence[ModelSpec], sample: Sample) -> dict[str, bytes]:
    """What the first run of an output leaves for its readers: key → content."""
    return {
        "README.md": output_readme(specs, sample).encode(),
        "views/duckdb.sql": views_sql(specs).encode(),
    }


def output_readme(specs: Sequence[ModelSpec], sample: Sample) -> str:
    """The text of `<output>/README.md`.

    Args:
        specs: models of the first run's job; the questions are asked of them.
        sample: its sampling rule.
    """
    views = {**view_bodies(), **model_bodies(specs)}
    parts = [
        _INTRO.format(sample=sampling_partition(sample), views=", ".join(f"`{v}`" for v in views)),
        "## Five questions\n",
        *(f"{title}\n\n```sql\n{text}\n```\n" for title, text in questions(specs).items()),
        "## Tables\n",
        "Times are seconds (`_s`) from the first frame of the video, or UTC timestamps (`_at`).",
        "Intervals do not include their end. Boxes are fractions of the upright frame.\n",
        *(_table(name) for name in SCHEMAS),
    ]
    return "\n".join(parts)


def questions(specs: Sequence[ModelSpec]) -> dict[str, str]:
    """Five questions and their SQL over the views, asked of the job's own models and labels."""
    label, asked = _pick_label(specs)
    compared, table = asked or ("scene", "labels")
    drawn = [v for v in model_bodies(specs) if v.startswith("embeddings_")]
    vectors = drawn[0] if drawn else "embeddings"
    similarity = "array_cosine_similarity" if drawn else "list_cosine_similarity"
    return {
        "1. Minutes in which a label is seen, per camera and day": f"""\
FROM minutes('{label}')""",
        "2. The 50 frames most like a picture (here: the first frame of the first video)": f"""\
WITH picture AS (
    SELECT model, embedding FROM {vectors} ORDER BY uri, frame_index LIMIT 1
)
SELECT e.uri, e.time_s, {similarity}(e.embedding, picture.embedding) AS similarity
FROM {vectors} e JOIN picture USING (model)
ORDER BY similarity DESC LIMIT 50""",
        "3. Which videos failed last night, and why": """\
SELECT uri, model, start_s, stage, kind, message, advice
FROM failures
WHERE run = (SELECT max(run) FROM coverage_all)
ORDER BY uri, model, start_s""",
        "4. Version v1 of a model against v2, in March": _COMPARED[table].format(model=compared),
        "5. All frames of one video between 00:10 and 00:20, with their boxes": """\
FROM frames_of((SELECT min(uri) FROM videos), 10, 20)""",
    }


_COMPARED = {
    "labels": """\
WITH march AS (
    SELECT l.sample, l.video_id, l.frame_index, m.version, l.label, l.score
    FROM labels_all l JOIN models m USING (model) SEMI JOIN videos USING (sample, video_id)
    WHERE m.name = '{model}' AND month(l.dt) = 3 AND l.rank = 1
)
SELECT v1.label AS v1, v2.label AS v2, count(*) AS frames,
       avg(v1.score) AS score_v1, avg(v2.score) AS score_v2
FROM (FROM march WHERE version = 'v1') v1
JOIN (FROM march WHERE version = 'v2') v2 USING (sample, video_id, frame_index)
GROUP BY ALL ORDER BY frames DESC""",
    "detections": """\
WITH looked AS (
    SELECT c.sample, c.video_id
    FROM coverage_all c JOIN models m USING (model) SEMI JOIN videos USING (sample, video_id)
    WHERE m.name = '{model}' AND m.version IN ('v1', 'v2') AND c.status IN ('ok', 'partial')
    GROUP BY ALL HAVING count(DISTINCT m.version) = 2
)
SELECT m.version, d.label, count(*) AS boxes, avg(d.score) AS score
FROM detections_all d JOIN models m USING (model) SEMI JOIN looked USING (sample, video_id)
WHERE m.name = '{model}' AND month(d.dt) = 3
GROUP BY ALL ORDER BY ALL""",
}
"""Where both versions looked: labels frame by frame, boxes by their number."""


def _pick_label(specs: Sequence[ModelSpec]) -> tuple[str, tuple[str, str] | None]:
    """A label worth asking for, and (model, table) of the first model that gives labels."""
    asked = next(
        (
            (spec.name, table)
            for table in ("labels", "detections")
            for spec in specs
            if table in spec.gives
        ),
        None,
    )
    known = [label for spec in specs for label in spec.labels]
    telling = [label for label in ("person", "face", "car", "dark") if label in known]
    return (telling or known or ["person"])[0], asked


def _table(name: str) -> str:
    schema = SCHEMAS[name]
    lines = [f"### {name}\n", f"One row per {ROWS_ARE[name]}."]
    lines += [f"Files: `{table_glob(name)}`", f"Unique: {', '.join(UNIQUE_KEYS[name])}\n"]
    lines += ["| column | type | meaning |", "|---|---|---|"]
    for field in schema:
        kind = str(field.type).replace("element: ", "").replace(" not null", "")
        kind = kind if field.nullable else f"{kind}, never null"
        lines.append(f"| {field.name} | {kind} | {COLUMNS[field.name]} |")
    return "\n".join(lines) + "\n"


_INTRO = f"""\
# Tables of a video archive

Written by vidbatch; the first run sampled frames by `{{sample}}`. Plain Parquet under `v1/`, for
any engine, by the globs below: level by level, not `**`. `sample`, `model` and `dt` stand in the
path and come as columns (hive partitions). Nothing is ever overwritten: rows of an older version of
a video or model, and failures that were cured, stay in the files. The views leave them out:

    vidbatch sql OUTPUT "SELECT ..."            # on disk or in a bucket
    duckdb -init views/duckdb.sql               # in this folder

Views: {{views}}.
Macros: {", ".join(f"`{name}{body.partition(' AS')[0]}`" for name, body in MACROS.items())}.
`…_all` hold the history. An output may have been sampled by several rules: each is kept apart in
the column `sample`; filter by it where you count, or join `current_models` and take
`newest_sample`, as the macros do. What no row of `coverage` covers has not been looked at: it is
not "nothing there".
"""
