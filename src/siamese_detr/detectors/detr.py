"""DETR (Carion et al., ECCV 2020): the region feature is part of the query's position embedding."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import DetrConfig, DetrForObjectDetection, PretrainedConfig, PreTrainedModel

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from siamese_detr.detectors.functional import (
    additive_mask,
    encoder_layer,
    full_precision,
    padding_mask,
    sine_positions,
)
from siamese_detr.detectors.structures import ClassLoss


class DetrAdapter(DetectorAdapter):
    family = "detr"
    model_class: ClassVar[type[PreTrainedModel]] = DetrForObjectDetection
    config_class: ClassVar[type[PretrainedConfig]] = DetrConfig
    processor_class = "DetrImageProcessor"
    class_loss: ClassVar[ClassLoss] = "softmax"

    @classmethod
    def configure(cls, backbone: PretrainedConfig, size: DetectorSize) -> PretrainedConfig:
        values: dict[str, Any] = dict(backbone_config=backbone, hidden_size=size.hidden_size, dilation=size.dilation)
        return cls.config_class(**values, **size.values())

    @property
    def queries(self) -> nn.Embedding:
        """The learned queries."""
        return self.model.model.query_position_embeddings

    def initialise(self) -> None:
        detr = self.model.model
        initialise.xavier(detr.encoder)
        initialise.xavier(detr.decoder)
        initialise.reset(self.queries)
        initialise.reset(detr.input_projection)
        initialise.box_head(self.model.bbox_predictor, zero_last=False)
        initialise.class_head(self.model.class_labels_classifier, focal=False)

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        detr, last = self.model.model, maps[-1]
        (mask,), shapes = self.level_masks([last], pixel_mask)
        positions = sine_positions(detr.position_embedding, last, mask).to(last.dtype)
        tokens = detr.input_projection(last).flatten(2).transpose(1, 2)
        tokens = dropout(tokens, detr.encoder.dropout, self.training)
        attention_mask = padding_mask(mask.flatten(1), tokens.dtype)
        for layer in detr.encoder.layers:
            tokens = encoder_layer(layer, tokens, attention_mask=attention_mask, position_embeddings=positions)
        return Memory(tokens, mask.flatten(1), shapes, positions)

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        decoder = self.model.model.decoder
        positions = self.add_regions(self.queries.weight, region_queries, len(memory.tokens))
        hidden = torch.zeros_like(positions)
        given = dict(
            attention_mask=additive_mask(query_mask, hidden.dtype),
            object_queries_position_embeddings=positions,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=padding_mask(memory.mask, hidden.dtype),
            spatial_position_embeddings=memory.positions,
        )
        states, boxes = [], []
        for layer in decoder.layers:
            hidden = layer(hidden, **given)
            states.append(decoder.layernorm(hidden))
            boxes.append(full_precision(self.model.bbox_predictor(states[-1])).sigmoid())
        return Decoded(torch.stack(states), torch.stack(boxes))
