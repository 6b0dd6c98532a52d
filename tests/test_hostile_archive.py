"""One job over real videos mixed with odd and broken ones, on Ray and alone."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.outputs import check_no_key_twice, check_same, read_tables
from tests.test_run import make_job
from vidbatch.launch import launch
from vidbatch.ledger import Ledger
from vidbatch.pipeline.run import run_job
from vidbatch.storage import open_store
from vidbatch.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NOT_OK = {
    "decord__corrupted.mp4": ("partial", "corrupt"),
    "exo__git-lfs-pointer.mp4": ("failed", "not_media"),
    "exo__sample_with_sdt.ts": ("failed", "truncated"),
    "exo__subsample_encrypted_altref.webm": ("failed", "encrypted"),
    "libwebm__blockgroup_block_ends_beyond_blockgroup.mkv": ("partial", "truncated"),
    "libwebm__fixed_lacing_bad_lace_size.mkv": ("failed", "truncated"),
    "libwebm__invalid_vp9_bitstream-bug_1416.webm": ("failed", "too_large"),
    "libwebm__matroska_doctype.mkv": ("failed", "codec_refused"),
    "mb__36-bytes.mov": ("failed", "truncated"),
    "mb__entry12-variant1-init.mp4": ("failed", "zero_frames"),
    "mb__multiple-aac-tracks.mp4": ("failed", "no_video"),
    "mb__segment-without-moov.mp4": ("failed", "truncated"),
    "mb__toothsome-dts.mp4": ("failed", "no_video"),
    "mb__no-aud.ts": ("partial", "truncated"),
    "moviepy__audio-only_somename.mp4": ("failed", "no_video"),
    "moviepy__zero-bytes_result.webm": ("failed", "empty"),
    "mp4ff__2xSencNoMdat.mp4": ("failed", "truncated"),
    "mp4ff__init_truncated.mp4": ("failed", "truncated"),
    "mp4rs__invalid_userdata.mp4": ("failed", "zero_frames"),
    "mp4rs__no_timescale.mp4": ("partial", "corrupt"),
    "mp4rs__zero_empty_stsc.mp4": ("failed", "undecodable"),
    "small__AudioVideoInterleave.avi": ("failed", "zero_frames"),
    "small__Mpeg4.mp4": ("failed", "no_video"),
    "small__gif.gif": ("failed", "zero_frames"),
    "vhs__media-live.m3u8": ("failed", "format_refused"),
    "vhs__zeroLength.ts": ("failed", "zero_frames"),
}
"""Every file of the archive that is not ok, and what it comes to. All others are complete."""


@pytest.fixture
def gpu_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the processor, so that scores do not depend on the machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield


@pytest.mark.timeout(400)
def test_real_and_odd_videos_in_one_job(
    shared_videos: Path, tmp_path: Path, ray_cluster: None, gpu_free: None
) -> None:
    """Exit 0, every good video complete, every odd one named; the same tables as without Ray."""
    folders = [str(shared_videos / name) for name in ("real", "truth", "odd")]
    no_video = (".pt", ".json", ".py")  # the truth about some of them
    changes: dict[str, Any] = {
        "archive": {
            "uri": folders,
            "include": ["**"],
            "exclude": [f"**/*{suffix}" for suffix in no_video],
        },
        "sample": {"fps": 1},
        "limits": {"task_minutes": 0.1},
        "clips": {"split_above": "3MiB", "length_s": 5},
    }
    on_ray = str(tmp_path / "ray")
    done = launch(make_job("", on_ray, engine={"decoders": 2, "predictors": 1}, **changes))
    assert done.exit_code == 0
    tables = read_tables(open_store(on_ray))
    check_no_key_twice(tables)
    ended = {
        Path(row["uri"]).name: (row["status"], None)
        for partition, rows in tables["coverage"].items()
        for row in rows.to_pylist()
        if partition[1] == "frames"
    }
    for rows in tables["failures"].values():
        ended.update((Path(r["uri"]).name, (ended[Path(r["uri"]).name][0], r["kind"]))
                     for r in rows.to_pylist())  # fmt: skip
    listed = {
        path.name
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix not in no_video
    }
    assert ended == {name: NOT_OK.get(name, ("ok", None)) for name in listed}
    assert not verify(Ledger(open_store(on_ray))).problems
    assert done.summary["engine"]["child_restarts"] == 0
    children_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert children_kib * 1024 < 4 * 2**30, "a process of the run grew past 4 GiB"

    alone = str(tmp_path / "alone")
    job = make_job("", alone, engine={"address": "none"}, **changes)
    assert run_job(job, strict=True).exit_code == 3
    check_same(tables, read_tables(open_store(alone)), tolerance=2e-3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
