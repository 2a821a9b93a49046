"""Deformable DETR (Zhu et al., ICLR 2021), single- or multi-scale, with or without iterative box refinement.

The learned query embedding has two halves. The region feature is added to the position half, from which the reference
point is predicted; the content half stays what was learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, PretrainedConfig

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from siamese_detr.detectors.functional import (
    additive_mask,
    encoder_layer,
    full_precision,
    inverse_sigmoid,
    level_arguments,
    sine_positions,
    valid_ratios,
)
from siamese_detr.errors import UserError


class DeformableDetrAdapter(DetectorAdapter):
    """Options: `num_feature_levels` (1: stride 32 only; 4: strides 8, 16, 32 and an extra level), `points` sampled per
    head and level, `with_box_refine`."""

    family = "deformable-detr"
    model_class = DeformableDetrForObjectDetection
    processor_class = "DeformableDetrImageProcessor"
    defaults = {"num_queries": 300, "ffn_size": 1024}  # noqa: RUF012

    @classmethod
    def wanted_strides(cls, num_feature_levels: int = 4, **options: Any) -> list[int]:
        return [32] if num_feature_levels == 1 else [8, 16, 32][-num_feature_levels:]

    @classmethod
    def configure(
        cls,
        backbone: PretrainedConfig,
        size: DetectorSize,
        num_feature_levels: int = 4,
        points: int = 4,
        with_box_refine: bool = False,
        two_stage: bool = False,
    ) -> PretrainedConfig:
        if two_stage:
            raise UserError(
                "two-stage Deformable DETR cannot be pre-trained: its queries are made of box coordinates alone, with "
                "no place for a region feature; use with_box_refine, or rt-detr, whose queries take encoder features"
            )
        if size.hidden_size % 32:
            raise UserError(f"hidden_size {size.hidden_size} must be a multiple of 32 in Deformable DETR (group norm)")
        if size.decoder_layers < 2:
            raise UserError("Deformable DETR needs at least two decoder layers in Transformers; raise decoder_layers")
        return DeformableDetrConfig(
            backbone_config=backbone,
            d_model=size.hidden_size,
            encoder_n_points=points,
            decoder_n_points=points,
            num_feature_levels=num_feature_levels,
            with_box_refine=with_box_refine,
            dilation=size.dilation,
            **size.values(),
        )

    @property
    def class_heads(self) -> nn.ModuleList:
        return self.model.class_embed

    @property
    def num_levels(self) -> int:
        return self.config.num_feature_levels

    def initialise(self) -> None:
        detr = self.model.model
        for part in (detr.encoder, detr.decoder):
            initialise.xavier(part)
            initialise.deformable_attention(part)
        for projection in detr.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
            projection[1].reset_parameters()
        nn.init.normal_(detr.level_embed)
        initialise.reset(detr.query_position_embeddings)
        nn.init.xavier_uniform_(detr.reference_points.weight)
        nn.init.zeros_(detr.reference_points.bias)
        for head in self.model.bbox_embed:
            initialise.box_head(head)
        nn.init.constant_(self.model.bbox_embed[0].layers[-1].bias.data[2:], -2.0)  # boxes start at 12 % of the image
        for head in self.class_heads:
            initialise.class_head(head)

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        detr = self.model.model
        sources = [projection(x) for projection, x in zip(detr.input_proj, maps, strict=False)]
        for level in range(len(maps), self.config.num_feature_levels):
            sources.append(detr.input_proj[level](maps[-1] if level == len(maps) else sources[-1]))
        masks, shapes = self.level_masks(sources, pixel_mask)
        positions = [sine_positions(detr.position_embedding, x, mask) for x, mask in zip(sources, masks, strict=True)]
        position = torch.cat([x + detr.level_embed[i].view(1, 1, -1) for i, x in enumerate(positions)], 1)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in sources], 1)
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        ratios = valid_ratios(detr, masks, tokens.dtype)
        extra = level_arguments(shapes, tokens.device)
        reference = detr.encoder.get_reference_points(tuple(shapes), ratios, device=tokens.device)
        tokens = dropout(tokens, detr.encoder.dropout, self.training)
        own = dict(attention_mask=mask, position_embeddings=position, reference_points=reference, **extra)
        for layer in detr.encoder.layers:
            tokens = encoder_layer(layer, tokens, encoder_hidden_states=tokens, **own)
        return Memory(tokens, mask, shapes, position, {"valid_ratios": ratios, **extra})

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        detr = self.model.model
        extra = dict(memory.extra)
        ratios = extra.pop("valid_ratios")
        position, content = detr.query_position_embeddings.weight.split(self.hidden_size, dim=1)
        positions = self.add_regions(position, region_queries, len(memory.tokens))
        hidden = content.unsqueeze(0).expand(len(positions), -1, -1)
        given = dict(
            attention_mask=additive_mask(query_mask, hidden.dtype),
            object_queries_position_embeddings=positions,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask,
            **extra,
        )
        reference = full_precision(detr.reference_points(positions)).sigmoid()
        states, boxes = [], []
        for layer, box_head in zip(detr.decoder.layers, self.model.bbox_embed, strict=True):
            scale = ratios if reference.shape[-1] == 2 else torch.cat((ratios, ratios), -1)
            anchors = reference[:, :, None] * scale[:, None]
            hidden = layer(hidden, reference_points=anchors, **given)
            states.append(hidden)
            shift, known = full_precision(box_head(hidden)), reference.shape[-1]
            anchor = inverse_sigmoid(reference)
            boxes.append(torch.cat((shift[..., :known] + anchor, shift[..., known:]), -1).sigmoid())
            if self.config.with_box_refine:
                reference = boxes[-1].detach()
        return Decoded(torch.stack(states), torch.stack(boxes))
