"""Tracks: who is who on made scenes at several rates, and how they come into an output."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.made_tracks import (
    NOW,
    World,
    boxes_of,
    idf1,
    make_scene,
    switches,
)
from tests.memory_store import Bucket, Faults, Killed, MemoryStore
from tests.outputs import check_no_key_twice, check_nothing_changed, fingerprints, read_tables
from vidbatch import cli, query
from vidbatch.config import parse_job
from vidbatch.data import Ints, Pixels
from vidbatch.errors import UsageError
from vidbatch.ledger import Ledger
from vidbatch.media.writing import write_video
from vidbatch.pipeline.run import run_job
from vidbatch.storage import open_store
from vidbatch.track import TrackRule, TrackWhat, load_rule, report_lines, track
from vidbatch.track.associate import Boxes, Linker, load_matcher
from vidbatch.verify import verify

ROOT = Path(__file__).resolve().parents[1]
MATCH = load_matcher()


def link(boxes: Boxes, **values: Any) -> Ints:
    looks = "looks" if boxes.embedding.shape[1] else None
    return Linker(TrackWhat(on="faces", **values).settled(looks), MATCH).link(boxes)


@pytest.mark.parametrize(
    ("fps", "appearance", "least", "most_switches"),
    [
        (1, True, 0.85, 12),
        (2, True, 0.85, 20),
        (8, True, 0.9, 15),
        (25, True, 0.9, 15),
        (8, False, 0.85, 10),
        (25, False, 0.78, 10),
    ],
)
def test_things_keep_their_tracks(
    fps: int, appearance: bool, least: float, most_switches: int
) -> None:
    """Eight things for twenty seconds; on irregular times too."""
    for irregular in (False, True):
        seeds = (1,) if fps == 25 else (1, 2)
        scenes = [make_scene(fps, seed=seed, irregular=irregular) for seed in seeds]
        ids = [link(boxes_of(scene, appearance=appearance)) for scene in scenes]
        right = [idf1(s.identity, i) for s, i in zip(scenes, ids, strict=True)]
        changed = [switches(s.identity, i) for s, i in zip(scenes, ids, strict=True)]
        assert np.mean(right) > least, right
        assert np.mean(changed) < most_switches, changed


@pytest.mark.parametrize("fps", [1, 2])
def test_motion_alone_fails_below_its_rate(fps: int) -> None:
    """Why such samples are refused."""
    scene = make_scene(fps, seed=1)
    assert idf1(scene.identity, link(boxes_of(scene, appearance=False))) < 0.5


def standing(times: list[float], x: list[float] | float = 0.4, **facts: Any) -> Boxes:
    """One box a frame."""
    n = len(times)
    left = np.broadcast_to(np.asarray(x, np.float64), (n,))
    columns: dict[str, Any] = {
        "frame_index": np.arange(n),
        "time_s": np.array(times),
        "label_id": np.zeros(n, np.int64),
        "score": np.full(n, 0.9, np.float32),
        "xyxy": np.stack([left, np.full(n, 0.4), left + 0.1, np.full(n, 0.6)], 1),
        "embedding": np.zeros((n, 0), np.float32),
    }
    return Boxes(**(columns | facts))


@pytest.mark.parametrize("fps", [8, 25, 60])
def test_gates_are_seconds_at_any_rate(fps: int) -> None:
    before = [k / fps for k in range(fps)]
    assert set(link(standing([*before, before[-1] + 1.9])).tolist()) == {1}
    assert link(standing([*before, before[-1] + 2.1]))[-1] == 2
    assert link(standing([*before, before[-1] + 2.1]), lost_s=3)[-1] == 1


def test_a_low_score_continues_a_track_and_begins_none() -> None:
    times = [k / 10 for k in range(4)]
    score = np.array([0.3, 0.9, 0.3, 0.3], np.float32)
    assert link(standing(times, score=score)).tolist() == [0, 1, 1, 1]
    far = standing(times, x=[0.1, 0.1, 0.1, 0.7], score=score)
    assert link(far).tolist() == [0, 1, 1, 0]


def test_labels_are_never_mixed() -> None:
    labels = np.array([0, 0, 1, 1, 0])
    assert link(standing([k / 10 for k in range(5)], label_id=labels)).tolist() == [1, 1, 2, 2, 1]


def test_damaged_input_is_survived() -> None:
    """Times that step back or stand still, boxes without area, vectors that are missing."""
    odd = standing([0.0, 0.5, 0.2, 0.2, 0.3], xyxy=np.full((5, 4), 0.5))
    assert (link(odd) > 0).all()
    looks = np.full((5, 2), np.nan, np.float32)
    looks[[0, 3]] = [1, 0]
    sparse = standing([0.0, 1.0, 2.0, 3.0, 4.0], embedding=looks)
    assert link(sparse).tolist() == [1, 2, 3, 1, 4]  # without a vector, who is it?
    assert link(standing([])).tolist() == []


def test_clip_by_clip_is_the_same_as_at_once() -> None:
    boxes = boxes_of(make_scene(8, seed=3), appearance=True)
    what = TrackWhat(on="faces").settled("looks")
    linker, names = Linker(what, MATCH), list(Boxes.__dataclass_fields__)
    cuts = [0, *np.searchsorted(boxes.frame_index, [40, 41, 100]).tolist(), len(boxes.time_s)]
    parts = [
        linker.link(Boxes(**{name: getattr(boxes, name)[a:b] for name in names}))
        for a, b in pairwise(cuts)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), link(boxes))


# into an output


SCENES = {"a": make_scene(8, seed=1), "b": make_scene(8, seed=2, things=4)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Video a in four clips over two tasks, the second with b: all ok at 8 fps."""
    world = World(open_store(str(tmp_path / "tables")), 8, SCENES)
    clips = world.clips("a", 4)
    for task in world.plan(clips[:2], [*clips[2:], *world.clips("b")]):
        world.commit(task)
    return world


