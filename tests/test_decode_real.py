"""decode_clip on footage of cameras and films, and on what an archive holds after ten years."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.decoding import ALL, decode, fps
from tests.real_videos import SOUND
from vidbatch.data import DecodeLimits, Geometry, Sample
from vidbatch.errors import MediaError
from vidbatch.media import BytesSource
from vidbatch.probe import probe


def test_every_real_and_truth_file_is_named(shared_videos: Path) -> None:
    media = {".mp4", ".mkv", ".webm", ".avi", ".gif", ".ts", ".3gp"}
    there = {
        str(p.relative_to(shared_videos))
        for folder in ("real", "truth")
        for p in (shared_videos / folder).rglob("*")
        if p.suffix in media
    }
    assert there == {name for name in SOUND if not name.startswith("odd/")}


OUTCOMES = """
-video-with-dash-.mp4                                 ok       5
decord__corrupted.mp4                                 corrupt  49
decord__video_270.mov                                 ok       3
decord__video_90.mov                                  ok       3
exo__bear-vp9-odd-dimensions.webm                     ok       30
exo__git-lfs-pointer.mp4                              failed   not_media
exo__sample_with_sdt.ts                               failed   truncated
exo__subsample_encrypted_altref.webm                  failed   encrypted
libwebm__blockgroup_block_ends_beyond_blockgroup.mkv  truncated  1
libwebm__fixed_lacing_bad_lace_size.mkv               failed   truncated
libwebm__invalid_vp9_bitstream-bug_1416.webm          failed   too_large
libwebm__matroska_doctype.mkv                         failed   codec_refused
mb__36-bytes.mov                                      failed   truncated
mb__annex-b-avc.mkv                                   ok       745
mb__av1-aac.avi                                       ok       25
mb__edit-list-discard.mp4                             ok       49
mb__edts.mp4                                          ok       225
mb__entry12-variant1-init.mp4                         failed   zero_frames
mb__entry24-segment3.ts                               ok       100
mb__missing-keyframe-labels.ts                        ok       600
mb__multiple-aac-tracks.mp4                           failed   no_video
mb__no-aud.ts                                         truncated  9
mb__sar_2x1.mp4                                       ok       150
mb__segment-without-moov.mp4                          failed   truncated
mb__test-mkv-ass-fonts.mkv                            ok       250
mb__toothsome-dts.mp4                                 failed   no_video
mb__transparency-faulty.webm                          ok       300
mb__wrong-keyframe-labels.mp4                         ok       120
moviepy__audio-only_somename.mp4                      failed   no_video
moviepy__no_duration.webm                             ok       74
moviepy__zero-bytes_result.webm                       failed   empty
mp4ff__2xSencNoMdat.mp4                               failed   truncated
mp4ff__init_truncated.mp4                             failed   truncated
mp4ff__stereo_spatial.mp4                             ok       10
mp4ff__vvc_400kbps_2s.mp4                             ok       50
mp4p__MOV00006.3gp                                    ok       222
mp4p__h265-sample.mp4                                 ok       299
mp4rs__invalid_userdata.mp4                           failed   zero_frames
mp4rs__metadata.mp4                                   ok       1
mp4rs__no_timescale.mp4                               corrupt  168
mp4rs__video_colr_nclx_rgb.mp4                        ok       3
mp4rs__zero_empty_stsc.mp4                            failed   undecodable
small__AudioVideoInterleave.avi                       failed   zero_frames
small__Mpeg4.mp4                                      failed   no_video
small__gif.gif                                        failed   zero_frames
small__mp4.mp4                                        ok       1
tc__frame_exceeds_screen.gif                          ok       1
tc__sine_stereo_mp2.mpg                               ok       100
vhs__gear4-0.ts                                       ok       300
vhs__media-live.m3u8                                  failed   format_refused
vhs__zeroLength.ts                                    failed   zero_frames
"""
"""Of each odd file: ok or the kind of partial with the rows of the rule `all`, or why it failed."""
ODD = {line.split()[0]: line.split()[1:] for line in OUTCOMES.strip().splitlines()}


def test_every_odd_file_is_named(shared_videos: Path) -> None:
    assert {p.name for p in (shared_videos / "odd").iterdir()} == set(ODD)
    sound = {name for name, (outcome, _) in ODD.items() if outcome == "ok"}
    assert {n.removeprefix("odd/") for n in SOUND if n.startswith("odd/")} == sound


@pytest.mark.parametrize("name", ODD)
def test_odd_files_end_as_they_should(shared_videos: Path, name: str) -> None:
    data = (shared_videos / "odd" / name).read_bytes()
    outcome, detail = ODD[name]
    if outcome == "failed":
        with pytest.raises(MediaError) as error:
            decode(data, ALL)
        assert error.value.kind == detail and error.value.advice and not error.value.retryable
        return
    got = decode(data, ALL)
    assert (got.end.kind or "ok", len(got.rows)) == (outcome, int(detail)), got.end
    assert got.end.status == ("ok" if outcome == "ok" else "partial")
    sparse = decode(data, fps(1)) if len(data) < 1_100_000 else got
    by_index = {row.index: row for row in got.rows}
    for row in sparse.rows:
        assert replace(row, covers_s=0) == replace(by_index[row.index], covers_s=0)


def test_is_keyframe_is_what_the_container_says(shared_videos: Path) -> None:
    data = (shared_videos / "odd/mb__wrong-keyframe-labels.mp4").read_bytes()
    _, table = probe(BytesSource(data), limits=DecodeLimits())
    assert table is not None
    got = decode(data, ALL)
    assert [row.key for row in got.rows] == table.keys.tolist()
    assert decode(data, Sample(kind="keyframes")).index == np.flatnonzero(table.keys).tolist()


def test_display_sizes_and_rotation(shared_videos: Path) -> None:
    for name, width, height, turn in (
        ("odd/decord__video_90.mov", 320, 568, 90),
        ("odd/decord__video_270.mov", 320, 568, 270),
        ("truth/torchcodec/nasa_13013_rotated.mp4", 270, 480, 270),
        ("real/moviepy__fire2.mp4", 1280, 720, 180),
    ):
        info = decode((shared_videos / name).read_bytes(), fps("1/100")).info
        assert (info.width_px, info.height_px, info.rotation_deg) == (width, height, turn)


def test_published_times_of_frames(shared_videos: Path) -> None:
    folder = shared_videos / "truth/torchcodec"
    for name in ("nasa_13013.mp4", "nasa_13013_rotated.mp4", "var_fps_video.mp4"):
        published = json.loads((folder / f"{name}.stream0.all_frames_info.json").read_text())
        got = decode((folder / name).read_bytes(), ALL, geometries=[])
        times = [float(frame["pts_time"]) for frame in published]
        assert [row.time_s for row in got.rows] == pytest.approx(
            [t - times[0] for t in times], abs=1e-5
        )


def test_published_pixels_of_frames(shared_videos: Path) -> None:
    loader: dict[str, object] = {}
    exec(
        (shared_videos / "truth/pt_frame.py").read_text(), loader
    )  # the shared reader of the truth
    folder = shared_videos / "truth/torchcodec"
    size = Geometry(width_px=320, height_px=180)
    got = decode((folder / "nasa_13013.mp4").read_bytes(), ALL, geometries=[size])
    pictures = [p for chunk in got.chunks for p in chunk.pixels[size.key]]
    compared = 0
    for path in sorted(folder.glob("nasa_13013.mp4.stream0.frame*.pt")):
        published = loader["load"](path)  # type: ignore[operator]
        own = pictures[int(path.name.split("frame")[1][:6])]
        assert np.abs(own.astype(int) - published).mean() < 1.0
        compared += 1
    assert compared > 10


def test_expectations_of_other_projects(shared_videos: Path) -> None:
    """What their tests publish about these files, so far as it is about decoding."""
    checked = 0
    for entry in json.loads((shared_videos / "truth/expectations.json").read_text()):
        path = shared_videos / entry["file"].split(",")[0]
        known = {"frames", "size", "display_size", "fps"} & set(entry)
        if entry.get("stream", 0) or not path.is_file() or not (known or entry["check"] in OTHERS):
            continue
        data = path.read_bytes()
        damaged = entry["check"] == "must_report_error"
        got = decode(data, ALL if damaged else Sample(kind="keyframes"), geometries=[])
        size = entry.get("size") or entry.get("display_size")
        if entry["check"] == "display_size":
            size = entry["value"]
        assert size in (None, [got.info.width_px, got.info.height_px]), entry
        assert entry.get("frames", got.end.end_frame) == got.end.end_frame, entry
        if "fps" in entry:
            assert float(got.info.rate or 0) == pytest.approx(entry["fps"], rel=1e-3), entry
        if entry["check"] == "frame_rates":
            _, table = probe(BytesSource(data), limits=DecodeLimits())
            assert table is not None
            steps = np.diff(table.ticks) * float(table.time_base)
            assert steps == pytest.approx(1 / entry["average"])
        if entry["check"] in {"first_pts", "normalised_first_frame_time_below"}:
            assert got.info.start_s == pytest.approx(entry.get("raw_start") or entry["value"], 1e-3)
            assert got.rows[0].time_s == 0
        if damaged:
            assert got.end.status == "partial" and got.end.decode_errors
        checked += 1
    assert checked == 12


OTHERS = {"frame_rates", "first_pts", "normalised_first_frame_time_below", "must_report_error"}
"""Checks that name no count and no size."""
