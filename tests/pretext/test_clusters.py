"""K-means classes of the regions, and their detection by the family's own losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pretext_cases import random_features
from siamese_detr.detection.criterion import CriterionConfig, SetCriterion
from siamese_detr.detectors.structures import Targets
from siamese_detr.errors import UserError
from siamese_detr.pretext import ClustersConfig, build_pretext
from siamese_detr.pretext.clusters import ClustersPretext
from siamese_detr.pretext.features import FrozenFeatures
from tiny_detectors import every_detector, tiny_detector

KINDS = 3


def clusters(case: str = "rt-detr", **changes: object) -> ClustersPretext:
    detector = tiny_detector(case, classes=KINDS, reduced=False, **changes)
    pretext = build_pretext("clusters", detector, ClustersConfig(classes=KINDS))
    assert isinstance(pretext, ClustersPretext)
    return pretext.train()


def features_for(pretext: ClustersPretext, **options: Any) -> FrozenFeatures:
    """Random ones of one view, in single precision, which Transformers' denoising wants."""
    features = random_features(views=1, detector=pretext.detector, **options)
    values = {name: getattr(features, name).float() for name in ("boxes", "query_boxes", "crop_features")}
    return dataclasses.replace(features, maps=[level.float() for level in features.maps], **values)


def features_of_kinds(pretext: ClustersPretext, kinds: torch.Tensor, seed: int = 0) -> FrozenFeatures:
    """Features of regions (B, P) of which those of one kind point the same way."""
    features = features_for(pretext, batch=kinds.shape[0], regions=kinds.shape[1])
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(KINDS, features.crop_features.shape[-1], generator=torch.Generator().manual_seed(9))
    noise = 0.05 * torch.randn(features.crop_features.shape, generator=random)
    length = 0.5 + torch.rand(*kinds.shape, 1, generator=random)
    return dataclasses.replace(features, crop_features=length * (directions[kinds] + noise))


def test_regions_of_one_kind_get_one_class_whatever_the_length_of_their_features():
    pretext, kinds = clusters(), torch.randint(KINDS, (3, 8), generator=torch.Generator().manual_seed(1))
    pretext.begin(iter([features_of_kinds(pretext, kinds)]))
    others = torch.randint(KINDS, (3, 8), generator=torch.Generator().manual_seed(2))
    features = features_of_kinds(pretext, others, seed=3)
    features.boxes[:, 1, 5:] = 0  # padding
    targets = pretext.targets(features)
    assert targets.classes[1, 5:].tolist() == [-1] * 3
    assert_close(targets.boxes, features.targets[0])
    pairs = {(int(k), int(c)) for k, c in zip(others[targets.valid], targets.classes[targets.valid], strict=True)}
    assert len(pairs) == len({k for k, _ in pairs}) == len({c for _, c in pairs}) == KINDS


def test_clusters_are_the_same_again_and_are_saved_with_the_run():
    first, second = clusters(), clusters()
    for pretext in (first, second):
        pretext.begin(features_for(pretext, seed=n) for n in range(4))
    assert first.centres.abs().sum() > 0
    assert torch.equal(first.state_dict()["centres"], second.state_dict()["centres"])


@every_detector
def test_the_losses_are_those_of_fine_tuning(case):
    pretext = clusters(case)
    features = features_for(pretext)
    pretext.begin(iter([features]))
    torch.manual_seed(4)  # of denoising
    output = pretext(features)
    output.loss.backward()
    assert not [name for name, p in pretext.named_parameters() if p.requires_grad and p.grad is None]
    targets = pretext.targets(features)
    assert isinstance(targets, Targets)
    torch.manual_seed(4)
    predictions = pretext.detector.detect(features.maps, features.pixel_mask, targets)
    expected = SetCriterion(CriterionConfig.of(pretext.detector.class_loss))(predictions, targets)
    assert_close(output.loss, expected.loss)
    assert output.terms.keys() == expected.terms.keys()


@pytest.mark.parametrize("case", ["detr", "rt-detr"])
def test_every_region_has_its_own_query(case):
    pretext = clusters(case).eval()
    features = features_for(pretext)
    pretext.begin(iter([features]))
    _, decoded = pretext.predict(features)
    matches = pretext.match(decoded, features).matches
    assert matches.shape == (pretext.detector.num_layers, *features.boxes.shape[:3])
    for row in matches.flatten(0, 2).numpy():
        assert len(np.unique(row)) == len(row)


def test_bad_input():
    pretext = clusters()
    few = features_for(pretext, batch=1, regions=KINDS - 1)
    with pytest.raises(UserError, match="2 regions do not fall into 3 classes: give more images, or lower classes"):
        pretext.begin(iter([few]))
    with pytest.raises(UserError, match="classes must be at least 2"):
        ClustersConfig(classes=1)
    with pytest.raises(UserError, match="the detector has 3 classes, and 64 are to be"):
        build_pretext("clusters", tiny_detector("detr", classes=KINDS))