def quality(world: World, name: str) -> tuple[float, Ints]:
    """IDF1 of a video's rows in the output, and its tracks."""
    video_id = world.video(name).video_id
    rows = [
        row
        for table in read_tables(world.store)["tracks"].values()
        for row in table.to_pylist()
        if row["video_id"] == video_id
    ]
    tracked = {(r["frame_index"], r["detection_id"]): r["track_id"] for r in rows}
    truth = world.identities(name)
    assert tracked.keys() <= truth.keys()
    ids = np.array([tracked.get(key, 0) for key in truth])
    return idf1(np.array(list(truth.values())), ids), ids


def test_tracks_run_across_clips_and_tasks(world: World) -> None:
    uri = world.store.uri
    report = track(uri, now=NOW)
    assert (report.tasks, report.videos, report.waiting_videos, report.failed) == (2, 2, 0, {})
    assert report.appearance is None and report.rate_fps == 8
    boxes = [boxes_of(scene, appearance=False) for scene in SCENES.values()]
    assert report.tracks == sum(int(link(b).max()) for b in boxes)
    for name in SCENES:
        found, ids = quality(world, name)
        assert found > 0.85
        assert report.boxes == sum(len(s.time_s) for s in SCENES.values())
        assert set(ids.tolist()) - {0} == set(range(1, ids.max() + 1))
    seams = query.sql(
        uri,
        """
        SELECT count(*) FROM (SELECT track_id FROM tracks WHERE uri LIKE '%a.mp4'
        GROUP BY track_id HAVING min(time_s) < 9 AND max(time_s) > 11)""",
    )
    assert seams.rows[0][0] >= 3
    check_no_key_twice(read_tables(world.store))
    proof = verify(world.ledger)
    assert proof.ok, proof.problems
    assert {c.model: (c.planned, c.ok, c.pending) for c in proof.outputs} == {
        "frames": (5, 5, 0),
        world.faces.partition: (5, 5, 0),
        report.model: (5, 5, 0),
    }


