"""Siamese DETR: its invariances, its gradients, and its losses against a slow, obvious computation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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
    swap_views,
    take_images,
    term_name,
)
from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.detectors.build import FAMILIES
from siamese_detr.errors import UserError
from siamese_detr.pretext import SiameseConfig, build_pretext
from siamese_detr.pretext.features import pool_regions
from siamese_detr.pretext.siamese import SiamesePretext


def siamese(**changes: object) -> SiamesePretext:
    sizes = {"global_hidden_size": 16, "global_size": 16, "global_predictor_size": 8}
    return randomise(SiamesePretext(small_detector(), SiameseConfig(**(sizes | changes))))


def same_terms(a, b, tolerance=1e-9):
    assert a.terms.keys() == b.terms.keys()
    for name in a.terms:
        assert_close(a.terms[name], b.terms[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert_close(a.loss, b.loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target_view", ["own", "other"])
@pytest.mark.parametrize("cross_view", [True, False])
def test_terms_agree_with_a_slow_computation(target_view, cross_view):
    pretext = siamese(target_view=target_view, cross_view=cross_view)
    features, recorder = random_features(), Recorder(pretext.detector)
    output = pretext(features)
    (decoded,) = recorder.decoded
    expected, triples = slow_pretext_terms(pretext, decoded, features)
    for (layer, view), found in triples.items():
        source = 1 - view if cross_view else view  # the view whose regions the queries carry
        crops = features.crop_features[source if target_view == "own" else 1 - source]
        said = pretext.region_head(decoded.states[layer, view * 3 : view * 3 + 3])
        total = sum(slow_distance(said[image, query], crops[image, region]) for image, query, region in found)
        key = ("loss_region", layer)
        expected[key] = expected.get(key, 0.0) + total / len(found) / 2
    for (name, layer), value in expected.items():
        assert output.terms[term_name(name, layer)].item() == pytest.approx(value, abs=1e-9)

    memory = pretext.detector.encode(features.maps, features.pixel_mask)
    pooled = torch.stack([tokens[mask].mean(0) for tokens, mask in zip(memory.tokens, memory.mask, strict=True)])
    first, second = (pretext.global_head.projector(view) for view in pooled.split(3))

    def one_way(a, b):
        return (2 - 2 * F.cosine_similarity(pretext.global_head.predictor(a), b)).mean()

    expected_global = (one_way(first, second) + one_way(second, first)) / 2
    assert_close(output.terms["loss_global"], expected_global)

    weights = {"loss_class": 1, "loss_box": 5, "loss_giou": 2, "loss_region": 5}
    total = sum(weights[name] * value for (name, _), value in expected.items()) + 10 * expected_global.item()
    assert output.loss.item() == pytest.approx(total)
    assert not any(term.requires_grad for term in output.terms.values())


def test_queries_carry_the_regions_of_their_view_in_a_row():
    pretext, features = siamese(), random_features()
    recorder = Recorder(pretext.detector)
    pretext(features)
    given = recorder.queries[0].unflatten(0, (2, 3))
    pooled = pool_regions(features.maps, features.query_boxes, [32], features.sizes)
    embedded = pretext.region_embedding(pooled)
    for query in range(12):
        assert_close(given[0, :, query], embedded[1, :, query // 3])
        assert_close(given[1, :, query], embedded[0, :, query // 3])


def test_region_dropout_hides_the_regions_of_whole_images_in_training_only():
    pretext, features = siamese(region_dropout=0.5), random_features(batch=4)
    shown = pretext.eval().queries(features)
    torch.manual_seed(0)
    pretext.train()
    seen = torch.zeros(2, 4)
    for _ in range(64):
        queries = pretext.queries(features)
        kept = queries.abs().amax((2, 3)) > 0
        assert_close(queries, torch.where(kept[..., None, None], shown, 0))
        seen += kept / 64
    assert ((seen > 0.2) & (seen < 0.8)).all(), "each image of each view is hidden about half of the time, by itself"
    assert pretext(features).loss.isfinite()


def test_permuting_the_batch_permutes_the_predictions_and_leaves_the_loss():
    pretext, features, order = siamese(), random_features(), torch.tensor([2, 0, 1])
    recorder = Recorder(pretext.detector)
    same_terms(pretext(features), pretext(take_images(features, order)))
    plain, permuted = (decoded.boxes.unflatten(1, (2, 3)) for decoded in recorder.decoded)
    assert_close(permuted, plain[:, :, order])


def test_swapping_the_views_swaps_the_directions_and_leaves_the_total():
    pretext, features = siamese(), random_features()
    recorder = Recorder(pretext.detector)
    same_terms(pretext(features), pretext(swap_views(features)))
    plain, swapped = (decoded.boxes.unflatten(1, (2, 3)) for decoded in recorder.decoded)
    assert_close(swapped, plain.flip(1))


def test_padding_changes_nothing():
    pretext, features = siamese(), random_features()
    plain = pretext(features)
    same_terms(plain, pretext(fill_padding(features, 1e3)))
    same_terms(plain, pretext(pad_more(features, rows=2, columns=1)))


def test_with_the_papers_pooling_padding_leaks():
    pretext, features = siamese(pool_padding=True), random_features()
    plain, filled = pretext(features), pretext(fill_padding(features, 1e3))
    assert (plain.terms["loss_global"] - filled.terms["loss_global"]).abs() > 1e-3


def test_the_papers_global_features_leave_out_the_level_that_deformable_detr_adds():
    detector = small_detector("deformable-detr", num_feature_levels=4)
    features = random_features(detector=detector)
    pretext = {
        levels: randomise(build_pretext("siamese", detector, SiameseConfig(global_levels=levels)))
        for levels in ("all", "backbone")
    }
    sizes = {levels: module.global_head.projector[0].in_features for levels, module in pretext.items()}
    assert sizes == {"all": 4 * 32, "backbone": 3 * 32}
    loss = pretext["backbone"](features).terms["loss_global"]
    pooled = detector.encode(features.maps, features.pixel_mask).pooled().unflatten(0, (2, -1))
    predictions, projections = pretext["backbone"].global_head(pooled[..., : 3 * 32])
    assert_close(loss, (2 - 2 * F.cosine_similarity(predictions, projections.flip(0), dim=-1)).mean())


def test_both_directions_and_all_layers_receive_gradient():
    pretext, features = siamese(), random_features()
    recorder = Recorder(pretext.detector)
    pretext(features).loss.backward()
    (decoded,) = recorder.decoded
    for tensor in (decoded.states, decoded.boxes):
        per_image = tensor.grad.abs().amax((2, 3))
        assert per_image.shape == (2, 6)
        assert (per_image > 0).all()


# LW-DETR and RF-DETR have a ViT of their own and take no small ResNet: test_detectors.py covers their gradients.
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lw-detr", "rf-detr"}))
@pytest.mark.parametrize("method", ["siamese", "up-detr", "detreg"])
def test_every_learning_parameter_receives_gradient(family, method):
    detector = small_detector(family)
    pretext = randomise(build_pretext(method, detector))
    pretext(random_features(views=2 if method == "siamese" else 1, detector=detector)).loss.backward()
    without = [name for name, p in pretext.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in pretext.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("discrimination", "terms"),
    [("none", set()), ("region", {"region"}), ("global", {"global"}), ("both", {"region", "global"})],
)
def test_discrimination(discrimination, terms):
    pretext, features = siamese(discrimination=discrimination), random_features()
    features = dataclasses.replace(features, crop_features=features.crop_features if "region" in terms else None)
    output = pretext(features)
    names = {name.removesuffix("_0") for name in output.terms}
    assert names == {"loss_class", "loss_box", "loss_giou"} | {f"loss_{term}" for term in terms}
    assert pretext.needs_crops == ("region" in terms)
    output.loss.backward()
    assert all(p.grad is not None for p in pretext.parameters() if p.requires_grad)


def test_region_targets_from_the_view_need_no_crops():
    pretext, features = siamese(region_target="roi"), random_features()
    assert not pretext.needs_crops
    from_views = pretext(dataclasses.replace(features, crop_features=None))
    pooled = pool_regions(features.maps, features.boxes, [32], features.sizes)
    pretext.config.region_target = "crop"
    same_terms(from_views, pretext(dataclasses.replace(features, crop_features=pooled)))


def test_padding_regions_change_nothing():
    pretext, features = siamese(), random_features(regions=4)
    features = dataclasses.replace(features, boxes=features.boxes.clone(), crop_features=features.crop_features.clone())
    features.boxes[:, :, 3] = 0
    assert not features.valid[..., 3].any()
    plain = pretext(features)
    features.crop_features[:, :, 3] = 7
    same_terms(plain, pretext(features))
    plain.loss.backward()
    assert all(p.grad.isfinite().all() for p in pretext.parameters() if p.grad is not None)
    recorder = Recorder(pretext.detector)
    pretext(features)
    expected, _ = slow_pretext_terms(pretext, recorder.decoded[0], features)
    for (name, layer), value in expected.items():
        assert plain.terms[term_name(name, layer)].item() == pytest.approx(value, abs=1e-9)


def test_training_leaves_the_backbone_untouched_and_lowers_the_loss():
    pretext = SiamesePretext(small_detector(), SiameseConfig(global_hidden_size=16, global_size=16)).train()
    before = copy.deepcopy(pretext.detector.backbone.state_dict())
    head = pretext.detector.class_heads[0].weight.clone()
    inputs = random_inputs()
    features = pretext.frozen_features(inputs)
    assert not any(level.requires_grad for level in features.maps)
    assert features.crop_features.shape == (2, 2, 3, 16)
    optimiser = torch.optim.AdamW([p for p in pretext.parameters() if p.requires_grad], lr=1e-3)
    first = None
    for _ in range(15):
        loss = pretext(pretext.frozen_features(inputs)).loss
        first = loss.item() if first is None else first
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < first
    after = pretext.detector.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(pretext.detector.class_heads[0].weight, head)


def test_frozen_features_are_those_of_the_backbone():
    pretext, inputs = SiamesePretext(small_detector(), SiameseConfig()), random_inputs()
    features = pretext.frozen_features(inputs)
    alone = pretext.detector.features(inputs.crops[:1], torch.ones(1, 32, 32, dtype=torch.bool))
    assert_close(features.crop_features[0, 0, 0], alone[0].mean((2, 3))[0])
    assert features.maps[0].shape == (4, 16, 2, 3)
    moved = features.to("cpu")
    assert torch.equal(moved.maps[0], features.maps[0])
    with pytest.raises(UserError, match="crops"):
        pretext.frozen_features(random_inputs(crops=False))


def test_half_precision_stays_close():
    pretext, features = siamese().float(), random_features()
    for name in ("boxes", "query_boxes", "crop_features"):
        setattr(features, name, getattr(features, name).float())
    features.maps = [level.float() for level in features.maps]
    exact = pretext(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = pretext(dataclasses.replace(features, maps=[level.bfloat16() for level in features.maps]))
    assert rounded.loss.dtype == torch.float32
    rounded.loss.backward()
    assert all(p.grad.isfinite().all() for p in pretext.parameters() if p.grad is not None)
    for name in ("loss_class", "loss_box", "loss_giou", "loss_region"):
        assert_close(rounded.terms[name], exact.terms[name], rtol=0.05, atol=0.05)


def test_non_finite_features_are_reported():
    pretext, features = siamese(), random_features()
    features.maps[0][4] = float("nan")  # the second view of image 1
    with pytest.raises(NonFiniteError, match=r"\[1\]"):
        pretext(features)


class HostReads(TorchDispatchMode):
    """Counts the operations for which a host waits for its device."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean_index = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.waiting or boolean_index:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["siamese", "up-detr", "detreg"])
