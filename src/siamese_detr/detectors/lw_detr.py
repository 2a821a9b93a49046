"""LW-DETR (Chen et al., 2024) and RF-DETR (Robinson et al., 2025): a windowed ViT, a convolutional projector in place
of an encoder, and a decoder whose queries are learned contents at the boxes predicted from the best tokens.

The region feature is added to the learned content. Which tokens the queries start from while there are no classes to
score tokens with, and what is learned there, is as for RT-DETR (see `rt_detr`). Behind the frozen ViT the projector,
the box proposals and the decoder are pre-trained.

Both are trained on labels with 13 groups of queries, each matched by itself, and predict with the first alone (Group
DETR, Chen et al., 2023). Pre-training has the first group only; fine-tuning makes the others from it.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    LwDetrConfig,
    LwDetrForObjectDetection,
    PretrainedConfig,
    PreTrainedModel,
    RfDetrConfig,
    RfDetrForObjectDetection,
)

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from siamese_detr.detectors.backbones import Backbone
from siamese_detr.detectors.functional import best_tokens, full_precision, level_arguments, spread_tokens, valid_ratios
from siamese_detr.errors import UserError


def refine(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes cxcywh shifted by `deltas` times their size and scaled by e to the power of `deltas`."""
    deltas = full_precision(deltas)
    return torch.cat((deltas[..., :2] * boxes[..., 2:] + boxes[..., :2], deltas[..., 2:].exp() * boxes[..., 2:]), -1)


