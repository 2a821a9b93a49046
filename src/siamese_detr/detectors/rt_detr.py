"""RT-DETR (Zhao et al., CVPR 2024), RT-DETRv2 (Lv et al., 2024) and D-FINE (Peng et al., ICLR 2025).

These detectors have no learned queries: the encoder's tokens are scored by a class head, and the best ones become the
queries, each with the token as its content and the box predicted at the token as its reference. While pre-training
there are no classes to score with. Then query n takes the n-th token of a fixed, evenly spread sequence of tokens, of
which every stretch covers the whole image and all levels: each region's copies start everywhere, as the learned
queries of the other families do. Its content is the token plus the region feature, its reference the box predicted at
the token, both without gradient, as in the detector itself. What is predicted *at the tokens* is returned as a first
layer, so that the losses also train the head that proposes boxes, again as in the detector itself.

While fine-tuning, further queries learn to recover labels from noisy copies of them (Contrastive DeNoising, DINO §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    PretrainedConfig,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from siamese_detr.detectors.functional import (
    additive_mask,
    best_tokens,
    constant,
    full_precision,
    level_arguments,
    spread_tokens,
)
from siamese_detr.detectors.structures import ClassLoss, Edges, Predictions, Targets


@dataclass
class DenoisingQueries:
    """Noisy copies of the labels, as queries before the others.

    Args:
        content: (B, N, D), embeddings of the classes, some of which are wrong.
        references: (B, N, 4), logits of the noisy boxes.
        may_attend: (N + Q, N + Q) bool, which query (row) sees which (column) in self-attention.
        assigned, repeats: as in `Predictions`.
    """

    content: Tensor
    references: Tensor
    may_attend: Tensor
    assigned: Tensor
    repeats: int


class RTDetrAdapter(DetectorAdapter):
    """Option: `points` sampled per head and level."""

    family = "rt-detr"
    model_class: ClassVar[type[PreTrainedModel]] = RTDetrForObjectDetection
    config_class: ClassVar[type[PretrainedConfig]] = RTDetrConfig
    processor_class = "RTDetrImageProcessor"
    class_loss: ClassVar[ClassLoss] = "varifocal"
    square_side = 32  # or the levels of the encoder do not fit on each other
    selects_queries = True
    denoises = True
    defaults: ClassVar[dict[str, Any]] = {
        "num_queries": 300,
        "encoder_layers": 1,
        "ffn_size": 1024,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }

    @classmethod
    def wanted_strides(cls, **options: Any) -> list[int]:
        return [8, 16, 32]

    @classmethod
    def configure(cls, backbone: PretrainedConfig, size: DetectorSize, points: int = 4) -> PretrainedConfig:
        values: dict[str, Any] = dict(
            backbone_config=backbone,
            freeze_backbone_batch_norms=True,
            encoder_hidden_dim=size.hidden_size,
            encoder_in_channels=backbone_channels(backbone),
            d_model=size.hidden_size,
            decoder_in_channels=[size.hidden_size] * 3,
            decoder_n_points=points,
            **size.values(),
        )
        return cls.config_class(**values)

    @property
    def class_heads(self) -> nn.ModuleList:
        return nn.ModuleList([self.model.model.enc_score_head, *self.model.model.decoder.class_embed])

    @property
    def projections(self) -> nn.ModuleList:
        """The projection of every backbone map to the encoder's width."""
        return self.model.model.encoder_input_proj

    @property
    def num_layers(self) -> int:
        return self.config.decoder_layers + 1

    @property
    def num_levels(self) -> int:
        return self.config.num_feature_levels

    @property
    def denoising_embeddings(self) -> list[nn.Module]:
        """The embedding of the noisy classes, if the detector has one."""
        embedding = getattr(self.model.model, "denoising_class_embed", None)
        return [] if embedding is None else [embedding]

    @property
    def class_layers(self) -> list[nn.Module]:
        return [*self.class_heads, *self.denoising_embeddings]

    def untrained(self) -> list[nn.Module]:
        return self.denoising_embeddings

    def complete(self) -> list[str]:
        if self.denoising_embeddings:
            return []
        labels = self.config.num_labels
        self.config.num_denoising = self.config_class().num_denoising
        embedding = nn.Embedding(labels + 1, self.hidden_size, padding_idx=labels)  # it starts as class layers do
        self.model.model.denoising_class_embed = embedding.to(self.model.device)
        return ["model.denoising_class_embed.weight"]

    def initialise(self) -> None:
        detr = self.model.model
        for part in (
            self.projections,
            detr.encoder,
            detr.enc_output,
            detr.enc_bbox_head,
            detr.decoder_input_proj,
            detr.decoder,
        ):
            initialise.reset(part)
            initialise.packed_attention(part)
            initialise.deformable_attention(part)
        nn.init.xavier_uniform_(detr.enc_output[0].weight)
        for layer in detr.decoder.query_pos_head.layers:
            nn.init.xavier_uniform_(layer.weight)
        for head in (detr.enc_bbox_head, *detr.decoder.bbox_embed):
            initialise.box_head(head)
        for layer in self.class_layers:
            initialise.class_head(layer)

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        detr, pixel_mask = self.model.model, self.pad(pixel_mask)
        masks, _ = self.level_masks(maps, pixel_mask)
        # There is no attention mask to keep the padding out with: at least there is nothing in it.
        maps = [x * mask[:, None].to(x.dtype) for x, mask in zip(maps, masks, strict=True)]
        encoded = detr.encoder([project(x) for project, x in zip(self.projections, maps, strict=True)])[0]
        sources = [project(x) for project, x in zip(detr.decoder_input_proj, encoded, strict=False)]
        sources += [project(encoded[-1]) for project in detr.decoder_input_proj[len(sources) :]]
        masks, shapes = self.level_masks(sources, pixel_mask)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in sources], 1)
        # Boxes come relative to the whole input; valid / whole makes them relative to the un-padded image.
        valid = torch.stack((pixel_mask[:, 0].sum(1), pixel_mask[:, :, 0].sum(1)), 1)
        whole = constant([pixel_mask.shape[2], pixel_mask.shape[1]], valid.device)
        extra = dict(valid=valid / whole, **level_arguments(shapes, tokens.device))
        return Memory(tokens, torch.cat([mask.flatten(1) for mask in masks], 1), shapes, None, extra)

    def decode(
        self,
        memory: Memory,
        region_queries: Tensor | None,
        query_mask: Tensor | None = None,
        targets: Targets | None = None,
    ) -> Decoded:
        detr, extra = self.model.model, dict(memory.extra)
        valid = extra.pop("valid")
        dtype = torch.promote_types(memory.tokens.dtype, torch.float32)
        anchors, inside = detr.generate_anchors(tuple(memory.shapes), device=memory.tokens.device, dtype=dtype)
        tokens = detr.enc_output(inside.to(memory.tokens.dtype) * memory.tokens)
        if region_queries is None:
            chosen = best_tokens(detr.enc_score_head(tokens), self.num_queries)
        else:
            chosen = spread_tokens(self.num_queries, memory.shapes, valid)
        token = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        anchor = anchors.expand(len(tokens), -1, -1).gather(1, chosen[..., None].expand(-1, -1, 4))
        proposed = full_precision(detr.enc_bbox_head(token)) + anchor
        content = token.detach() if region_queries is None else self.add_regions(token.detach(), region_queries)
        references, scale = proposed.detach(), torch.cat((valid, valid), -1)[:, None]
        noisy = self.denoising_queries(targets, scale) if targets is not None and self.training else None
        if noisy is not None:
            content, references = torch.cat((noisy.content, content), 1), torch.cat((noisy.references, references), 1)
            query_mask = noisy.may_attend
        elif targets is not None:  # every trained parameter needs a gradient, also where a batch has no boxes
            content = content + sum(0 * p.sum() for layer in self.denoising_embeddings for p in layer.parameters())
        out = self.decode_layers(
            inputs_embeds=content,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=additive_mask(query_mask, content.dtype),  # of the self-attention, despite its name
            reference_points=references,
            **extra,
        )
        assert out.logits is not None
        denoising, boxes, edges, count = None, out.boxes / scale, out.edges, 0
        if edges is not None:
            edges = replace(edges, references=edges.references / scale)
        if noisy is not None:
            count = noisy.content.shape[1]
            denoising = Predictions(
                out.logits[:, :, :count],
                boxes[:, :, :count],
                edges.of(slice(count)) if edges is not None else None,
                assigned=noisy.assigned,
                repeats=noisy.repeats,
            )
        return Decoded(
            torch.cat((token[None], out.states[:, :, count:])),
            torch.cat((proposed.sigmoid()[None] / scale, boxes[:, :, count:])),
            torch.cat((detr.enc_score_head(token)[None], out.logits[:, :, count:])),
            edges.of(slice(count, None)) if edges is not None else None,
            denoising,
        )

    def decode_layers(self, **inputs: Any) -> Decoded:
        """Run the stock decoder."""
        out = self.model.model.decoder(**inputs)
        outputs = out.intermediate_hidden_states, out.intermediate_reference_points, out.intermediate_logits
        return Decoded(*(x.transpose(0, 1) for x in outputs))

    def denoising_queries(self, targets: Targets, scale: Tensor) -> DenoisingQueries | None:
        """Noisy copies of the labels, drawn from PyTorch's generator; None where there are none.

        Args:
            targets: labels of the batch.
            scale: (B, 1, 4), what turns boxes relative to the un-padded image into ones relative to the whole input.
        """
        valid, config = targets.valid, self.config
        content, references, mask, meta = get_contrastive_denoising_training_group(
            [
                {"class_labels": classes[inside], "boxes": boxes[inside].float()}
                for classes, boxes, inside in zip(targets.classes, targets.boxes * scale, valid, strict=True)
            ],
            config.num_labels,
            self.num_queries,
            getattr(self.model.model, "denoising_class_embed", None),
            config.num_denoising,
            config.label_noise_ratio,
            config.box_noise_scale,
        )
        if content is None:
            return None
        # Each group holds a copy of every label that is to predict it, then one of more noise that is no object.
        groups = meta["dn_num_group"]
        most = content.shape[1] // (2 * groups)
        order = (~valid).int().argsort(dim=1, stable=True)[:, :most]
        positive = order.where(valid.gather(1, order), -1)
        assigned = torch.cat((positive, torch.full_like(positive, -1)), 1).repeat(1, groups)
        return DenoisingQueries(content, references, mask == 0, assigned, groups)


