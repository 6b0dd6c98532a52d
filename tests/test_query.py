"""The views are current and complete, the five questions run as written, mistakes are one line."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import duckdb
import pytest

from tests.made_output import (
    CHANGED_NEW,
    CHANGED_OLD,
    CURED,
    CUT,
    FACES,
    FPS1,
    GOOD,
    LONG,
    MIX,
    NIGHTS,
    NO_VIDEO,
    QUALITY,
    RUNS,
    SCENE_V1,
    SPECS_1,
    TWICE,
    begin,
    outputs_of,
    upload,
)
from vidbatch.data import ModelSpec
from vidbatch.errors import NotFoundInStore, UsageError
from vidbatch.query import connect, output_readme, readme_and_views, result_table, sql, views_sql
from vidbatch.query.readme import COLUMNS, ROWS_ARE, questions
from vidbatch.tables import PARTITIONS, SCHEMAS

FPS1_SAMPLE = "sample LIKE 'fps1.%'"


def one(output: Path | str, query: str) -> object:
    """The only value of a query's only row."""
    rows = sql(str(output), query).rows
    assert len(rows) == 1 and len(rows[0]) == 1
    return rows[0][0]


def column(output: Path | str, query: str) -> list[object]:
    return [row[0] for row in sql(str(output), query).rows]


# what is current


def test_videos_are_the_newest_versions(made_output: Path) -> None:
    query = f"SELECT video_id FROM videos WHERE uri = '{CHANGED_NEW.uri}'"
    assert column(made_output, query) == [CHANGED_NEW.video_id]
    both = column(made_output, query.replace("videos", "videos_all"))
    assert sorted(map(str, both)) == sorted([CHANGED_NEW.video_id, CHANGED_OLD.video_id])
    uris = f"SELECT count(*) - count(DISTINCT uri) FROM videos WHERE {FPS1_SAMPLE}"
    assert one(made_output, uris) == 0
    old = f"SELECT count(*) FROM %s WHERE video_id = '{CHANGED_OLD.video_id}'"
    for table in ("frames", "labels", "embeddings", "detections", "features", "coverage"):
        assert one(made_output, old % table) == 0, table
        assert one(made_output, old % f"{table}_all"), table


def test_the_newest_model_that_covers_a_video_speaks_for_it(made_output: Path) -> None:
    query = """
        SELECT uri, version FROM current_models
        WHERE name = 'scene' ORDER BY uri
    """
    versions = dict(sql(str(made_output), query).rows)
    day_1 = [v for v in GOOD if v.dt == "2026-03-01"]
    for video in (*day_1, CUT, LONG):
        assert versions[video.uri] == "v1", "v2 has not looked at it yet"
    for video in (*(v for v in GOOD if v not in day_1), CHANGED_NEW):
        assert versions[video.uri] == "v2"
    assert NO_VIDEO.uri not in versions and TWICE.uri not in versions
    spoken = """
        SELECT DISTINCT uri, m.version FROM labels JOIN models m USING (model)
        WHERE name = 'scene'
    """
    assert dict(sql(str(made_output), spoken).rows) == versions


def test_no_row_is_doubled_and_none_is_lost_by_the_views(made_output: Path) -> None:
    keys = "sample, video_id, frame_index"
    assert one(made_output, f"SELECT count(*) - count(DISTINCT ({keys})) FROM frames") == 0
    per_frame = f"""
        SELECT count(*) FROM (SELECT {keys} FROM labels JOIN models USING (model)
        WHERE name = 'scene' AND rank = 1 GROUP BY ALL HAVING count(*) > 1)
    """
    assert one(made_output, per_frame) == 0
    frames = one(made_output, f"SELECT count(*) FROM frames WHERE {FPS1_SAMPLE}")
    whole = len(GOOD) + 3  # and CHANGED, CURED, LONG
    assert frames == whole * 30 + 20


def test_failures_are_those_that_nothing_cured(made_output: Path) -> None:
    rows = sql(
        str(made_output), "SELECT uri, model, start_s, generation, kind, run FROM failures"
    ).rows
    by_uri: dict[str, set[tuple[object, ...]]] = {}
    for uri, model, start_s, generation, kind, run in rows:
        name = model.split("-v")[0]
        by_uri.setdefault(uri, set()).add((name, start_s, generation, kind, run))
    names = {"frames", "faces", "colour-mix", "quality"}
    assert by_uri == {
        NO_VIDEO.uri: {(n, 0.0, 0, "no_video_stream", RUNS[0]) for n in names | {"scene"}},
        CUT.uri: {(n, 0.0, 0, "truncated", RUNS[0]) for n in names | {"scene"}},
        # tried again in run 2, by all outputs that were still in the job
        TWICE.uri: {(n, 0.0, 1, "busy", RUNS[1]) for n in names}
        | {("scene", 0.0, 0, "busy", RUNS[0])},
        CURED.uri: {("scene", 0.0, 0, "busy", RUNS[0])},
        LONG.uri: {("faces", 14.0, 0, "ModelError", RUNS[0])},
    }
    assert one(made_output, "SELECT count(*) FROM failures_all") == len(rows) + 4 + 4


