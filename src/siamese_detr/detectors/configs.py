"""Read config.json and preprocessor_config.json of a detector of any age, without asking the network.

Files are never changed: what newer versions of Transformers no longer read is repaired in memory.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, PretrainedConfig

from siamese_detr.detectors.weights import first_line, quiet
from siamese_detr.errors import UserError

RESNETS = {
    "18": ("basic", (64, 128, 256, 512), (2, 2, 2, 2)),
    "26": ("bottleneck", (256, 512, 1024, 2048), (2, 2, 2, 2)),
    "34": ("basic", (64, 128, 256, 512), (3, 4, 6, 3)),
    "50": ("bottleneck", (256, 512, 1024, 2048), (3, 4, 6, 3)),
    "101": ("bottleneck", (256, 512, 1024, 2048), (3, 4, 23, 3)),
    "152": ("bottleneck", (256, 512, 1024, 2048), (3, 8, 36, 3)),
}
"""Depth -> layer type, widths and depths of the stages of ``microsoft/resnet-N``."""
NAMED_BACKBONE = {"detr", "conditional_detr", "deformable_detr", "dab_detr", "table-transformer"}
"""Models whose backbone is timm's resnet50 unless their configuration says otherwise."""


def read_json(file: Path) -> dict[str, Any]:
    """The values of a JSON file.

    Raises:
        UserError: no JSON object that can be read.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}; fetch or save the detector again") from None
    if not isinstance(values, dict):
        raise UserError(f"cannot read {file}: it holds no JSON object; fetch or save the detector again")
    return values


def read_config(directory: Path, config_class: type[PretrainedConfig] | None = None) -> PretrainedConfig:
    """The configuration in a directory's config.json.

    Args:
        directory: of the detector.
        config_class: of the model; default: what Transformers knows for its `model_type`.

    Raises:
        UserError: not a configuration of a known model, or with values it cannot have.
    """
    file = directory / "config.json"
    values = read_json(file)
    kind = values.get("model_type")
    if config_class is None:
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(f"{file}: model_type {kind!r} is no model that Transformers knows; choose another detector")
        config_class = CONFIG_MAPPING[kind]
    values.pop("auto_map", None)  # names code in the directory, which is never run
    try:
        _check_numbers(values)
        _name_classes(values)
        if hasattr(config_class, "backbone_config"):
            _describe_backbone(values)
        with quiet():
            return config_class.from_dict(values)
    except Exception as error:  # Transformers raises anything here, depending on the value
        raise UserError(f"{file} has a value that is not valid: {first_line(error)}; correct it there") from None


def _check_numbers(values: dict[str, Any]) -> None:
    """Raise for numbers that would only fail, or never end, when the model is built or run."""
    for name, value in values.items():
        if isinstance(value, int | float):
            low, high = (0, 1) if "dropout" in name else (-1000, 10**6)
            low = 0 if re.search("heads|layers|num_|dim", name) else low
            if (isinstance(value, int) or high == 1) and not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, not {value!r}")


def _name_classes(values: dict[str, Any]) -> None:
    """Give `id2label` one name for each of 0 … n - 1, and `label2id` the same names."""
    names = values.get("id2label")
    if names is None and isinstance(values.get("label2id"), dict):
        names = {index: name for name, index in values["label2id"].items()}
    values.pop("label2id", None)
    if names is None:
        values.pop("id2label", None)
        return
    known = {int(k): str(name) for k, name in (enumerate(names) if isinstance(names, list) else names.items())}
    count = max(known, default=-1) + 1
    if min(known, default=0) < 0 or count > 100_000:
        raise ValueError(f"id2label has the class indices {min(known)} to {max(known)}")
    values["id2label"] = {k: known.get(k, f"LABEL_{k}") for k in range(count)}
    values["label2id"] = {name: k for k, name in values["id2label"].items()}
    values.pop("num_labels", None)


def _describe_backbone(values: dict[str, Any]) -> None:
    """Replace the old ways of naming a backbone by `backbone_config`, as older versions of Transformers did."""
    old = {key: values.pop(key, None) for key in ("backbone", "use_timm_backbone", "backbone_kwargs")}
    values.pop("use_pretrained_backbone", None)
    name, options, model = old["backbone"], dict(old["backbone_kwargs"] or {}), values["model_type"]
    if values.get("backbone_config") is not None or (name is None and model not in NAMED_BACKBONE):
        return
    if old["use_timm_backbone"] or (old["use_timm_backbone"] is None and model in NAMED_BACKBONE):
        stages = [1, 2, 3, 4] if model in NAMED_BACKBONE - {"deformable_detr"} else [2, 3, 4]
        stages = [4] if values.get("num_feature_levels") == 1 else stages
        values["backbone_config"] = {
            "model_type": "timm_backbone",
            "backbone": name or "resnet50",
            "num_channels": options.get("in_chans", options.get("num_channels", values.get("num_channels", 3))),
            "out_indices": list(options.get("out_indices", stages)),
            "output_stride": options.get("output_stride", 16 if values.get("dilation") else None),
        }
    elif (depth := str(name or "microsoft/resnet-50").removeprefix("microsoft/resnet-")) in RESNETS:
        layer, widths, depths = RESNETS[depth]
        sizes = {"layer_type": layer, "hidden_sizes": list(widths), "depths": list(depths)}
        maps = {} if "out_indices" in options else {"out_features": ["stage4"]}
        values["backbone_config"] = {"model_type": "resnet", **sizes, **maps, **options}
    else:
        values["backbone_config"] = AutoConfig.from_pretrained(name, trust_remote_code=False, **options).to_dict()


def read_processor(directory: Path, config: PretrainedConfig, default: str | None = None) -> Any:
    """The image processor of a directory's preprocessor_config.json.

    Args:
        directory: of the detector.
        config: its configuration.
        default: class of the processor, where neither file names one.

    Raises:
        UserError: values that an image processor cannot have.
    """
    file = directory / "preprocessor_config.json"
    values = read_json(file) if file.is_file() else {}
    values.pop("auto_map", None)
    if default is not None and not values.keys() & {"image_processor_type", "feature_extractor_type"}:
        values["image_processor_type"] = default
    try:
        # Transformers makes a processor of the right class from a directory only.
        with tempfile.TemporaryDirectory() as folder, quiet():
            Path(folder, file.name).write_text(json.dumps(values))
            processor = AutoImageProcessor.from_pretrained(folder, config=config, trust_remote_code=False)
        _check(processor)
    except Exception as error:  # Transformers raises anything here, depending on the value
        raise UserError(f"{file} has a value that is not valid: {first_line(error)}; correct or remove it") from None
    if directory.is_dir() and not file.is_file():
        size = {name: side for name, side in dict(processor.size).items() if side is not None}
        warnings.warn(f"{file} is missing: taking its model's defaults, size {size}", stacklevel=4)
    return processor


def _check(processor: Any) -> None:
    """Raise if the processor cannot give the pixels of an image."""
    for name in ("image_mean", "image_std"):
        value = getattr(processor, name)
        if processor.do_normalize and not (len(value) == 3 and all(math.isfinite(v) for v in value)):
            raise ValueError(f"{name} {value!r}: three numbers are needed")
    for name, side in dict(processor.size).items():
        if side is not None and not (type(side) is int and 0 < side <= 20_000):
            raise ValueError(f"size: {name} {side!r} is no number of pixels")
    pixels = processor(images=[np.full((48, 64, 3), 127, np.uint8)], return_tensors="pt")["pixel_values"]
    if pixels.dim() != 4 or pixels.shape[:2] != (1, 3) or not torch.isfinite(pixels).all():
        raise ValueError("it makes no finite RGB pixels of an image")
