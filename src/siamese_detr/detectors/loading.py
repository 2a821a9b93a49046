"""The one way to load a detector: from a run, a Hugging Face directory of any age, its name on the Hub, or a checkpoint
of the research codes."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, PretrainedConfig, PreTrainedModel

from siamese_detr.detectors import initialise
from siamese_detr.detectors.adapter import DetectorAdapter, only_pretrained
from siamese_detr.detectors.backbones import WEIGHT_SUFFIXES
from siamese_detr.detectors.build import FAMILIES, adapter_class, families
from siamese_detr.detectors.configs import read_config, read_json, read_processor
from siamese_detr.detectors.research.checkpoint import read_research_checkpoint
from siamese_detr.detectors.weights import first_line, quiet
from siamese_detr.errors import UserError

PLACES = ("", "best", "last", "detector")
"""Where in a directory a detector may be: itself, in a fine-tuning run, in a pre-training run."""


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


@dataclass(frozen=True)
class StoredDetector:
    """A detector on disk, its configuration read and repaired, its model not built yet.

    Args:
        path: its directory, or the file of a research checkpoint.
        config: may be changed before the model is loaded.
        adapter: of its family; None for object detectors that can be run, but have no adapter.
        provenance: what is recorded of its origin.
        tensors: of a research checkpoint, under Transformers' names; None: they are in the directory.
        unused: names of a research checkpoint's tensors that have no place in the model.
    """

    path: Path
    config: PretrainedConfig
    adapter: type[DetectorAdapter] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] | None = None
    unused: tuple[str, ...] = ()

    @property
    def only_pretrained(self) -> bool:
        """Whether it has no classes yet."""
        return only_pretrained(self.provenance, list((self.config.id2label or {}).values()))

    def load_model(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model, in float32, and Transformers' account of what did not fit: sets of `missing_keys`,
        `unexpected_keys` and `mismatched_keys`.

        Raises:
            UserError: no weights, or damaged or unsafe (pickled) ones.
        """
        try:
            with quiet():
                model, info = self.model_class.from_pretrained(
                    self.path if self.tensors is None else None,
                    config=self.config,
                    state_dict=self.tensors,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the caller looks at them
                    weights_only=True,
                    dtype=torch.float32,
                )
        except pickle.UnpicklingError:
            raise UserError(
                f"the weights in {self.path} are a pickle with more than tensors in it, which is never loaded; "
                "a model.safetensors is needed"
            ) from None
        except Exception as error:  # whatever the libraries raise for damaged files
            self._check_model()
            raise UserError(
                f"cannot load the weights in {self.path}: {first_line(error)}; "
                "an intact pytorch_model.bin or model.safetensors is needed"
            ) from None
        if (labels := self._labels_in_weights(info)) is not None:
            self.config.num_labels = labels
            return self.load_model()
        return model, info

    def load_processor(self) -> Any:
        """Its image processor, in working order.

        Raises:
            UserError: preprocessor_config.json has values that cannot be.
        """
        return read_processor(self.path, self.config, self.adapter.processor_class if self.adapter else None)

    @property
    def model_class(self) -> Any:
        """The stock class of the model."""
        return self.adapter.model_class if self.adapter else MODEL_FOR_OBJECT_DETECTION_MAPPING[type(self.config)]

    def _check_model(self) -> None:
        """Raise UserError if the configuration describes no model."""
        try:
            with torch.device("meta"), quiet():
                self.model_class(self.config)
        except Exception as error:  # whatever the model raises for its values
            file = self.path / "config.json"
            raise UserError(f"{file} describes no model: {first_line(error)}; correct it there") from None

    def _labels_in_weights(self, info: dict[str, Any]) -> int | None:
        """Number of classes of the class head in the file, if it is not the two that Transformers assumes where
        config.json names none."""
        if list((self.config.id2label or {}).values()) != ["LABEL_0", "LABEL_1"]:
            return None
        found = set()
        for _, stored, built in info["mismatched_keys"]:
            no_object = built[0] - 2  # one output more in some families
            if no_object in (0, 1) and stored[1:] == built[1:]:
                found.add(stored[0] - no_object)
        return found.pop() if len(found) == 1 else None


def find_detector(source: str | Path) -> Path:
    """The directory of a detector, or the file of a research checkpoint.

    Args:
        source: the directory or file itself; a run, whose `best`, `last` (fine-tuning) or `detector` (pre-training) it
            is; or, where there is no such path, a name on the Hugging Face Hub ("facebook/detr-resnet-50"), which is
            downloaded once.

    Raises:
        UserError: no detector there, or no way to download it.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in WEIGHT_SUFFIXES or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
            raise UserError(f"there is no detector {path}: no such file or folder")
        path = _download(str(source))
    if path.is_file():
        if (path.parent / "config.json").is_file() and path.suffix in (".safetensors", ".bin", ".json"):
            raise UserError(f"{path} is only one file of a detector; name the folder {path.parent}")
        return path
    for candidate in (path / place for place in PLACES):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(f"{path} is no detector: it holds no config.json, nor do best, last or detector in it")


def _download(name: str) -> Path:
    """Where the Hub's repository of that name is in the cache."""
    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
        if not list(path.glob("*.safetensors")):
            path = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except Exception as error:  # whatever the network, the Hub and its client may say
        raise UserError(
            f"there is no folder {name}, and the Hugging Face Hub cannot give a model of that name "
            f"({first_line(error)}); check the name, the network, and HF_HUB_OFFLINE"
        ) from None
    return path