def test_coverage_has_each_clip_once_per_output(made_output: Path) -> None:
    query = """
        SELECT count(*), count(DISTINCT (sample, model, video_id, start_s)) FROM coverage
    """
    total, distinct = sql(str(made_output), query).rows[0]
    assert total == distinct
    cured = (
        f"SELECT status, generation FROM coverage WHERE uri = '{CURED.uri}' AND model = 'frames'"
    )
    assert sql(str(made_output), cured).rows == [("ok", 1)]


def test_sampling_rules_are_kept_apart_and_macros_take_the_newest(made_output: Path) -> None:
    uri = GOOD[0].uri
    counts = f"SELECT sample, count(*) FROM frames WHERE uri = '{uri}' GROUP BY ALL ORDER BY ALL"
    (rule_1, frames_1), (rule_2, frames_2) = sql(str(made_output), counts).rows
    assert (rule_1[:5], frames_1, rule_2[:5], frames_2) == ("fps1.", 30, "fps2.", 60)
    assert column(made_output, f"SELECT DISTINCT sample FROM frames_of('{uri}', 0, 30)") == [rule_2]
    newest = f"SELECT name, sample FROM current_models WHERE uri = '{uri}' AND newest_sample"
    assert dict(sql(str(made_output), newest).rows) == {
        "frames": rule_2, "faces": rule_2, "scene": rule_1, "quality": rule_1, "colour-mix": rule_1,
    }  # fmt: skip


def test_minutes_count_what_was_seen_of_what_was_looked_at(made_output: Path) -> None:
    rows = sql(str(made_output), "FROM minutes('face')").rows
    found = {(str(dt), source): (seen, looked) for dt, source, _, seen, looked in rows}
    sixth = round(10 / 60, 3)
    assert found == {
        ("2026-03-01", "cam-01"): (sixth, 0.5),  # under fps 2 alone, not under both rules
        ("2026-03-01", "cam-02"): (sixth, 0.5), ("2026-03-01", "cam-03"): (sixth, 0.5),
        ("2026-03-01", "cam-04"): (sixth, 0.5), ("2026-03-02", "cam-01"): (sixth, 0.5),
        ("2026-03-02", "cam-02"): (sixth, 0.5), ("2026-03-02", "cam-03"): (sixth, round(1 / 3, 3)),
        ("2026-03-03", "cam-01"): (sixth, 0.5), ("2026-03-03", "cam-02"): (sixth, 0.5),
        ("2026-03-03", "cam-03"): (sixth, round(14 / 60, 3)),
    }  # fmt: skip
    assert {row[2] for row in rows} == {"faces"}
    dark = sql(str(made_output), "FROM minutes('dark') WHERE source = 'cam-03'").rows
    assert (date(2026, 3, 2), "cam-03", "quality", 0.0, 0.333) in dark, "looked at, none seen"
    sure = "SELECT sum(minutes) FROM minutes('person', min_score := 0.5) WHERE source = 'cam-01'"
    assert one(made_output, sure) == pytest.approx(3 * sixth)
    assert sql(str(made_output), "FROM minutes('elephant')").rows == []


def test_frames_of_has_each_frame_with_its_boxes(made_output: Path) -> None:
    query = f"SELECT time_s, detection_id, label, x_min FROM frames_of('{GOOD[1].uri}', 8, 12)"
    assert sql(str(made_output), query).rows == [
        (8.0, 0, "face", 0.25), (8.0, 1, "face", 0.25), (9.0, 0, "face", 0.25),
        (9.0, 1, "face", 0.25), (10.0, None, None, None), (11.0, None, None, None),
    ]  # fmt: skip


def test_features_of_a_model_are_columns(made_output: Path) -> None:
    query = f"""
        SELECT frame_index, brightness, sharpness FROM features_quality
        WHERE uri = '{GOOD[1].uri}' ORDER BY frame_index
    """
    rows = sql(str(made_output), query).rows
    assert len(rows) == 30
    assert rows[0] == (0, 0.0, None), "a feature that is not a number has no row"
    assert rows[15] == (15 * 25, 0.5, 0.5)


def test_embeddings_of_a_model_are_vectors_of_its_newest_width(made_output: Path) -> None:
    kinds = "SELECT typeof(embedding), count(*) FROM embeddings_%s GROUP BY ALL"
    assert sql(str(made_output), kinds % "scene").rows == [("FLOAT[16]", 150)]
    ((kind, rows),) = sql(str(made_output), kinds % "colour_mix").rows
    assert kind == "FLOAT[300]" and rows == 9 * 30 + 20


