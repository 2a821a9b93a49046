"""Build a detector of a family, or load one from an ordinary Hugging Face directory."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import DetectorAdapter, DetectorSize
from siamese_detr.detectors.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone, resolve_backbone
from siamese_detr.detectors.weights import quiet
from siamese_detr.errors import UserError

FAMILIES = {
    "detr": "detr:DetrAdapter",
    "conditional-detr": "conditional_detr:ConditionalDetrAdapter",
    "deformable-detr": "deformable_detr:DeformableDetrAdapter",
    "dab-detr": "dab_detr:DabDetrAdapter",
    "rt-detr": "rt_detr:RTDetrAdapter",
    "rt-detr-v2": "rt_detr:RTDetrV2Adapter",
    "d-fine": "rt_detr:DFineAdapter",
    "deimv2": "deimv2:Deimv2Adapter",
    "lw-detr": "lw_detr:LwDetrAdapter",
    "rf-detr": "lw_detr:RfDetrAdapter",
}
"""Family -> where its adapter is (imported when asked for)."""


def adapter_class(family: str) -> type[DetectorAdapter]:
    """The adapter of a family.

    Raises:
        UserError: no such family.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown detector {family!r}; {hint}there are: {', '.join(FAMILIES)}")
    module, name = FAMILIES[family].split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


@dataclass(frozen=True)
class DetectorPlan:
    """A detector that can be built: everything about it is known and fits together."""

    adapter: type[DetectorAdapter]
    size: DetectorSize
    backbone: Backbone
    backbone_config: PretrainedConfig
    config: PretrainedConfig


def plan_detector(
    family: str = "conditional-detr",
    backbone: str | PretrainedConfig = "efficientnet-lite0",
    *,
    class_names: list[str] | None = None,
    **sizes: Any,
) -> DetectorPlan:
    """What :func:`build_detector` would build, without building it: mistakes show in a fraction of a second.

    Raises:
        UserError: unknown family, backbone or option; sizes that do not fit together.
    """
    adapter = adapter_class(family)
    fields = {field.name for field in dataclasses.fields(DetectorSize)}
    options = {name: value for name, value in sizes.items() if name not in fields}
    given = {name: value for name, value in sizes.items() if name in fields and value is not None}
    if class_names is not None:
        given["num_labels"] = len(class_names)
    own = inspect.signature(adapter.configure).parameters
    if unknown := [name for name in options if name not in own]:
        near = difflib.get_close_matches(unknown[0], [*fields, *own], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"a {family!r} detector has no option {unknown[0]!r}{hint}")
    size = DetectorSize(**{**adapter.defaults, **given})
    if size.hidden_size % (2 * size.heads):
        raise UserError(f"hidden_size {size.hidden_size} must be a multiple of 2 x heads (2 x {size.heads})")
    resolved = resolve_backbone(backbone)
    backbone_config = adapter.backbone_config(resolved, adapter.wanted_strides(**options), size.dilation)
    return DetectorPlan(adapter, size, resolved, backbone_config, adapter.configure(backbone_config, size, **options))


def build_detector(
    family: str = "conditional-detr",
    backbone: str | PretrainedConfig = "efficientnet-lite0",
    *,
    class_names: list[str] | None = None,
    seed: int | None = None,
    **sizes: Any,
) -> DetectorAdapter:
    """A new detector, initialised as its paper does, with a frozen backbone.

    Args:
        family: see `FAMILIES`.
        backbone: see `resolve_backbone`.
        class_names: names of the classes; their number is the class head's size (else `num_labels`, 1).
        seed: makes the initial values reproducible, without touching PyTorch's global random state.
        **sizes: fields of `DetectorSize`, and options of the family.

    Raises:
        UserError: unknown family, backbone or option; sizes that do not fit together.
    """
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        plan = plan_detector(family, backbone, class_names=class_names, **sizes)
        model = plan.adapter.model_class(plan.config)
        provenance = {"family": family, "backbone": plan.backbone.name}
        detector = plan.adapter(model, plan.backbone.image_mean, plan.backbone.image_std, provenance)
        detector.initialise()
        plan.backbone.load_into(detector.backbone, plan.backbone_config)
    labels = plan.size.num_labels
    names = class_names or (["object"] if labels == 1 else [f"class {i}" for i in range(labels)])
    detector.name_classes(names)
    return detector.train()


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors a load did not carry over.

    Args:
        missing: in the model, not in the file: freshly initialised.
        unexpected: in the file, not in the model: ignored.
        remade: the class head, re-made for other classes.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    remade: tuple[str, ...] = ()


