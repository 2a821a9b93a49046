"""UP-DETR and DETReg: their masks, their losses against a slow, obvious computation, their invariances."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from pretext_cases import (
    Recorder,
    fill_padding,
    pad_more,
    random_features,
    random_inputs,
    randomise,
    slow_distance,
    slow_pretext_terms,
    small_detector,
    take_images,
    term_name,
)
from siamese_detr.errors import UserError
from siamese_detr.pretext import UpDetrConfig, build_pretext
from siamese_detr.pretext.features import region_of_query
from siamese_detr.pretext.up_detr import patch_mask


@pytest.mark.parametrize("regions", [1, 3, 4, 5, 12])
def test_queries_are_shared_out_evenly_and_see_only_their_patch(regions):
    region = region_of_query(12, regions)
    assert sorted(region.tolist()) == region.tolist()
    shares = region.bincount(minlength=regions)
    assert shares.min() >= 12 // regions
    assert shares.max() <= -(-12 // regions)
    mask = patch_mask(region)
    assert mask.any(1).all()
    for query in range(12):
        assert (mask[query] == (region == region[query])).all()


@pytest.mark.parametrize("regions", [4, 5])
def test_up_detr_agrees_with_a_slow_computation(regions):
    pretext = randomise(build_pretext("up-detr", small_detector(), UpDetrConfig(patch_dropout=0.0)))
    features, recorder = random_features(views=1, regions=regions), Recorder(pretext.detector)
    output = pretext(features)
    (decoded,) = recorder.decoded
    expected, triples = slow_pretext_terms(pretext, decoded, features)
    for (layer, _), found in triples.items():
        said = pretext.region_head(decoded.states[layer])
        total = sum(slow_distance(said[i, q], features.crop_features[0, i, r]) for i, q, r in found)
        expected["loss_region", layer] = total / len(found)
    for (name, layer), value in expected.items():
        assert output.terms[term_name(name, layer)].item() == pytest.approx(value, abs=1e-9)
    weights = {"loss_class": 1, "loss_box": 5, "loss_giou": 2, "loss_region": 1}
    assert output.loss.item() == pytest.approx(sum(weights[name] * value for (name, _), value in expected.items()))


def test_up_detr_patches_do_not_see_each_other():
    pretext = randomise(build_pretext("up-detr", small_detector(), UpDetrConfig(patch_dropout=0.0)))
    features, recorder = random_features(views=1, regions=5), Recorder(pretext.detector)
    pretext(features)
    changed = dataclasses.replace(features, crop_features=features.crop_features.clone())
    changed.crop_features[:, :, 2] += 1
    pretext(changed)
    plain, other = (decoded.states for decoded in recorder.decoded)
    mine = region_of_query(12, 5) == 2
    assert_close(plain[:, :, ~mine], other[:, :, ~mine])
    assert ((plain - other)[:, :, mine].abs().amax(-1) > 1e-6).all()


def test_up_detr_drops_patches_in_training_only():
    pretext = randomise(build_pretext("up-detr", small_detector(queries=100), UpDetrConfig(patch_dropout=0.3)))
    features, recorder = random_features(views=1), Recorder(pretext.detector)
    for _ in range(2):
        torch.manual_seed(5)
        pretext(features)
    pretext.eval()(features)
    first, again, evaluated = recorder.queries
    assert torch.equal(first, again)
    dropped = (first == 0).all(-1)
    assert 0.15 < dropped.float().mean() < 0.45
    assert torch.equal(first[~dropped], evaluated[~dropped])
    assert not (evaluated == 0).all(-1).any()


def ragged(features):
    """Three, two and one regions."""
    boxes = features.boxes.clone()
    boxes[:, 1, 2:] = 0
    boxes[:, 2, 1:] = 0
    return dataclasses.replace(features, boxes=boxes)


def test_detreg_agrees_with_a_slow_computation():
    pretext = randomise(build_pretext("detreg", small_detector()))
    features, recorder = ragged(random_features(views=1, regions=3)), Recorder(pretext.detector)
    output = pretext(features)
    (decoded,) = recorder.decoded
    assert recorder.queries == [None]
    expected, triples = slow_pretext_terms(pretext, decoded, features)
    found = triples[1, 0]
    assert len(found) == 6
    said = pretext.region_head(decoded.states[1])
    total = sum((said[i, q] - features.crop_features[0, i, r]).abs().mean().item() for i, q, r in found)
    expected["loss_embedding", 1] = total / len(found)
    assert set(output.terms) == {term_name(name, layer) for name, layer in expected}
    for (name, layer), value in expected.items():
        assert output.terms[term_name(name, layer)].item() == pytest.approx(value, abs=1e-9)
    weights = {"loss_class": 1, "loss_box": 5, "loss_giou": 2, "loss_embedding": 1}
    assert output.loss.item() == pytest.approx(sum(weights[name] * value for (name, _), value in expected.items()))


@pytest.mark.parametrize("method", ["up-detr", "detreg"])
def test_invariances(method):
    config = UpDetrConfig(patch_dropout=0.0) if method == "up-detr" else None
    pretext = randomise(build_pretext(method, small_detector(), config))
    features = ragged(random_features(views=1))
    plain = pretext(features)
    for changed in (
        take_images(features, torch.tensor([1, 2, 0])),
        fill_padding(features, 1e3),
        pad_more(features, rows=1, columns=3),
    ):
        other = pretext(changed)
        for name, value in plain.terms.items():
            assert_close(other.terms[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["up-detr", "detreg"])
def test_from_pixels(method):
    pretext = build_pretext(method, small_detector())
    assert pretext.needs_crops
    features = pretext.frozen_features(random_inputs(views=1))
    pretext(features).loss.backward()
    assert all(p.grad is not None for p in pretext.parameters() if p.requires_grad)
    with pytest.raises(UserError, match="crops"):
        pretext(dataclasses.replace(features, crop_features=None))


@pytest.mark.parametrize("method", ["up-detr", "detreg"])
def test_too_few_queries(method):
    with pytest.raises(UserError, match="too few queries"):
        build_pretext(method, small_detector(queries=4)).double()(random_features(views=1, regions=5))


def test_bad_patch_dropout():
    with pytest.raises(UserError, match="patch_dropout"):
        UpDetrConfig(patch_dropout=1.0)
