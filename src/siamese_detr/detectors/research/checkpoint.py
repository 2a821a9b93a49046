"""Checkpoints of the research codes: DETR, Conditional DETR, Deformable DETR, UP-DETR, DETReg and Siamese DETR.

Such a file says neither what detector it holds nor of what size: both are read off the names and shapes of its tensors.
The heads of a pretext, and the class head trained with them, are left out. The released Siamese DETR checkpoints were
trained with RoIAlign without the half-pixel shift, which is also what our region features use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import DetectorAdapter, only_pretrained
from siamese_detr.detectors.backbones import resnet_depth
from siamese_detr.detectors.build import DetectorPlan, adapter_class, plan_detector
from siamese_detr.detectors.configs import RESNETS
from siamese_detr.detectors.research.names import BACKBONE, research_names, torchvision_name
from siamese_detr.detectors.weights import read_checkpoint
from siamese_detr.errors import UserError

MARKS = {
    "deformable-detr": "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "conditional-detr": "transformer.decoder.layers.0.sa_qcontent_proj.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}
"""Family -> a tensor that only its Transformer has."""
VARIANTS = {
    r"transformer\.enc_output\.": "a two-stage Deformable DETR, which has no learned queries to add regions to",
    r"refpoint_embed\.|label_enc\.|transformer\.decoder\.bbox_embed\.\d+\.\d": "a DAB-DETR or one of its descendants",
    r"transformer\.encoder\.norm\.": "a DETR that normalises before attention (--pre_norm)",
    r".*(row|col)_embed\.": "a detector with learned position embeddings (--position_embedding learned)",
}
"""Tensors of detectors of these codes that have no counterpart here -> what these are."""
PRETEXT = re.compile(r"(^|\.)(patch2query|feature_align|feature_embed|pred_head|enc_head)\.")
"""Heads of UP-DETR, DETReg and Siamese DETR. Beside them the class head has only seen objects, no classes."""
HEADS = 8
"""Attention heads in all these papers; the tensors do not tell their number."""


@dataclass(frozen=True)
class ResearchCheckpoint:
    """A research checkpoint, ready to be loaded into a model.

    Args:
        plan: the detector it holds.
        tensors: under Transformers' names.
        unused: names of the tensors left out: heads of a pretext or of a segmentation.
        class_names: stored ones, or COCO's for 91 classes; None: the classes have no names.
        pretrained: it has only been pre-trained: `tensors` has a new class head, for the class "object".
    """

    plan: DetectorPlan
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]
    class_names: list[str] | None
    pretrained: bool


def read_research_checkpoint(path: str | Path) -> ResearchCheckpoint:
    """What the file holds, whatever wraps it (`{"model": ...}`, `module.`).

    Args:
        path: .pth, read without executing anything in it, or .safetensors. Where `args` are stored in it, they tell
            the number of heads, the dilation, and in files written here the class names; otherwise there are 8 heads
            and no dilation, as in the papers.

    Raises:
        UserError: unreadable; no detector, or one without counterpart here; sizes that do not fit together.
    """
    raw, options = read_checkpoint(path)
    state = normalise(raw)
    family, depth = _recognise(path, state), resnet_depth(_inside(state, "backbone."))
    if depth is None:
        raise UserError(
            f"{path} holds a {family} detector on no ResNet of {', '.join(RESNETS)} layers; use another one"
        )
    focal = adapter_class(family).class_loss != "softmax"
    head = next((state[n] for n in ("class_embed.0.weight", "class_embed.weight") if n in state), None)
    pretrained = head is None or any(PRETEXT.search(name) for name in raw)
    labels = 1 if head is None or pretrained else len(head) - (0 if focal else 1)
    plan = plan_detector(family, f"resnet{depth}", num_labels=labels, **_sizes(family, state, options))
    with torch.device("meta"):
        names = research_names(family, plan.adapter.model_class(plan.config))
    if not getattr(plan.config, "with_box_refine", True):  # one head serves all layers, and is stored once for each
        state = {name: value for name, value in state.items() if not re.match(r"(bbox|class)_embed\.[1-9]", name)}
    tensors: dict[str, Tensor] = {}
    for research, stock in names.items():
        if pretrained and research.startswith("class_embed."):
            new = nn.Linear(plan.size.hidden_size, labels if focal else labels + 1)
            initialise.class_head(new, focal=focal)
            tensors[stock[0]] = getattr(new, research.rpartition(".")[2]).detach()
        elif research in state:
            tensors |= zip(stock, state.pop(research).chunk(len(stock)), strict=True)
    for name in _inside(state, "backbone."):
        tensors[BACKBONE + name] = state.pop(f"backbone.{name}")
    class_names = ["object"] if pretrained else _class_names(labels, options)
    return ResearchCheckpoint(plan, tensors, tuple(sorted(state)), class_names, pretrained)


def _class_names(count: int, options: dict[str, Any]) -> list[str] | None:
    stored = options.get("class_names")
    if isinstance(stored, list) and len(stored) == count:
        return [str(name) for name in stored]
    if count != 91:
        return None
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights  # slow to import

    return FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


def _recognise(path: str | Path, state: dict[str, Tensor]) -> str:
    """The family of the detector."""
    for pattern, variant in VARIANTS.items():
        if any(re.match(pattern, name) for name in state):
            raise UserError(f"{path} holds {variant}; it cannot be used here")
    family = next((family for family, mark in MARKS.items() if mark in state and "query_embed.weight" in state), None)
    if family is not None:
        return family
    if any(re.search(r"(^|\.)layer1\.0\.conv1\.weight$", name) for name in state):
        raise UserError(f"{path} holds a backbone, no detector; give it as --backbone")
    raise UserError(
        f"{path} holds no detector of a known code; its tensors are called {', '.join(sorted(state)[:3])} …; "
        "a Hugging Face directory is known by its config.json: name the folder"
    )


def _sizes(family: str, state: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """`DetectorSize`, and the family's options, as the tensors' shapes tell them."""
    ffn, hidden = state["transformer.encoder.layers.0.linear1.weight"].shape
    heads = options.get("nheads") or HEADS
    sizes = dict(
        num_queries=len(state["query_embed.weight"]),
        hidden_size=hidden,
        heads=heads,
        ffn_size=ffn,
        encoder_layers=_count(state, "transformer.encoder.layers."),
        decoder_layers=_count(state, "transformer.decoder.layers."),
        dilation=bool(options.get("dilation")),
    )
    if family == "deformable-detr":
        levels = len(state["transformer.level_embed"])
        weights = state["transformer.encoder.layers.0.self_attn.attention_weights.bias"]
        first, second = (state.get(f"bbox_embed.{i}.layers.2.bias") for i in (0, 1))
        sizes |= dict(
            num_feature_levels=levels,
            points=len(weights) // (levels * heads),
            with_box_refine=first is not None and second is not None and not torch.equal(first, second),
        )
    return sizes


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Number of modules in a list."""
    return len({name.split(".")[0] for name in _inside(state, prefix)})


