"""The networks of each task: loaded by the library, fed with our frames, answers as a model's rows.

Scaling was the decoder's; here pixels are only cut, rescaled and normalised, on the device. torch
and the library are imported when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vidbatch.data import (
    AudioGrid,
    Batch,
    BoxRows,
    Geometry,
    Ints,
    ModelSpec,
    WindowGrid,
    fit_box,
)
from vidbatch.errors import ModelError
from vidbatch.models.base import undo_fit
from vidbatch.models.huggingface.facts import ANY_SIZE, DETECTORS
from vidbatch.models.precision import PRECISIONS, settle
from vidbatch.models.weights import WeightFile, staged

if TYPE_CHECKING:
    import torch

_PROMPT_TOKENS = 64
"""What SigLIP was trained with: its prompts are padded to it."""


class Network:
    """Loading, precision and pixels, as all tasks have them; `options` come with the subclass."""

    options: ClassVar[dict[str, Any]] = {}
    precisions = PRECISIONS
    compiles = True
    batch = 32

    files: Mapping[str, bytes]
    weights: tuple[WeightFile, ...] = ()
    spec: ModelSpec
    geometry: Geometry

    def __init__(self) -> None:
        self._network: Any = None
        self._call: Any = None
        self._scale: Any = None
        self._shift: Any = None

    def load(self, device: str) -> None:
        """Stages the files, loads them, brings them to the device. Raises ModelError."""
        import torch

        with staged(self.weights, self.files) as folder:
            network = self._read(str(folder))
            self._prepare(str(folder), network)
        self._device = torch.device(device)
        self._network, self._dtype = settle(network.eval(), self.spec.precision, self._device)
        self._call = self._entry(self._network)
        if self.spec.compile:
            self._call = torch.compile(self._call)
        if "mean" in self.options:
            mean = torch.tensor(self.options["mean"], dtype=torch.float32, device=self._device)
            std = torch.tensor(self.options["std"], dtype=torch.float32, device=self._device)
            self._scale = (self.options["scale"] / std)[:, None, None]
            self._shift = ((self.options["shift"] - mean) / std)[:, None, None]

    def close(self) -> None:
        """Forgets the network."""
        self._network = self._call = None

    def _read(self, folder: str) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # stderr is for talk, not for workers
        transformers.utils.logging.set_verbosity_error()
        cls = getattr(transformers, self.options["architecture"], None)
        if cls is None:
            raise ModelError(
                f"transformers {transformers.__version__} has no {self.options['architecture']}; "
                "the model cannot be loaded; install a version that has it",
                kind="model_load",
            )
        network, report = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
            dtype="float32",
        )  # fmt: skip
        lacking = sorted(key for key in report["missing_keys"] if not self._needless(key)) + sorted(
            str(key) for key in report.get("mismatched_keys", ())
        )
        if lacking:
            raise ModelError(
                f"the weights lack {len(lacking)} tensors, {lacking[0]} among them; they would be "
                "random numbers, so the model is not loaded; take weights that go with config.json",
                kind="model_load",
            )
        return network

    def _needless(self, key: str) -> bool:
        """Whether a tensor that the weights lack is not used."""
        return False

    def _entry(self, network: Any) -> Any:
        """What is called with pixels."""
        return network

    def _prepare(self, folder: str, network: Any) -> None:
        """What is done once while the files are at hand."""

    def _run(self, **inputs: torch.Tensor) -> Any:
        """What the network says of B items. A compiled one always gets a full batch, of which the
        rest repeats the last item: every other size would be compiled anew, for minutes."""
        import torch

        if not self.spec.compile:
            return self._call(**inputs)
        ((name, values),) = inputs.items()
        n = len(values)
        rest = values[-1:].expand(self.spec.batch - n, *values.shape[1:])
        answer = self._call(**{name: torch.cat([values, rest])})
        return SimpleNamespace(**{k: v[:n] for k, v in answer.items() if hasattr(v, "shape")})

    def _pixels(self, pixels: Any) -> torch.Tensor:
        """uint8 (…, H, W, 3) → the network's (…, 3, h, w)."""
        inner, outer = self.options["inner"], self.options["outer"]
        if inner is not None and tuple(pixels.shape[-3:-1]) == tuple(outer):
            top, left = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
            pixels = pixels[..., top : top + inner[0], left : left + inner[1], :]
        channels = pixels.movedim(-1, -3).float()
        found: torch.Tensor = (channels * self._scale + self._shift).to(self._dtype)
        return found.contiguous()


