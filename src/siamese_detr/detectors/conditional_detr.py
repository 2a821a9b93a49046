"""Conditional DETR (Meng et al., ICCV 2021): the region feature is part of the query's position embedding, from which
the reference point of the query is predicted."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, PretrainedConfig, PreTrainedModel

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import Decoded, Memory
from siamese_detr.detectors.detr import DetrAdapter
from siamese_detr.detectors.functional import (
    additive_mask,
    full_precision,
    inverse_sigmoid,
    padding_mask,
    sine_embedding,
)


class ConditionalDetrAdapter(DetrAdapter):
    family = "conditional-detr"
    model_class: ClassVar[type[PreTrainedModel]] = ConditionalDetrForObjectDetection
    config_class: ClassVar[type[PretrainedConfig]] = ConditionalDetrConfig
    processor_class = "ConditionalDetrImageProcessor"
    class_loss = "focal"

    def initialise(self) -> None:
        detr = self.model.model
        initialise.xavier(detr.encoder)
        initialise.xavier(detr.decoder)
        for name, layer in detr.decoder.named_modules():
            if name.endswith(("attn.o_proj", "attn.output_proj")):
                nn.init.zeros_(layer.bias)
        initialise.reset(self.queries)
        initialise.reset(detr.input_projection)
        initialise.box_head(self.model.bbox_predictor)
        for head in self.class_heads:
            initialise.class_head(head)

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        decoder = self.model.model.decoder
        positions = self.add_regions(self.queries.weight, region_queries, len(memory.tokens))
        reference = decoder.ref_point_head(positions).sigmoid()
        sine = sine_embedding(reference, self.hidden_size // 2)
        reference = inverse_sigmoid(full_precision(reference))
        hidden = torch.zeros_like(positions)
        given = dict(
            attention_mask=additive_mask(query_mask, hidden.dtype),
            query_position_embeddings=positions,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=padding_mask(memory.mask, hidden.dtype),
            spatial_position_embeddings=memory.positions,
        )
        states, boxes = [], []
        for index, layer in enumerate(decoder.layers):
            scaled = sine * decoder.query_scale(hidden) if index else sine
            hidden = layer(hidden, query_sine_embed=scaled, is_first=index == 0, **given)
            states.append(decoder.layernorm(hidden))
            shift = full_precision(self.model.bbox_predictor(states[-1]))
            boxes.append(torch.cat((shift[..., :2] + reference, shift[..., 2:]), -1).sigmoid())
        return Decoded(torch.stack(states), torch.stack(boxes))
