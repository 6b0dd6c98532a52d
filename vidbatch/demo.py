"""The demo: makes a small archive of two cameras over three days, for `vidbatch demo`.

Every video is drawn here, so that each query of the demo has an answer worth reading: people
(drawn faces that the frontal-face cascade finds) on some mornings, a lens that was covered, one
out of focus, one frozen, one turned to another street, a microphone that went silent, a file that
was cut in transfer and a text file named .mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from vidbatch.config import parse_job
from vidbatch.data import Pixels, Singles
from vidbatch.media.writing import SOUND_HZ, write_video
from vidbatch.progress import Progress

Plane = npt.NDArray[np.float64]

WIDTH_PX, HEIGHT_PX, RATE_HZ = 320, 180, 10

DATE_PATTERN = r"(?P<source>cam-\d+)/(?P<date>\d{4}/\d{2}/\d{2})/(?P<time>\d{6})"

SCENES = {
    "cam-01/2026/03/01/080000.mp4": "person",
    "cam-01/2026/03/01/200000.mp4": "street",
    "cam-01/2026/03/02/080000.mp4": "person",
    "cam-01/2026/03/02/200000.mp4": "covered",
    "cam-01/2026/03/03/080000.mp4": "street",
    "cam-02/2026/03/01/090000.mp4": "turned",
    "cam-02/2026/03/02/090000.mp4": "person",
    "cam-02/2026/03/02/210000.mp4": "unfocused",
    "cam-02/2026/03/03/090000.mp4": "frozen",
    "cam-02/2026/03/03/210000.mp4": "person",
}
QUESTIONS = {
    "Minutes with a face in the picture, per camera and day": "from minutes('face')",
    "Which cameras had something wrong, when, and for how long": (
        "select source, dt, label as what, count(*) / 2.0 as seconds from labels"
        " where label in ('black', 'blurred', 'frozen') group by all"
        " union all select source, dt, kind, null from failures where model = 'frames'"
        " order by all"
    ),
    "Where a camera was turned, and where its microphone heard nothing": (
        "select source, dt, 'another picture' as what, start_s as from_s, null as seconds"
        " from shots where start_frame > 0 union all"
        " select source, dt, label, min(start_s), count(*) from audio where kind = 'label'"
        " group by all order by all"
    ),
}

MODELS = ("quality", "colour", "motion", "phash", "faces", "shots", "loudness", "silence")

CUT = "cam-02/2026/03/03/230000.mp4"
TEXT = "cam-01/2026/03/03/235900.mp4"


def make_archive(folder: Path, *, seconds: int = 8) -> list[Path]:
    """Writes the demo's archive below `folder` (what is there already stays) and names them."""
    paths = []
    for i, (name, scene) in enumerate(sorted(SCENES.items())):
        path = folder / name
        paths.append(path)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = _frames(scene, seconds * RATE_HZ, seed=i)
            write_video(path, frames, rate=RATE_HZ, sound=_sound(scene, seconds, seed=i))
    whole = (folder / sorted(SCENES)[0]).read_bytes()
    for name, data in ((CUT, whole[: len(whole) * 2 // 3]), (TEXT, b"not a video\n" * 20)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(data)
        paths.append(path)
    return paths


def run_demo(folder: Path, *, address: str = "local") -> int:
    """Makes the archive below `folder`, runs the job, prints what came out. Returns the exit code.

    Args:
        address: `engine.address` of the job: `local` (Ray) or `none` (one process).
    """
    from rich.console import Console

    from vidbatch import query
    from vidbatch.launch import launch

    console = Console()
    archive, tables = folder / "demo-archive", folder / "demo-tables"
    console.print(f"making {archive}", highlight=False)
    make_archive(archive)
    job = parse_job(
        {
            "archive": {"uri": str(archive), "date": {"from": "key", "pattern": DATE_PATTERN}},
            "sample": {"fps": 2},
            "models": [{"builtin": m} for m in MODELS],
            "output": {"uri": str(tables)},
            "engine": {"address": address},
        },
        base_dir=folder,
        name="demo",
    )
    with Progress() as progress:
        result = launch(job, progress=progress)
    console.print(f"\n{tables}, what the run left behind:")
    for table in sorted(p for p in (tables / "v1").iterdir()):
        files = [f for f in table.rglob("*.parquet") if f.name != "part-empty.parquet"]
        rows = query.sql(str(tables), f"select count(*) from {table.name}").rows[0][0]
        console.print(f"  {table.name:11} {len(files):3} files {rows:6} rows", highlight=False)
    for question, text in QUESTIONS.items():
        console.print(f'\n[bold]{question}[/bold]\n  vidbatch sql {tables} "{text}"')
        console.print(query.result_table(query.sql(str(tables), text)))
    console.print(f"\nRun it again: nothing to do.  Look inside: {tables}/README.md")
    return result.exit_code


def _frames(scene: str, n: int, *, seed: int) -> Iterator[Pixels]:
    rng = np.random.default_rng(seed)
    street, other = _street(rng), _street(rng)[::-1]
    for i in range(n):
        t = 0 if scene == "frozen" else i
        light = (other if scene == "turned" and i >= n // 2 else street).copy()
        car = int(20 + 5 * t) % (WIDTH_PX + 60) - 60
        light[128:152, max(car, 0) : max(car + 55, 0)] = (180, 40, 40)
        if scene == "person" and n // 4 <= i < 3 * n // 4:
            _draw_face(light, centre_x=80 + 1.5 * t, centre_y=80.0, size=62.0)
        if scene == "covered":
            light = light // 60
        noise = rng.normal(0, 2, light.shape) if scene != "frozen" else 0
        frame = np.clip(light + noise, 0, 255).astype(np.uint8)
        yield _blur(frame) if scene == "unfocused" else frame


def _sound(scene: str, seconds: int, *, seed: int) -> Singles | None:
    """Traffic, a voice where a person is, nothing from a covered camera; no track when frozen."""
    if scene == "frozen":
        return None
    rng = np.random.default_rng(seed)
    t = np.arange(seconds * SOUND_HZ) / SOUND_HZ
    traffic = np.convolve(rng.normal(0, 0.05, len(t)), np.full(16, 1 / 4), mode="same")
    voice = np.sin(2 * np.pi * 180 * t) * np.sin(2 * np.pi * 3 * t) ** 2 * 0.3
    there = (t >= seconds / 4) & (t < seconds * 3 / 4)
    heard = traffic + voice * there if scene == "person" else traffic
    return np.zeros(len(t), np.float32) if scene == "covered" else heard.astype(np.float32)


def _street(rng: np.random.Generator) -> Plane:
    picture = np.zeros((HEIGHT_PX, WIDTH_PX, 3))
    picture[:70] = (150, 180, 215)
    picture[120:] = (95, 95, 100)
    for left in range(0, WIDTH_PX, 40):
        top = int(rng.integers(20, 60))
        picture[top:120, left : left + 36] = rng.integers(90, 190, 3)
        for y in range(top + 6, 112, 14):
            picture[y : y + 7, left + 5 : left + 31 : 9] = (60, 70, 90)
    return picture


def _draw_face(picture: Plane, *, centre_x: float, centre_y: float, size: float) -> None:
    """Shades an oval with eyes, brows, nose, mouth and hair: enough for a Haar cascade."""
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX].astype(np.float64)
    dy, dx = (y - centre_y) / size, (x - centre_x) / size

    def blob(at_y: float, at_x: float, high: float, wide: float) -> Plane:
        return cast(Plane, np.exp(-(((dy - at_y) / high) ** 2 + ((dx - at_x) / wide) ** 2)))

    def inside(high: float, wide: float) -> Plane:
        edge = np.clip((np.hypot(dy / high, dx / wide) - 1) * 14, -50, 50)
        return cast(Plane, 1 / (1 + np.exp(edge)))

    face = np.full((HEIGHT_PX, WIDTH_PX), 205.0)
    for side in (-0.22, 0.22):
        face -= 120 * blob(-0.12, side, 0.07, 0.12) + 70 * blob(-0.25, side, 0.035, 0.16)
    face += 25 * blob(0.05, 0, 0.2, 0.06) - 60 * blob(0.18, 0, 0.04, 0.1)
    face -= 95 * blob(0.36, 0, 0.05, 0.2)
    face -= 35 * (blob(0.1, -0.42, 0.4, 0.08) + blob(0.1, 0.42, 0.4, 0.08))
    hair = inside(0.74, 0.58) / (1 + np.exp(np.clip((dy + 0.42) * size * 0.5, -50, 50)))
    for channel, tint in enumerate((1.0, 0.86, 0.78)):
        layer = picture[..., channel]
        oval = inside(0.68, 0.52)
        layer += (face * tint - layer) * oval
        layer += (45 * tint - layer) * hair


def _blur(frame: Pixels) -> Pixels:
    padded = np.cumsum(
        np.cumsum(np.pad(frame.astype(np.int64), ((8, 7), (8, 7), (0, 0)), "edge"), 0), 1
    )
    box = padded[15:, 15:] - padded[:-15, 15:] - padded[15:, :-15] + padded[:-15, :-15]
    out = np.empty_like(frame)
    out[:] = frame.mean((0, 1)).astype(np.uint8)
    out[: box.shape[0], : box.shape[1]] = (box // 225).astype(np.uint8)
    return out
