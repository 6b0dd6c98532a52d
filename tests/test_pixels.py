"""Scaled pixels against colour arithmetic in floating point, and what geometry leaves alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter

from tests.clips import make_clip
from tests.decoding import ALL, decode
from vidbatch.data import Geometry
from vidbatch.decode.pixels import UPRIGHT, Scaler

EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
KERNELS = {
    "bilinear": Interpolation.BILINEAR,
    "bicubic": Interpolation.BICUBIC,
    "area": Interpolation.AREA,
}
SIZES = [(224, 224), (160, 96), (48, 31), (320, 200)]
"""Larger, as it is, smaller, and of another aspect."""

LIMITED, FULL = 1, 2
BT709, UNKNOWN, BT470BG, BT601, BT2020 = 1, 2, 5, 6, 9
WEIGHTS = {
    BT709: (0.2126, 0.0722),
    UNKNOWN: (0.299, 0.114),
    BT470BG: (0.299, 0.114),
    BT601: (0.299, 0.114),
    BT2020: (0.2627, 0.0593),
}
"""Share of red and of blue in luma; a stream that does not say is taken for BT.601."""


def picture(width: int, height: int) -> Any:
    """(H, W, 3) of 0..1: waves of every colour over edges that lenses blur like this."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    red = 0.5 + 0.45 * np.sin(9 * x + 4 * y)
    green = 0.5 + 0.45 * np.sin(5 * x - 11 * y + 1)
    blue = 0.5 + 0.45 / (1 + np.exp(-60 * (x - 0.5))) * np.cos(7 * y)
    return np.stack([red, green, blue], -1)


def parts_of(frame: Any) -> list[Any]:
    """The samples of each component, (H, W), writable where the frame is."""
    parts = []
    for part in frame.format.components:
        plane = frame.planes[part.plane]
        kind = np.uint16 if part.bits > 8 else np.uint8
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        parts.append(rows[: part.height, : part.width * kind().itemsize].view(kind))
    return parts


def scale_of(frame: Any) -> tuple[float, float, float]:
    """Black, span of luma, span of chroma, in the frame's own units."""
    bits = frame.format.components[0].bits
    if frame.color_range == FULL or frame.format.name.startswith("yuvj"):
        return 0.0, 2**bits - 1, 2**bits - 1
    return 16 * 2 ** (bits - 8), 219 * 2 ** (bits - 8), 224 * 2 ** (bits - 8)