def open_detector(source: str | Path) -> StoredDetector:
    """The detector `find_detector` finds, ready to load.

    Raises:
        UserError: no detector there, or of a model that detects no objects.
    """
    path = find_detector(source)
    if path.is_file():
        return _open_research_checkpoint(path)
    kind = str(read_json(path / "config.json").get("model_type")).replace("_", "-")
    if kind in FAMILIES or kind in families():
        adapter = adapter_class(kind)
        config = read_config(path, adapter.model_class.config_class)
        return StoredDetector(path, config, adapter, _provenance(path, adapter.family))
    config = read_config(path)
    if type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        raise UserError(f"{path} holds a {kind!r} model; known detectors: {', '.join(families())}")
    return StoredDetector(path, config, None)


def _open_research_checkpoint(path: Path) -> StoredDetector:
    checkpoint = read_research_checkpoint(path)
    plan, config = checkpoint.plan, checkpoint.plan.config
    if checkpoint.class_names is not None:
        config.id2label = dict(enumerate(checkpoint.class_names))
        config.label2id = {name: i for i, name in enumerate(checkpoint.class_names)}
    provenance = {"family": plan.adapter.family, "backbone": plan.backbone.name, "from": str(path.absolute())}
    if checkpoint.pretrained:
        provenance["method"] = "that of the research checkpoint"
    return StoredDetector(path, config, plan.adapter, provenance, checkpoint.tensors, checkpoint.unused)


def load_detector(
    source: str | Path | StoredDetector, class_names: list[str] | None = None, **overrides: Any
) -> DetectorAdapter:
    """A detector of a known family behind its adapter, with a frozen backbone.

    What could not be loaded is in the adapter's `load_report`.

    Args:
        source: see `find_detector`; or what `open_detector` gave, which is not read again.
        class_names: if given and other than those stored, the class head is re-made for them; all else is kept.
        **overrides: values of the configuration to change (`dropout=0.0`).

    Raises:
        UserError: no detector there, a family without adapter, damaged or unsafe weights.
    """
    stored = source if isinstance(source, StoredDetector) else open_detector(source)
    path, config, adapter = stored.path, stored.config, stored.adapter
    if adapter is None:
        raise UserError(
            f"{path} holds a {config.model_type!r} model, which cannot be trained here; "
            f"known detectors: {', '.join(families())}"
        )
    if getattr(config, "auxiliary_loss", False):
        config.auxiliary_loss = False  # Transformers' auxiliary loss changes what the decoder computes.
    for name, value in overrides.items():
        if not hasattr(config, name):
            raise UserError(f"a {adapter.family!r} detector has no option {name!r}")
        setattr(config, name, value)
    remake = class_names is not None and list((config.id2label or {}).values()) != list(class_names)
    model, info = stored.load_model()
    if wrong := info["mismatched_keys"]:
        raise UserError(
            f"cannot load the weights in {path}: {min(wrong)[0]} has another shape than the detector's sizes say; "
            "they belong to another model"
        )
    processor = stored.load_processor()
    plain = not processor.do_normalize
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (processor.image_mean, processor.image_std)
    detector = adapter(model, tuple(mean), tuple(std), stored.provenance)
    detector.input_size = {name: side for name, side in dict(processor.size).items() if side is not None}
    remade = _remake_class_head(detector, class_names) if remake and class_names is not None else set()
    missing = tuple(sorted(set(info["missing_keys"]) - remade))
    unexpected = (*stored.unused, *sorted(info["unexpected_keys"]))
    detector.load_report = LoadReport(missing, unexpected, tuple(sorted(remade)))
    if stored.unused:
        warnings.warn(
            f"{path}: {len(stored.unused)} tensors have no place in a {adapter.family} detector and are left out, "
            f"e.g. {', '.join(stored.unused[:3])}",
            stacklevel=2,
        )
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} tensors were not in the file and are freshly initialised, "
            f"e.g. {', '.join(missing[:3])}",
            stacklevel=2,
        )
    return detector.train()


def _remake_class_head(detector: DetectorAdapter, class_names: list[str]) -> set[str]:
    """Give a detector a new class head, for other classes; returns the names of its tensors.

    Not before loading: for tensors of other shapes than in the file, `from_pretrained` fails where heads are tied.
    """
    more = len(class_names) - len(detector.class_names)
    old = {tensor for layer in detector.class_layers for tensor in layer.parameters()}
    new = {x: nn.Parameter(x.new_empty(len(x) + more, *x.shape[1:]), x.requires_grad) for x in old}
    remade = {name for name, tensor in detector.model.named_parameters(remove_duplicate=False) if tensor in old}
    for name in remade:  # tied ones stay tied
        owner, _, kind = name.rpartition(".")
        module = detector.model.get_submodule(owner)
        setattr(module, kind, new[getattr(module, kind)])
    for layer in detector.class_layers:
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings, layer.padding_idx = len(layer.weight), len(class_names)
        else:
            layer.out_features = len(layer.weight)  # type: ignore[arg-type,assignment]
        initialise.class_head(layer, focal=detector.class_loss != "softmax")
    detector.name_classes(class_names)
    vars(detector.config).pop("score_thresholds", None)  # of the old classes
    return remade


def _provenance(path: Path, family: str) -> dict[str, Any]:
    """What is recorded of a detector's origin; a damaged record harms nothing but itself."""
    file = path / "siamese_detr.json"
    try:
        return read_json(file) if file.is_file() else {"family": family}
    except UserError as error:
        warnings.warn(f"{error}; going on without what it tells of the detector's origin", stacklevel=3)
        return {"family": family}
