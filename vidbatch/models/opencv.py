"""`opencv`: its cascades, YuNet faces from a file, networks that its DNN module reads.

cascade  one that OpenCV carries, or an .xml: {cascade: haarcascade_frontalface_default}
yunet    an .onnx of YuNet, the face detector of the OpenCV Zoo: {yunet: face_detection_yunet.onnx}
file     any other .onnx, of one output: keys of `networkfile`

One of the three is written. All run on the CPU, frame by frame.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vidbatch.data import Batch, BoxRows, Geometry, ModelSpec, fit_box
from vidbatch.errors import ModelError, UsageError
from vidbatch.models import networkfile
from vidbatch.models.base import undo_fit, unknown_name
from vidbatch.models.located import Located
from vidbatch.models.networkfile import NetworkFile, find_file, locate_network, network_class
from vidbatch.models.weights import WeightFile, staged

if TYPE_CHECKING:
    import torch

KEYS = ("cascade", "yunet", *networkfile.KEYS)

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


class YuNet:
    """Faces by the network of Wu et al. 2023; its score is the root of class times objectness.

    It finds faces from about 10 to 300 pixels wide in the picture that it gets: choose the geometry
    by the smallest that matter.
    """

    kind = "detector"
    geometry = Geometry(width_px=640, height_px=360, fit="letterbox")
    detects = True
    labels = ("face",)
    min_score = 0.6
    batch = 16
    on_host = True

    files: Mapping[str, bytes]
    weights: tuple[WeightFile, ...] = ()
    spec: ModelSpec

    def __init__(self, nms_iou: float = 0.3, most: int = 5000) -> None:
        if not (0 <= nms_iou <= 1 and most >= 1):
            raise ValueError("nms_iou is within 0..1, most >= 1")
        self.nms_iou, self.most = nms_iou, most
        self._detector: Any = None

    def load(self, device: str) -> None:
        """Reads the network. Raises ModelError: the file is none, or no YuNet."""
        import cv2

        cv2.setNumThreads(1)
        floor = json.loads(self.spec.thresholds)["min_score"]
        size = (self.geometry.width_px, self.geometry.height_px)
        with staged(self.weights, getattr(self, "files", {})) as folder:
            (path,) = folder.iterdir()
            content = np.frombuffer(path.read_bytes(), np.uint8)
        try:
            self._detector = cv2.FaceDetectorYN.create(
                "onnx", content, np.zeros(0, np.uint8), size, floor, self.nms_iou, self.most
            )
            self._detector.detect(np.zeros((size[1], size[0], 3), np.uint8))
        except (cv2.error, SystemError) as error:
            text = " ".join(str(error).split())[:300]
            raise ModelError(
                f"yunet: {path.name} cannot be run as YuNet: {text}; take one made for OpenCV 4.10 "
                "and later, or write `file:` for another network",
                kind="model_load",
            ) from error

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Boxes of every frame, coordinates 0..1 of the upright frame."""
        items: list[int] = []
        found = [np.zeros((0, 15), np.float32)]
        for i, (picture, (w, h)) in enumerate(
            zip(batch.pixels.numpy(), batch.source_px, strict=True)
        ):
            scaled_w, scaled_h = self.geometry.width_px, self.geometry.height_px
            if self.geometry.fit == "letterbox":
                scaled_w, scaled_h, _, _ = fit_box(self.geometry, int(w), int(h))
            self._detector.setInputSize((scaled_w, scaled_h))
            seen = np.ascontiguousarray(picture[:scaled_h, :scaled_w, ::-1])  # no padding; BGR
            _, faces = self._detector.detect(seen)
            if faces is not None:
                items += [i] * len(faces)
                found.append(faces)
        item, rows = np.array(items, np.int64), np.concatenate(found)
        xyxy = np.concatenate([rows[:, :2], rows[:, :2] + np.maximum(rows[:, 2:4], 0)], axis=1)
        boxes = BoxRows(
            item=item,
            label_id=np.zeros(len(item), np.int64),
            score=np.clip(rows[:, 14], 0, 1),
            xyxy=undo_fit(self.geometry, xyxy, batch.source_px[item]),
        )
        return {"boxes": boxes}

    def close(self) -> None:
        """Forgets the network."""
        self._detector = None


