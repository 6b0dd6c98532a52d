"""`preprocessor_config.json` → the geometry and the numbers that a network expects, or a refusal.

What the file leaves out holds as in the library's processor of that name (`PROCESSORS`; a test
holds the table against the library). Size, mean and deviation must stand in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidbatch.data import Geometry
from vidbatch.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What an image processor of the library does where its file is silent."""

    resample: int = 2
    square: bool = True
    """A size of one number is both sides, not the shortest edge."""
    crops: bool = False
    normalises: bool = True
    offset: bool = False
    """Rescaled to -1..1 instead of 0..1."""
    crop_share: float = 0.0
    """Below 384 px the picture is this share of a larger one, its centre; above it is stretched."""


PROCESSORS: dict[str, Processor] = {
    "ViT": Processor(),
    "DeiT": Processor(resample=3, crops=True),
    "CLIP": Processor(resample=3, square=False, crops=True),
    "Siglip": Processor(resample=3, square=False),
    "Bit": Processor(resample=3, square=False, crops=True),
    "ConvNext": Processor(resample=3, square=False, crop_share=224 / 256),
    "Segformer": Processor(),
    "Detr": Processor(square=False),
    "Yolos": Processor(square=False),
    "RTDetr": Processor(square=False, normalises=False),
    "VideoMAE": Processor(square=False, crops=True),
    "Timesformer": Processor(square=False, crops=True),
    "Vivit": Processor(square=False, crops=True, offset=True),
}
"""Name without `ImageProcessor`, `FeatureExtractor` and the like → its defaults."""

_FAMILY_OF = {
    "vit": "ViT", "deit": "DeiT", "clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "Siglip",
    "siglip_vision_model": "Siglip", "dinov2": "Bit", "convnext": "ConvNext", "resnet": "ConvNext",
    "segformer": "Segformer", "detr": "Detr", "yolos": "Yolos", "rt_detr": "RTDetr",
    "videomae": "VideoMAE", "timesformer": "VideoMAE", "vivit": "Vivit",
}  # fmt: skip
"""`model_type` → the processor, for files that do not name it."""

