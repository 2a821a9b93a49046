"""Training steps computed with the official Siamese DETR code (Apache-2.0, (c) 2023 SenseTime) in float64, without
dropout, and the same steps by ours.

A case is a folder of tensors under the official names: ``state_dict``, ``inputs``, ``outputs``, ``grads``,
``params_after_adamw_step`` and ``bn_buffers_after`` (``.safetensors``; of the last four any part), and ``meta.json``
with the number of heads and the weights of the losses. Three samples of unequal size, hidden size 32, 2 + 2 layers;
backbone maps stand for the backbone. The repository holds Conditional DETR's, with gradients in float32 and a
selection of the rest. ``SIAMESE_DETR_GOLDEN=folder`` adds all cases in that folder, of DETR, Conditional and Deformable
DETR, Siamese and UP-DETR.

Ours differs from the official code where that errs (``docs/detectors.md``). Its behaviour is restored here by

- ``pool_padding`` and ``global_levels`` of :class:`SiameseConfig`;
- :class:`FirstImagesQueries` for the Deformable cases in which the whole batch decodes the first image's queries;
- DETR's position embedding in the place of Deformable DETR's own, which is half a cell further (the official code
  pre-trains with the former and fine-tunes with the latter).
"""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from siamese_detr.detectors.research.checkpoint import normalise
from siamese_detr.detectors.research.names import research_names
from siamese_detr.pretext import SiameseConfig, UpDetrConfig, losses
from siamese_detr.pretext.base import Pretext
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.pretext.up_detr import UpDetrPretext

FOLDER = Path(__file__).parent / "data" / "golden"
LOSSES = {
    "loss_class": "loss_ce",
    "loss_box": "loss_bbox",
    "loss_giou": "loss_giou",
    "loss_region": "loss_feature",
    "loss_global": "loss_enc_global_contra",
}
"""Our names of the losses, and the official ones."""
HEADS = {
    r"^patch2query\.": "region_embedding.",
    r"^class_embed\.(0\.)?": "class_head.",
    r"^feature_align\.layers\.0\.": "region_head.0.",
    r"^feature_align\.layers\.1\.": "region_head.2.",
    r"^enc_head\.0\.(projector|predictor)\.mlp\.": r"global_head.\1.",
}
"""Official names of the pretext's heads, as :func:`normalise` leaves them, and ours."""


@functools.cache
def units() -> dict[str, Tensor]:
    """Values of single functions."""
    return load_file(FOLDER / "units.safetensors")


def cases() -> list[Case]:
    """The repository's case, and those of the folder named in the environment."""
    folders = [FOLDER / "siamese_conditional"]
    if more := os.environ.get("SIAMESE_DETR_GOLDEN"):
        folders += sorted(path.parent for path in Path(more).glob("*/meta.json"))
    return [Case(folder) for folder in folders]


