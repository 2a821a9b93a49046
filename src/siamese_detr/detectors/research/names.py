"""How the research codes call the tensors Transformers has: DETR, Conditional DETR and Deformable DETR and, on top of
them, UP-DETR, DETReg and Siamese DETR, which keep the names of the detector they pre-train.
"""

from __future__ import annotations

import re

from transformers import PreTrainedModel

BACKBONE = "model.backbone.model."
"""Where Transformers has the backbone."""

OWN = {
    "detr": {r"encoder_attn\.": "multihead_attn."},
    "conditional-detr": {
        r"decoder(.*)\.(s)elf_attn\.([qkv])_?(\w*)_proj\.": r"decoder\1.\2a_\3\4_proj.",
        r"decoder(.*)\.en(c)oder_attn\.([qkv])_?(\w*)_proj\.": r"decoder\1.\2a_\3\4_proj.",
        r"encoder_attn\.": "cross_attn.",
    },
    "deformable-detr": {
        r"decoder(.*)\.encoder_attn_layer_norm": r"decoder\1.norm1",  # cross-attention's norm has number 1
        r"decoder(.*)\.self_attn_layer_norm": r"decoder\1.norm2",
        r"encoder_attn\.": "cross_attn.",
    },
}
"""Family -> patterns that turn Transformers' names into those of the research code, before those for all families."""
SHARED = {
    r"^model\.query_position_embeddings": "query_embed",
    r"^model\.input_proj(ection)?\.": "input_proj.",
    r"^model\.": "transformer.",
    r"^class_labels_classifier": "class_embed",
    r"^bbox_predictor": "bbox_embed",
    r"decoder\.layernorm": "decoder.norm",
    r"mlp\.fc": "linear",
    r"self_attn_layer_norm": "norm1",
    r"encoder_attn_layer_norm": "norm2",
    r"encoder(.*)\.final_layer_norm": r"encoder\1.norm2",
    r"final_layer_norm": "norm3",
    r"\.[qkv]_proj\.(weight|bias)$": r".in_proj_\1",
    r"\.o_proj": ".out_proj",
}


def research_names(family: str, model: PreTrainedModel) -> dict[str, list[str]]:
    """Research name -> Transformers' names of all tensors but the backbone's.

    There are three of them where the research code packs query, key and value projections into one matrix.

    Args:
        family: of `OWN`.
        model: the stock model.
    """
    repeated = r"model\.decoder\.(bbox|class)_embed"
    if not getattr(model.config, "with_box_refine", True):  # one class head and one box head serve all layers
        repeated += r"|(bbox|class)_embed\.[1-9]"
    names: dict[str, list[str]] = {}
    # The order in a packed matrix: q_proj, k_proj, v_proj.
    for name in sorted(model.state_dict(), key=lambda name: "qkv".find(name.rpartition("_proj")[0][-1:])):
        if not name.startswith(BACKBONE) and not re.match(repeated, name):
            research = name
            for pattern, replacement in (OWN[family] | SHARED).items():
                research = re.sub(pattern, replacement, research)
            names.setdefault(research, []).append(name)
    return names


def torchvision_name(name: str) -> str:
    """Transformers' name of a tensor of a ResNet -> torchvision's."""
    name = name.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    name = re.sub(r"^encoder\.stages\.(\d)\.layers", lambda stage: f"layer{int(stage[1]) + 1}", name)
    name = name.replace("shortcut.convolution.", "downsample.0.").replace("shortcut.normalization.", "downsample.1.")
    name = re.sub(r"layer\.(\d)\.convolution\.", lambda layer: f"conv{int(layer[1]) + 1}.", name)
    return re.sub(r"layer\.(\d)\.normalization\.", lambda layer: f"bn{int(layer[1]) + 1}.", name)
