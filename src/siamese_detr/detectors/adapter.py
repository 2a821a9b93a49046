"""What every detector looks like to the pre-training: features -> encode -> decode with the queries we give -> boxes.

An adapter holds a stock `...ForObjectDetection` model of Transformers and composes its sub-modules; it owns no
parameter of its own and copies no model code. So what pre-training leaves behind is an ordinary model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from siamese_detr.detectors import weights
from siamese_detr.detectors.backbones import Backbone
from siamese_detr.detectors.functional import backbone_maps, level_mask
from siamese_detr.detectors.structures import ClassLoss, Decoded, DetectorSize, Memory, Predictions, Targets
from siamese_detr.errors import UserError

__all__ = ["Decoded", "DetectorAdapter", "DetectorSize", "Memory", "only_pretrained"]


def only_pretrained(provenance: dict[str, Any], class_names: list[str]) -> bool:
    """Whether a detector of this origin has never been shown classes: its class head says nothing yet."""
    shown_none = class_names == ["object"] or provenance.get("pseudo_classes", False)
    return "method" in provenance and "finetuned" not in provenance and shown_none


class DetectorAdapter(nn.Module):
    """One detector family. Sub-classes say how to configure, encode and decode; the rest is here.

    Args:
        model: the stock model; its `config.auxiliary_loss` must be off (it changes the decoder's function).
        image_mean, image_std: normalisation of the backbone, for pixels in [0, 1].
        provenance: plain values recorded beside a saved model (family, backbone, origin).
    """

    family: ClassVar[str]
    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[str]
    defaults: ClassVar[dict[str, Any]] = {}
    """Sizes in which the family's paper differs from `DetectorSize`."""
    class_loss: ClassVar[ClassLoss] = "focal"
    """How fine-tuning trains the class head (kinds of `detection.criterion`); "softmax" has a no-object class."""
    square_side: ClassVar[int | None] = None
    """The family takes square inputs only, of a side that is a multiple of this."""
    selects_queries: ClassVar[bool] = False
    """The family chooses its queries by class score (see `blank_queries`)."""
    masks_queries: ClassVar[bool] = True
    """Whether `decode` takes a `query_mask`."""
    denoises: ClassVar[bool] = False
    """Whether `decode` takes `targets`, from which it makes denoising queries."""

    def __init__(
        self,
        model: PreTrainedModel,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model  # its sub-modules are looked up by name: typing would only say Tensor | Module
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.provenance = dict(provenance or {})
        self.input_size: dict[str, int] = {"shortest_edge": 800, "longest_edge": 1333}
        if self.square_side is not None:
            self.input_size = {"height": 20 * self.square_side, "width": 20 * self.square_side}
        self.load_report: Any = None
        self.frozen_backbone: Callable[[Tensor], list[Tensor]] | None = None
        """Another way to the maps of a frozen backbone, equal up to rounding; ``kernels.accelerate`` sets it."""
        self.set_trainable(backbone=False, class_head=False)

    # --- what a family says -------------------------------------------------------------------------------------
    @classmethod
    def wanted_strides(cls, **options: Any) -> list[int]:
        """Strides of the backbone maps the family consumes, finest first, un-dilated."""
        return [32]

    @classmethod
    def backbone_config(cls, backbone: Backbone, strides: list[int], dilation: bool) -> PretrainedConfig:
        """The backbone's configuration for this family (see `Backbone.config`)."""
        return backbone.config(strides, dilation)

    @classmethod
    def configure(cls, backbone: PretrainedConfig, size: DetectorSize) -> PretrainedConfig:
        """The Transformers configuration of such a detector. Families with options of their own add keywords."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Initialise everything but the backbone as the family's paper does."""
        raise NotImplementedError

    @torch.no_grad()
    def shrink_and_perturb(self, share: float) -> None:
        """Move everything but the backbone and a re-made class head towards new initial values (Ash and Adams, NeurIPS
        2020): `share` of the present values, 0 to 1, plus 1 - `share` of new ones.

        What was pre-trained for another task is a bad place to start a short fine-tuning from: the weights are large
        for the steps that are left, and the queries look where they were told to. Half-way back to the initial values
        the features are still there and the network learns as fast as a new one.
        """
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        present = {name: tensor.clone() for name, tensor in tensors}
        self.initialise()
        remade = self.load_report.remade if self.load_report is not None else ()
        for name, tensor in tensors:
            if tensor.is_floating_point() and name not in remade:
                tensor.lerp_(present[name], share)

    def pad(self, x: Tensor) -> Tensor:
        """(B, ..., H, W) padded with zeros on the right and at the bottom to sides the family takes."""
        if self.square_side is None:
            return x
        height, width = x.shape[-2:]
        return nn.functional.pad(x, (0, -width % self.square_side, 0, -height % self.square_side))

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> list[Tensor]:
        """Backbone maps the detector consumes, finest first.

        Args:
            pixel_values: (B, 3, H, W), normalised.
            pixel_mask: (B, H, W) boolean, True = inside the image; None: everywhere. What lies outside is set to zero
                first.

        Returns:
            One (B, C, h, w) per level; without gradient while the backbone is frozen.
        """
        if pixel_mask is not None:
            pixel_values = pixel_values * pixel_mask[:, None].to(pixel_values.dtype)
        pixel_values = self.pad(pixel_values)
        if self.frozen_backbone is not None and not self.backbone_trainable:
            return self.frozen_backbone(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone_trainable):
            return backbone_maps(self.backbone, pixel_values)

    def encode(self, maps: list[Tensor], pixel_mask: Tensor) -> Memory:
        """Projection and Transformer encoder.

        Args:
            maps: as `features` gives them (also cached ones).
            pixel_mask: (B, H, W) boolean, True = inside the image.
        """
        raise NotImplementedError

    def decode(self, memory: Memory, region_queries: Tensor | None, query_mask: Tensor | None = None) -> Decoded:
        """Transformer decoder and box head.

        Args:
            memory: from `encode`.
            region_queries: (B, Q, D), added to the learned query embedding of every image; None for the stock queries.
            query_mask: boolean (Q, Q), True where a query (row) may attend to another (column) in self-attention;
                None: everywhere.
        """
        raise NotImplementedError

    # --- saving ---------------------------------------------------------------------------------------------------
    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the class head's outputs."""
        return [self.config.id2label[i] for i in range(len(self.config.id2label))]

    def name_classes(self, names: list[str]) -> None:
        """Store the class names in the model's configuration (their number must be that of the class head)."""
        outputs = self.class_heads[0].out_features - (1 if self.class_loss == "softmax" else 0)  # type: ignore[operator]
        if len(names) != outputs:
            raise ValueError(f"{len(names)} class names for a class head of {outputs} classes")
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: i for i, name in enumerate(names)}

    def image_processor(
        self,
        *,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        square: bool = False,
    ) -> Any:
        """The family's stock image processor, with this detector's normalisation.

        Args:
            shortest_edge, longest_edge: resize to this short side in pixels unless the long side then exceeds
                `longest_edge`; default: the detector's `input_size`.
            square: resize to a square of `shortest_edge` pixels, whatever the aspect ratio. Some families always do.

        Raises:
            UserError: a side the family cannot take.
        """
        size = dict(self.input_size)
        if shortest_edge is not None:
            if self.square_side is not None and shortest_edge % self.square_side:
                raise UserError(
                    f"{self.family} takes squares whose side is a multiple of {self.square_side} pixels, "
                    f"not {shortest_edge}; use {max(1, round(shortest_edge / self.square_side)) * self.square_side}"
                )
            if square or self.square_side is not None:
                size = {"height": shortest_edge, "width": shortest_edge}
            else:
                size = {
                    "shortest_edge": shortest_edge,
                    "longest_edge": longest_edge or round(shortest_edge * 1333 / 800),
                }
        return getattr(transformers, self.processor_class)(
            do_resize=True,
            size=size,
            do_rescale=True,
            do_normalize=True,
            image_mean=list(self.image_mean),
            image_std=list(self.image_std),
            do_pad="height" not in size,
        )

    def save(
        self,
        directory: str | Path,
        *,
        class_names: list[str] | None = None,
        provenance: dict[str, Any] | None = None,
        **size: Any,
    ) -> None:
        """Write an ordinary Hugging Face directory (see `weights.save_detector` for its files and errors).

        Args:
            directory: created if need be; files of the same names in it are replaced.
            class_names: stored in the model (default: those it has).
            provenance: plain values added to siamese_detr.json.
            **size: of the images, for `image_processor`; kept as the detector's `input_size`.
        """
        if class_names is not None:
            self.name_classes(class_names)
        processor = self.image_processor(**size)
        self.input_size = {name: side for name, side in dict(processor.size).items() if side is not None}
        self.provenance.update(provenance or {})
        weights.save_detector(self.model, processor, self.provenance, directory)

    # --- what is common -------------------------------------------------------------------------------------------
    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def num_queries(self) -> int:
        return self.config.num_queries

    @property
    def hidden_size(self) -> int:
        return self.config.d_model

    @property
    def num_layers(self) -> int:
        return self.config.decoder_layers

    @property
    def backbone(self) -> nn.Module:
        """The network giving the maps."""
        return self.model.model.backbone.model

    @property
    def class_heads(self) -> nn.ModuleList:
        """The linear layers that give the class logits."""
        return nn.ModuleList([self.model.class_labels_classifier])

    @property
    def class_layers(self) -> list[nn.Module]:
        """All layers made for the number of classes: the heads, and embeddings of classes."""
        return list(self.class_heads)

    @functools.cached_property
    def _probe(self) -> list[tuple[int, int]]:
        weight = next(self.backbone.parameters())
        training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            side = -(-128 // (self.square_side or 1)) * (self.square_side or 1)
            images = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
            maps = backbone_maps(self.backbone, images)
        self.backbone.train(training)
        return [(x.shape[1], side // x.shape[2]) for x in maps]

    @property
    def channels(self) -> list[int]:
        """Channels of every map `features` gives."""
        return [channels for channels, _ in self._probe]

    @property
    def strides(self) -> list[int]:
        """Stride of every map `features` gives, in pixels."""
        return [stride for _, stride in self._probe]

    @property
    def num_levels(self) -> int:
        """Levels of the memory `encode` gives."""
        return len(self.channels)

    def set_trainable(self, *, backbone: bool, class_head: bool) -> None:
        """Which parameters learn: pre-training (False, False) or fine-tuning. To be called after every load.

        Everything else always learns, save what the family leaves out of pre-training (`untrained`).
        """
        self.backbone_trainable = backbone
        self.model.requires_grad_(True)
        self.backbone.requires_grad_(backbone)
        for constant in self.constants():
            constant.requires_grad_(False)
        if not class_head:
            self.class_heads.requires_grad_(False)
            for module in self.untrained():
                module.requires_grad_(False)
        self.train(self.training)

    def untrained(self) -> list[nn.Module]:
        """Modules besides the class head to which pre-training gives no gradient."""
        return []

    def reduce(self) -> None:
        """Drop queries that only fine-tuning trains; `complete` adds them again. No prediction changes."""

    def complete(self) -> list[str]:
        """Add what fine-tuning trains and a stored detector may lack, since no prediction needs it.

        Returns:
            Names of the new tensors.
        """
        return []

    def constants(self) -> list[nn.Parameter]:
        """Parameters that never learn."""
        return []

    def trainable_names(self) -> list[str]:
        """Names of the parameters that learn."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> DetectorAdapter:
        """As in PyTorch, except that a frozen backbone and all its batch norms stay in evaluation mode."""
        super().train(mode)
        if not self.backbone_trainable:
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, targets: Targets | None = None) -> Predictions:
        """Plain detection: what every decoder layer predicts, the same numbers as the stock model's.

        Args:
            pixel_values, pixel_mask: as in `features`.
            targets: the labels; in training, some families also learn to recover them from noisy copies (denoising).
        """
        return self.detect(self.features(pixel_values, pixel_mask), pixel_mask, targets)

    def detect(self, maps: list[Tensor], pixel_mask: Tensor, targets: Targets | None = None) -> Predictions:
        """As `forward`, from the backbone's maps."""
        memory = self.encode(maps, pixel_mask)
        decoded = self.decode(memory, None, **({"targets": targets} if self.denoises else {}))  # type: ignore[arg-type]
        logits = self.classify(decoded.states) if decoded.logits is None else decoded.logits
        groups = decoded.boxes.shape[2] // self.num_queries
        return Predictions(logits, decoded.boxes, decoded.edges, groups, decoded.denoising)

    def classify(self, states: Tensor) -> Tensor:
        """Class logits (layers, B, Q, labels) of the decoder states (layers, B, Q, D)."""
        heads = list(self.class_heads)
        return torch.stack([heads[min(i, len(heads) - 1)](state) for i, state in enumerate(states)])

    def blank_queries(self, memory: Memory) -> Tensor | None:
        """What a pretext that tells the detector no regions gives `decode` as `region_queries`: None, or zeros where
        the family would choose its queries by a class score that pre-training does not train."""
        if not self.selects_queries:
            return None
        return memory.tokens.new_zeros(len(memory.tokens), self.num_queries, self.hidden_size)

    def add_regions(self, embedding: Tensor, region_queries: Tensor | None, batch: int = 1) -> Tensor:
        """Query embedding (Q, D) or (B, Q, D) plus the region queries (B, Q, D) if any: (B, Q, D).

        Raises:
            ValueError: the region queries have another shape.
        """
        queries = embedding if embedding.dim() == 3 else embedding.unsqueeze(0).expand(batch, -1, -1)
        if region_queries is None:
            return queries.contiguous()
        if region_queries.shape != queries.shape:
            raise ValueError(f"region_queries are {tuple(region_queries.shape)}, expected {tuple(queries.shape)}")
        return queries + region_queries

    def level_masks(self, maps: list[Tensor], pixel_mask: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Masks (B, h, w) and shapes (h, w) of the maps."""
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        return [level_mask(pixel_mask, shape) for shape in shapes], shapes