@dataclass(frozen=True)
class Case:
    """A case's folder. Do not write into its tensors."""

    folder: Path

    @functools.cache  # noqa: B019
    def tensors(self, name: str) -> dict[str, Tensor]:
        """One of the files, under the official names."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @functools.cached_property
    def family(self) -> str:
        state = self.tensors("state_dict")
        if "transformer.level_embed" in state:
            return "deformable-detr"
        return "conditional-detr" if "transformer.decoder.query_scale.layers.0.weight" in state else "detr"

    @functools.cached_property
    def siamese(self) -> bool:
        return "box" in self.tensors("inputs")

    @functools.cached_property
    def first_images_queries(self) -> bool:
        """Whether the batch shares the first image's queries, and with them its reference points."""
        reference = self.tensors("outputs").get("ref_init_q1")
        return reference is not None and bool((reference == reference[:1]).all())

    def detector(self) -> Any:
        """A detector of the case's sizes."""
        from transformers import ResNetConfig  # here, since the processes of a test need only the numbers
        from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

        from siamese_detr.detectors.build import build_detector

        state, options = self.tensors("state_dict"), {}
        heads = (self.meta["config"].get("transformer") or self.meta["config"]["neck"])["nhead"]
        projections = [state[name] for name in sorted(state) if re.fullmatch(r"input_proj\.(\d\.0\.)?weight", name)]
        if self.family == "deformable-detr":
            offsets = state["transformer.encoder.layers.0.self_attn.sampling_offsets.bias"].numel()
            levels = len(projections)
            options = {"num_feature_levels": levels, "points": offsets // (2 * heads * levels)}
        channels = [weight.shape[1] for weight in projections if weight.shape[2] == 1]
        backbone = ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4] * (4 - len(channels)) + channels,
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"][-len(channels) :],
        )
        encoder, decoder = (
            len({name.split(".")[3] for name in state if name.startswith(f"transformer.{part}.layers")})
            for part in ("encoder", "decoder")
        )
        detector = build_detector(
            self.family,
            backbone,
            num_queries=len(state["query_embed.weight"]),
            hidden_size=state["query_embed.weight"].shape[1],
            heads=heads,
            encoder_layers=encoder,
            decoder_layers=decoder,
            ffn_size=len(state["transformer.encoder.layers.0.linear1.bias"]),
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            seed=0,
            **options,
        )
        if self.family == "deformable-detr":
            detector.model.model.position_embedding = DetrSinePositionEmbedding(
                detector.hidden_size // 2, normalize=True
            )
        return detector

    def config(self) -> SiameseConfig | UpDetrConfig:
        """The configuration of the case."""
        weights, state = self.meta["weight_dict"], self.tensors("state_dict")
        common = {
            "class_weight": weights["loss_ce"],
            "box_weight": weights["loss_bbox"],
            "giou_weight": weights["loss_giou"],
        }
        if not self.siamese:
            return UpDetrConfig(**common, reconstruction_weight=weights["loss_feature"])
        return SiameseConfig(
            **common,
            lambda_region=weights["loss_feature"],
            lambda_global=weights["loss_enc_global_contra"],
            pool_padding=True,
            global_levels="backbone",
            global_hidden_size=len(state["enc_head.0.projector.mlp.0.bias"]),
            global_size=len(state["enc_head.0.projector.mlp.6.bias"]),
            global_predictor_size=len(state["enc_head.0.predictor.mlp.0.bias"]),
        )

    def pretext(self) -> Pretext:
        """The pretext task with the case's parameters, in float64 and training mode."""
        detector, config = self.detector(), self.config()
        pretext: Pretext
        if isinstance(config, UpDetrConfig):
            pretext = PatchesKept(detector, config, self.tensors("inputs")["query_patch_keep"])
        else:
            pretext = (FirstImagesQueries if self.first_images_queries else SiamesePretext)(detector, config)
        pretext.double()
        weights = self.translate("state_dict", detector)
        missing, unexpected = pretext.load_state_dict(weights, strict=False)
        assert not unexpected
        learned = {name for name, parameter in pretext.named_parameters() if parameter.requires_grad}
        assert not learned & set(missing)
        return pretext.train()

    def translate(self, file: str, detector: Any) -> dict[str, Tensor]:
        """The tensors of parameters, gradients or buffers in ``file`` under our names.

        Args:
            detector: has the ``model``.
        """
        state = normalise(self.tensors(file))
        state.pop("criterion.empty_weight", None)
        ours = {}
        for official, stock in research_names(self.family, detector.model).items():
            if official in state and not official.startswith("class_embed."):  # the pretext's
                parts = state.pop(official).chunk(len(stock))
                ours |= {f"detector.model.{name}": part for name, part in zip(stock, parts, strict=True)}
        return ours | self.translate_heads(state)

    @staticmethod
    def translate_heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pretext's heads under our names."""
        ours = {}
        for name, value in state.items():
            for pattern, replacement in HEADS.items():
                name = re.sub(pattern, replacement, name)
            ours[name] = value
        return ours

    def features(self) -> FrozenFeatures:
        """The case's input, view-major."""
        data = self.tensors("inputs")
        views = ["_v1", "_v2"] if self.siamese else [""]
        mask = ~(data["mask"].transpose(0, 1) if self.siamese else data["mask"][None])
        sizes = torch.stack([mask[..., 0].sum(-1), mask[..., 0, :].sum(-1)], -1).flatten(0, 1)
        levels = sum(name.startswith(f"feat{views[0]}.") for name in data)
        crops = [
            torch.cat([data[f"cropfeat{view}.level{level}"].mean((2, 3)) for level in range(levels)], 1)
            for view in views
        ]
        if self.siamese:
            boxes, query_boxes = (data[name].transpose(0, 1) for name in ("box", "box_disturbed"))
        else:
            scale = sizes.flip(1).repeat(1, 2)[None, :, None]
            boxes = query_boxes = boxes.box_corners(data["target_boxes_cxcywh"])[None] * scale
        return FrozenFeatures(
            maps=[torch.cat([data[f"feat{view}.level{level}"] for view in views]) for level in range(levels)],
            pixel_mask=mask.flatten(0, 1),
            sizes=sizes,
            boxes=boxes,
            query_boxes=query_boxes,
            crop_features=torch.stack(crops).unflatten(1, boxes.shape[1:3]),
        )