def test_a_step_waits_for_the_device_three_times_at_most(method):
    pretext = build_pretext(method, small_detector()).double()
    features = random_features(views=2 if method == "siamese" else 1)
    with HostReads() as reads:
        pretext(features).loss.backward()
    assert len(reads.seen) <= 2  # the third is matching's copy, which does not show here


def test_bad_input():
    with pytest.raises(UserError, match="discrimination='all' is not one of none, region, global, both"):
        SiameseConfig(discrimination="all")
    with pytest.raises(UserError, match="region_target"):
        SiameseConfig(region_target="pixels")
    with pytest.raises(UserError, match="target_view"):
        SiameseConfig(target_view="both")
    with pytest.raises(UserError, match="region_dropout must be at least 0 and below 1"):
        SiameseConfig(region_dropout=1.0)
    with pytest.raises(UserError, match="too few queries for the number of regions: 12 queries, 13 regions"):
        siamese()(random_features(regions=13))
    with pytest.raises(UserError, match="two views"):
        siamese()(random_features(views=1))
    with pytest.raises(UserError, match="there are: siamese, up-detr, detreg, clusters"):
        build_pretext("moco", small_detector())
    with pytest.raises(UserError, match="takes a UpDetrConfig, not a SiameseConfig"):
        build_pretext("up-detr", small_detector(), SiameseConfig())