def load_detector(
    directory: str | Path, class_names: list[str] | None = None, *, family: str | None = None, **overrides: Any
) -> DetectorAdapter:
    """A detector from an ordinary Hugging Face directory of a known family, with a frozen backbone.

    What could not be loaded is in the adapter's `load_report`.

    Args:
        directory: holds config.json and model.safetensors. A name on the Hugging Face hub ("facebook/detr-resnet-50")
            is downloaded, if there is no such directory.
        class_names: if given and other than those stored, the class head is re-made for them; all else is kept.
        family: refuse any other family.
        **overrides: values of the configuration to change (`dropout=0.0`).

    Raises:
        UserError: not such a directory, a family without adapter, another family, damaged or unsafe weights.
    """
    directory = _local(directory)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is not a detector: it has no config.json; give the Hugging Face directory of a detector"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {directory / 'config.json'}: {_first_line(error)}") from None
    found = config.model_type.replace("_", "-")
    if found not in FAMILIES:
        raise UserError(f"{directory} holds a {config.model_type!r} model; known detectors: {', '.join(FAMILIES)}")
    if family is not None and found != family:
        raise UserError(f"{directory} holds a {found!r} detector, not {family!r}; name that detector instead")
    if getattr(config, "auxiliary_loss", False):
        config.auxiliary_loss = False  # Transformers' auxiliary loss changes what the decoder computes.
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise UserError(f"a {found!r} detector has no option {name!r}")
        setattr(config, name, value)
    adapter = adapter_class(found)
    model_class: Any = adapter.model_class
    remake = class_names is not None and list(config.id2label.values()) != list(class_names)
    if remake and class_names is not None:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: i for i, name in enumerate(class_names)}
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                directory,
                config=config,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # looked at below
                weights_only=True,
                dtype=torch.float32,
            )
    except pickle.UnpicklingError:
        raise UserError(
            f"the weights in {directory} are a pickle with more than tensors in it, which is never loaded; "
            "a model.safetensors is needed"
        ) from None
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load the weights in {directory}: {_first_line(error)}; an intact model.safetensors is needed"
        ) from None

    mean, std, size = _read_processor(directory)
    provenance_file = directory / "siamese_detr.json"
    provenance = json.loads(provenance_file.read_text()) if provenance_file.is_file() else {"family": found}
    detector = adapter(model, mean, std, provenance)
    detector.input_size = size
    if remake:
        for head in detector.class_heads:
            assert isinstance(head, nn.Linear)
            initialise.class_head(head, focal=adapter.focal)
    heads = {id(parameter) for parameter in detector.class_heads.parameters()} if remake else set()
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in heads}
    if wrong := [str(key) for key, *_ in info["mismatched_keys"] if key not in names]:
        raise UserError(
            f"cannot load the weights in {directory}: {wrong[0]} has another shape than config.json says; "
            "they belong to another model"
        )
    missing = tuple(sorted(set(info["missing_keys"]) - names))
    detector.load_report = LoadReport(missing, tuple(sorted(info["unexpected_keys"])), tuple(sorted(names)))
    if missing:
        warnings.warn(
            f"{directory}: {len(missing)} tensors were not in the file and are freshly initialised, "
            f"e.g. {', '.join(missing[:3])}",
            stacklevel=2,
        )
    return detector.train()


def _read_processor(directory: Path) -> tuple[tuple[float, ...], tuple[float, ...], dict[str, int]]:
    """Mean, std and size of the directory's preprocessor_config.json; ImageNet's and 800/1333 without one."""
    file = directory / "preprocessor_config.json"
    if not file.is_file():
        warnings.warn(f"{file} is missing: taking ImageNet's mean and deviation, short side 800", stacklevel=3)
        return IMAGENET_MEAN, IMAGENET_STD, {"shortest_edge": 800, "longest_edge": 1333}
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not values.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean = tuple(values.get("image_mean", IMAGENET_MEAN))
        std = tuple(values.get("image_std", IMAGENET_STD))
    size = {name: side for name, side in (values.get("size") or {}).items() if side is not None}
    return mean, std, size or {"shortest_edge": 800, "longest_edge": 1333}


def _local(directory: str | Path) -> Path:
    """The directory itself, or where the hub's repository of that name was downloaded to."""
    if Path(directory).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(directory)):
        return Path(directory)
    try:
        return Path(huggingface_hub.snapshot_download(str(directory), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # whatever the network, the hub and its client may say
        raise UserError(
            f"{directory} is no directory here, and cannot be had from the Hugging Face hub either "
            f"({_first_line(error)}); give a directory, or check name and network"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
