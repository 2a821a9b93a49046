"""The options of ``pretrain``: mistakes are named, and recipes are those of the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from siamese_detr.config import read_sources, recipe_names, validate
from siamese_detr.detectors import plan_detector
from siamese_detr.errors import UserError
from siamese_detr.training.optimizer import lr_factor
from siamese_detr.training.pretrain import pretrain
from siamese_detr.training.pretrain_config import PretrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_regions": 7}, "too few queries.*6 queries, 7 regions"),
        ({"detector": "conditional-dter"}, "did you mean 'conditional-detr'"),
        ({"batch_size": 5, "accumulate": 2}, "batch_size 5 must be a multiple"),
        ({"feature_bank": 2, "view_size": None}, "view_size"),
        ({"batch_size": 4, "accumulate": 8}, "batch_size 4 must be a multiple"),
        ({"detector": "rt-detr", "view_size": 72}, "multiple of 32 pixels, not 72; use 64"),
        ({"steps": 0}, "steps must be above 0"),
        ({"epochs": float("nan"), "steps": None}, "epochs must be above 0"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"lambda_region": -1.0}, "lambda_region must be 0 or more"),
        ({"box_jitter": 0.7}, "box_jitter=0.7"),
        ({"report_to": ["abacus"]}, "no tracker 'abacus'"),
        ({"precision": "fp16"}, "fp16 needs an accelerator"),
        ({"iou": 1.5}, "iou"),
        ({"images": "/nowhere"}, "/nowhere"),
        ({"proposals": "/nowhere"}, "/nowhere"),
        ({"init": "/nowhere"}, "/nowhere"),
        ({"method": "moco"}, "method"),
    ],
)
def test_mistakes_are_named(base: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(**{**base, "proposals": None, "out": str(tmp_path / "run"), **changes})
    assert not (tmp_path / "run" / "proposals").exists()  # mistakes show before hours of proposals


PAPER: dict[str, Any] = {
    **{"backbone": "resnet50", "flip": True, "view_size": None, "crop_size": 128, "box_jitter": 0.1},
    **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "color_probability": 0.8},
    **{"gray_probability": 0.2, "blur_probability": 0.5, "blur_sigma": (0.1, 2.0)},
    **{"class_weight": 1, "box_weight": 5, "giou_weight": 2, "no_object_weight": 0.1},
    **{"class_cost": 1, "box_cost": 5, "giou_cost": 2},
    **{"lr": 1e-4, "weight_decay": 1e-4, "clip": 0.1, "warmup": 0},
}
SIAMESE: dict[str, Any] = {
    **{"method": "siamese", "num_regions": 10, "proposal_method": "edge-boxes", "box_source": "proposals"},
    **{"area_range": (0.5, 1.0), "aspect_range": (3 / 4, 4 / 3), "iou": 0.5, "shrink": True, "diagonals": False},
    **{"min_area": 0.05, "selection": "top", "discrimination": "both", "region_target": "crop", "target_view": "own"},
    **{"cross_view": True, "jitter_queries": True, "region_dropout": 0},
}
UP_DETR = {"method": "up-detr", "num_regions": 10, "reconstruction_weight": 1, "patch_dropout": 0.1}
DETREG = {"method": "detreg", "num_regions": 30, "proposal_method": "selective-search", "embedding_weight": 1}
IMAGENET = {"short_sides": tuple(range(320, 481, 16)), "max_size": 600, "batch_size": 256}
COCO = {"short_sides": tuple(range(480, 801, 32)), "max_size": 1333, "batch_size": 64}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], str, int, float, float, int, int]] = {
    # method, images, detector, queries, weights of region and global discrimination, updates, those before the drop
    "imagenet-conditional": (SIAMESE, IMAGENET, "conditional-detr", 100, 5, 10, 300_000, 200_000),
    "imagenet-detr": (SIAMESE, IMAGENET, "detr", 100, 3, 10, 300_000, 200_000),
    "imagenet-deformable-ss": (SIAMESE, IMAGENET, "deformable-detr", 300, 3, 10, 300_000, 200_000),
    "imagenet-deformable-ms": (SIAMESE, IMAGENET, "deformable-detr", 300, 3, 10, 300_000, 200_000),
    "coco-conditional": (SIAMESE, COCO, "conditional-detr", 100, 3, 0.3, 120_000, 80_000),
    "imagenet-up-detr": (UP_DETR, IMAGENET, "detr", 100, 0, 0, 60 * 5000, 40 * 5000),
    "imagenet-detreg": (DETREG, IMAGENET, "detr", 100, 0, 0, 60 * 5000, 40 * 5000),
}
"""What the papers say of each; of epochs, of 5000 updates."""


def recipe(name: str) -> PretrainConfig:
    return validate(PretrainConfig, read_sources(PretrainConfig, name, None) | {"images": "a", "out": "b"}, name)


def test_every_recipe_is_valid() -> None:
    """The shipped YAML files name existing settings with valid values."""
    names = recipe_names(PretrainConfig)
    assert set(names) == {*RECIPES, "laptop", "gpu"}
    for config in map(recipe, names):
        assert config.batch_size % config.accumulate == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_papers(name: str) -> None:
    config = recipe(name)
    method, images, detector, queries, of_regions, of_images, steps, drop = RECIPES[name]
    expected = PAPER | method | images | {"detector": detector, "num_queries": queries}
    if method is SIAMESE:
        expected |= {"lambda_region": of_regions, "lambda_global": of_images}
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.total_steps(5000 * 256) == steps
    factor = lr_factor(config.schedule, steps, config.drop_at, config.warmup)
    assert [factor(step) for step in (0, drop - 1, drop, steps - 1)] == pytest.approx([1, 1, 0.1, 0.1])
    plan = plan_detector(detector, config.backbone, **config.sizes())
    sizes = dict(hidden_size=256, heads=8, encoder_layers=6, decoder_layers=6, num_queries=queries)
    sizes |= dict(ffn_size=1024 if detector == "deformable-detr" else 2048)
    assert {key: getattr(plan.size, key) for key in sizes} == sizes
    assert plan.size.dropout == plan.size.attention_dropout == plan.size.activation_dropout == 0.1
    if detector == "deformable-detr":
        assert plan.config.num_feature_levels == (4 if name.endswith("ms") else 1)
        assert plan.config.encoder_n_points == plan.config.decoder_n_points == 4
