"""What a detector is made from, and what comes out of its parts. Its options must not load PyTorch for ``--help``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from siamese_detr.config import Options, check_numbers

if TYPE_CHECKING:
    from torch import Tensor

ClassLoss = Literal["softmax", "focal", "varifocal", "iou-bce", "matching-aware"]
"""How a family's class scores are trained, see :mod:`siamese_detr.detection.criterion`."""
SIZES = ("num_queries", "hidden_size", "heads", "encoder_layers", "decoder_layers", "ffn_size")
OF_NEW = ("detector", "backbone", *SIZES, "detector_options")
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")


@dataclass(kw_only=True)
class DetectorOptions(Options):
    """The detector; of one to start from, only the dropouts can be changed.

    Args:
        detector: family of a new detector.
        backbone: its backbone: efficientnet-lite0 (needs no network), a timm or Transformers name, a path to weights,
            random:NAME.
        num_queries: object queries; default: the family's, 100 or 300, like the following sizes.
        hidden_size: width of the Transformer.
        heads: attention heads.
        encoder_layers: depth of the encoder.
        decoder_layers: depth of the decoder.
        ffn_size: width of the feed-forward blocks.
        dropout: dropout probability; default: the family's, or the starting detector's.
        attention_dropout: dropout of attention weights, likewise.
        activation_dropout: dropout inside the feed-forward blocks, likewise.
        detector_options: further options of the family.
    """

    detector: str = "conditional-detr"
    backbone: str = "efficientnet-lite0"
    num_queries: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    ffn_size: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    activation_dropout: float | None = None
    detector_options: dict[str, int | float | bool | str] = field(default_factory=dict)

    def check(self) -> None:
        check_numbers(self, positive=SIZES, shares=DROPOUTS)

    @property
    def start(self) -> str | None:
        """Where the detector to start from is; None: a new one."""
        return None

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.start is not None:
            yield OF_NEW, f"the detector is that of {self.start}"

    def sizes(self) -> dict[str, Any]:
        """The sizes, dropouts and options of the family that are given."""
        return self._given(SIZES) | self.dropouts() | self.detector_options

    def dropouts(self) -> dict[str, Any]:
        """The dropout probabilities that are given."""
        return self._given(DROPOUTS)

    def _given(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class DetectorSize:
    """Sizes of a detector; every family reads those that apply to it.

    Args:
        num_queries: object queries per image.
        hidden_size: width D of the Transformer.
        heads: attention heads; must divide `hidden_size`.
        encoder_layers, decoder_layers: depth.
        ffn_size: hidden width of the feed-forward blocks.
        num_labels: outputs of the class head.
        dropout, attention_dropout, activation_dropout: probabilities (the papers: 0.1 each).
        dilation: last backbone stage at half its stride (DC5), for families that use one map.
    """

    num_queries: int = 100
    hidden_size: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_size: int = 2048
    num_labels: int = 1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    dilation: bool = False

    def values(self) -> dict[str, Any]:
        """What most configurations of Transformers call by the same names."""
        return dict(
            num_queries=self.num_queries,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=self.ffn_size,
            decoder_ffn_dim=self.ffn_size,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            num_labels=self.num_labels,
        )


@dataclass
class Memory:
    """Encoder output of a batch of B images.

    Args:
        tokens: (B, L, D), the levels one after the other, each row-major.
        mask: (B, L) boolean, True = inside the image.
        shapes: (h, w) of every level; the products sum to L.
        positions: (B, L, D) position embedding of the tokens, or None where the family uses none.
        extra: whatever else the family's decoder needs.
    """

    tokens: Tensor
    mask: Tensor
    shapes: list[tuple[int, int]]
    positions: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def pooled(self) -> Tensor:
        """Mean over the valid tokens of each level, levels concatenated: (B, D * levels)."""
        import torch

        sizes = [height * width for height, width in self.shapes]
        levels = zip(self.tokens.split(sizes, 1), self.mask.split(sizes, 1), strict=True)
        return torch.cat(
            [(x * m[..., None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1).to(x.dtype) for x, m in levels], dim=1
        )


@dataclass
class Decoded:
    """Decoder output.

    Args:
        states: (layers, B, Q, D), every layer's queries as the heads see them (after the shared final norm, if any).
        boxes: (layers, B, Q, 4) cxcywh in [0, 1], by the detector's own box head, relative to the un-padded image
            (not clamped: where the family knows no padding, a box in the padding exceeds 1).
        logits: (layers, B, Q, labels) where a family's class logits are more than its heads on `states`.
        edges: where the boxes are made of distributions over their edges.
        denoising: what the layers predict for the denoising queries, where `decode` was given any.
    """

    states: Tensor
    boxes: Tensor
    logits: Tensor | None = None
    edges: Edges | None = None
    denoising: Predictions | None = None


@dataclass(frozen=True)
class Edges:
    """D-FINE's distributions over the distances of a box's edges from a reference box, of the last L layers.

    Args:
        logits: (L, B, Q, 4, bins).
        references: (B, Q, 4), cxcywh.
        scale, up: (1,) each, what the distances of the bins are made of.
    """

    logits: Tensor
    references: Tensor
    scale: Tensor
    up: Tensor

    def of(self, queries: slice) -> Edges:
        """Those of some of the queries."""
        return Edges(self.logits[:, :, queries], self.references[:, queries], self.scale, self.up)


@dataclass(frozen=True)
class Targets:
    """Labels of a batch, padded to the largest number T of boxes.

    Args:
        classes: (B, T) int64, −1 where padded.
        boxes: (B, T, 4), cxcywh in [0, 1] of the valid image; finite where padded.
    """

    classes: Tensor
    boxes: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, T) bool."""
        return self.classes >= 0


@dataclass
class Predictions:
    """What a detector predicts, as its criterion wants it.

    Args:
        logits: (layers, B, Q, K), with the no-object class last for softmax.
        boxes: (layers, B, Q, 4), cxcywh in [0, 1].
        edges: where the boxes of the last layers are made of distributions over their edges.
        groups: Q is so many equal groups of queries, one after the other; each is matched by itself (Group DETR).
        denoising: the same of the denoising queries (Contrastive DeNoising, DINO §3.3).
        assigned: (B, Q) int64, the target each query is to predict, −1 for no object; None: the criterion matches.
        repeats: denoising queries of each target that are to predict it.
    """

    logits: Tensor
    boxes: Tensor
    edges: Edges | None = None
    groups: int = 1
    denoising: Predictions | None = None
    assigned: Tensor | None = None
    repeats: int = 1
