"""Matching: the cheapest assignment, for everything at once."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_convert, generalized_box_iou

from siamese_detr.detection.matching import MatchCosts, NonFiniteError, assign, match, match_costs
from siamese_detr.errors import UserError


def random_problem(seed: int, layers: int = 2, views: int = 2, batch: int = 3, queries: int = 7, targets: int = 4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, views, batch, queries, 3, generator=generator)
    boxes = torch.rand(layers, views, batch, queries, 4, generator=generator) * 0.5 + 0.1
    return logits, boxes, torch.rand(views, batch, targets, 4, generator=generator) * 0.5 + 0.1


def test_costs_agree_with_the_formula():
    logits, boxes, targets = random_problem(0)
    costs = match_costs(logits, boxes, targets, MatchCosts(label=2.0, box=3.0, giou=4.0))
    for layer, view, image, target, query in itertools.product(range(2), range(2), range(3), range(4), range(7)):
        box, goal = boxes[layer, view, image, query], targets[view, image, target]
        probability = logits[layer, view, image, query].softmax(0)[1]
        overlap = generalized_box_iou(*(box_convert(x[None], "cxcywh", "xyxy") for x in (box, goal)))[0, 0]
        expected = -2 * probability + 3 * (box - goal).abs().sum() - 4 * overlap
        assert_close(costs[layer, view, image, target, query], expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
def test_assignment_is_the_cheapest(seed, targets, queries):
    if targets > queries:
        targets, queries = queries, targets
    cost = torch.randn(1, 2, targets, queries, generator=torch.Generator().manual_seed(seed))
    chosen = assign(cost)
    for image in range(2):
        picked = chosen[0, image].tolist()
        assert len(set(picked)) == targets
        price = sum(cost[0, image, target, query].item() for target, query in enumerate(picked))
        best = min(
            sum(cost[0, image, target, query].item() for target, query in enumerate(order))
            for order in itertools.permutations(range(queries), targets)
        )
        assert price == pytest.approx(best, abs=1e-5)


def test_permuting_images_and_queries_permutes_the_result():
    logits, boxes, targets = random_problem(1)
    images, queries = torch.tensor([2, 0, 1]), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    plain = match(logits, boxes, targets)
    permuted = match(logits[:, :, images][..., queries, :], boxes[:, :, images][..., queries, :], targets[:, images])
    assert torch.equal(queries[permuted], plain[:, :, images])


def test_padding_rows_take_no_query():
    logits, boxes, targets = random_problem(3)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[:, 1, 2:] = False
    valid[:, 2] = False
    targets[~valid] = float("nan")  # padding may hold anything
    chosen = match(logits, boxes, targets, valid)
    assert (chosen[:, ~valid] == 0).all()
    alone = match(logits[:, :, 1:2], boxes[:, :, 1:2], targets[:, 1:2, :2])
    assert torch.equal(chosen[:, :, 1:2, :2], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_predictions_name_their_samples(value):
    logits, boxes, targets = random_problem(4)
    logits[1, 0, 2, 3] = value
    boxes[0, 1, 0, 0] = value
    with pytest.raises(NonFiniteError, match=r"samples \[0, 2\]") as caught:
        match(logits, boxes, targets, torch.ones(2, 3, 4, dtype=torch.bool))
    assert caught.value.samples == [0, 2]
    assert isinstance(caught.value, UserError)
    assert pickle.loads(pickle.dumps(caught.value)).samples == [0, 2]


def test_half_precision_predictions_are_matched_in_single_precision():
    logits, boxes, targets = random_problem(5)
    cost = match_costs(logits.bfloat16(), boxes.bfloat16(), targets)
    assert cost.dtype == torch.float32
    assert assign(cost).dtype == torch.int64


def test_more_targets_than_queries():
    with pytest.raises(ValueError, match="5 targets cannot be matched to 3 queries"):
        assign(torch.zeros(1, 5, 3))