# the file that the first run leaves


def test_the_file_of_the_output_gives_the_same_views(
    made_output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made_output)
    text = (made_output / "views" / "duckdb.sql").read_text("utf-8")
    assert text == views_sql(SPECS_1)
    with duckdb.connect() as connection:
        connection.execute(text)
        names = [n for (n,) in connection.execute("SHOW TABLES").fetchall()]
        for name in names:
            mine = connection.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0]
            if name != "embeddings_scene":  # of v1's width there: the file cannot know of v2
                assert mine == one(made_output, f"SELECT count(*) FROM {name}"), name
        assert connection.execute("SELECT count(*) FROM minutes('face')").fetchall() == [(10,)]


def test_the_file_of_the_output_takes_another_root(
    made_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as connection:
        connection.execute("SET VARIABLE vidbatch_root = ?", [str(made_output)])
        connection.execute((made_output / "views" / "duckdb.sql").read_text("utf-8"))
        assert connection.execute("SELECT count(*) FROM frames").fetchall()[0][0] > 0


def test_the_views_know_every_table_and_every_model(made_output: Path) -> None:
    with connect(str(made_output)) as connection:
        names = {n for (n,) in connection.execute("SHOW TABLES").fetchall()}
    histories = {f"{t}_all" for t, levels in PARTITIONS.items() if levels}
    of_models = {"features_quality", "embeddings_scene", "embeddings_colour_mix"}
    assert names == {*SCHEMAS, *histories, *of_models, "current_models"}


# the five questions


@pytest.mark.parametrize("title", questions(SPECS_1))
def test_a_question_runs_as_written(title: str, made_output: Path) -> None:
    readme = (made_output / "README.md").read_text("utf-8")
    text = questions(SPECS_1)[title]
    assert text in readme
    result = sql(str(made_output), text)
    if title.startswith("1"):
        assert result.columns == ("dt", "source", "model", "minutes", "looked_at_minutes")
        assert len(result.rows) == 9
    elif title.startswith("2"):
        assert len(result.rows) == 50
        assert result.rows[0][2] == pytest.approx(1.0, abs=1e-6), "the picture itself comes first"
        assert [r[2] for r in result.rows] == sorted((r[2] for r in result.rows), reverse=True)
    elif title.startswith("3"):
        assert result.rows == [], "nothing failed in the last run"
        earlier = text.replace("(SELECT max(run) FROM coverage_all)", f"'{RUNS[1]}'")
        rows = sql(str(made_output), earlier).rows
        assert {(r[0], r[4], r[6]) for r in rows} == {(TWICE.uri, "busy", "comes back by itself")}
    elif title.startswith("4"):
        street, person = ("street", "street", 80), ("person", "person", 40)
        assert [row[:3] for row in result.rows] == [street, person]
        assert [round(v, 3) for v in result.rows[0][3:]] == [0.8, 0.7]
    else:
        assert [row[1] for row in result.rows] == [10 + i / 2 for i in range(20)]


@pytest.mark.parametrize("specs", [(), (FACES,), (QUALITY,), (MIX,), (SCENE_V1, FACES)])
def test_the_questions_run_for_any_job(specs: tuple[ModelSpec, ...], tmp_path: Path) -> None:
    begin(tmp_path)
    with connect(str(tmp_path)) as connection:
        connection.execute("SET VARIABLE vidbatch_root = ?", [str(tmp_path)])
        connection.execute(views_sql(specs))
        for text in questions(specs).values():
            assert connection.execute(text).fetchall() == []


def test_the_readme_says_what_every_column_is() -> None:
    assert set(ROWS_ARE) == set(SCHEMAS)
    columns = {c for schema in SCHEMAS.values() for c in schema.names}
    assert set(COLUMNS) == columns | {"sample", "model", "dt"}
    text = output_readme(SPECS_1, FPS1)
    for name in SCHEMAS:
        section = text.partition(f"### {name}\n")[2].partition("###")[0]
        for column_name in SCHEMAS[name].names:
            assert f"| {column_name} |" in section
    assert set(readme_and_views(SPECS_1, FPS1)) == {"README.md", "views/duckdb.sql"}


# nothing there, and mistakes


def test_an_output_of_nothing_gives_no_rows(tmp_path: Path) -> None:
    result = sql(str(tmp_path / "new"), "SELECT label, dt FROM labels WHERE dt > '2026-01-01'")
    assert (result.columns, result.rows) == (("label", "dt"), [])
    assert "nothing has been written" in result.note
    assert one(tmp_path / "new", "SELECT count(*) FROM coverage") == 0
    assert sql(str(tmp_path / "new"), "FROM minutes('face')").rows == []
    assert not (tmp_path / "new").exists()


def test_an_output_that_has_only_begun_gives_no_rows(tmp_path: Path) -> None:
    begin(tmp_path / "out")
    assert sql(str(tmp_path / "out"), "FROM labels").note == ""
    for table in SCHEMAS:
        assert one(tmp_path / "out", f"SELECT count(*) FROM {table}") == 0
    assert sql(str(tmp_path / "out"), "FROM frames_of('x', 0, 1)").rows == []


@pytest.mark.parametrize(
    ("query", "said", "hint"),
    [
        ("SELECT * FROM lables", "no table 'lables'", "did you mean 'labels'?"),
        ("SELECT labl FROM labels", "no column 'labl'", "did you mean 'label'?"),
        ("SELECT l.scor FROM labels l", "no column 'scor'", "did you mean 'score'?"),
        ("FROM features_qualty", "no table 'features_qualty'", "did you mean 'features_quality'?"),
        ("FROM minute('x')", "no function 'minute'", "did you mean 'minutes'?"),
        ("SELEC 1", "the query cannot be run", 'syntax error at or near "SELEC"'),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(
    query: str, said: str, hint: str, made_output: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        sql(str(made_output), query)
    assert hint in caught.value.message and "\n" not in caught.value.message


def test_values_come_as_plain_python(made_output: Path) -> None:
    query = """
        SELECT max(listed_at) AS seen, max(dt) AS day, sum(size_bytes) AS bytes, [1, 2] AS pair
        FROM videos
    """
    result = sql(str(made_output), query)
    assert result.columns == ("seen", "day", "bytes", "pair")
    seen, day, size_bytes, pair = result.rows[0]
    assert seen == NIGHTS[2] and seen.utcoffset() == datetime.now(UTC).utcoffset()
    assert (day, type(size_bytes), pair) == (date(2026, 3, 3), int, [1, 2])
    assert sql(str(made_output), "SELECT 1 AS a; SELECT 2 AS b").rows == [(2,)]


def test_a_result_is_shown_as_it_is(made_output: Path) -> None:
    from rich.console import Console

    def shown(query: str) -> str:
        console = Console(width=120, file=io.StringIO())
        console.print(result_table(sql(str(made_output), query)))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    text = shown("SELECT '[h264 @ 0x5] x' AS \"a[1]\"")
    assert "[h264 @ 0x5] x" in text and "a[1]" in text
    assert "… 300]" in shown("SELECT embedding FROM embeddings_colour_mix LIMIT 1")
    text = shown("SELECT * FROM range(300) AS numbers(a_long_name_for_a_number)")
    assert "199" in text and "200 " not in text and "100 more rows" in text


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    root = tmp_path / "a[1]*?'b"
    begin(root)
    assert one(root, "SELECT count(*) FROM labels") == 0
    assert sql(str(root), "FROM labels").note == ""


# buckets


@pytest.mark.s3
def test_the_same_views_over_a_bucket(made_output: Path, s3_bucket: str) -> None:
    uri = f"s3://{s3_bucket}/deep/tables"
    upload(made_output, uri)
    for query in (
        "SELECT count(*), round(sum(score), 3) FROM labels",
        "FROM minutes('face')",
        "SELECT round(sum(embedding[1]), 3) FROM embeddings_scene",
        "SELECT uri, model FROM failures ORDER BY ALL",
    ):
        assert sql(uri, query).rows == sql(str(made_output), query).rows
    with pytest.raises(NotFoundInStore, match="no such bucket"):
        sql("s3://no-such-bucket-anywhere/x", "FROM labels")
    assert sql(f"s3://{s3_bucket}/other", "FROM labels").rows == []


def test_any_other_store_that_fsspec_knows() -> None:
    make = begin("memory://query-test/tables")
    assert one("memory://query-test/tables", "SELECT count(*) FROM labels") == 0
    make.write_models(outputs_of(SPECS_1, FPS1), RUNS[0])
    assert one("memory://query-test/tables", "SELECT count(*) FROM models") == 4


def test_importing_the_views_loads_no_engine() -> None:
    code = "import sys, vidbatch.query, vidbatch.report; print('duckdb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_feature_may_be_called_like_a_column(tmp_path: Path) -> None:
    spec = replace(QUALITY, features=("uri", 'a "b"', "it's"))
    begin(tmp_path)
    with duckdb.connect() as connection:
        connection.execute("SET VARIABLE vidbatch_root = ?", [str(tmp_path)])
        connection.execute(views_sql((spec,)))
        found = connection.execute("FROM features_quality")
        assert {"uri", "uri_value", 'a "b"', "it's"} <= {d[0] for d in found.description}