class RTDetrV2Adapter(RTDetrAdapter):
    family = "rt-detr-v2"
    model_class = RTDetrV2ForObjectDetection
    config_class = RTDetrV2Config


class DFineAdapter(RTDetrAdapter):
    """D-FINE refines a distribution over each box edge, starting from the box `pre_bbox_head` predicts after the first
    layer: one more layer of boxes. Its class scores are corrected by a location quality estimate."""

    family = "d-fine"
    model_class: ClassVar[type[PreTrainedModel]] = DFineForObjectDetection
    config_class: ClassVar[type[PretrainedConfig]] = DFineConfig

    @property
    def num_layers(self) -> int:
        return self.config.decoder_layers + 2

    def untrained(self) -> list[nn.Module]:
        return [*super().untrained(), self.model.model.decoder.lqe_layers]

    def constants(self) -> list[nn.Parameter]:
        return [self.model.model.decoder.reg_scale, self.model.model.decoder.up]

    def initialise(self) -> None:
        super().initialise()
        decoder = self.model.model.decoder
        initialise.box_head(decoder.pre_bbox_head)
        for layer in decoder.layers:
            if getattr(layer, "gateway", None) is not None:
                nn.init.zeros_(layer.gateway.gate.weight)
                nn.init.zeros_(layer.gateway.gate.bias)
        for estimate in decoder.lqe_layers:
            initialise.box_head(estimate.reg_conf)

    def decode_layers(self, **inputs: Any) -> Decoded:
        decoder = self.model.model.decoder
        training, decoder.training = decoder.training, True  # this flag alone: in evaluation it returns one layer only
        try:
            out = decoder(**inputs)
        finally:
            decoder.training = training
        states = out.intermediate_hidden_states
        boxes, logits = out.intermediate_reference_points.transpose(0, 1), out.intermediate_logits.transpose(0, 1)
        corners = out.intermediate_predicted_corners.transpose(0, 1).unflatten(-1, (4, -1))
        edges = Edges(corners, out.initial_reference_points[:, 0], decoder.reg_scale, decoder.up)
        return Decoded(torch.cat((states[:1], states)), boxes, logits, edges)


def backbone_channels(config: PretrainedConfig) -> list[int]:
    """Channels of the maps a backbone of this configuration gives."""
    from transformers import AutoBackbone

    with torch.device("meta"):
        return list(AutoBackbone.from_config(config).channels)