class LwDetrAdapter(DetectorAdapter):
    """Option: `points` sampled per head and level."""

    family = "lw-detr"
    model_class: ClassVar[type[PreTrainedModel]] = LwDetrForObjectDetection
    config_class: ClassVar[type[PretrainedConfig]] = LwDetrConfig
    backbone_type: ClassVar[str] = "lw_detr_vit"
    processor_class = "DeformableDetrImageProcessor"
    class_loss = "iou-bce"
    selects_queries = True
    masks_queries = False
    defaults: ClassVar[dict[str, Any]] = {
        "num_queries": 300,
        "decoder_layers": 3,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }

    @classmethod
    def backbone_config(cls, backbone: Backbone, strides: list[int], dilation: bool) -> PretrainedConfig:
        network = backbone.network
        if not isinstance(network, PretrainedConfig) or network.model_type != cls.backbone_type:
            raise UserError(
                f"{cls.family} has a ViT of its own ({cls.backbone_type}) and takes no other backbone, such as "
                f"{backbone.name!r}; start from one of its checkpoints"
            )
        return network

    @classmethod
    def configure(cls, backbone: PretrainedConfig, size: DetectorSize, points: int = 4) -> PretrainedConfig:
        values: dict[str, Any] = dict(
            backbone_config=backbone,
            projector_scale_factors=[1.0],
            d_model=size.hidden_size,
            num_queries=size.num_queries,
            decoder_layers=size.decoder_layers,
            decoder_ffn_dim=size.ffn_size,
            decoder_self_attention_heads=size.heads,
            decoder_cross_attention_heads=2 * size.heads,
            decoder_n_points=points,
            dropout=size.dropout,
            attention_dropout=size.attention_dropout,
            activation_dropout=size.activation_dropout,
            num_labels=size.num_labels,
        )
        return cls.config_class(**values)

    @property
    def square_side(self) -> int:  # type: ignore[override]
        """Sides of the input must be multiples of this many pixels: whole patches in whole windows."""
        config = self.config.backbone_config
        return config.patch_size * config.num_windows_side

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.backbone.backbone

    @property
    def class_heads(self) -> nn.ModuleList:
        return nn.ModuleList([*self.model.model.enc_out_class_embed, self.model.class_embed])

    def classify(self, states: Tensor) -> Tensor:
        groups = zip(self.model.model.enc_out_class_embed, states[0].split(self.num_queries, 1), strict=False)
        first = torch.cat([head(tokens) for head, tokens in groups], 1)
        return torch.cat((first[None], self.model.class_embed(states[1:])))

    @property
    def num_layers(self) -> int:
        return self.config.decoder_layers + 1

    @property
    def num_levels(self) -> int:
        return len(self.config.projector_scale_factors)

    def initialise(self) -> None:
        detr = self.model.model
        initialise.reset(detr.backbone.projector)
        initialise.xavier(detr.decoder)
        initialise.deformable_attention(detr.decoder)
        for module in (detr.enc_output, detr.enc_output_norm, detr.query_feat):
            initialise.reset(module)
        nn.init.zeros_(detr.reference_point_embed.weight)
        for head in (*detr.enc_out_bbox_embed, self.model.bbox_embed):
            initialise.box_head(head)
        for head in self.class_heads:
            initialise.class_head(head)

    def project(self, maps: list[Tensor]) -> list[Tensor]:
        """The projector: maps of the ViT's layers -> one map per level."""
        return self.model.model.backbone.projector(maps)

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        detr, pixel_mask = self.model.model, self.pad(pixel_mask)
        masks, _ = self.level_masks(maps, pixel_mask)
        # The projector knows no mask: at least there is nothing in the padding.
        sources = self.project([x * mask[:, None].to(x.dtype) for x, mask in zip(maps, masks, strict=True)])
        masks, shapes = self.level_masks(sources, pixel_mask)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in sources], 1)
        ratios = valid_ratios(detr, masks, tokens.dtype)
        extra = dict(**level_arguments(shapes, tokens.device), valid_ratios=ratios)
        return Memory(tokens, torch.cat([mask.flatten(1) for mask in masks], 1), shapes, None, extra)

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        if query_mask is not None:
            raise ValueError(f"{self.family} takes no query_mask")
        detr = self.model.model
        groups = self.config.group_detr if self.training else 1
        if region_queries is not None and groups > 1:
            raise ValueError("region queries are for one group of queries: reduce the detector first")
        tokens, grid, outside = detr.gen_encoder_output_proposals(memory.tokens, ~memory.mask, memory.shapes)
        proposals = [self.propose(group, memory, tokens, grid, outside, region_queries) for group in range(groups)]
        token, proposed = (torch.cat(parts, 1) for parts in zip(*proposals, strict=True))
        queries = groups * self.num_queries
        anchors = refine(proposed.detach(), detr.reference_point_embed.weight[:queries])
        out = detr.decoder(
            inputs_embeds=self.add_regions(detr.query_feat.weight[:queries], region_queries, len(tokens)),
            reference_points=anchors,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask,
            **memory.extra,
        )
        states = out.intermediate_hidden_states
        boxes = torch.stack([refine(anchors, self.model.bbox_embed(state)) for state in states])
        return Decoded(torch.cat((token[None], states)), torch.cat((proposed[None], boxes)))

    def propose(
        self, group: int, memory: Memory, tokens: Tensor, grid: Tensor, outside: Tensor, region_queries: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens (B, Q, D) that the queries of a group start from, and the boxes (B, Q, 4) predicted there."""
        detr = self.model.model
        tokens = detr.enc_output_norm[group](detr.enc_output[group](tokens))
        if region_queries is None:
            scores = detr.enc_out_class_embed[group](tokens).masked_fill(outside, float("-inf"))
            chosen = best_tokens(scores, self.num_queries)
        else:
            chosen = spread_tokens(self.num_queries, memory.shapes, memory.extra["valid_ratios"][:, 0])
        token = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        return token, refine(grid.gather(1, chosen[..., None].expand(-1, -1, 4)), detr.enc_out_bbox_embed[group](token))

    def reduce(self) -> None:
        if self.config.group_detr > 1:
            self.regroup(1)

    def complete(self) -> list[str]:
        if self.config.group_detr > 1:
            return []
        before = set(self.model.state_dict())
        self.regroup(self.config_class().group_detr)
        for head in self.model.model.enc_out_class_embed[1:]:
            initialise.class_head(head)
        return [name for name in self.model.state_dict() if name not in before]

    def regroup(self, groups: int) -> None:
        """Keep the first group of queries alone, and make the others from it.

        Equal groups would learn the same. So each takes its queries in another order, which gives them other tokens to
        start from.
        """
        detr, count = self.model.model, self.num_queries
        self.config.group_detr = detr.group_detr = groups
        for name in ("enc_output", "enc_output_norm", "enc_out_bbox_embed", "enc_out_class_embed"):
            first = getattr(detr, name)[0]
            setattr(detr, name, nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(groups - 1))]))
        for name in ("reference_point_embed", "query_feat"):
            first = getattr(detr, name).weight.detach()[:count]
            weight = torch.cat([first.roll(group, 0) for group in range(groups)])
            setattr(detr, name, nn.Embedding.from_pretrained(weight, freeze=False))
        self.set_trainable(backbone=False, class_head=False)


class RfDetrAdapter(LwDetrAdapter):
    """RF-DETR: the ViT is a DINOv2 (whose published weights fit), whose windows only square inputs fill correctly."""

    family = "rf-detr"
    model_class = RfDetrForObjectDetection
    config_class = RfDetrConfig
    backbone_type = "rf_detr_dinov2"
    processor_class = "RfDetrImageProcessor"

    def constants(self) -> list[nn.Parameter]:
        embeddings: Any = self.backbone.embeddings
        return [embeddings.mask_token]  # DINOv2 masks patches only while it is pre-trained

    @property
    def square_side(self) -> int:  # type: ignore[override]
        config = self.config.backbone_config
        return config.patch_size * config.num_windows

    @property
    def num_levels(self) -> int:
        return 1

    def pad(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        side = -(-max(height, width) // self.square_side) * self.square_side
        return nn.functional.pad(x, (0, side - width, 0, side - height))

    def project(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.model.model.backbone.projector(maps)]