class Classifier(Network):
    """Labels of frames, by a head that was trained for them."""

    kind = "classifier"
    top_k = 5

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Scores of the labels."""
        return {"scores": self._scores(self._run(pixel_values=self._pixels(batch.pixels)).logits)}

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        softmax = self.options["scores"] == "softmax"
        scores = logits.softmax(dim=-1) if softmax else logits.sigmoid()
        kept = self.options["kept"]
        return scores if kept is None else scores[:, kept]


class VideoClassifier(Classifier):
    """Labels of windows of frames."""

    kind = "video_classifier"
    batch = 4


class AudioClassifier(Classifier):
    """Labels of windows of sound; its features are made by the library, on the host."""

    kind = "audio_classifier"
    batch = 16

    def _prepare(self, folder: str, network: Any) -> None:
        from transformers import AutoFeatureExtractor

        self._extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Scores of the labels."""
        sound = list(batch.samples.cpu().numpy())
        inputs = self._extractor(
            sound, sampling_rate=self._extractor.sampling_rate, return_tensors="pt"
        )
        values = inputs["input_values"].to(self._device, self._dtype)
        return {"scores": self._scores(self._run(input_values=values).logits)}


class ImageText(Network):
    """Labels of frames by prompts, which are read and embedded once, when it is loaded."""

    kind = "zero_shot"

    def _prepare(self, folder: str, network: Any) -> None:
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        siglip = self.options["model_type"] == "siglip"
        padding: dict[str, Any] = (
            {"padding": "max_length", "max_length": _PROMPT_TOKENS, "truncation": True}
            if siglip
            else {"padding": True}
        )
        tokens = tokenizer(self.options["prompts"], return_tensors="pt", **padding)
        with torch.inference_mode():
            text = network.get_text_features(**tokens).pooler_output.float()
        self._text = torch.nn.functional.normalize(text, dim=-1)
        self._gain = network.logit_scale.detach().float().exp()
        self._bias = network.logit_bias.detach().float() if siglip else None

    def _entry(self, network: Any) -> Any:
        return network.get_image_features

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Scores of the prompts; embeddings as well, if asked for."""
        import torch

        found = self._run(pixel_values=self._pixels(batch.pixels))
        image = torch.nn.functional.normalize(found.pooler_output.float(), dim=-1)
        logits = image @ self._text.to(image.device).T * self._gain.to(image.device)
        scores = (
            logits.softmax(dim=-1)
            if self._bias is None
            else (logits + self._bias.to(image.device)).sigmoid()
        )
        return {"scores": scores} | ({"embeddings": image} if self.options["dim"] else {})


class Embedder(Network):
    """Embeddings of frames."""

    kind = "embedder"

    def _needless(self, key: str) -> bool:
        return self.options["pooling"] != "pooler" and key.startswith("pooler.")

    def _entry(self, network: Any) -> Any:
        return getattr(network, "get_image_features", network)

    def predict(self, batch: Batch) -> dict[str, Any]:
        """One vector per frame."""
        answer = self._run(pixel_values=self._pixels(batch.pixels))
        if self.options["architecture"].endswith("WithProjection"):
            return {"embeddings": answer.image_embeds}
        if self.options["pooling"] == "pooler":
            return {"embeddings": answer.pooler_output.flatten(1)}
        states = answer.last_hidden_state
        if states.ndim == 4:  # a convolutional network: (B, C, h, w)
            states = states.flatten(2).movedim(1, 2)
        return {
            "embeddings": states[:, 0] if self.options["pooling"] == "cls" else states.mean(dim=1)
        }


class Detector(Network):
    """Boxes of things, of networks that answer with a set: no box is found twice, no NMS."""

    kind = "detector"
    detects = True
    min_score = 0.5
    batch = 8

    def predict(self, batch: Batch) -> dict[str, Any]:
        """Boxes, coordinates 0..1 of the upright frame."""
        import torch

        parts = []
        for items, width, height in self._pictures(batch):
            pixels = self._pixels(batch.pixels[torch.from_numpy(items), :height, :width])
            answer = self._run(pixel_values=pixels)
            found = self._boxes(answer.logits.float(), answer.pred_boxes.float())
            parts.append(self._rows(found, items, width, height, batch.source_px))
        return {
            "boxes": BoxRows(
                item=np.concatenate([p.item for p in parts]),
                label_id=np.concatenate([p.label_id for p in parts]),
                score=np.concatenate([p.score for p in parts]),
                xyxy=np.concatenate([p.xyxy for p in parts]),
            )
        }

    def _pictures(self, batch: Batch) -> Iterator[tuple[Ints, int, int]]:
        """(items, width, height) of the pictures that are given to the network together.

        Those that take any size get a letterbox without its padding, as the library gives it them;
        frames of one video have one size, so that a batch seldom comes apart.
        """
        g = self.geometry
        everything = np.arange(len(batch.source_px))
        if g.fit != "letterbox" or self.options["model_type"] not in ANY_SIZE:
            yield everything, g.width_px, g.height_px
            return
        sizes = np.array([fit_box(g, int(w), int(h))[:2] for w, h in batch.source_px])
        for width, height in np.unique(sizes, axis=0):
            same = (sizes == (width, height)).all(axis=1)
            yield everything[same], int(width), int(height)

    def _boxes(self, logits: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores (B, Q), classes (B, Q), boxes (B, Q, 4) from logits (B, Q, K) and boxes, which are
        centre x, y, width, height, 0..1 of the picture."""
        if DETECTORS[self.options["model_type"]] == "softmax":
            scores, classes = logits.softmax(dim=-1)[..., :-1].max(dim=-1)  # the last is: nothing
            return scores, classes, boxes
        scores, index = logits.sigmoid().flatten(1).topk(logits.shape[1], dim=-1)
        queries = index // logits.shape[2]
        picked = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        return scores, index % logits.shape[2], picked

    def _rows(
        self, found: tuple[torch.Tensor, ...], items: Ints, width: int, height: int, source_px: Ints
    ) -> BoxRows:
        scores, classes, boxes = (x.cpu().numpy() for x in found)
        kept = self.options["kept"]
        renumbered = np.full(self.options["classes"], -1)
        renumbered[np.arange(len(renumbered)) if kept is None else kept] = np.arange(
            len(self.options["labels"])
        )
        label_id = renumbered[classes].ravel()
        rows = label_id >= 0
        item = np.repeat(items, scores.shape[1])[rows]
        centre, size = boxes.reshape(-1, 4)[rows, :2], boxes.reshape(-1, 4)[rows, 2:]
        px = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        px *= (width, height, width, height)
        return BoxRows(
            item=item,
            label_id=label_id[rows],
            score=scores.ravel()[rows],
            xyxy=undo_fit(self.geometry, px, source_px[item]),
        )


