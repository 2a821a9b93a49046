"""DEIMv2 (Huang et al., 2025) with a convolutional backbone: D-FINE with a lighter encoder and decoder layers.

Its variants with a DINOv3 backbone are refused: their side branch of convolutions reads the pixels, so there are no
frozen features to pre-train behind.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Deimv2Config, Deimv2ForObjectDetection, PretrainedConfig, PreTrainedModel

from siamese_detr.detectors.adapter import DetectorSize
from siamese_detr.detectors.rt_detr import DFineAdapter
from siamese_detr.errors import UserError


class Deimv2Adapter(DFineAdapter):
    family = "deimv2"
    model_class = Deimv2ForObjectDetection
    config_class = Deimv2Config
    class_loss = "matching-aware"

    def __init__(self, model: PreTrainedModel, *arguments: Any, **keywords: Any) -> None:
        refuse_dinov3(model.config.backbone_config)
        super().__init__(model, *arguments, **keywords)

    @classmethod
    def configure(cls, backbone: PretrainedConfig, size: DetectorSize, points: int = 4) -> PretrainedConfig:
        refuse_dinov3(backbone)
        return super().configure(backbone, size, points)

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.conv_encoder.model

    @property
    def projections(self) -> nn.ModuleList:
        return self.model.model.conv_encoder.encoder_input_proj


def refuse_dinov3(backbone: Any) -> None:
    if getattr(backbone, "model_type", None) == "dinov3_vit":
        raise UserError(
            "DEIMv2 with a DINOv3 backbone cannot be pre-trained: a branch of its backbone learns from the pixels, so "
            "there are no frozen features; use a DEIMv2 with a convolutional backbone, or d-fine"
        )