class DnnNetwork(NetworkFile):
    """A network that OpenCV reads; frame by frame, for it plans memory anew for other batches."""

    on_host = True

    def _open(self, path: Path, device: str) -> int:
        import cv2

        cv2.setNumThreads(1)
        try:
            self._network = cv2.dnn.readNetFromONNX(str(path))
        except (cv2.error, SystemError) as error:
            text = " ".join(str(error).split())[:300]
            raise ModelError(
                f"file: OpenCV {cv2.__version__} cannot read {self.options['file']}: {text}; "
                "write adapter: onnx, which knows more operators",
                kind="model_load",
            ) from error
        self.check_count(len(self._network.getUnconnectedOutLayersNames()))
        return 1

    def _run(self, values: torch.Tensor) -> list[torch.Tensor]:
        import cv2
        import torch

        self._network.setInput(values.numpy())
        try:
            return [torch.from_numpy(self._network.forward().copy())]
        except cv2.error as error:
            text = " ".join(str(error).split())[:300]
            raise ModelError(
                f"geometry: {self.options['file']} cannot run on {tuple(values.shape)} in OpenCV: "
                f"{text}; set geometry and input.layout to what it takes, or write adapter: onnx",
                kind="model_raised",
            ) from error


_CLASSES = {"cascade": Cascade, "yunet": YuNet}


def locate(what: Mapping[str, Any], folders: Sequence[Path], where: str) -> Located:
    """A cascade, a YuNet or another network, by which key is written. Raises UsageError."""
    kinds = [key for key in ("cascade", "yunet", "file") if key in what]
    if len(kinds) != 1:
        raise UsageError(f"{where}: write one of cascade, yunet and file; here: {kinds or 'none'}")
    (kind,) = kinds
    if kind == "file":
        if len(what.get("gives") or ()) > 1:
            raise UsageError(
                f"{where}.gives: OpenCV does not keep the order of several outputs; write "
                "adapter: onnx for this network"
            )
        target = "vidbatch.models.opencv:DnnNetwork"
        return locate_network(target, what, folders, where, (".onnx",))
    if odd := [k for k in networkfile.KEYS if k in what and (kind, k) != ("yunet", "store")]:
        raise UsageError(f"{where}.{odd[0]}: goes with file, not with {kind}; leave it out")
    target = f"vidbatch.models.opencv:{_CLASSES[kind].__name__}"
    if kind == "yunet":
        store, name = find_file(what, "yunet", folders, where, (".onnx",))
        small, large = store.find([name], what.get("sha256") or {})
        return Located(adapter="opencv", target=target, files=small, weights=large)
    name = str(what["cascade"])
    carried = _carried()
    path = carried.get(name.removesuffix(".xml"))
    if path is None:
        if not name.endswith(".xml"):
            raise unknown_name(f"{where}.cascade", "cascade", name, tuple(carried))
        path = folders[0] / name
        if not path.is_file():
            raise UsageError(f"{where}.cascade: {path}: no such file, and OpenCV carries none so")
    return Located(adapter="opencv", target=target, files=((path.name, path.read_bytes()),))


def load_class(located: Located) -> type[Any]:
    """Cascade, YuNet, or the class with the facts of a network."""
    if located.options:
        return network_class(DnnNetwork, located)
    return next(c for c in _CLASSES.values() if c.__name__ == located.class_name)


def _carried() -> dict[str, Path]:
    """Name → path of the cascades of the installed OpenCV, found without importing it."""
    found = importlib.util.find_spec("cv2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")
    return {p.stem: p for p in (Path(found.origin).parent / "data").glob("*.xml")}