def make_frame(name: str, matrix: int, span: int, width: int = 160, height: int = 96) -> Any:
    """The picture in a format, by the book: chroma is the mean of the pixels it stands for."""
    frame = av.VideoFrame(width, height, name)
    frame.colorspace, frame.color_range = matrix, span
    rgb = picture(width, height)
    kr, kb = WEIGHTS[matrix]
    luma = rgb @ [kr, 1 - kr - kb, kb]
    black, wide, chroma = scale_of(frame)
    middle = 2 ** (frame.format.components[0].bits - 1)
    values = [
        black + wide * luma,
        middle + chroma * (rgb[..., 2] - luma) / (2 - 2 * kb),
        middle + chroma * (rgb[..., 0] - luma) / (2 - 2 * kr),
        np.full(luma.shape, 2.0 ** frame.format.components[0].bits / 3),
    ]
    for part, value in zip(parts_of(frame), values, strict=False):
        rows, columns = -(-height // len(part)), -(-width // part.shape[1])
        padded = np.pad(value, ((0, -height % rows), (0, -width % columns)), "edge")
        boxes = padded.reshape(len(part), rows, part.shape[1], columns)
        part[:] = np.round(boxes.mean((1, 3)))
    return frame


def stretch(part: Any, height: int, width: int, cosited: bool) -> Any:
    """Chroma on the grid of luma, by linear interpolation between rows and between columns, or
    cosited with every other column."""
    rows, columns = -(-height // len(part)), -(-width // part.shape[1])
    shift = 0.0 if cosited else 0.5 - 0.5 / columns
    x = np.clip(np.arange(width) / columns - shift, 0, part.shape[1] - 1)
    y = np.clip((np.arange(height) + 0.5) / rows - 0.5, 0, len(part) - 1)
    left, top = x.astype(int), y.astype(int)
    right, below = np.minimum(left + 1, part.shape[1] - 1), np.minimum(top + 1, len(part) - 1)
    across = part[:, left] * (1 - x + left) + part[:, right] * (x - left)
    down = (y - top)[:, None]
    return across[top] * (1 - down) + across[below] * down


def full_rgb(frame: Any, *, cosited: bool = False) -> Any:
    """(H, W, 3) uint8 of the whole frame, by the matrix and range that it names."""
    luma, blue, red = (p.astype(float) for p in parts_of(frame)[:3])
    black, wide, chroma = scale_of(frame)
    middle = 2 ** (frame.format.components[0].bits - 1)
    kr, kb = WEIGHTS[int(frame.colorspace)]
    y = (luma - black) / wide
    u, v = ((stretch(c, *y.shape, cosited) - middle) / chroma for c in (blue, red))
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(np.round(np.stack([r, g, b], -1) * 255), 0, 255).astype(np.uint8)


def error(frame: Any, geometry: Geometry, full: Any) -> float:
    """Mean distance in grey levels from scaling `full` by the same filter."""
    whole = av.VideoFrame.from_ndarray(full, format="rgb24")
    wanted = VideoReformatter().reformat(
        whole,
        geometry.width_px,
        geometry.height_px,
        "rgb24",
        interpolation=KERNELS[geometry.interpolation] | EXACT,
        threads=1,
    )
    got = Scaler([geometry]).scale(frame, UPRIGHT)[geometry.key]
    return float(np.abs(got.astype(int) - wanted.to_ndarray()).mean())


def geometries(*sizes: tuple[int, int]) -> list[Geometry]:
    """All filters at all sizes."""
    return [
        Geometry(width_px=w, height_px=h, interpolation=kernel)
        for w, h in sizes
        for kernel in ("bilinear", "bicubic", "area")
    ]


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("span", [LIMITED, FULL])
@pytest.mark.parametrize(
    "name",
    ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p12le", "yuva420p"],
)
def test_matrix_and_range_are_those_the_frame_names(name: str, matrix: int, span: int) -> None:
    frame = make_frame(name, matrix, span)
    full = full_rgb(frame)
    assert np.abs(full - picture(160, 96) * 255).mean() < 1.5
    for geometry in geometries(*SIZES):
        assert error(frame, geometry, full) < 1, geometry


@pytest.mark.parametrize("size", [(161, 97), (97, 65), (33, 17)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    for name in ("yuv420p", "yuv422p", "yuv420p10le", "yuv444p"):
        frame = make_frame(name, BT709, LIMITED, *size)
        grey = make_frame(name, BT709, LIMITED, *size)
        for part in parts_of(grey)[1:]:
            part[:] = 2 ** (frame.format.components[0].bits - 1)
        for geometry in geometries((224, 224), size, (32, 32)):
            assert error(grey, geometry, full_rgb(grey)) < 1, (name, geometry)
            # The last column of chroma stands for one column of luma, swscale takes it for two: at
            # the far edge colour is off by one pixel, of these steep waves by more than of footage.
            steep = 260 / min(size)
            far = error(frame, geometry, full_rgb(frame))
            assert far < (1 if name == "yuv444p" else steep), (name, geometry)


def test_alpha_is_dropped() -> None:
    with_alpha, without = (make_frame(n, BT709, LIMITED) for n in ("yuva420p", "yuv420p"))
    for geometry in geometries((64, 64)):
        pixels = [Scaler([geometry]).scale(f, UPRIGHT)[geometry.key] for f in (with_alpha, without)]
        assert (pixels[0] == pixels[1]).all()


def test_frames_of_all_kinds_may_follow_each_other() -> None:
    frames = [
        make_frame(name, matrix, span, *size)
        for name in ("yuv420p", "yuv420p10le", "yuv444p")
        for matrix in (BT709, BT601)
        for span in (LIMITED, FULL)
        for size in ((160, 96), (97, 65))
    ]
    chosen = geometries((64, 48))
    scaler = Scaler(chosen)
    for frame in [*frames, *frames[::-1]]:
        got, alone = scaler.scale(frame, UPRIGHT), Scaler(chosen).scale(frame, UPRIGHT)
        assert all((got[g.key] == alone[g.key]).all() for g in chosen)


def test_a_matrix_that_is_not_known_is_taken_for_bt601() -> None:
    geometry = Geometry(width_px=64, height_px=64)
    frames = [make_frame("yuv420p", BT601, LIMITED) for _ in range(2)]
    frames[0].colorspace = 8  # YCgCo
    pixels = [Scaler([geometry]).scale(f, UPRIGHT)[geometry.key] for f in frames]
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize("span", ["off", "on"])
@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
def test_colours_go_through_a_file(matrix: str, span: str) -> None:
    numbers = {"bt709": BT709, "smpte170m": BT601, "bt2020nc": BT2020}
    params = f"qp=1:colormatrix={matrix}:fullrange={span}"
    data = make_clip(frames=2, gop=1, options={"x264-params": params})
    geometry = Geometry(width_px=64, height_px=64)
    got = decode(data, ALL, geometries=[geometry]).chunks[0].pixels[geometry.key]
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    for pixels, frame in zip(got, frames, strict=True):
        frame.colorspace = numbers[matrix]
        frame.color_range = FULL if span == "on" else LIMITED
        assert np.abs(pixels.astype(int) - full_rgb(frame)).mean() < 1


REAL = """real/mdn__flower.mp4 real/gpmf__hero7.mp4 real/mb__0.ts real/mb__video-h265.mp4
    real/exo__roadtrip-vp92-10bit.webm real/intel__car-detection.mp4
    truth/torchcodec/bt2020_10bit.mp4 truth/torchcodec/bt601_full_range.mp4
    truth/torchcodec/bt601_limited_range.mp4 truth/torchcodec/bt709_full_range.mp4
    truth/torchcodec/nasa_13013_hdr.mp4 odd/exo__bear-vp9-odd-dimensions.webm"""


@pytest.mark.parametrize("name", REAL.split())
def test_pixels_of_real_videos(shared_videos: Path, name: str) -> None:
    with av.open(str(shared_videos / name), metadata_errors="ignore") as container:
        frame = next(container.decode(video=0))
        codec = container.streams.video[0].codec_context.name
    full = full_rgb(frame, cosited=codec in {"h264", "hevc"})
    for geometry in geometries((224, 224), (320, 180)):
        assert error(frame, geometry, full) < 1, geometry


def test_sample_aspect_is_left_as_coded(shared_videos: Path) -> None:
    data = (shared_videos / "odd/mb__sar_2x1.mp4").read_bytes()
    got = decode(data, ALL, geometries=[])
    assert (got.info.width_px, got.info.height_px) == (640, 360)
    assert {tuple(s) for c in got.chunks for s in c.source_px.tolist()} == {(640, 360)}