class Segmenter(Network):
    """The class of every pixel of the picture that the network saw."""

    kind = "segmenter"
    segments = True
    batch = 8

    def predict(self, batch: Batch) -> dict[str, Any]:
        """(B, H, W) numbers of labels, -1 for classes that are not kept."""
        import torch

        logits = self._run(pixel_values=self._pixels(batch.pixels)).logits.float()
        size = batch.pixels.shape[1:3]
        full = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        classes = full.argmax(dim=1)
        kept = self.options["kept"]
        if kept is None:
            return {"masks": classes}
        renumbered = torch.full((logits.shape[1],), -1, device=classes.device)
        renumbered[torch.tensor(kept, device=classes.device)] = torch.arange(
            len(kept), device=classes.device
        )
        return {"masks": renumbered[classes]}


CLASSES: dict[str, type[Network]] = {
    "image-classification": Classifier,
    "video-classification": VideoClassifier,
    "audio-classification": AudioClassifier,
    "zero-shot": ImageText,
    "image-embedding": Embedder,
    "object-detection": Detector,
    "semantic-segmentation": Segmenter,
}


def class_facts(options: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a plain model (`base.Facts`) that these options mean."""
    found: dict[str, Any] = {"options": dict(options), "labels": tuple(options.get("labels", ()))}
    if "dim" in options:
        found["dim"] = options["dim"]
    if options.get("geometry"):
        width, height, fit, interpolation = options["geometry"]
        found["geometry"] = Geometry(
            width_px=width, height_px=height, fit=fit, interpolation=interpolation
        )
    if "frames" in options:
        found["window"] = WindowGrid(frames=options["frames"])
    if "audio" in options:
        rate_hz, window_s, hop_s = options["audio"]
        found["audio"] = AudioGrid(
            rate_hz=rate_hz, window_s=Fraction(window_s), hop_s=Fraction(hop_s)
        )
    return found