def _inside(names: Iterable[str], prefix: str) -> list[str]:
    """The names that start with the prefix, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def normalise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The many spellings of one checkpoint under one: no wrappers, heads at the top, queries in one piece."""
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    state = {re.sub(r"^(pred_head|head)\.", "", name): value for name, value in state.items()}
    state = {re.sub(r"^(detr\.)", "", name): value for name, value in state.items()}
    state = {re.sub(r"^backbone\.0\.body\.", "backbone.", name): value for name, value in state.items()}
    if "transformer.tgt_embed.weight" in state and "query_embed.weight" in state:
        # Siamese DETR's Deformable DETR keeps position and target apart.
        parts = state.pop("query_embed.weight"), state.pop("transformer.tgt_embed.weight")
        state["query_embed.weight"] = torch.cat(parts, 1)
    # Heads per layer are named with the layer, one head for all without; refinement repeats them inside the decoder.
    numbered = "transformer.level_embed" in state
    state = {
        re.sub(r"^(bbox|class)_embed\.(?=layers|weight|bias)", r"\1_embed.0.", n) if numbered else n: v
        for n, v in state.items()
    }
    return {name: value for name, value in state.items() if not name.startswith("transformer.decoder.bbox_embed.")}


def research_state_dict(adapter: DetectorAdapter) -> dict[str, Tensor]:
    """The detector's tensors under the research codes' names; after pre-training alone, without the class head.

    Raises:
        UserError: a family the research codes do not have.
    """
    if adapter.family not in MARKS:
        raise UserError(f"the research codes have no {adapter.family!r}; they have {', '.join(MARKS)}")
    own = adapter.model.state_dict()
    names = research_names(adapter.family, adapter.model)
    if only_pretrained(adapter.provenance, adapter.class_names):
        names = {research: stock for research, stock in names.items() if not research.startswith("class_embed.")}
    state = {research: torch.cat([own[name] for name in stock]) for research, stock in names.items()}
    backbone = {name: own[BACKBONE + name] for name in _inside(own, BACKBONE)}
    if adapter.config.backbone_config.model_type == "resnet":
        backbone = {torchvision_name(name): value for name, value in backbone.items()}
    state |= {f"backbone.{name}": value for name, value in backbone.items()}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def save_research_checkpoint(adapter: DetectorAdapter, path: str | Path) -> None:
    """Write `research_state_dict` as .safetensors, or as a PyTorch checkpoint {"model": ..., "args": ...}.

    Raises:
        UserError: the file cannot be written.
    """
    state, path = research_state_dict(adapter), Path(path)
    config = adapter.config
    options = {
        "nheads": config.encoder_attention_heads,
        "dilation": config.dilation,
        "class_names": adapter.class_names,
    }
    try:
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"model": state, "args": options}, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