def test_every_row_has_its_box_and_stands_for_its_model(world: World) -> None:
    report = track(world.store.uri, now=NOW)
    orphans = query.sql(
        world.store.uri,
        """
        SELECT count(*), count(d.detection_id), count(DISTINCT t.of_model) FROM tracks t
        LEFT JOIN detections_all d ON d.sample = t.sample AND d.model = t.of_model
            AND d.video_id = t.video_id AND d.frame_index = t.frame_index
            AND d.detection_id = t.detection_id AND d.label = t.label AND d.time_s = t.time_s""",
    )
    assert orphans.rows == [(report.tracked_boxes, report.tracked_boxes, 1)]
    models = query.sql(world.store.uri, "SELECT name, version, adapter, config FROM models "
                       f"WHERE model = '{report.model}'").rows  # fmt: skip
    assert models[0][:3] == ("faces-tracks", "v1", "track")
    assert json.loads(models[0][3])["of_model"] == world.faces.partition == report.of_model


def test_a_rerun_writes_nothing_and_new_videos_are_taken(world: World) -> None:
    uri = world.store.uri
    first = track(uri, now=NOW)
    before = fingerprints(world.store)
    again = track(uri, now=NOW)
    assert (again.tasks, again.tasks_before, again.model) == (0, 2, first.model)
    assert "nothing was written" in "\n".join(report_lines(again))
    assert fingerprints(world.store) == before
    scene = make_scene(8, seed=5)
    later = World(world.store, 8, {**SCENES, "c": scene}, hour=10)
    (task,) = later.plan(later.clips("c"))
    later.commit(task)
    third = track(uri, now=NOW)
    assert (third.tasks, third.videos, third.boxes) == (1, 1, len(scene.time_s))
    check_nothing_changed(before, fingerprints(world.store))


def test_another_rule_is_another_partition(world: World, tmp_path: Path) -> None:
    uri = world.store.uri
    file = tmp_path / "rule.yaml"
    file.write_text("name: faces-tracks\nversion: v2\nwhat: {on: faces, lost_s: 1.5s}\n")
    later = track(uri, rule=load_rule(file), now=NOW + timedelta(seconds=1))
    models = {track(uri, now=NOW).model, later.model}
    assert len(models) == 2
    check_no_key_twice(read_tables(world.store))
    rows = query.sql(uri, "SELECT DISTINCT model FROM tracks").rows
    assert len(rows) == 1 and rows[0][0].startswith("faces-tracks-v2."), "the newest speaks"
    shipped = load_rule(ROOT / "configs" / "tracks" / "faces.yaml")
    assert track(uri, rule=shipped, now=NOW).tasks == 0, "the shipped file says the defaults"


def test_what_may_come_back_is_waited_for(tmp_path: Path) -> None:
    world = World(open_store(str(tmp_path / "tables")), 8, SCENES)
    clips = world.clips("a", 2)
    whole = world.clips("b")
    first, second = world.plan([clips[0], *whole], [clips[1]])
    world.commit(first)
    assert track(str(tmp_path / "tables"), now=NOW).waiting_videos == 2, "second is not done yet"
    world.commit(second, failed=[clips[1]])
    report = track(str(tmp_path / "tables"), now=NOW)
    assert (report.tasks, report.waiting_videos) == (0, 2)
    assert "tracks" not in read_tables(world.store)
    world.commit(world.retry(clips[1]))
    report = track(str(tmp_path / "tables"), now=NOW)
    assert (report.tasks, report.videos, report.waiting_videos) == (2, 2, 0)
    assert quality(world, "a")[0] > 0.85
    assert verify(world.ledger).ok


def test_what_failed_for_good_is_passed_over_and_named(tmp_path: Path) -> None:
    uri = str(tmp_path / "tables")
    world = World(open_store(uri), 8, SCENES)
    clips = world.clips("a", 4)
    (task,) = world.plan(clips)
    world.commit(task, failed=[clips[1]], retryable=False)
    report = track(uri, now=NOW)
    assert (report.tasks, report.failed) == (1, {"no_boxes": 1})
    rows = query.sql(uri, f"SELECT kind, message FROM failures WHERE model = '{report.model}'").rows
    assert rows == [("no_boxes", "its boxes are missing: busy")]
    frames = query.sql(uri, "SELECT count(*) FROM tracks WHERE frame_index BETWEEN 40 AND 79").rows
    assert frames == [(0,)]
    before = fingerprints(world.store)
    world.commit(world.retry(clips[1]))
    later = track(uri, now=NOW)
    assert (later.tasks, later.cured_clips) == (0, 1)
    assert "another version" in "\n".join(report_lines(later))
    check_nothing_changed(before, fingerprints(world.store))
    assert verify(world.ledger).ok


