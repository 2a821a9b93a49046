"""Numbers computed with the official Siamese DETR code (Apache-2.0, (c) 2023 SenseTime), in float64, without dropout.

The file holds one training step of Conditional DETR: three pairs of views with padding, hidden size 32, 2 + 2 layers,
20 queries, 5 regions; parameters under our names ("weight/..."), their gradients (float32) and a few of them after one
AdamW step; inputs ("in/"), intermediate results and losses ("out/", direction v decodes on the memory of view v); and
values of single functions ("unit/").
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiameseConfig, SiamesePretext

FILE = Path(__file__).parent / "data" / "siamese_conditional.safetensors"


@functools.cache
def golden() -> dict[str, Tensor]:
    """All tensors of the file; do not write into them."""
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@functools.cache
def negligible_gradients() -> frozenset[str]:
    """Parameters whose gradient is analytically zero, so that the official one is rounding noise."""
    with safe_open(FILE, "pt") as file:
        return frozenset(json.loads(file.metadata()["negligible_gradient"]))


def golden_config(**changes: object) -> SiameseConfig:
    """The configuration of the case, in which the global feature averages padding."""
    sizes = {"global_hidden_size": 24, "global_size": 28, "global_predictor_size": 20}
    return SiameseConfig(**({"lambda_region": 5.0, "lambda_global": 10.0, "pool_padding": True} | sizes | changes))


def golden_pretext(config: SiameseConfig | None = None) -> SiamesePretext:
    """A detector of the case's sizes with its parameters, in float64 and training mode."""
    from transformers import ResNetConfig  # here, since the processes of a test need only the numbers

    from siamese_detr.detectors.build import build_detector

    backbone = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    detector = build_detector(
        "conditional-detr",
        backbone,
        num_queries=20,
        hidden_size=32,
        heads=4,
        encoder_layers=2,
        decoder_layers=2,
        ffn_size=64,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        seed=0,
    )
    pretext = SiamesePretext(detector, config or golden_config()).double()
    weights = {name.removeprefix("weight/"): value for name, value in golden().items() if name.startswith("weight/")}
    missing, unexpected = pretext.load_state_dict(weights, strict=False)
    assert not unexpected
    learned = {name for name, parameter in pretext.named_parameters() if parameter.requires_grad}
    assert not learned & set(missing)
    return pretext.train()


def golden_features() -> FrozenFeatures:
    """The case's input, view-major."""
    data = golden()
    sizes = data["in/sizes"].repeat(2, 1)
    rows, columns = torch.arange(150), torch.arange(190)
    mask = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
    return FrozenFeatures(
        maps=[data["in/maps"].flatten(0, 1)],
        pixel_mask=mask,
        sizes=sizes,
        boxes=data["in/boxes"],
        query_boxes=data["in/query_boxes"],
        crop_features=data["in/crop_features"],
    )
