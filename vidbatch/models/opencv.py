"""`opencv`: the cascade classifiers that OpenCV carries, or one from a file.

what: {adapter: opencv, cascade: haarcascade_frontalface_default, params: {label: face}}
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidbatch.data import Batch, BoxRows, Geometry, fit_box
from vidbatch.errors import ModelError, UsageError
from vidbatch.models.base import undo_fit, unknown_name
from vidbatch.models.located import Located

KEYS = ("cascade",)

_HALF_WEIGHT = 2.0
"""Stage weight at which the score is 0.5. On 30 real videos faces had 1.2 to 9, and of the
finds below 1.3 most were none. Equalising the histogram found other false ones, no face more."""


class Cascade:
    """Boxes of one kind of thing, found by a boosted cascade (Viola and Jones 2001) on grey frames.

    Score = w / (w + 2) of the last stage's weight w, 0 where w < 0: a ranking, not a probability.
    At 352 pixels a face must be wider than 1/15 of the frame; widen the geometry for smaller ones
    (cost grows with the area).
    """

    kind = "detector"
    geometry = Geometry(width_px=352, height_px=198, fit="letterbox")
    detects = True
    min_score = 0.4
    batch = 16
    on_host = True

    files: Mapping[str, bytes]

    def __init__(
        self,
        label: str = "face",
        scale_factor: float = 1.2,
        min_neighbours: int = 2,
        min_size_px: int = 24,
    ) -> None:
        if not (1.01 <= scale_factor <= 4 and min_neighbours >= 1 and min_size_px >= 1):
            raise ValueError("scale_factor is within 1.01..4, min_neighbours and min_size_px >= 1")
        self.labels = (label,)
        self.scale_factor, self.min_neighbours = scale_factor, min_neighbours
        self.min_size_px = min_size_px
        self._cascade: Any = None

    def load(self, device: str) -> None:
        """Reads the cascade. Raises ModelError: the file is none."""
        import cv2

        cv2.setNumThreads(1)  # many actors beat many threads; also, its pool does not survive fork
        ((name, content),) = self.files.items()
        try:
            mode = cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY
            storage = cv2.FileStorage(content.decode("utf-8"), mode)
            cascade = cv2.CascadeClassifier()
            read = cascade.read(storage.getFirstTopLevelNode())
        except (cv2.error, UnicodeDecodeError, SystemError) as error:
            raise ModelError(f"{name} is no cascade file: {error}", kind="model_load") from error
        if not read or cascade.empty():
            raise ModelError(f"{name} holds no cascade that OpenCV can read", kind="model_load")
        self._cascade = cascade

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Boxes of every frame, coordinates 0..1 of the upright frame."""
        import cv2

        items: list[int] = []
        boxes: list[Any] = []
        weights: list[float] = []
        pixels = batch.pixels.numpy()
        for i, (picture, (w, h)) in enumerate(zip(pixels, batch.source_px, strict=True)):
            scaled_w, scaled_h, _, _ = fit_box(self.geometry, int(w), int(h))
            grey = cv2.cvtColor(picture[:scaled_h, :scaled_w], cv2.COLOR_RGB2GRAY)  # no padding
            found, _, weight = self._cascade.detectMultiScale3(
                grey,
                scaleFactor=self.scale_factor,
                minNeighbors=self.min_neighbours,
                minSize=(self.min_size_px, self.min_size_px),
                outputRejectLevels=True,
            )
            items += [i] * len(found)
            boxes += list(found)
            weights += np.ravel(weight).tolist()
        item = np.array(items, np.int64)
        xywh = np.array(boxes, np.float64).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        w = np.clip(np.array(weights, np.float32), 0, None)
        rows = BoxRows(
            item=item,
            label_id=np.zeros(len(item), np.int64),
            score=(w / (w + _HALF_WEIGHT)).astype(np.float32),
            xyxy=undo_fit(self.geometry, xyxy, batch.source_px[item]),
        )
        return {"boxes": rows}

    def close(self) -> None:
        """Forgets the cascade."""
        self._cascade = None


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """The cascade file: one that OpenCV carries, by name, or an .xml beside the model file."""
    name = str(what.get("cascade", ""))
    carried = _carried()
    path = carried.get(name.removesuffix(".xml"))
    if path is None:
        if not name.endswith(".xml"):
            raise unknown_name(f"{where}.cascade", "cascade", name, tuple(carried))
        path = folders[0] / name
        if not path.is_file():
            raise UsageError(f"{where}.cascade: {path}: no such file, and OpenCV carries none so")
    return Located(
        adapter="opencv",
        target="vidbatch.models.opencv:Cascade",
        files=((path.name, path.read_bytes()),),
    )


def load_class(located: Located) -> type[Any]:
    """The one class there is."""
    return Cascade


def _carried() -> dict[str, Path]:
    """Name → path of the cascades of the installed OpenCV, found without importing it."""
    found = importlib.util.find_spec("cv2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")
    return {p.stem: p for p in (Path(found.origin).parent / "data").glob("*.xml")}
