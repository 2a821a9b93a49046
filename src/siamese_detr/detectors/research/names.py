"""How the research codes call the tensors Transformers has: DETR, Conditional DETR and Deformable DETR and, on top of
them, UP-DETR, DETReg and Siamese DETR, which keep the names of the detector they pre-train.

A table row is (research name, Transformers names): one name, or three where the research code packs query, key and
value projections into one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Row = tuple[str, tuple[str, ...]]


def table(family: str, config: Any) -> list[Row]:
    """All rows of a family but the backbone and the class head.

    Args:
        family: "detr", "conditional-detr" or "deformable-detr".
        config: the Transformers configuration (depths and levels).
    """
    rows: list[Row] = []
    for i in range(config.encoder_layers):
        rows += _encoder_layer(family, f"transformer.encoder.layers.{i}", f"model.encoder.layers.{i}")
    for i in range(config.decoder_layers):
        research, stock = f"transformer.decoder.layers.{i}", f"model.decoder.layers.{i}"
        rows += {"detr": _detr_layer, "conditional-detr": _conditional_layer, "deformable-detr": _deformable_layer}[
            family
        ](research, stock, i)
    rows += [("query_embed.weight", ("model.query_position_embeddings.weight",))]
    if family == "deformable-detr":
        rows += [("transformer.level_embed", ("model.level_embed",))]
        rows += _linear("transformer.reference_points", "model.reference_points")
        for i in range(config.num_feature_levels):
            rows += [*_linear(f"input_proj.{i}.0", f"model.input_proj.{i}.0")]
            rows += [*_linear(f"input_proj.{i}.1", f"model.input_proj.{i}.1")]
        for i in range(config.decoder_layers if config.with_box_refine else 1):
            rows += [
                row for k in range(3) for row in _linear(f"bbox_embed.{i}.layers.{k}", f"bbox_embed.{i}.layers.{k}")
            ]
        return rows
    rows += _linear("input_proj", "model.input_projection")
    rows += _linear("transformer.decoder.norm", "model.decoder.layernorm")
    rows += [row for k in range(3) for row in _linear(f"bbox_embed.layers.{k}", f"bbox_predictor.layers.{k}")]
    if family == "conditional-detr":
        for head in ("query_scale", "ref_point_head"):
            for k in range(2):
                rows += _linear(f"transformer.decoder.{head}.layers.{k}", f"model.decoder.{head}.layers.{k}")
    return rows


def class_rows(family: str, config: Any) -> list[Row]:
    """The rows of the class head."""
    if family != "deformable-detr":
        return [*_linear("class_embed", "class_labels_classifier")]
    heads = config.decoder_layers if config.with_box_refine else 1
    return [row for i in range(heads) for row in _linear(f"class_embed.{i}", f"class_embed.{i}")]


def torchvision_name(name: str) -> str:
    """Transformers' name of a tensor of a ResNet -> torchvision's."""
    name = name.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    name = re.sub(r"^encoder\.stages\.(\d)\.layers", lambda stage: f"layer{int(stage[1]) + 1}", name)
    name = name.replace("shortcut.convolution.", "downsample.0.").replace("shortcut.normalization.", "downsample.1.")
    name = re.sub(r"layer\.(\d)\.convolution\.", lambda layer: f"conv{int(layer[1]) + 1}.", name)
    return re.sub(r"layer\.(\d)\.normalization\.", lambda layer: f"bn{int(layer[1]) + 1}.", name)


def _linear(research: str, stock: str) -> Iterator[Row]:
    for kind in ("weight", "bias"):
        yield f"{research}.{kind}", (f"{stock}.{kind}",)


def _packed(research: str, stock: str) -> Iterator[Row]:
    for kind in ("weight", "bias"):
        yield f"{research}.in_proj_{kind}", tuple(f"{stock}.{part}_proj.{kind}" for part in "qkv")
    yield from _linear(f"{research}.out_proj", f"{stock}.o_proj")


def _deformable(research: str, stock: str) -> Iterator[Row]:
    for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        yield from _linear(f"{research}.{part}", f"{stock}.{part}")


def _feed_forward(research: str, stock: str) -> Iterator[Row]:
    for i in (1, 2):
        yield from _linear(f"{research}.linear{i}", f"{stock}.mlp.fc{i}")


def _norms(research: str, stock: str, *names: str) -> Iterator[Row]:
    for i, name in enumerate(names, 1):
        yield from _linear(f"{research}.norm{i}", f"{stock}.{name}_layer_norm")


def _encoder_layer(family: str, research: str, stock: str) -> Iterator[Row]:
    attention = _deformable if family == "deformable-detr" else _packed
    yield from attention(f"{research}.self_attn", f"{stock}.self_attn")
    yield from _feed_forward(research, stock)
    yield from _norms(research, stock, "self_attn", "final")


def _detr_layer(research: str, stock: str, index: int) -> Iterator[Row]:
    yield from _packed(f"{research}.self_attn", f"{stock}.self_attn")
    yield from _packed(f"{research}.multihead_attn", f"{stock}.encoder_attn")
    yield from _feed_forward(research, stock)
    yield from _norms(research, stock, "self_attn", "encoder_attn", "final")


def _deformable_layer(research: str, stock: str, index: int) -> Iterator[Row]:
    yield from _packed(f"{research}.self_attn", f"{stock}.self_attn")
    yield from _deformable(f"{research}.cross_attn", f"{stock}.encoder_attn")
    yield from _feed_forward(research, stock)
    yield from _norms(research, stock, "encoder_attn", "self_attn", "final")  # cross-attention's norm has number 1


def _conditional_layer(research: str, stock: str, index: int) -> Iterator[Row]:
    for short, attention in (("sa", "self_attn"), ("ca", "encoder_attn")):
        parts = ["qcontent", "qpos", "kcontent", "kpos", "v"]
        if short == "ca":
            parts += ["qpos_sine"]
            parts.remove("qpos") if index else None  # the first layer alone adds the query position
        for part in parts:
            name = re.sub(r"^([qk])(content|pos)", r"\1_\2", part)
            yield from _linear(f"{research}.{short}_{part}_proj", f"{stock}.{attention}.{name}_proj")
    yield from _linear(f"{research}.self_attn.out_proj", f"{stock}.self_attn.o_proj")
    yield from _linear(f"{research}.cross_attn.out_proj", f"{stock}.encoder_attn.o_proj")
    yield from _feed_forward(research, stock)
    yield from _norms(research, stock, "self_attn", "encoder_attn", "final")