_SUFFIX = re.compile(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor|VideoProcessor)$")
_KERNELS = {2: "bilinear", 3: "bicubic"}
_RESAMPLES = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_KNOWN_STEPS = {
    "do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "do_convert_rgb",
    "do_convert_annotations", "do_reduce_labels", "do_sample_frames",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRule:
    """From a frame to what a network sees: scaled, cut, then (x · scale + shift − mean) / std."""

    geometry: Geometry | None
    """Null where the model file writes its own."""
    inner: tuple[int, int] | None
    """(height, width) cut from the centre of the picture, whose short side is longer."""
    scale: float
    shift: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def numbers(self) -> dict[str, Any]:
        """All but the geometry, as plain values; `inner` is cut from a picture of size `outer`."""
        g = self.geometry
        return {
            "inner": self.inner,
            "outer": (g.height_px, g.width_px) if g and self.inner else None,
            "scale": self.scale,
            "shift": self.shift,
            "mean": self.mean,
            "std": self.std,
        }


def read_pixels(
    file: Mapping[str, Any], model_type: str, own: Mapping[str, Any], where: str
) -> PixelRule:
    """The rule of a `preprocessor_config.json`.

    Args:
        own: the `geometry:` block of the model file, {} if there is none.

    Raises:
        UsageError: the file states no size or numbers, or asks for what our geometries cannot be.
    """
    family = _SUFFIX.sub("", str(file.get("image_processor_type") or "")) or _SUFFIX.sub(
        "", str(file.get("feature_extractor_type") or file.get("video_processor_type") or "")
    )
    family = family or _FAMILY_OF.get(model_type, "")
    defaults = PROCESSORS.get(family, Processor())
    steps = [k for k, v in file.items() if k.startswith("do_") and v and k not in _KNOWN_STEPS]
    if steps:
        raise UsageError(
            f"{where} asks for {', '.join(steps)}, which vidbatch cannot do; its rows would not be "
            "the model's; export the model by torch_export or onnx with that step inside"
        )
    if "width_px" in own and "height_px" in own:
        geometry, inner = None, None
    else:
        size = _Size(file, family, defaults, where)
        fit, outer, inner = size.picture()
        geometry = Geometry(
            width_px=outer[1],
            height_px=outer[0],
            fit="crop" if fit == "crop" else "stretch",
            interpolation=_kernel(file, family, defaults, own, where),
        )
    rescales = file.get("do_rescale", True)
    scale = float(file.get("rescale_factor", 1 / 127.5 if defaults.offset else 1 / 255))
    offset = rescales and bool(file.get("offset", defaults.offset))
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if file.get("do_normalize", defaults.normalises):
        mean, std = _three(file, "image_mean", where), _three(file, "image_std", where)
    return PixelRule(
        geometry=geometry,
        inner=inner,
        scale=scale if rescales else 1.0,
        shift=-1.0 if offset else 0.0,
        mean=mean,
        std=std,
    )


def _kernel(
    file: Mapping[str, Any], family: str, defaults: Processor, own: Mapping[str, Any], where: str
) -> Any:
    if "interpolation" in own:
        return "bilinear"  # replaced by the one of the model file
    if "resample" not in file and family not in PROCESSORS:
        raise UsageError(
            f"{where} states no `resample` and is of no kind that vidbatch knows "
            f"({family or 'no name'}); write geometry: {{interpolation: bilinear}} or bicubic, as "
            "the model was trained"
        )
    resample = file.get("resample", defaults.resample)
    if resample not in _KERNELS:
        raise UsageError(
            f"{where}: resample {resample} ({_RESAMPLES.get(resample, 'unknown')}) is none of "
            "bilinear and bicubic; write geometry: {interpolation: …} for the nearest one"
        )
    return _KERNELS[resample]


class _Size:
    """`size`, `crop_size` and what goes with them, in their older and newer spellings."""

    def __init__(
        self, file: Mapping[str, Any], family: str, defaults: Processor, where: str
    ) -> None:
        self._file, self._family, self._defaults, self._where = file, family, defaults, where

    def picture(self) -> tuple[str, tuple[int, int], tuple[int, int] | None]:
        """(fit, (height, width) of the geometry, (height, width) of the centre or None)."""
        if not self._file.get("do_resize", True) or "size" not in self._file:
            raise self._unclear("states no size that frames are scaled to")
        if self._file.get("pad_size"):
            raise self._unclear("pads to `pad_size`, which vidbatch cannot do exactly")
        size = self._file["size"]
        if isinstance(size, list | tuple) and len(size) == 2:
            size = {"height": size[0], "width": size[1]}
        elif isinstance(size, int):
            size = {"height": size, "width": size} if self._defaults.square else (
                {"shortest_edge": size}
            )  # fmt: skip
            if self._family in ("Detr", "Yolos"):
                size["longest_edge"] = self._file.get("max_size", 1333)
        if not isinstance(size, Mapping):
            raise self._unclear(f"has the size {size!r}")
        if size.get("height") and size.get("width"):
            outer = (int(size["height"]), int(size["width"]))
            return "stretch", outer, self._inner(outer, unit=1)
        edge, longest = size.get("shortest_edge"), size.get("longest_edge")
        if edge and longest:
            raise self._unclear(
                f"scales to a shortest edge of {edge} and a longest of {longest}, whose size "
                "changes with the frame",
                self._instead(int(edge), int(longest)),
            )
        if not edge:
            raise self._unclear(f"has the size {dict(size)!r}")
        if share := self._share():
            return self._shared(int(edge), share)
        inner = self._crop_size()
        if inner is None:
            raise self._unclear(
                f"scales to a shortest edge of {edge} and does not crop: the size changes with "
                "the frame",
                f"geometry: {{width_px: {edge}, height_px: {edge}, fit: crop}}",
            )
        outer = (int(edge), int(edge))
        return "crop", outer, self._inner(outer, unit=2)

    def _instead(self, edge: int, longest: int) -> str:
        if self._family != "Yolos":
            return (
                f"geometry: {{width_px: {longest}, height_px: {edge}, fit: letterbox}} (the same "
                "for frames that are wider than tall; taller ones become smaller)"
            )
        height = min(edge, longest * 9 // 16)
        width = height * 16 // 9
        return (
            f"geometry: {{width_px: {width - width % 16}, height_px: {height - height % 16}, fit: "
            "stretch} (the same for frames of 16:9)"
        )

    def _shared(
        self, edge: int, share: float
    ) -> tuple[str, tuple[int, int], tuple[int, int] | None]:
        if edge >= 384:
            return "stretch", (edge, edge), None
        outer = int(edge / share)
        self._check_centre((outer, outer), (edge, edge), unit=2)
        return "crop", (outer, outer), (edge, edge) if outer != edge else None

    def _share(self) -> float:
        return float(self._file.get("crop_pct") or self._defaults.crop_share)

    def _crop_size(self) -> tuple[int, int] | None:
        if not self._file.get("do_center_crop", self._defaults.crops):
            return None
        size = self._file.get("crop_size")
        if isinstance(size, int):
            return size, size
        if isinstance(size, Mapping) and size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        raise self._unclear("crops the centre, but states no crop_size")

    def _inner(self, outer: tuple[int, int], unit: int) -> tuple[int, int] | None:
        inner = self._crop_size()
        if inner is None or inner == outer:
            return None
        self._check_centre(outer, inner, unit)
        return inner

    def _check_centre(self, outer: tuple[int, int], inner: tuple[int, int], unit: int) -> None:
        """The centre of a crop is the frame's centre only if its margins are whole pixels."""
        if any(o < i or (o - i) % unit for o, i in zip(outer, inner, strict=True)):
            raise self._unclear(
                f"crops {inner[0]} x {inner[1]} from {outer[0]} x {outer[1]}, which vidbatch "
                "cannot do exactly",
                f"geometry: {{width_px: {inner[1]}, height_px: {inner[0]}, fit: crop}}",
            )

    def _unclear(self, what: str, instead: str = "") -> UsageError:
        instead = instead or "geometry: {width_px: …, height_px: …, fit: stretch}"
        return UsageError(
            f"{self._where} {what}; nothing was started; write the size in the model file, such as "
            f"{instead}"
        )


def _three(file: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    value = file.get(key)
    if isinstance(value, int | float):
        value = [value] * 3
    if not isinstance(value, list) or len(value) != 3:
        raise UsageError(
            f"{where} normalises, but its {key} is {value!r}; write the three numbers the model "
            "was trained with into it"
        )
    return tuple(float(x) for x in value)
