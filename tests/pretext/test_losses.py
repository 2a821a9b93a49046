"""The losses: zero for a perfect answer, blind to padding, and equal to slow, obvious float64 computations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_convert, generalized_box_iou

from siamese_detr.detection import boxes
from siamese_detr.pretext import losses

LAYERS, VIEWS, BATCH, QUERIES, REGIONS, CHANNELS = 2, 2, 3, 6, 4, 5


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    valid = torch.ones(VIEWS, BATCH, REGIONS, dtype=torch.bool)
    valid[:, 1, 3:] = False
    matches = torch.stack(
        [torch.randperm(QUERIES, generator=generator)[:REGIONS] for _ in range(LAYERS * VIEWS * BATCH)]
    ).view(LAYERS, VIEWS, BATCH, REGIONS)
    matches = torch.where(valid, matches, 0)
    return {
        "logits": 2 * draw(LAYERS, VIEWS, BATCH, QUERIES, 3),
        "boxes": 0.1 + 0.5 * draw(LAYERS, VIEWS, BATCH, QUERIES, 4),
        "targets": 0.1 + 0.5 * draw(VIEWS, BATCH, REGIONS, 4),
        "features": draw(LAYERS, VIEWS, BATCH, REGIONS, CHANNELS) - 0.5,
        "crops": draw(VIEWS, BATCH, REGIONS, CHANNELS) - 0.5,
        "matches": matches,
        "valid": valid,
        "counts": losses.count(valid, torch.float64),
    }


def test_box_conversions():
    corners = torch.tensor([[[10.0, 20.0, 30.0, 60.0]]])
    normalised = boxes.normalise_boxes(corners, torch.tensor([[100, 50]]))
    assert_close(normalised, torch.tensor([[[0.4, 0.4, 0.4, 0.4]]]))
    assert_close(boxes.box_corners(normalised), torch.tensor([[[0.2, 0.2, 0.6, 0.6]]]))


corner = st.floats(0, 1, allow_subnormal=False, width=32)
box = st.tuples(corner, corner, corner, corner).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
)


@settings(deadline=None)
@given(box, box)
def test_generalized_iou_is_bounded_symmetric_and_differentiable(one, other):
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (one, other))
    value = boxes.generalized_iou(a, b)
    assert -1 <= value.item() <= 1 + 1e-12
    assert_close(value, boxes.generalized_iou(b, a))
    value.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    sides = torch.stack([a[2:] - a[:2], b[2:] - b[:2]])
    if sides.min() > 1e-3:
        assert_close(value.detach(), generalized_box_iou(a[None], b[None])[0, 0].detach())
        assert boxes.generalized_iou(a, a).item() == 1


def test_class_loss(problem):
    found = losses.class_loss(problem["logits"], problem["matches"], problem["valid"], problem["counts"], 0.1)
    for layer, view in itertools.product(range(LAYERS), range(VIEWS)):
        labels = torch.full((BATCH, QUERIES), 2)
        for image, region in itertools.product(range(BATCH), range(REGIONS)):
            if problem["valid"][view, image, region]:
                labels[image, problem["matches"][layer, view, image, region]] = 1
        weight = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
        expected = F.cross_entropy(problem["logits"][layer, view].flatten(0, 1), labels.flatten(), weight)
        assert_close(found[layer, view], expected)


def test_box_losses(problem):
    matched = losses.at_matches(problem["boxes"], problem["matches"])
    distance, apart = losses.box_losses(matched, problem["targets"], problem["valid"], problem["counts"])
    for layer, view in itertools.product(range(LAYERS), range(VIEWS)):
        total = overlap = 0.0
        for image, region in itertools.product(range(BATCH), range(REGIONS)):
            if not problem["valid"][view, image, region]:
                continue
            answer = problem["boxes"][layer, view, image, problem["matches"][layer, view, image, region]]
            goal = problem["targets"][view, image, region]
            total += (answer - goal).abs().sum().item()
            corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (answer, goal)]
            overlap += 1 - generalized_box_iou(*corners).item()
        assert distance[layer, view].item() == pytest.approx(total / 11)
        assert apart[layer, view].item() == pytest.approx(overlap / 11)


def test_region_and_embedding_losses(problem):
    region = losses.region_loss(problem["features"], problem["crops"], problem["valid"], problem["counts"])
    embedding = losses.embedding_loss(problem["features"], problem["crops"], problem["valid"], problem["counts"])
    for layer, view in itertools.product(range(LAYERS), range(VIEWS)):
        squares = differences = 0.0
        for image, place in itertools.product(range(BATCH), range(REGIONS)):
            if problem["valid"][view, image, place]:
                a, b = problem["features"][layer, view, image, place], problem["crops"][view, image, place]
                squares += ((a / a.norm() - b / b.norm()) ** 2).sum().item()
                differences += (a - b).abs().mean().item()
        assert region[layer, view].item() == pytest.approx(squares / 11)
        assert embedding[layer, view].item() == pytest.approx(differences / 11)


def test_global_loss_is_symmetric_and_stops_the_target_gradient():
    generator = torch.Generator().manual_seed(1)
    predictions, projections = (
        torch.randn(2, 3, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    counts = losses.count(torch.ones(2, 3, 1, dtype=torch.bool), torch.float64)
    loss = losses.global_loss(predictions, projections, counts)

    def one_way(a, b):
        return (2 - 2 * F.cosine_similarity(a, b, dim=-1)).mean()

    expected = (one_way(predictions[0], projections[1]) + one_way(predictions[1], projections[0])) / 2
    assert_close(loss, expected)
    assert_close(loss, losses.global_loss(predictions.flip(0), projections.flip(0), counts))
    loss.backward()
    assert projections.grad is None
    assert predictions.grad is not None


def test_a_perfect_answer_costs_nothing(problem):
    valid, counts, matches = problem["valid"], problem["counts"], problem["matches"]
    targets = problem["targets"].expand(LAYERS, -1, -1, -1, -1)
    crops = problem["crops"].expand(LAYERS, -1, -1, -1, -1)
    for loss in losses.box_losses(targets, problem["targets"], valid, counts):
        assert (loss == 0).all()
    zero = torch.zeros(LAYERS, VIEWS, dtype=torch.float64)
    assert_close(losses.region_loss(3 * crops, problem["crops"], valid, counts), zero)
    assert_close(losses.embedding_loss(crops, problem["crops"], valid, counts), zero)
    assert_close(losses.global_loss(problem["crops"][:, :, 0], problem["crops"].flip(0)[:, :, 0], counts), zero[0, 0])
    sure = torch.zeros_like(problem["logits"])
    sure[..., losses.NO_OBJECT] = 60
    for place in itertools.product(range(LAYERS), range(VIEWS), range(BATCH), range(REGIONS)):
        if valid[place[1:]]:
            sure[(*place[:3], matches[place])] = torch.tensor([0.0, 60.0, 0.0], dtype=torch.float64)
    assert_close(losses.class_loss(sure, matches, valid, counts), zero)


def test_padding_may_hold_anything_and_weighs_nothing(problem):
    valid, counts, matches = problem["valid"], problem["counts"], problem["matches"]
    targets, features = problem["targets"].clone(), problem["features"].clone()
    targets[~valid] = float("nan")
    features[:, ~valid] = 1e9
    matched = losses.at_matches(problem["boxes"], matches).requires_grad_()
    clean = losses.box_losses(matched, problem["targets"], valid, counts)
    dirty = losses.box_losses(matched, targets, valid, counts)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    sum(dirty).sum().backward()
    assert matched.grad.isfinite().all()
    assert (matched.grad[:, ~valid] == 0).all()
    assert torch.equal(
        losses.region_loss(features, problem["crops"], valid, counts),
        losses.region_loss(problem["features"], problem["crops"], valid, counts),
    )


def test_no_regions_at_all():
    valid = torch.zeros(1, 2, 3, dtype=torch.bool)
    counts = losses.count(valid)
    boxes = torch.rand(1, 1, 2, 3, 4, requires_grad=True)
    for loss in losses.box_losses(boxes, torch.rand(1, 2, 3, 4), valid, counts):
        assert loss.item() == 0
    logits, matches = torch.randn(1, 1, 2, 6, 3), torch.zeros(1, 1, 2, 3, dtype=torch.int64)
    expected = F.cross_entropy(logits.flatten(0, 3), torch.full((12,), 2))
    assert_close(losses.class_loss(logits, matches, valid, counts).squeeze(), expected)
    logits.requires_grad_()
    loss = losses.class_loss(logits, matches, valid, counts, no_object_weight=0.0)
    loss.sum().backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
