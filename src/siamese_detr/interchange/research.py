"""Checkpoints of the research codes (DETR, Conditional DETR, Deformable DETR, UP-DETR, DETReg, Siamese DETR).

Everything a detector keeps after pre-training is carried over: backbone, encoder, decoder, queries, box head. The
pretext's own heads and the class head are left out and reported. The released Siamese DETR checkpoints were trained
with RoIAlign without the half-pixel shift, which is also what our region features use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.detectors.weights import read_weights, strip_prefixes
from siamese_detr.errors import UserError
from siamese_detr.interchange.names import resnet_name, table

FAMILIES = ("detr", "conditional-detr", "deformable-detr")


@dataclass(frozen=True)
class ResearchReport:
    """What a load left out.

    Args:
        missing: tensors of the detector that the checkpoint lacks; they keep their values.
        unused: tensors of the checkpoint that were not loaded (pretext heads, a class head).
    """

    missing: tuple[str, ...]
    unused: tuple[str, ...]


def load_research_checkpoint(
    path: str | Path, adapter: DetectorAdapter, *, backbone: bool = True, class_head: bool = False
) -> ResearchReport:
    """Load a research checkpoint (.pth, read safely, or .safetensors) into a detector of the same sizes.

    Args:
        path: the checkpoint, as its code saved it.
        adapter: a detr, conditional-detr or deformable-detr of the same depths, widths and number of queries.
        backbone: also load the ResNet, if it is in the file. Otherwise the detector's own stays.
        class_head: also load the class head, where the number of classes agrees.

    Raises:
        UserError: another family or other sizes, nothing to load, unreadable file.
    """
    state = normalise(read_weights(path))
    target = {name: value for name, value in adapter.model.state_dict().items() if "num_batches_tracked" not in name}
    rows = _rows(adapter)
    loaded: dict[str, Tensor] = {}
    for research, stock in rows:
        if research in state:
            value = state.pop(research)
            for name, part in zip(stock, value.chunk(len(stock)) if len(stock) > 1 else [value], strict=True):
                loaded[name] = part
    if not loaded:
        raise UserError(f"{path} holds no {adapter.family} Transformer; its tensors are called {sorted(state)[:3]} …")
    prefix = _backbone_prefix(adapter)
    if backbone:
        for name in [name for name in state if name.startswith("backbone.")]:
            ours = prefix + _backbone_name(adapter, name.removeprefix("backbone."))
            if ours in target:
                loaded[ours] = state.pop(name)
    wrong = [name for name, value in loaded.items() if name not in target or value.shape != target[name].shape]
    if wrong:
        have = tuple(target[wrong[0]].shape) if wrong[0] in target else "absent"
        raise UserError(
            f"{path} holds a detector of other sizes: {wrong[0]} is {tuple(loaded[wrong[0]].shape)} there, "
            f"{have} here; build the detector with the checkpoint's sizes"
        )
    pointers = {name: value.data_ptr() for name, value in target.items()}
    filled = {pointers[name] for name in loaded}
    adapter.model.load_state_dict(loaded, strict=False)
    if class_head:
        _load_class_heads(adapter, state)
    heads = {parameter.data_ptr() for parameter in adapter.class_heads.parameters()}
    missing = sorted(
        name
        for name, pointer in pointers.items()
        if pointer not in filled | heads and (backbone or not name.startswith(prefix))
    )
    return ResearchReport(tuple(missing), tuple(sorted(state)))


def _load_class_heads(adapter: DetectorAdapter, state: dict[str, Tensor]) -> None:
    """Load the class heads that fit, and take them out of ``state``."""
    used = set()
    for i, head in enumerate(adapter.class_heads):
        for kind in ("weight", "bias"):
            spelling = next((n for n in (f"class_embed.{i}.{kind}", f"class_embed.{kind}") if n in state), None)
            if spelling is not None and state[spelling].shape == getattr(head, kind).shape:
                getattr(head, kind).data.copy_(state[spelling])
                used.add(spelling)
    for name in used:  # a head may serve several layers
        del state[name]


def research_state_dict(adapter: DetectorAdapter) -> dict[str, Tensor]:
    """The detector's tensors under the research codes' names, without the class head.

    Raises:
        UserError: a family the research codes do not have.
    """
    own = adapter.model.state_dict()
    out = {research: torch.cat([own[name] for name in stock]) for research, stock in _rows(adapter)}
    prefix = _backbone_prefix(adapter)
    inverse = {prefix + _backbone_name(adapter, name): name for name in _torchvision_names(adapter)}
    # Both spellings agree on everything else; the backbone is spelled as torchvision does.
    out |= {f"backbone.{inverse.get(name, name.removeprefix(prefix))}": own[name] for name in own if prefix in name}
    return {name: value.detach().clone().contiguous() for name, value in out.items()}


def save_research_checkpoint(adapter: DetectorAdapter, path: str | Path) -> None:
    """Write `research_state_dict` as .safetensors, or as a PyTorch checkpoint {"model": ...}.

    Raises:
        UserError: the file cannot be written.
    """
    state, path = research_state_dict(adapter), Path(path)
    try:
        save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {error}") from None


def normalise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The many spellings of one checkpoint under one: no wrappers, heads at the top, queries in one piece."""
    state = strip_prefixes(state, ["module."])
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    state = {re.sub(r"^(pred_head|head)\.", "", name): value for name, value in state.items()}
    state = {re.sub(r"^(detr\.)", "", name): value for name, value in state.items()}
    state = {re.sub(r"^backbone\.0\.body\.", "backbone.", name): value for name, value in state.items()}
    if "transformer.tgt_embed.weight" in state:  # Siamese's Deformable DETR keeps position and target apart
        parts = state.pop("query_embed.weight"), state.pop("transformer.tgt_embed.weight")
        state["query_embed.weight"] = torch.cat(parts, 1)
    # Heads per layer are named with the layer, one head for all without; refinement repeats them inside the decoder.
    numbered = "transformer.level_embed" in state
    state = {
        re.sub(r"^(bbox|class)_embed\.(?=layers|weight|bias)", r"\1_embed.0.", n) if numbered else n: v
        for n, v in state.items()
    }
    return {name: value for name, value in state.items() if not name.startswith("transformer.decoder.bbox_embed.")}


def _rows(adapter: DetectorAdapter) -> list[tuple[str, tuple[str, ...]]]:
    if adapter.family not in FAMILIES:
        raise UserError(f"the research codes have no {adapter.family!r}; they have {', '.join(FAMILIES)}")
    return table(adapter.family, adapter.config)


def _backbone_prefix(adapter: DetectorAdapter) -> str:
    return "model.backbone.model."


def _backbone_name(adapter: DetectorAdapter, name: str) -> str:
    return name if adapter.config.backbone_config.model_type == "timm_backbone" else resnet_name(name)


def _torchvision_names(adapter: DetectorAdapter) -> list[str]:
    """Names a torchvision ResNet of any depth may have, enough to invert the renaming."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = ["conv1.weight", *(f"bn1.{kind}" for kind in norm)]
    for stage in range(1, 5):
        for block in range(40):
            unit = f"layer{stage}.{block}."
            names += [f"{unit}conv{i}.weight" for i in (1, 2, 3)] + [f"{unit}downsample.0.weight"]
            names += [f"{unit}{bn}.{kind}" for bn in ("bn1", "bn2", "bn3", "downsample.1") for kind in norm]
    return names