def test_killed_anywhere_it_ends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of a video go together though its tasks were committed by different calls."""
    scenes = {"a": make_scene(8, seed=1, things=4)}
    tables = []
    for kill_before in (None, 2, 4, 5, 6, 8):
        bucket = Bucket()
        world = World(MemoryStore(bucket), 8, scenes)
        clips = world.clips("a", 2)
        for task in world.plan(clips[:1], clips[1:]):
            world.commit(task, failed=clips[1:], retryable=False)
        if kill_before:
            dying = MemoryStore(bucket, Faults(kill_before=kill_before))
            monkeypatch.setattr("vidbatch.track.work.open_store", lambda *_, s=dying: s)
            with pytest.raises(Killed):
                track("memory://", now=NOW + timedelta(hours=10))
        if (kill_before or 0) > 4:  # a task is committed; what is cured now comes too late for it
            world.hour = 20
            world.commit(world.retry(clips[1]))
        alive = MemoryStore(bucket)
        monkeypatch.setattr("vidbatch.track.work.open_store", lambda *_, s=alive: s)
        track("memory://", now=NOW + timedelta(hours=30))
        assert verify(Ledger(alive)).ok
        (rows,) = read_tables(alive)["tracks"].values()
        tables.append(rows)
    assert all(rows.equals(tables[0]) for rows in tables)


def sparse_world(folder: Path) -> World:
    scenes = {"a": make_scene(2, seed=1), "b": make_scene(2, seed=2, things=4)}
    world = World(open_store(str(folder)), 2, scenes)
    clips = world.clips("a", 2)
    for task in world.plan(clips[:1], [clips[1], *world.clips("b")]):
        world.commit(task)
    return world


def test_too_few_samples_are_refused_in_one_line(tmp_path: Path) -> None:
    world = sparse_world(tmp_path / "tables")
    before = fingerprints(world.store)
    with pytest.raises(UsageError) as caught:
        track(world.store.uri)
    for words in ("has 2 frames a second", "from 8 on", "sample: {fps: 8}", "`on: faces`"):
        assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert fingerprints(world.store) == before


def test_appearance_takes_over_where_samples_are_sparse(tmp_path: Path) -> None:
    world = sparse_world(tmp_path / "tables")
    uri = world.store.uri
    world.ledger.write_models([world.looks], "run-1")
    log = world.ledger.read_plan(world.sampling)
    first, second = log.tasks()
    world.commit(first, world.looks)
    assert (waiting := track(uri, now=NOW)).waiting_videos == 2
    assert waiting.appearance == "looks"
    world.commit(second, world.looks, failed=second.clips[1:], retryable=False)
    report = track(uri, now=NOW)
    assert report.failed == {"no_embeddings": 1}
    found, _ = quality(world, "a")
    assert found > 0.85
    boxes = boxes_of(world.scenes["a"], appearance=True)
    assert report.tracks == link(boxes).max(), "looks belong to their boxes"
    with pytest.raises(UsageError, match="mirror gives no embeddings"):
        track(uri, appearance="mirror")


def test_a_sparse_video_among_dense_ones_is_a_failure_row(world: World) -> None:
    """As under `every: 3`, where one camera records fewer frames."""
    uri = world.store.uri
    rule = TrackRule(name="strict", what=TrackWhat(on="faces", min_fps=8.2))
    slow = World(world.store, 8, {**SCENES, "slow": make_scene(4, seed=1)}, hour=10)
    (task,) = slow.plan(slow.clips("slow"))
    slow.fps = 4
    slow.commit(task)
    report = track(uri, rule=rule, now=NOW)
    assert report.failed == {"too_sparse": 1} and report.videos == 2
    assert quality(world, "a")[0] > 0.85


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "cars"}, "there are: faces under fps8."),
        ({"sample": "fps2"}, "there are: faces under fps8."),
        ({"rule": TrackRule(name="faces", what=TrackWhat(on="faces"))}, "another name"),
        ({"rule": TrackRule(name="t", what=TrackWhat(on="faces")), "model": "cars"}, "on: faces"),
    ],
)
def test_what_is_meant_must_be_there(world: World, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        track(world.store.uri, **arguments)


def test_an_empty_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        track(str(tmp_path))


def test_without_the_extra_it_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match=r"pip install 'vidbatch\[track\]'"):
        track(world.store.uri)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: t\nwhat: {on: faces, lost: 2}", "what.lost: .*known keys: on, appearance"),
        ("name: t\nwhat: {on: faces, min_cosine: 2}", "what.min_cosine"),
        ("name: T\nwhat: {on: faces}", "name: "),
        ("name: t\nwhat: {}", "what.on"),
        ("name: t\nwhat: {on: faces, lost_s: 2 hours}", "not a duration"),
    ],
)
def test_a_wrong_tracker_file_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        load_rule(file)
    assert "\n" not in caught.value.message


DETECTOR = '''
import numpy as np
from vidbatch.data import BoxRows, Geometry

class Bright:
    """A box around what is bright in each half of the frame."""

    geometry = Geometry(width_px=64, height_px=64)
    labels = ("light",)
    detects = True

    def predict(self, batch):
        item, xyxy = [], []
        for i, frame in enumerate(np.asarray(batch.pixels.cpu())):
            for top in (0, 32):
                y, x = np.nonzero(frame[top : top + 32, :, 0] > 128)
                if len(x):
                    item.append(i)
                    xyxy.append([x.min(), y.min() + top, x.max() + 1, y.max() + 1 + top])
        n = len(item)
        boxes = np.array(xyxy, np.float32).reshape(-1, 4) / 64
        return {"boxes": BoxRows(item=np.array(item, np.int64), label_id=np.zeros(n, np.int64),
                                 score=np.full(n, 0.9, np.float32), xyxy=boxes)}
'''


def test_from_a_video_to_its_tracks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lights that pass each other, in clips of a second: two tracks, by the command line."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "lights.mp4", lights(seconds=4), rate=25)
    (tmp_path / "bright.py").write_text(DETECTOR)
    out = str(tmp_path / "tables")
    job = parse_job(
        {
            "archive": {"uri": str(tmp_path / "videos")},
            "sample": {"all": True},
            "models": [{"name": "bright", "version": "v1",
                        "what": {"adapter": "python", "class": "bright:Bright"}}],
            "output": {"uri": out},
            "clips": {"length_s": 1, "split_above": 1},
            "engine": {"address": "none"},
            "limits": {"isolate": False},
        },
        base_dir=tmp_path,
    )  # fmt: skip
    assert run_job(job).exit_code == 0
    for video in (tmp_path / "videos").iterdir():
        video.unlink()  # no byte of it is needed
    for says in ("2 tracks, 200 of 200 boxes", "nothing was written"):
        monkeypatch.setattr(sys, "argv", ["vidbatch", "track", out])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert says in capsys.readouterr().out
    clips = query.sql(out, "SELECT count(*) FROM coverage WHERE model LIKE 'bright-v1%'").rows
    assert clips[0][0] > 1
    rows = query.sql(
        out,
        """
        SELECT track_id, count(*), max(y_max) < 0.5 AS above, max(y_min) > 0.5 AS below
        FROM tracks t JOIN detections d USING (sample, video_id, frame_index, detection_id)
        GROUP BY ALL ORDER BY above DESC""",
    ).rows
    assert {row[1:] for row in rows} == {(100, True, False), (100, False, True)}


def lights(seconds: int) -> list[Pixels]:
    """Pictures of two lights, one above the other, that go opposite ways."""
    pictures = []
    for k in range(25 * seconds):
        picture = np.zeros((64, 64, 3), np.uint8)
        x = round(50 * k / (25 * seconds))
        picture[10:22, x : x + 12] = picture[42:54, 50 - x : 62 - x] = 255
        pictures.append(picture)
    return pictures
