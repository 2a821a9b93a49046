"""DAB-DETR (Liu et al., ICLR 2022): a query is a learned anchor box and a content that starts at zero. The region
feature is that content; the anchors stay learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DabDetrConfig, DabDetrForObjectDetection

from siamese_detr.detectors.adapter import Decoded, Memory
from siamese_detr.detectors.conditional_detr import ConditionalDetrAdapter
from siamese_detr.detectors.functional import (
    additive_mask,
    full_precision,
    inverse_sigmoid,
    padding_mask,
    sine_embedding,
)


class DabDetrAdapter(ConditionalDetrAdapter):
    family = "dab-detr"
    model_class = DabDetrForObjectDetection
    config_class = DabDetrConfig
    defaults = {"num_queries": 300}  # noqa: RUF012

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.backbone.conv_encoder.model

    @property
    def class_heads(self) -> nn.ModuleList:
        return nn.ModuleList([self.model.class_embed])

    @property
    def queries(self) -> nn.Embedding:
        return self.model.model.query_refpoint_embeddings

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        detr, last = self.model.model, maps[-1]
        (mask,), shapes = self.level_masks([last], pixel_mask)
        positions = detr.backbone.position_embedding(last, mask).to(last.dtype).flatten(2).transpose(1, 2)
        tokens = detr.input_projection(last).flatten(2).transpose(1, 2)
        attention_mask = padding_mask(mask.flatten(1), tokens.dtype)
        for layer in detr.encoder.layers:
            scaled = positions * detr.encoder.query_scale(tokens)
            tokens = layer(tokens, attention_mask=attention_mask, object_queries=scaled)[0]
        return Memory(tokens, mask.flatten(1), shapes, positions)

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        decoder, half = self.model.model.decoder, self.hidden_size // 2
        anchors = self.queries.weight
        content = memory.tokens.new_zeros(len(anchors), self.hidden_size)
        hidden = self.add_regions(content, region_queries, len(memory.tokens))
        refined = full_precision(anchors.repeat(len(hidden), 1, 1)).sigmoid()
        memory_mask = padding_mask(memory.mask, hidden.dtype)
        self_mask = additive_mask(query_mask, hidden.dtype)
        states, anchors_read = [], []
        for index, layer in enumerate(decoder.layers):
            reference = refined.detach() if index else refined  # a layer's anchors learn from its boxes only
            sine = sine_embedding(reference, half).to(hidden.dtype)
            positions = decoder.ref_point_head(sine)
            sine = sine[..., : 2 * half] * (decoder.query_scale(hidden) if index else 1)
            size = decoder.ref_anchor_head(hidden).sigmoid()  # attention is modulated by the anchor's size, y before x
            y = sine[..., :half] * (size[..., 1] / reference[..., 3]).unsqueeze(-1)
            x = sine[..., half:] * (size[..., 0] / reference[..., 2]).unsqueeze(-1)
            sine = torch.cat((y, x), -1).to(hidden.dtype)
            hidden = layer(
                hidden,
                self_mask,
                memory.positions,
                positions,
                sine,
                memory.tokens,
                encoder_attention_mask=memory_mask,
            )[0]
            states.append(decoder.layernorm(hidden))
            anchors_read.append(inverse_sigmoid(refined))
            refined = (full_precision(decoder.bbox_embed(hidden)) + inverse_sigmoid(reference)).sigmoid()
        shifts = full_precision(self.model.bbox_predictor(torch.stack(states)))
        return Decoded(torch.stack(states), (shifts + torch.stack(anchors_read)).sigmoid())
