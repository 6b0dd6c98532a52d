"""Tiny models of the transformers library, made with the library itself: seeded, saved to a folder.

Every one has a trained model's files: config.json, preprocessor_config.json, model.safetensors and,
with prompts, a tokenizer. Their weights are spread so that answers differ from frame to frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LABELS = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}
"""Two classes of one name, as ImageNet has them."""
WORDS = ("a", "photo", "of", "cat", "dog", "street", "at", "night", "the")

_BLOCK: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
_IMAGE: dict[str, Any] = {**_BLOCK, "image_size": 32, "patch_size": 8}
_NAMES: dict[str, Any] = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
_SQUARE = {"size": {"height": 32, "width": 32}}
_CUT = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def _resnet_backbone() -> Any:
    return hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def vit() -> Any:
    config = hf.ViTConfig(**_IMAGE, **_NAMES)
    return hf.ViTForImageClassification(config), hf.ViTImageProcessorPil(**_SQUARE)


def resnet() -> Any:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **_NAMES
    )
    processor = hf.ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875)
    return hf.ResNetForImageClassification(config), processor


def convnext() -> Any:
    config = hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], **_NAMES)
    processor = hf.ConvNextImageProcessorPil(size={"shortest_edge": 384})
    return hf.ConvNextForImageClassification(config), processor


def dinov2() -> Any:
    return hf.Dinov2Model(hf.Dinov2Config(**_IMAGE)), hf.BitImageProcessorPil(**_CUT)


def vit_embedding() -> Any:
    return hf.ViTModel(hf.ViTConfig(**_IMAGE)), hf.ViTImageProcessorPil(**_SQUARE)


def _text(tokens: int) -> dict[str, Any]:
    return {**_BLOCK, "vocab_size": 32, "max_position_embeddings": tokens}


def clip() -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = hf.CLIPConfig(
        text_config={**_text(16), **ends}, vision_config=_IMAGE, projection_dim=12
    )
    processor = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return hf.CLIPModel(config), processor


def siglip() -> Any:
    config = hf.SiglipConfig(text_config=_text(64), vision_config=_IMAGE)
    return hf.SiglipModel(config), hf.SiglipImageProcessorPil(**_SQUARE)


_DETR: dict[str, Any] = {
    "d_model": 16, "num_queries": 12, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}  # fmt: skip


def detr() -> Any:
    config = hf.DetrConfig(
        backbone_config=_resnet_backbone(), use_timm_backbone=False, use_pretrained_backbone=False,
        **_DETR, **_NAMES,
    )  # fmt: skip
    size = {"shortest_edge": 64, "longest_edge": 96}
    return hf.DetrForObjectDetection(config), hf.DetrImageProcessorPil(size=size)


def rt_detr() -> Any:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16, encoder_attention_heads=2, decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16, decoder_attention_heads=2, num_queries=12, decoder_layers=1,
        num_denoising=0, anchor_image_size=None, **{**_NAMES, "d_model": 16},
    )  # fmt: skip
    size = {"height": 64, "width": 64}
    return hf.RTDetrForObjectDetection(config), hf.RTDetrImageProcessorPil(size=size)


def yolos() -> Any:
    config = hf.YolosConfig(
        **{**_IMAGE, "image_size": [64, 96], "patch_size": 16}, num_detection_tokens=12, **_NAMES
    )
    size = {"shortest_edge": 64, "longest_edge": 96}
    return hf.YolosForObjectDetection(config), hf.YolosImageProcessorPil(size=size)


def segformer() -> Any:
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, **_NAMES,
    )  # fmt: skip
    processor = hf.SegformerImageProcessorPil(size={"height": 64, "width": 64})
    return hf.SegformerForSemanticSegmentation(config), processor


def videomae() -> Any:
    config = hf.VideoMAEConfig(**_IMAGE, num_frames=4, tubelet_size=2, **_NAMES)
    return hf.VideoMAEForVideoClassification(config), hf.VideoMAEImageProcessorPil(**_CUT)


def timesformer() -> Any:
    config = hf.TimesformerConfig(**_IMAGE, num_frames=4, **_NAMES)
    return hf.TimesformerForVideoClassification(config), hf.VideoMAEImageProcessorPil(**_CUT)


def vivit() -> Any:
    config = hf.VivitConfig(**_IMAGE, num_frames=4, tubelet_size=[2, 8, 8], **_NAMES)
    return hf.VivitForVideoClassification(config), hf.VivitImageProcessor(**_CUT)


def ast() -> Any:
    config = hf.ASTConfig(
        **_BLOCK, patch_size=8, frequency_stride=8, time_stride=8, max_length=48, num_mel_bins=16,
        **_NAMES,
    )  # fmt: skip
    extractor = hf.ASTFeatureExtractor(max_length=48, num_mel_bins=16)
    return hf.ASTForAudioClassification(config), extractor


def wav2vec2() -> Any:
    config = hf.Wav2Vec2Config(
        **_BLOCK, conv_dim=[8, 8, 8], conv_stride=[8, 8, 4], conv_kernel=[10, 8, 4],
        num_feat_extract_layers=3, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        classifier_proj_size=8, **_NAMES,
    )  # fmt: skip
    return hf.Wav2Vec2ForSequenceClassification(config), hf.Wav2Vec2FeatureExtractor()


RECIPES: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        vit, resnet, convnext, dinov2, vit_embedding, clip, siglip, detr, rt_detr, yolos, segformer,
        videomae, timesformer, vivit, ast, wav2vec2,
    )
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    """Saves one of RECIPES to folder/name, from seed 0."""
    place = folder / name
    torch.manual_seed(0)
    model, processor = RECIPES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.eval().save_pretrained(place)
    processor.save_pretrained(place)
    if name in ("clip", "siglip"):
        _tokenizer(siglip=name == "siglip").save_pretrained(place)
    return place


def change_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes them."""
    tree = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def _tokenizer(*, siglip: bool) -> Any:
    """Words as tokens; CLIP's ends are those of `clip`."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{w: i for i, w in enumerate(WORDS, 3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    form = "$A </s>" if siglip else "<s> $A </s>"
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="</s>", eos_token="</s>",
        bos_token="<s>",
    )  # fmt: skip