class FirstImagesQueries(SiamesePretext):
    """All images of a batch decode the regions of the first, as in the official code's Deformable DETR."""

    def queries(self, features: FrozenFeatures) -> Tensor:
        queries = super().queries(features)
        return queries[:, :1].expand_as(queries)


class PatchesKept(UpDetrPretext):
    """Which queries keep their patch is given (Q, B, 1)."""

    def __init__(self, detector: Any, config: UpDetrConfig, keep: Tensor) -> None:
        super().__init__(detector, config)
        self.keep = keep

    def kept(self, queries: Tensor) -> Tensor:
        return self.keep.permute(2, 1, 0) > 0


def replay(pretext: Pretext, features: FrozenFeatures) -> dict[str, Tensor]:
    """All stages of the step by ours, under the official names (of the first view, "_v1" and "_q1", in UP-DETR)."""
    found: dict[str, Tensor] = {}
    references, globals_ = watch(pretext)
    memory, decoded = pretext.predict(features)
    matched = pretext.match(decoded, features)
    lead = features.boxes.shape[:2]
    layers = [*range(len(decoded.states) - 1), "last"]
    states, boxes = (x.unflatten(1, lead) for x in (decoded.states, decoded.boxes))
    crops = features.crops().flip(0) if features.views == 2 else features.crops()
    region = losses.region_loss(pretext.region_head(matched.states), crops, matched.valid, matched.counts)
    tokens = memory.tokens.unflatten(0, lead).split([height * width for height, width in memory.shapes], 2)
    for view in range(features.views):  # on whose memory is decoded
        asked = features.views - 1 - view
        for level, (one, shape) in enumerate(zip(tokens, memory.shapes, strict=True)):
            found[f"memory_v{view + 1}.level{level}"] = one[view].transpose(1, 2).unflatten(2, shape)
        tag = f"q{asked + 1}"
        if isinstance(pretext, SiamesePretext):
            embedding = pretext.detector.model.model.query_position_embeddings.weight[:, : pretext.detector.hidden_size]
            own = SiamesePretext.queries(pretext, features)[asked]  # also where the first image's are decoded
            found[f"query_v{asked + 1}"] = (own + embedding).transpose(0, 1)
        found[f"hs_{tag}_on_v{view + 1}"] = states[:, view]
        found[f"target_boxes_cxcywh_{tag}"] = features.targets[view]
        found[f"recon_target_v{asked + 1}"] = crops[view].flatten(0, 1)
        if references:
            reference = references[0].sigmoid().unflatten(0, lead)[view]
            found |= {f"ref_{tag}": reference, f"ref_init_{tag}": reference}
            found[f"ref_inter_{tag}"] = reference.expand(len(states), *reference.shape)
        for index, layer in enumerate(layers):
            state, match = states[index, view], matched.matches[index, view]
            found[f"pred_logits_{tag}.layer_{layer}"] = pretext.class_head(state)
            found[f"pred_boxes_{tag}.layer_{layer}"] = boxes[index, view]
            found[f"pred_feature_{tag}.layer_{layer}"] = pretext.region_head(state)
            pairs = torch.stack([match.sort().values, match.argsort()], -1)
            found[f"match/{tag}.layer_{layer}"] = pairs
            suffix = "" if layer == "last" else f"_{layer}"
            for name, term in (matched.terms | {"loss_region": region}).items():
                found[f"loss_of_{tag}/{LOSSES[name]}{suffix}"] = term[index, view]
    output = pretext(features)
    found["loss_total_weighted"] = output.loss
    for name, term in output.terms.items():
        loss, layer = re.fullmatch(r"(loss_[a-z]+)(_\d+)?", name).groups(default="")
        found[f"loss/{LOSSES[loss]}{layer}"] = term
    for kind, both in zip(("pred", "proj"), globals_, strict=False):
        found |= {f"global_{kind}_v{view + 1}": value for view, value in enumerate(both)}
    return found


def watch(pretext: Pretext) -> tuple[list[Tensor], list[Tensor]]:
    """Lists that will hold the reference points before the sigmoid, and the global predictions and projections."""
    references: list[Tensor] = []
    globals_: list[Tensor] = []
    model = pretext.detector.model.model
    head = getattr(model, "reference_points", None) or getattr(model.decoder, "ref_point_head", None)
    if head is not None:
        head.register_forward_hook(lambda module, given, result: references.append(result))
    if getattr(pretext, "global_head", None) is not None:
        pretext.global_head.register_forward_hook(lambda module, given, result: globals_.extend(result))
    return references, globals_
